"""What each role takes of the cluster, whether any node can hold it, and the words for what is missing.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from atpo_async.config import Config
from atpo_async.config.sections.cluster import BufferShare, Share
from atpo_async.core.errors import SetupError

GIB = 1 << 30
PIN = 0.001
"""Of a resource that says where the run's folder is: as good as nothing, so that others can be there too."""

LISTED = 4
"""Nodes that an error names."""

HEAD = "node:__internal_head__"
"""Ray's resource of the head's node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one bundle takes: a role's share of one node."""

    amounts: Mapping[str, float]
    """By Ray's name of the resource; memory in bytes."""
    labels: Mapping[str, str] = field(default_factory=dict)

    def on(self, address: str) -> Need:
        """The same, on the node with an address."""
        return replace(self, amounts={**self.amounts, f"node:{address}": PIN})

    def __str__(self) -> str:
        labels = [f"label {name} = {value}" for name, value in self.labels.items()]
        return ", ".join([*amounts_in_words(self.amounts), *labels]) or "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the cluster that lives."""

    node_id: str
    address: str
    hostname: str
    total: Mapping[str, float]
    """Resource -> amount, whether in use or not."""
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.hostname} ({self.address})" if self.hostname not in ("", self.address) else self.address


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the roles of a run take."""

    pin: Need
    """Where the supervisor is, and with it the buffer, the run's folder and the journal."""
    buffer: Need
    learner: tuple[Need, ...]
    """One bundle a node; together they are one placement group."""
    actor: Need
    """Each actor is a placement group of its own."""
    actors: int
    """All that may ever be there."""


def plan(config: Config, nodes: Iterable[Node], *, here: str) -> Plan:
    """What a configuration asks for.

    Args:
        nodes: of the cluster, now.
        here: Ray's resource of the node with the run's folder where the configuration does not say.
    """
    gpus = any(node.total.get("GPU", 0) for node in nodes)
    learner, actor = config.learner, config.actor
    ranks = learner.num_processes // config.ray.learner.nodes
    bundle = _need(config.ray.learner, gpus=ranks if gpus and learner.device != "cpu" else 0)
    return Plan(
        pin=_pin(config.ray.buffer, here),
        buffer=_need(config.ray.buffer, gpus=0),
        learner=(bundle,) * config.ray.learner.nodes,
        actor=_need(config.ray.actor, gpus=actor.tensor_parallel_size if gpus and actor.device != "cpu" else 0),
        actors=max(actor.count, config.ray.max_actors or 0),
    )


def _need(share: Share, *, gpus: int) -> Need:
    """``gpus``: where the share does not say."""
    amounts = {"CPU": share.num_cpus, "GPU": float(gpus) if share.num_gpus is None else share.num_gpus}
    if share.memory_gb is not None:
        amounts["memory"] = float(int(share.memory_gb * GIB))
    return Need(amounts={name: n for name, n in {**amounts, **share.resources}.items() if n}, labels=share.labels)


def _pin(share: BufferShare, here: str) -> Need:
    amounts = dict.fromkeys(share.resources, PIN)
    if share.node is not None:
        amounts[f"node:{share.node}"] = PIN
    elif not (share.resources or share.labels):
        amounts[here] = PIN
    return Need(amounts=amounts, labels=share.labels)


def check(plan: Plan, nodes: Sequence[Node], *, wait: bool) -> None:
    """Raises SetupError, with the numbers, for what no node of the cluster could hold even if it were empty.

    Args:
        wait: nodes of other kinds may come: only the buffer's has to be there.
    """
    pinned = [node for node in nodes if _fits(plan.pin, node)]
    if not pinned:
        raise SetupError(
            f"no node of the cluster is the one for the buffer and the run's folder ({plan.pin}): {_said(nodes)}; see "
            "ray.buffer.node, ray.buffer.resources and ray.buffer.labels"
        )
    _check("the buffer", "ray.buffer", plan.buffer, pinned)
    if wait:
        return
    each = "the learner" if len(plan.learner) == 1 else f"each of the {len(plan.learner)} parts of the learner"
    for need in plan.learner[:1]:
        _check(each, "ray.learner", need, nodes)
    if plan.actors:
        _check("an actor", "ray.actor", plan.actor, nodes)


def _check(role: str, section: str, need: Need, nodes: Sequence[Node]) -> None:
    if any(_fits(need, node) for node in nodes):
        return
    later = "" if role == "the buffer" else ", or say --ray.wait_for_nodes true where such a node is to come"
    raise SetupError(
        f"{role} needs {need} on one node, and none can ever have that: {_said(nodes)}; see {section}{later}"
    )


def _fits(need: Need, node: Node) -> bool:
    enough = all(node.total.get(name, 0.0) + 1e-9 >= amount for name, amount in need.amounts.items())
    return enough and all(node.labels.get(name) == value for name, value in need.labels.items())


def _said(nodes: Sequence[Node]) -> str:
    if not nodes:
        return "it has no node"
    listed = sorted(nodes, key=lambda node: -node.total.get("GPU", 0.0) * 1000 - node.total.get("CPU", 0.0))
    said = [f"{node} has {', '.join(amounts_in_words(_own(node)))}" for node in listed[:LISTED]]
    return "; ".join(said) + (f"; and {len(nodes) - LISTED} more" if len(nodes) > LISTED else "")


def _own(node: Node) -> dict[str, float]:
    """What a person would ask for: without Ray's names of single nodes."""
    known = {name: n for name, n in node.total.items() if not name.startswith("node:") and "object_store" not in name}
    return {"CPU": 0.0, **known}


def amounts_in_words(amounts: Mapping[str, float]) -> list[str]:
    """``2 CPU``, ``1 GPU``, ``8 GiB of memory``, ``journal``."""
    words = []
    for name, amount in amounts.items():
        if name.startswith("node:"):
            words.append("the head's node" if name == HEAD else f"node {name.removeprefix('node:')}")
        elif name == "memory":
            words.append(f"{amount / GIB:.3g} GiB of memory")
        else:
            words.append(name if amount == PIN else f"{amount:g} {name}")
    return words


def mismatch(role: str, where: str, *, theirs: tuple[str, str, int], ours: tuple[str, str, int]) -> str | None:
    """What makes a node unfit for a role of this run; None where nothing does.

    Args:
        where: the node.
        theirs, ours: (Python's minor version, this package's version, the protocol) there and on the supervisor's node.
    """
    for what, there, here in zip(("Python", "atpo-async", "the protocol of"), theirs, ours, strict=True):
        if there != here:
            what = "atpo-async's protocol" if what.startswith("the protocol") else what
            return (
                f"{role} cannot run on node {where}: {what} is {there} there and {here} on the supervisor's node; "
                "install the same on every node"
            )
    return None
