"""Weight transport from the learner to the actors; sockets and their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from atpo_async.config import doors
from atpo_async.config.sections.base import Options, Section, named


class WeightsConfig(Section):
    """Weights from the learner to the actors."""

    transport: Annotated[str, named(doors.TRANSPORT)] = Field(
        "auto", description="auto: the learner's file on its own host where shared_memory is true, else chunks"
    )
    transport_options: Options = Field(default_factory=dict, description="passed to the transport")
    chunk_bytes: int = Field(1 << 20, ge=4096, le=16 << 20)
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
    actors_port: int = Field(0, ge=0, le=65535)
    learner_port: int = Field(0, ge=0, le=65535)
    weights_port: int = Field(0, ge=0, le=65535)
    announce_port: int = Field(0, ge=0, le=65535)
    keys_dir: Path | None = Field(None, description="folder with the CURVE keys")
    window: int = Field(1024, ge=1, description="messages an actor may have unacknowledged")
    heartbeat_s: float = Field(2.0, gt=0)
    deadline_s: float = Field(60.0, gt=0, description="a wait past this is logged with what it waits for")
    give_up_s: float = Field(600.0, gt=0, description="a wait past this ends the role with an error")
    max_message_bytes: int = Field(64 << 20, ge=1 << 16)
