"""Decides when the policy is evaluated; rank 0 requests evaluations from the buffer and waits for their results.

Actors do the held-out tasks; the buffer counts them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from atpo_async.config import Config
from atpo_async.config.sections.run import EvalConfig
from atpo_async.core.errors import PeerLost, WaitTimeout
from atpo_async.run.metrics import read_metrics, versions_said
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import EvalQuery, EvalRequest, EvalResult, Refused
from learner.batches.buffer_peer import REQUEST_WAIT_S, BufferPeer

RETRY_S = 0.5
"""Pause before a buffer that has forgotten an evaluation is queried again."""


def is_due(settings: EvalConfig, step: int, *, num_steps: int) -> bool:
    """Whether training is evaluated at ``step``; its start and its end are no part of this."""
    every = settings.every_steps
    return bool(every) and step % every == 0 and step < num_steps


def outcome(result: EvalResult) -> tuple[dict[str, float], str]:
    """The metrics of an evaluation that is done, none where it has no result; and what is said of it in the log."""
    if result.success is None:
        if not result.num_unknown:
            return {}, "none of its tasks could be done"
        return {}, (
            f"the environment reported no success or failure of {result.num_unknown} of its {result.num_tasks} tasks "
            "(StepResult.success is None), the others failed"
        )
    metrics = {"eval/success": result.success, "eval/tasks": float(result.num_tasks)}
    sampled_by = ""
    if result.version_min >= 0:
        # More than one version where training went on meanwhile: the result is not that of a single version.
        metrics |= {"eval/version_min": float(result.version_min), "eval/version_max": float(result.version_max)}
        sampled_by = f", sampled by {versions_said(result.version_min, result.version_max)}"
    return metrics, f"greedy success {result.success:.3f}{sampled_by}"


class Evaluations:
    """Evaluations of a run; each has the number of the step it was asked at.

    Args:
        config, rundir: of the run.
        buffer: gives the results.
        write: takes a result: step, version, metrics.
    """

    def __init__(
        self,
        config: Config,
        rundir: RunDir,
        *,
        buffer: BufferPeer,
        write: Callable[[int, int, Mapping[str, float]], None],
        log: logging.Logger,
    ) -> None:
        self.under_way: set[asyncio.Task[None]] = set()
        """Tasks that wait for results while training goes on; the end of the role cancels them."""
        self._settings = config.eval
        self._num_steps = config.run.steps
        self._rundir = rundir
        self._buffer = buffer
        self._write = write
        self._log = log

    def is_due(self, step: int) -> bool:
        """Whether training is evaluated at ``step``; its start and its end are no part of this."""
        return is_due(self._settings, step, num_steps=self._num_steps)

    def is_missing(self, step: int) -> bool:
        """Whether the latest evaluation due by ``step`` was lost when the run stopped.  Reads the run's metrics.

        It is then repeated under the current step's number: the weights of the step it was due at may be gone.
        """
        every = self._settings.every_steps
        due = step // every * every if every else 0
        if due == 0 or step >= self._num_steps:
            return False
        records = read_metrics(self._rundir.metrics_path)
        return not any("eval/success" in r.metrics and due <= r.step <= step for r in records)

    async def request(self, step: int, version: int, *, blocking: bool) -> None:
        """Request the evaluation of ``version``; no training lease is granted during a blocking one.

        Raises:
            PeerLost: the buffer takes nothing any more.
        """
        await self._buffer.send(
            EvalRequest(
                run=self._buffer.run_id,
                step=step,
                version=version,
                num_tasks=self._settings.num_tasks,
                blocking=blocking,
            )
        )

    async def begin(self, step: int, version: int, *, after: Callable[[], Awaitable[None]] | None = None) -> None:
        """Request an evaluation beside training; a task waits for its result.

        Args:
            step: of the evaluation.
            version: to evaluate.
            after: is waited for in that task, before the request; None: the version is published.

        Raises PeerLost as ``request``, where there is nothing to wait for.
        """
        if after is None:
            await self.request(step, version, blocking=False)
        self.under_way.add(asyncio.create_task(self._finish_aside(step, version, after), name=f"evaluation {step}"))

    async def _finish_aside(self, step: int, version: int, after: Callable[[], Awaitable[None]] | None) -> None:
        try:
            if after is not None:
                await after()
                await self.request(step, version, blocking=False)
            await self.finish(step, version, blocking=False)
        except (WaitTimeout, PeerLost) as exc:
            self._log.error("evaluation of step %d is given up: %s", step, exc)
        # No code awaits this task: training goes on without its result, and the log reports that.
        except Exception as exc:
            self._log.exception("evaluation of step %d is given up: %s: %s", step, type(exc).__name__, exc)

    async def finish(self, step: int, version: int, *, blocking: bool) -> None:
        """Wait for a requested evaluation and write its result with the step it was asked at.

        Waits for: actors to finish the held-out tasks.  Unblocked by: the buffer's result.

        Raises:
            WaitTimeout: no task was finished for ``links.give_up_s``.
            PeerLost: the buffer takes nothing any more.
        """
        wait = self._buffer.bounded_wait(f"the evaluation of step {step}")
        # A request may overtake the sends before it: the buffer must have the request for the evaluation first.
        await self._buffer.unless_stopping(self._buffer.link.drain(timeout_s=self._buffer.settings.give_up_s))
        done = -1
        while not self._buffer.stopping.is_set():
            reply = await self._buffer.ask(EvalQuery(run=self._buffer.run_id, step=step, wait_s=REQUEST_WAIT_S))
            if isinstance(reply, EvalResult) and reply.done:
                await self._take(reply, step, version)
                return
            if isinstance(reply, EvalResult):
                if reply.num_done != done:
                    done = reply.num_done
                    wait.moved()
                wait.again(f"{reply.num_done} of {reply.num_tasks} tasks are done")
                continue
            wait.again(reply.reason if isinstance(reply, Refused) else self._buffer.no_answer)
            if isinstance(reply, Refused):
                # The buffer started anew and has forgotten it.
                await self.request(step, version, blocking=blocking)
                await self._buffer.unless_stopping(asyncio.sleep(RETRY_S))

    async def _take(self, result: EvalResult, step: int, version: int) -> None:
        metrics, said = outcome(result)
        if metrics:
            self._write(step, version, metrics)
            self._log.info("step %d: %s", step, said)
        else:
            self._log.error("evaluation of step %d has no result: %s", step, said)

    async def wait_for_those_under_way(self) -> None:
        """Waits for: results of evaluations beside training, for ``links.give_up_s`` at most."""
        if self.under_way:
            give_up_s = self._buffer.settings.give_up_s
            _, late = await asyncio.wait(self.under_way, timeout=give_up_s)
            for task in late:
                self._log.error(
                    "%s has no result %.0f s after the last step (links.give_up_s)", task.get_name(), give_up_s
                )
