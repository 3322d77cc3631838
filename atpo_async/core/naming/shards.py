"""Which shard of a buffer a tree belongs to: its id says so.  Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TREE = re.compile(r"s(0|[1-9]\d{0,3})b\d+-")
_ROLE = re.compile(r"buffer-(0|[1-9]\d{0,3})")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the parts of a buffer: ``buffer.shards = n`` has those with index 0 to n - 1.

    A task belongs to the shard ``task index mod n``, and so do all its trees.
    """

    index: int = 0
    count: int = 1

    @property
    def prefix(self) -> str:
        """What the ids of its trees begin with; nothing where the buffer is one."""
        return f"s{self.index}" if self.count > 1 else ""

    def num_tasks(self, below: int) -> int:
        """How many of the tasks 0 to ``below`` - 1 are its own."""
        return len(range(self.index, below, self.count))


WHOLE = Shard()
"""A buffer that is not split."""


def shard_of(tree_id: str) -> int | None:
    """The index of the shard that has made this tree id; None for one of a buffer that is not split."""
    found = _TREE.match(tree_id)
    return int(found[1]) if found else None


def role_of(index: int) -> str:
    """The name of the role that is a shard: ``buffer-0``."""
    return f"buffer-{index}"


def shard_roles(count: int) -> tuple[str, ...]:
    """The roles of a buffer's shards; none where it is one process."""
    return tuple(role_of(index) for index in range(count if count > 1 else 0))


def index_of(role: str) -> int | None:
    """The index of the shard that a role is; None for another role."""
    found = _ROLE.fullmatch(role)
    return int(found[1]) if found else None
