"""A simulated engine: requests share its rate, so that each goes on more slowly the more there are.

Progress is counted in tokens that a request which was there all the time would have got; a request is done when the
count has grown by its length.  Only the next one to be done has an event.
"""

from __future__ import annotations

import heapq
from collections import deque

import simpy

from benchmarks.model_parts.parameters import EngineRate


class Engine:
    """One engine.

    Args:
        env: simulated time.
        rate: how fast it is.
    """

    def __init__(self, env: simpy.Environment, rate: EngineRate) -> None:
        self._env, self._rate = env, rate
        self._running: list[tuple[float, int, simpy.Event]] = []
        """Heap of (count at which it is done, number, its event)."""
        self._waiting: deque[tuple[float, simpy.Event]] = deque()
        self._count = 0.0
        self._since = env.now
        self._number = 0
        self._planned = 0
        """Of the event that is not out of date."""
        self._paused = 0
        self.tokens = 0.0
        """Sampled so far."""
        self.requests_s = 0.0
        """Integral of requests in the engine over time."""
        self.busy_s = 0.0
        """Time with any request in it."""

    def generate(self, tokens: float) -> simpy.Event:
        """An event that happens when a request of so many tokens is done."""
        done = self._env.event()
        self._settle()
        if len(self._running) < self._rate.seats:
            self._run(tokens, done)
        else:
            self._waiting.append((tokens, done))
        self._plan()
        return done

    def pause(self) -> None:
        """Stand still until ``resume``, as in a swap of weights."""
        self._settle()
        self._paused += 1
        self._plan()

    def resume(self) -> None:
        self._settle()
        self._paused -= 1
        self._plan()

    @property
    def in_flight(self) -> int:
        return len(self._running) + len(self._waiting)

    def _run(self, tokens: float, done: simpy.Event) -> None:
        self._number += 1
        heapq.heappush(self._running, (self._count + tokens, self._number, done))
        self.tokens += tokens

    def _settle(self) -> None:
        """Bring the counters up to now."""
        now = self._env.now
        running, passed = len(self._running), now - self._since
        self._since = now
        self.requests_s += passed * self.in_flight
        if running:
            self.busy_s += passed
            if not self._paused:
                self._count += passed / self._rate.token_s(running)

    def _plan(self) -> None:
        """Make the event of the next request to be done; the one before is out of date."""
        self._planned += 1
        if not self._running or self._paused:
            return
        left = max(self._running[0][0] - self._count, 0.0) * self._rate.token_s(len(self._running))
        planned = self._planned
        self._env.timeout(left).callbacks.append(lambda _: self._done(planned))

    def _done(self, planned: int) -> None:
        if planned != self._planned:
            return
        self._settle()
        _, _, done = heapq.heappop(self._running)
        done.succeed()
        if self._waiting:
            self._run(*self._waiting.popleft())
        self._plan()
