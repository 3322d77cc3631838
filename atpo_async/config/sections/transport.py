"""Weight transport from the learner to the actors; sockets and their limits."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from atpo_async.config import doors
from atpo_async.config.sections.base import Options, Section, named


class WeightsConfig(Section):
    """Weights from the learner to the actors."""

    transport: Annotated[str, named(doors.TRANSPORT)] = Field(
        "auto", description="auto: the learner's file on its own host where shared_memory is true, else chunks"
    )
    transport_options: Options = Field(default_factory=dict, description="passed to the transport")
    chunk_bytes: int = Field(1 << 20, ge=4096, le=16 << 20)
    max_chain: int = Field(
        32,
        ge=0,
        le=1000,
        description="differences in a row that bring a version to an actor on another host; 0: versions come whole",
    )
    poll_s: float = Field(
        2.0, gt=0, description="how often actors ask for the newest version, besides listening for announcements"
    )
    shared_memory: bool = Field(True, description="actors on the learner's host map its file")
    probe_tokens: int = Field(1024, ge=2, description="that an engine must reproduce the log-probs of after each swap")
    probe_tolerance: float | None = Field(
        None,
        gt=0,
        description="nats of noise on the logits; none: by device, precision and the engine's earlier readings",
    )
    fetch_timeout_s: float = Field(120.0, gt=0)
    swap_timeout_s: float | None = Field(
        None, gt=0, description="for an engine to take up weights; none: 60, or half of links.give_up_s if that is less"
    )


class LinksConfig(Section):
    """Sockets.  Port 0: a free port is chosen at the start and written to the run folder."""

    host: str = Field("127.0.0.1", description="address to bind; other than loopback needs keys")
    advertise: str | None = Field(
        None,
        description="name or address under which other machines reach this one (NAT, a name of its own); none: found",
    )
    actors_port: int = Field(0, ge=0, le=65535)
    learner_port: int = Field(0, ge=0, le=65535)
    shards_port: int = Field(
        0, ge=0, le=65535, description="of the first of buffer.shards, for turns; the others take the next ones"
    )
    weights_port: int = Field(0, ge=0, le=65535)
    announce_port: int = Field(0, ge=0, le=65535)
    follower_port: int = Field(0, ge=0, le=65535, description="for followers of the journal (buffer.follower)")
    keys_dir: Path | None = Field(None, description="folder with the CURVE keys")
    window: int = Field(1024, ge=1, description="messages an actor may have unacknowledged")
    heartbeat_s: float = Field(2.0, gt=0)
    deadline_s: float = Field(60.0, gt=0, description="a wait past this is logged with what it waits for")
    give_up_s: float = Field(600.0, gt=0, description="a wait past this ends the role with an error")
    max_message_bytes: int = Field(64 << 20, ge=1 << 16)

    @field_validator("advertise", mode="after")
    @classmethod
    def _is_a_host(cls, value: str | None) -> str | None:
        """Without the brackets of an IPv6 address; ports are those that are bound."""
        if value is None:
            return None
        host = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        try:
            right = not ipaddress.ip_address(host).is_unspecified
        except ValueError:
            right = re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,253})", host) is not None
        if not right:
            raise PydanticCustomError(
                "host", "must be a name or an address at which others reach this machine, without a port"
            )
        return host
