"""Where the roles of a run are placed on a Ray cluster, and with which resources (``atpo train CONFIG --on ray``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from atpo_async.config.sections.base import Section


def _amounts(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if not (math.isfinite(amount) and amount > 0):
            raise ValueError(f"{name} = {amount} is no amount of a resource; name one above 0, or leave it out")
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise ValueError(f"{name} is Ray's own: use num_cpus, num_gpus or memory_gb")
    return resources


Amounts = Annotated[dict[str, float], AfterValidator(_amounts)]
"""Custom resource of Ray -> how much of it."""


def _texts(table: Any) -> Any:
    """An option of the command line may look like a number."""
    if not isinstance(table, dict):
        return table
    return {name: str(text) if isinstance(text, int | float) else text for name, text in table.items()}


Texts = Annotated[dict[str, str], BeforeValidator(_texts)]


class Share(Section):
    """What one process of a role takes of its node, and which nodes it may be on."""

    num_cpus: float = Field(1.0, ge=0, description="that Ray counts as taken; its threads are not limited to them")
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="none: where its device may be CUDA and the cluster has GPUs, those that it uses; else 0",
    )
    memory_gb: float | None = Field(None, gt=0, description="of Ray's resource memory; none: not counted")
    resources: Amounts = Field(default_factory=dict, description="custom resources of Ray that its node must have")
    labels: Texts = Field(default_factory=dict, description="labels that its node must have")


class LearnerShare(Share):
    """The learner: all its ranks are one placement group."""

    nodes: int = Field(1, ge=1, description="nodes over which learner.num_processes are divided evenly, a bundle each")
    dir: Path | None = Field(None, description="of its files on its node; none: in its user's cache")


class BufferShare(Share):
    """The buffer and the supervisor: they are on the node that holds the run's folder and journal."""

    num_gpus: float | None = Field(0.0, ge=0, description="the buffer uses none")
    node: str | None = Field(
        None, description="address of the node with the run's folder; none: of this machine, unless resources or labels"
    )


class RayConfig(Section):
    """The cluster.  Without effect unless the run is started with ``--on ray``."""

    address: str = Field("auto", min_length=1, description="HOST:PORT of the head, or auto: the one of this machine")
    namespace: str = Field(
        "atpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names of runs are unique in it"
    )
    max_actors: int | None = Field(
        None, ge=1, description="actors that are placed when nodes come, beyond actor.count; none: no more than those"
    )
    wait_for_nodes: bool = Field(
        False, description="nodes of other kinds may come (an autoscaler): what none can hold now is waited for"
    )
    working_dir: Path | None = Field(
        None, description="folder that Ray copies to every node: the modules of your task; none: it is there already"
    )
    env_vars: Texts = Field(
        default_factory=dict, description="environment variables of the roles; no secrets: Ray shows them"
    )
    buffer: BufferShare = BufferShare()
    learner: LearnerShare = LearnerShare()
    actor: Share = Share()
