"""Ray's calls: reaching a cluster, its nodes, placement groups, hosts and the supervisor; its errors as ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util import get_node_ip_address, placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup, get_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.core.texts import of_error, shortened
from atpo_async.links import addresses
from atpo_async.ops.launchers.ray.host import RoleHost
from atpo_async.ops.launchers.ray.messages import Order
from atpo_async.ops.launchers.ray.places import HostGone
from atpo_async.ops.launchers.ray.plan import HEAD, Need, Node

OUT_OF_REACH_S = 60.0
"""How long a host may be out of reach, unless Ray knows that it is gone."""
REACH_S = 5.0
"""For a connection to the address of a cluster."""
SUPERVISOR = "supervisor of "
"""Begins the name of a run's supervisor, in the namespace."""
MOST_RESTARTS = 1000
"""Of a supervisor whose process or node is lost."""


def connect(address: str, namespace: str, *, runtime_env: Mapping[str, Any] | None = None) -> None:
    """Join a cluster as a driver.  Raises SetupError naming the address where that fails."""
    if ray.is_initialized():
        return
    where = f"ray.address = {address!r}"
    _knock(address, where)
    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=dict(runtime_env) if runtime_env else None,
        )
    except ConnectionError as exc:
        raise SetupError(
            f"there is no Ray cluster at {where}: {one_line(exc)}; start one here (`ray start --head`), or name the "
            "address of its head: --ray.address HOST:6379"
        ) from None
    except (RuntimeError, ValueError, OSError) as exc:  # a mismatch of versions; a folder that cannot be sent
        raise SetupError(f"the Ray cluster at {where} cannot be joined: {one_line(exc)}") from None


def _knock(address: str, where: str) -> None:
    """Raises SetupError where nothing listens: Ray would try for a minute."""
    bare = address.partition("://")[2] or address
    if address in ("auto", "local"):
        if address == "local":
            raise SetupError(f"{where} would be a cluster that ends with this command; leave --on ray out, or use auto")
        return
    try:
        host, port = addresses.split(bare)
    except ValueError as exc:
        raise SetupError(f"{where} is no address: {exc}; or auto for the cluster of this machine") from None
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except (OSError, UnicodeError) as exc:
        raise SetupError(
            f"there is no Ray cluster at {where}: {getattr(exc, 'strerror', None) or exc}; `ray start --head` starts "
            "one and prints its address"
        ) from None


def disconnect() -> None:
    ray.shutdown()


def here(address: str) -> str:
    """Ray's resource of the node of this driver; of the head's where the driver is on no node."""
    return HEAD if address.startswith("ray://") else f"node:{get_node_ip_address()}"


def nodes() -> list[Node]:
    """Those that live."""
    return [
        Node(
            node_id=str(found["NodeID"]),
            address=str(found["NodeManagerAddress"]),
            hostname=str(found["NodeManagerHostname"]),
            total=dict(found["Resources"]),
            labels=dict(found.get("Labels") or {}),
        )
        for found in ray.nodes()
        if found["Alive"]
    ]


def node_id() -> str:
    """Of the node where this process is."""
    return str(ray.get_runtime_context().get_node_id())


def address() -> str:
    """Of the node where this process is, as the others reach it."""
    return str(get_node_ip_address())


# --- supervisors


def start_supervisor(cls: type, run: str, pin: Need, *, concurrency: int, **arguments: Any) -> Any:
    """A supervisor that outlives this driver and starts again where its node or its process is lost.

    Raises SetupError where one of that name is there.
    """
    amounts = dict(pin.amounts)
    labels = {"label_selector": dict(pin.labels)} if pin.labels else {}
    try:
        return (
            ray.remote(cls)
            .options(
                name=SUPERVISOR + run,
                lifetime="detached",
                num_cpus=0,
                resources=amounts,
                max_restarts=MOST_RESTARTS,
                max_task_retries=0,
                max_concurrency=concurrency,
                **labels,
            )
            .remote(**arguments)
        )
    except ValueError as exc:
        raise SetupError(f"run {run} has just been started by another command: {one_line(exc)}") from None


def supervisor(run: str, namespace: str) -> Any | None:
    """The supervisor of a run; None where there is none."""
    try:
        return ray.get_actor(SUPERVISOR + run, namespace=namespace)
    except ValueError:
        return None


def runs(namespace: str) -> list[str]:
    """Names of the runs that have a supervisor."""
    found = ray.util.list_named_actors(all_namespaces=True)
    names = [str(each["name"]) for each in found if each["namespace"] == namespace]
    return sorted(name.removeprefix(SUPERVISOR) for name in names if name.startswith(SUPERVISOR))


def end(actor: Any) -> None:
    """End an actor for good."""
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor, no_restart=True)


def own_handle() -> Any:
    """Of the actor that calls this, in its constructor."""
    return ray.get_runtime_context().current_actor


def get(ref: Any, timeout_s: float) -> Any:
    """The value of a call.  Raises RayError, of which ``lost`` makes a sentence; an AtpoError that the call raised."""
    with unwrapped():
        return ray.get(ref, timeout=timeout_s)


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """An AtpoError that was raised in another process comes as itself, not as a part of Ray's."""
    try:
        yield
    except ray.exceptions.RayTaskError as exc:
        cause = exc.cause if isinstance(exc.cause, Exception) else exc
        if isinstance(cause, AtpoError):
            raise type(cause)(*cause.args) from None
        raise


# --- hosts and their placement groups


class Host(RoleHost):
    """A host as Ray starts it."""

    def __init__(self, order: Order) -> None:
        super().__init__(order, address=address(), node_id=node_id())


class RayPlaces:
    """The cluster that this process is a part of."""

    def ask(self, name: str, needs: Sequence[Need]) -> PlacementGroup:
        # What an earlier life of the supervisor left keeps its share of a node, and the name.
        with contextlib.suppress(ValueError):
            remove_placement_group(get_placement_group(name))
        labels = [dict(need.labels) for need in needs]
        return placement_group(
            [_amounts(need) for need in needs],
            strategy="PACK",
            name=name,
            **({"bundle_label_selector": labels} if any(labels) else {}),
        )

    def placed(self, places: Mapping[str, Any]) -> set[str]:
        table = placement_group_table()
        states = {str(key): str(found["state"]) for key, found in table.items()}
        return {name for name, place in places.items() if states.get(place.id.hex()) == "CREATED"}

    def give_back(self, place: Any) -> None:
        with contextlib.suppress(RayError, ValueError):
            remove_placement_group(place)

    def host(self, order: Order, need: Need, *, place: Any | None, bundle: int) -> Any:
        amounts = _amounts(need)
        if place is None:
            where: Any = NodeAffinitySchedulingStrategy(node_id(), soft=False)
            amounts = {name: n for name, n in amounts.items() if name in ("CPU", "GPU", "memory")}
        else:
            where = PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=bundle)
        memory = {"memory": int(amounts.pop("memory"))} if "memory" in amounts else {}
        return (
            ray.remote(Host)
            .options(
                num_cpus=amounts.pop("CPU", 0),
                num_gpus=amounts.pop("GPU", 0),
                resources=amounts,
                scheduling_strategy=where,
                max_restarts=0,
                max_task_retries=0,
                **memory,
            )
            .remote(order)
        )

    async def call(self, host: Any, method: str, *words: Any) -> Any:
        deadline = time.monotonic() + OUT_OF_REACH_S
        while True:
            try:
                with unwrapped():
                    return await getattr(host, method).remote(*words)
            except ActorUnavailableError as exc:
                # Only what may be asked twice: an answer was lost, or it never came to the host.
                if method != "poll" or time.monotonic() > deadline:
                    raise HostGone(one_line(exc)) from None
                await asyncio.sleep(1.0)
            except RayError as exc:
                raise HostGone(one_line(exc)) from None

    def end(self, host: Any) -> None:
        end(host)

    def nodes(self) -> list[Node]:
        return nodes()

    def address(self) -> str:
        return address()


def is_lost(exc: BaseException) -> bool:
    """Whether an error of a call means that the actor is not there any more."""
    return isinstance(exc, RayActorError) and not is_for_a_while(exc)


def is_for_a_while(exc: BaseException) -> bool:
    """Whether the same call may succeed later: the actor's node is out of reach, or the actor starts again."""
    return isinstance(exc, ActorUnavailableError)


def _amounts(need: Need) -> dict[str, float]:
    """Ray refuses a bundle of nothing."""
    return dict(need.amounts) or {"CPU": 0.001}


def one_line(exc: BaseException) -> str:
    """An error of Ray in one line: many say the fact first and then a page of advice."""
    text = of_error(exc) if not str(exc).strip() else str(exc)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return shortened(" ".join(lines), 300)
