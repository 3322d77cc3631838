"""Sends the messages of trees to the buffer, or straight to the shard of the buffer that a tree belongs to.

Where the buffer has shards, an answer with leases says where they listen.  A shard that answers there is sent its
trees' messages; one that does not is reached through the buffer, which passes them on.  A tree keeps its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from atpo_async.config import Config
from atpo_async.core.errors import AtpoError, PeerLost
from atpo_async.core.naming.shards import role_of, shard_of
from atpo_async.links.addresses import seen_from
from atpo_async.links.client import Client
from atpo_async.wire.messages import PROTOCOL, ActorHello, BufferToActor, TreeClosed, Welcome

log = logging.getLogger("atpo.actor")

KNOCK_S = 3.0
"""How long a shard has to answer; until it has, its trees go through the buffer."""
KNOCK_EVERY_S = 60.0
MOST_SHARDS = 64
DRAIN_S = 2.0
"""How long a stopping actor waits for the shards to take its last turns, unless it is given more time."""


class ShardLink:
    """The link to one shard.

    Args:
        endpoint: where it listens, as last heard.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.client: Client | None = None
        """Once it has answered."""


class TurnSender:
    """Sends of one actor.  Use as an async context.

    Args:
        run, name: of the run and of this actor.
        config: the run's.
        buffer: link to the buffer; what is refused is told to its ``on_refused``, whichever way it went.
        drain_s: how long the shards have to take the last turns at the end.
    """

    def __init__(self, *, run: str, name: str, config: Config, buffer: Client, drain_s: float = DRAIN_S) -> None:
        self._run, self._name, self._config = run, name, config
        self._buffer, self._drain_s = buffer, drain_s
        self._shards: dict[int, ShardLink] = {}
        self._ways: dict[str, Client] = {}
        """Tree -> the link that its messages take."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Before the leases are given back: who gets them goes on from these turns.
        with contextlib.suppress(PeerLost):
            await asyncio.gather(*(client.drain(timeout_s=self._drain_s) for client in self._clients()))
        for client in self._clients():
            await client.close()

    @property
    def waited_s(self) -> float:
        """Summed over senders: time that they waited for the window of any link."""
        return sum(client.stats.waited_s for client in (self._buffer, *self._clients()))

    @property
    def num_direct(self) -> int:
        """Shards that are sent to without the buffer in between."""
        return len(self._clients())

    @property
    def is_cut_off(self) -> bool:
        """Whether a shard that was reached is silent: it may have been started again elsewhere."""
        limit_s = 3 * self._config.links.heartbeat_s
        return any(not client.connected or client.silent_s > limit_s for client in self._clients())

    def learn(self, endpoints: Sequence[str]) -> None:
        """The buffer says where its shards listen now, by index; empty for one that it does not know."""
        for index, said in enumerate(endpoints[:MOST_SHARDS]):
            if not said:
                continue
            endpoint = seen_from(self._buffer.endpoint, said)
            if (there := self._shards.get(index)) is not None:
                there.endpoint = endpoint
                continue
            link = self._shards[index] = ShardLink(endpoint)
            task = asyncio.get_running_loop().create_task(self._reach(index, link), name=f"reach {role_of(index)}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def send(self, message: Any) -> None:
        """Send a message of a tree at least once.  Waits for: a place in the window.

        Raises PeerLost, BadMessage as ``Client.send``.
        """
        way = self._ways.get(message.tree_id)
        if way is None:
            way = self._ways[message.tree_id] = self._way_of(message.tree_id)
        await way.send(message)
        if isinstance(message, TreeClosed):
            self.forget(message.tree_id)

    def forget(self, tree_id: str) -> None:
        """No further message of a tree is sent under its lease."""
        self._ways.pop(tree_id, None)

    def _clients(self) -> list[Client]:
        return [link.client for link in self._shards.values() if link.client is not None]

    def _way_of(self, tree_id: str) -> Client:
        index = shard_of(tree_id)
        link = None if index is None else self._shards.get(index)
        return self._buffer if link is None or link.client is None else link.client

    async def _reach(self, index: int, link: ShardLink) -> None:
        """Find out whether a shard can be reached.  Waits for: its answer, and the clock between two attempts."""
        logged = False
        while link.client is None:
            client = Client(
                link.endpoint, peer=role_of(index), identity=self._name, receives=BufferToActor,
                settings=self._config.links, locate=lambda: link.endpoint,
                on_refused=self._on_refused,
            )  # fmt: skip
            try:
                await client.__aenter__()
                if (missing := await self._missing(client)) is None:
                    log.info("%s is sent turns directly, at %s", role_of(index), link.endpoint)
                    link.client, client = client, None  # type: ignore[assignment]
                    return
            except AtpoError as exc:
                missing = str(exc)
            finally:
                if client is not None:
                    await client.close()
            if not logged:
                log.info("%s is reached through the buffer: %s", role_of(index), missing)
                logged = True
            await asyncio.sleep(KNOCK_EVERY_S)

    async def _missing(self, client: Client) -> str | None:
        """Why a shard cannot be sent to; None where it can."""
        hello = ActorHello(
            protocol=PROTOCOL, run=self._run, actor=self._name, environment=self._config.task_name,
            search_leaves=self._config.max_leaves,
        )  # fmt: skip
        try:
            answer = await client.request(hello, timeout_s=KNOCK_S)
        except PeerLost as exc:
            return str(exc)
        return None if isinstance(answer, Welcome) else f"it answers {answer}"

    def _on_refused(self, message: Any, reason: str) -> None:
        if self._buffer.on_refused is not None:
            self._buffer.on_refused(message, reason)
