"""What the launcher asks of a cluster: places for roles, and hosts in them.  ``cluster`` has Ray's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from atpo_async.core.errors import AtpoError
from atpo_async.ops.launchers.ray.messages import Order
from atpo_async.ops.launchers.ray.plan import Need, Node


class HostGone(AtpoError):
    """A host does not answer any more, and never will; the message says how Ray lost it."""


class Places(Protocol):
    """A cluster.  Places and hosts are objects of its own."""

    def ask(self, name: str, needs: Sequence[Need]) -> Any:
        """A place for a role, with a bundle for each host; it may take long to come."""

    def placed(self, places: Mapping[str, Any]) -> set[str]:
        """The names of those that have come.  Blocks for a moment."""

    def give_back(self, place: Any) -> None:
        """Idempotent."""

    def host(self, order: Order, need: Need, *, place: Any | None, bundle: int) -> Any:
        """A host in its place; without one on the supervisor's own node."""

    async def call(self, host: Any, method: str, *words: Any) -> Any:
        """Waits for: the answer of a method of ``RoleHost``.  Raises HostGone; an AtpoError that the method raised."""

    def end(self, host: Any) -> None:
        """End a host.  Idempotent."""

    def nodes(self) -> list[Node]:
        """Those that live.  Blocks for a moment."""

    def address(self) -> str:
        """Of the supervisor's node, as the others reach it."""
