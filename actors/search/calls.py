"""The calls of a chain to engine and environment: each has a time limit, and its failure ends one branch."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar, cast

import numpy as np

from actors.engines.base import Engine, Generation, OnRunning, Sampling, Scored, ScoringEngine
from actors.hosting.calls import EnvironmentFault, EnvironmentTimeout
from actors.hosting.episode import HostedEpisode
from actors.hosting.host import HostedEnvironment
from actors.hosting.kept import Kept
from atpo_async.config import SearchConfig
from atpo_async.core.errors import EngineDead, EnvironmentBroken, GenerationFailed
from atpo_async.core.texts import of_error, shortened
from atpo_async.environments.base import Environment, Episode, ForkDiverged, NotJudged, StepResult
from atpo_async.environments.reference import Reference
from atpo_async.environments.replay import Past, replayed
from atpo_async.environments.team import AsMember, Member
from atpo_async.environments.tools.faults import ToolFailed
from atpo_async.environments.values import ValueRefused
from atpo_async.status import waits
from atpo_async.wire.messages import Lease

T = TypeVar("T")

GENERATE_TIMEOUT = "generate_timeout"
"""The reason of a branch that failed because the engine did not answer in time."""

FORK_DIVERGED = "fork_diverged"
"""The reason of a branch that was shown something else than its tree has."""

NOT_JUDGED = "not_judged"
"""The reason of a branch whose task could not say what its end is worth."""

QUEUE_LIMITS = 10
"""So many times ``search.generate_timeout_s`` a request may wait for its turn in the engine: behind those that each
have that long, and never for ever."""


def diverged_kind(field: Literal["prompt", "observation"]) -> str:
    """A prompt that differs is a slip that is always the same: of the kind of a wrong value."""
    return "value of prompt: it differs" if field == "prompt" else FORK_DIVERGED


class BranchFailed(Exception):
    """A generation or a tool failed.

    Attributes:
        reason: what it is counted under.
        kind: what faults with the same cause have in common; finer than ``reason``.
    """

    def __init__(self, reason: str, detail: str, *, kind: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.kind = kind or reason
        self.detail = detail


class BranchCalls:
    """The calls of one tree.  Each raises BranchFailed; EngineDead and EnvironmentBroken end the actor.

    Args:
        lease: the tree's.
        task: index of the task in its split.
        engine, environment: where actions and observations come from.
        search: the time limits.
    """

    def __init__(
        self, *, lease: Lease, task: int, engine: Engine, environment: Environment, search: SearchConfig
    ) -> None:
        self._lease = lease
        self._task = task
        self._engine = engine
        self._environment = environment
        self._search = search
        self._requests = 0
        self._who = f"tree {lease.tree_id}"
        self.task = f"task {task} ({lease.kind})"
        """For messages."""

    # --- the engine --------------------------------------------------------------------------------------------

    async def generate(self, context: np.ndarray, sampling: Sampling) -> Generation:
        """The action that follows ``context``."""

        def ask(request_id: str, on_running: OnRunning) -> Awaitable[Generation]:
            return self._engine.generate(context, sampling, request_id=request_id, on_running=on_running)

        generation = await self._answered("an action", ask, GENERATE_TIMEOUT, "generate_failed")
        # Only now: what an engine compiles for its first request takes longer than any later one.
        waits.phase("growing trees")
        return generation

    async def score(self, context: np.ndarray, continuation: np.ndarray) -> Scored:
        """How probable ``continuation`` is to the policy after ``context``; the engine is a ``ScoringEngine``."""

        def ask(request_id: str, on_running: OnRunning) -> Awaitable[Scored]:
            engine = cast(ScoringEngine, self._engine)
            return engine.score_continuation(context, continuation, request_id=request_id, on_running=on_running)

        return await self._answered("a score", ask, "score_timeout", "score_failed")

    async def _answered(self, what: str, ask: Callable[[str, OnRunning], Awaitable[T]], timeout: str, failed: str) -> T:
        """The answer to a request; BranchFailed counts under ``timeout`` or ``failed``.

        Waits for: the engine.  Unblocked by: its answer; ``search.generate_timeout_s`` from when the request runs,
        ``QUEUE_LIMITS`` times that if it never does.
        """
        self._requests += 1
        request_id = f"{self._lease.tree_id}.{self._lease.epoch}/{self._requests}"
        limit_s, running = self._search.generate_timeout_s, False
        try:
            with waits.waiting(self._who, what, on=waits.ENGINE, limit_s=QUEUE_LIMITS * limit_s) as wait:
                async with asyncio.timeout(QUEUE_LIMITS * limit_s) as limit:

                    def on_running() -> None:
                        nonlocal running
                        running = True
                        wait.limit_s = time.monotonic() - wait.since + limit_s
                        if not limit.expired():
                            limit.reschedule(asyncio.get_running_loop().time() + limit_s)

                    return await ask(request_id, on_running)
        except TimeoutError:
            took = f"took over {limit_s:g} s (search.generate_timeout_s)" if running else (
                f"waited over {QUEUE_LIMITS * limit_s:g} s in the engine's queue"
            )  # fmt: skip
            raise BranchFailed(timeout, f"request {request_id} {took}") from None
        except EngineDead:
            raise
        except GenerationFailed as exc:
            raise BranchFailed(failed, shortened(str(exc))) from exc

    # --- the environment: whatever it raises ends one branch ---------------------------------------------------

    async def start(self) -> Episode:
        return await self._call("start", self._environment.start(self._lease.kind, self._task))

    async def reference(self) -> Reference | None:
        """The task's right answer; None where it has none."""
        environment = self._environment

        async def asked() -> Reference | None:
            if isinstance(environment, HostedEnvironment):
                return await environment.reference(self._lease.kind, self._task)
            method = getattr(environment, "reference", None)
            said = None if method is None else method(self._lease.kind, self._task)
            found: Reference | None = await said if inspect.isawaitable(said) else said
            return found

        return await self._call("reference", asked())

    async def step(self, episode: Episode, action: np.ndarray) -> StepResult:
        return await self._call("step", episode.step(action))

    async def keep(self, episode: HostedEpisode) -> Kept | None:
        """The state of an episode; None where it cannot be kept.  Its failure costs no branch."""
        limit_s = self._search.step_timeout_s
        with waits.waiting(self._who, "the environment's snapshot", on=waits.ENVIRONMENT, limit_s=limit_s):
            return await episode.keep()

    async def fork(self, kept: Kept) -> Episode | None:
        """An episode in that state; None where a replay has to take its place."""
        assert isinstance(self._environment, HostedEnvironment)
        forked = self._environment.forked(self._lease.kind, self._task, kept)
        return await self._call("fork", forked, steps=2)

    def release(self, kept: Kept) -> None:
        assert isinstance(self._environment, HostedEnvironment)
        self._environment.keeper.release(kept)

    async def replay(self, past: Past) -> tuple[Episode, np.ndarray]:
        """An episode brought to the end of ``past``, and the observation that follows it."""
        steps = len(past.turns) + 1
        if isinstance(self._environment, HostedEnvironment):
            hosted = self._environment.replayed(self._lease.kind, self._task, past)
            episode = await self._call("replay", hosted, steps=steps)
            return episode, episode.observation
        return await self._call(
            "replay", replayed(self._environment, self._lease.kind, self._task, past), steps=steps
        )  # fmt: skip

    # --- a team: its members' episodes and cues ----------------------------------------------------------------

    async def member(self, member: Member, past: Past) -> tuple[Episode, np.ndarray]:
        """A member's episode brought to the end of ``past``, and what it is shown then: its prompt where nothing is
        past."""
        what, steps = f"start of a {member.role}", len(past.turns) + 1
        if isinstance(self._environment, HostedEnvironment):
            hosted = self._environment.member(self._lease.kind, self._task, member, past)
            begun = await self._call(what, hosted, steps=steps)
            return begun, begun.observation if past.turns else begun.prompt
        own = AsMember(self._environment, member)
        if past.turns:
            return await self._call(what, replayed(own, self._lease.kind, self._task, past), steps=steps)
        episode = await self._call(what, own.start(self._lease.kind, self._task))
        return episode, episode.prompt

    async def cue(self, actions: tuple[np.ndarray, ...]) -> np.ndarray | None:
        """int32[C], what the synthesizer is shown of a proposer's chain; None where it gave nothing."""
        environment: Any = self._environment
        return await self._call("cue", _settled(environment.cue(self._lease.kind, self._task, actions)))

    async def _call(self, what: str, call: Awaitable[T], *, steps: int = 1) -> T:
        """A named wait for the environment, which has ``search.step_timeout_s`` for each of ``steps``."""
        limit_s = steps * self._search.step_timeout_s
        try:
            with waits.waiting(self._who, f"the environment's {what}", on=waits.ENVIRONMENT, limit_s=limit_s):
                return await call
        except EnvironmentBroken:
            raise
        except EnvironmentTimeout as exc:
            raise BranchFailed("environment_timeout", str(exc), kind=f"timeout of {what}") from None
        except EnvironmentFault as exc:
            raise self._environment_fault(what, exc.error) from exc
        except Exception as exc:
            raise self._environment_fault(what, exc) from exc

    def _environment_fault(self, what: str, exc: BaseException) -> BranchFailed:
        """``exc`` came out of the environment's ``what``: as the branch's failure, its text cut."""
        if isinstance(exc, ForkDiverged):
            return BranchFailed(FORK_DIVERGED, shortened(str(exc), 600), kind=diverged_kind(exc.field))
        if isinstance(exc, ValueRefused):
            return BranchFailed(exc.reason, str(exc), kind=f"value of {exc.field}")
        if isinstance(exc, ToolFailed):
            return BranchFailed(exc.reason, shortened(str(exc), 600), kind=exc.kind)
        if isinstance(exc, NotJudged):
            said = of_error(exc, 600)
            return BranchFailed(NOT_JUDGED, said if self.task in said else f"{self.task}, {what}: {said}")
        return BranchFailed(
            "environment_failed", f"{self.task}, {what}: {of_error(exc)}", kind=f"{type(exc).__name__} in {what}"
        )


async def _settled(said: Any) -> Any:
    """What a plain function or a coroutine returns."""
    return await said if inspect.isawaitable(said) else said
