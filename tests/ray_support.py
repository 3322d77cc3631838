"""A cluster made up in this process: its hosts are real and start real processes; no Ray."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atpo_async.config import Config
from atpo_async.ops.launchers.ray.host import RoleHost
from atpo_async.ops.launchers.ray.launcher import RayLauncher
from atpo_async.ops.launchers.ray.messages import Order
from atpo_async.ops.launchers.ray.places import HostGone
from atpo_async.ops.launchers.ray.plan import Need, Node, plan
from atpo_async.ops.launchers.ray.run_keys import RunKeys
from atpo_async.ops.specs import RoleSpec
from atpo_async.run.rundir import RunDir

HERE = "127.0.0.1"


class MadeUpPlaces:
    """Places come when a node has been added for them; hosts live in this process."""

    def __init__(self, *node_ids: str) -> None:
        self.living = {name: Node(node_id=name, address=HERE, hostname=name, total={"CPU": 8.0}) for name in node_ids}
        self.free = list(node_ids)
        """Nodes that no place has yet; a place takes the first."""
        self.asked: list[str] = []
        self.given_back: list[str] = []
        self.orders: list[Order] = []
        self.hosts: dict[str, RoleHost] = {}
        """Role -> its newest host."""
        self.greeting: dict[str, Any] = {}
        """What is told in place of the truth."""
        self._node_of: dict[str, str] = {}
        self.dead: set[str] = set()
        """Roles whose hosts are gone."""

    def add(self, node_id: str) -> None:
        self.living[node_id] = Node(node_id=node_id, address=HERE, hostname=node_id, total={"CPU": 8.0})
        self.free.append(node_id)

    def ask(self, name: str, needs: Sequence[Need]) -> str:
        self.asked.append(name)
        return name

    def placed(self, places: Mapping[str, Any]) -> set[str]:
        for role in places:
            if role not in self._node_of and self.free:
                self._node_of[role] = self.free.pop(0)
        return {role for role in places if role in self._node_of}

    def give_back(self, place: str) -> None:
        self.given_back.append(place)
        node = self._node_of.pop(place.rpartition("/")[2], None)
        if node in self.living:
            self.free.append(node)

    def host(self, order: Order, need: Need, *, place: Any | None, bundle: int) -> RoleHost:
        self.orders.append(order)
        self.dead.discard(order.role)
        node = self._node_of.get(order.role, "head")
        self.hosts[order.role] = RoleHost(order, address=HERE, node_id=node)
        return self.hosts[order.role]

    async def call(self, host: RoleHost, method: str, *words: Any) -> Any:
        role = host._order.role
        work = asyncio.create_task(getattr(host, method)(*words))
        while not work.done():
            if role in self.dead and method == "poll":
                work.cancel()
                raise HostGone("the worker died")
            await asyncio.wait([work], timeout=0.02)
        found = work.result()
        return replace(found, **{"hostname": host._node_id, **self.greeting}) if method == "greet" else found

    def end(self, host: RoleHost) -> None:
        """It has closed itself."""

    def nodes(self) -> list[Node]:
        return list(self.living.values())

    def address(self) -> str:
        return HERE


def launcher_of(run: RunDir, places: MadeUpPlaces, *, said: list[str], keys: RunKeys | None = None) -> RayLauncher:
    planned = plan(run.config, places.nodes(), here="node:127.0.0.1")
    keys = keys or RunKeys(run.scratch / "keys", made=True)
    return RayLauncher(run, planned, places, keys, folder=str(Path.cwd()), say=said.append)


def script(role: str, code: str, *, ends_run: bool = False, words: Sequence[str] = ()) -> RoleSpec:
    """A role that is a few lines of Python."""
    argv = ("{python}", "-c", textwrap.dedent(code), *words)
    return RoleSpec(name=role, argv=argv, ends_run=ends_run)


def with_model(config: Config, path: Path) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})
