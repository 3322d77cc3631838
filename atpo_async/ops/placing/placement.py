"""Which role of a run goes to which node of a cluster, with which of its GPUs.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.ops.specs import RoleShare, role_shares


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One process, or the learner's ranks on one node."""

    role: str
    node: int
    gpus: tuple[int, ...] = ()
    """Numbers on that node."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The roles of a run on the nodes of a cluster.  The buffer is on the first one."""

    nodes: int
    learner: tuple[Placed, ...]
    """One for each of its nodes, which come first."""
    actors: tuple[Placed, ...]

    @property
    def num_idle(self) -> int:
        """Nodes without a role."""
        return self.nodes - len({0, *(placed.node for placed in (*self.learner, *self.actors))})


def learner_nodes(ranks: int, *, gpus: int, nodes: int) -> int:
    """The fewest nodes over which ``ranks`` are divided evenly.

    Args:
        ranks: each takes a GPU.
        gpus: of each node.
        nodes: there are.

    Raises:
        SetupError: there is no such number of nodes.
    """
    fitting = [count for count in range(1, nodes + 1) if ranks % count == 0 and ranks // count <= gpus]
    if not fitting:
        if ranks > nodes * gpus:
            raise SetupError(
                f"learner.num_processes = {ranks} ranks take a GPU each, and {nodes} nodes with {gpus} GPUs have "
                f"{nodes * gpus}: raise --nodes to {-(-ranks // gpus)} or more, or lower learner.num_processes"
            )
        raise SetupError(
            f"learner.num_processes = {ranks} cannot be divided evenly over up to {nodes} nodes with {gpus} GPUs each: "
            "take a number of ranks that can, as 'ranks on each node' × nodes"
        )
    return fitting[0]


def place(config: Config, *, nodes: int, gpus: int) -> Placement:
    """Place the roles: the learner's ranks on the first nodes, actors on the others, then where GPUs are left.

    Args:
        config: of the run.
        nodes: of the cluster.
        gpus: of each node; 0: nothing uses any, and actors are spread evenly.

    Raises:
        SetupError: the roles do not fit; the message has the numbers.
    """
    _, learner, *actors = role_shares(config)
    check_devices(config, gpus=gpus)
    if not gpus:
        others = range(1, nodes) if nodes > 1 else range(1)
        placed = [Placed(role=actor.name, node=others[index % len(others)]) for index, actor in enumerate(actors)]
        return Placement(nodes=nodes, learner=(Placed(role=learner.name, node=0),), actors=tuple(placed))
    free = [list(range(gpus)) for _ in range(nodes)]
    count = learner_nodes(learner.num_gpus, gpus=gpus, nodes=nodes) if learner.num_gpus else 1
    ranks = tuple(
        Placed(role=learner.name, node=node, gpus=_taken(free[node], learner.num_gpus // count))
        for node in range(count)
    )
    # The learner's own nodes last: an actor beside it competes for processors and memory.
    order = [*range(count, nodes), *range(count)]
    return Placement(nodes=nodes, learner=ranks, actors=tuple(_actors(actors, free, order, config, gpus)))


def check_checkpoints(config: Config, *, machines: int) -> None:
    """Raises SetupError where the learner's machines could not go on from one checkpoint."""
    if machines > 1 and config.learner.checkpoint_url is None:
        raise SetupError(
            f"learner.num_processes = {config.learner.num_processes} ranks are on {machines} nodes, which share no "
            "folder: set learner.checkpoint_url, where each of them finds the checkpoint to go on from"
        )


def check_devices(config: Config, *, gpus: int) -> None:
    """Raises SetupError where a role is bound to CUDA and its node has no GPU, or to more than a node has."""
    for field, device in (("learner.device", config.learner.device), ("actor.device", config.actor.device)):
        if device == "cuda" and not gpus:
            raise SetupError(f"{field} = 'cuda', and the nodes have no GPUs: set --gpus-per-node, or --{field} cpu")
    each = config.actor.tensor_parallel_size
    if gpus and config.actor.count and config.actor.device != "cpu" and each > gpus:
        raise SetupError(
            f"actor.tensor_parallel_size = {each} GPUs of one actor are on one node, and a node has {gpus}: lower it, "
            "or set --gpus-per-node"
        )


def _actors(
    actors: Sequence[RoleShare], free: list[list[int]], order: Sequence[int], config: Config, gpus: int
) -> list[Placed]:
    placed: list[Placed] = []
    for actor in actors:
        node = next((node for node in order if len(free[node]) >= actor.num_gpus), None)
        if node is None:
            left = sum(map(len, free)) + sum(len(each.gpus) for each in placed)
            raise SetupError(
                f"actor.count = {len(actors)} actors with {actor.num_gpus} GPUs each do not fit: beside the learner "
                f"{left} GPUs are left on {len(free)} nodes with {gpus} each, which hold {len(placed)} of them; raise "
                f"--nodes, or set --actor.count {len(placed)}"
            )
        if not actor.num_gpus:
            node = order[len(placed) % len(order)]
        placed.append(Placed(role=actor.name, node=node, gpus=_taken(free[node], actor.num_gpus)))
    return placed


def _taken(free: list[int], count: int) -> tuple[int, ...]:
    taken, free[:] = tuple(free[:count]), free[count:]
    return taken
