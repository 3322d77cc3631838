"""The learner's loop: wait for a batch, train on it, publish, confirm.

One batch is one version, also when nothing was learned from it (no trees, or the update was skipped): lag then keeps
its meaning, batches since the tokens were sampled.  Rank 0 counts versions, publishes and evaluates; every rank asks
for its own share of a batch and confirms it.

The buffer keeps what was trained on until a checkpoint holds it (``Checkpointed``): a learner that starts again asks
for the batch after its checkpoint, and the trees of those it has lost come again.

Two threads: torch runs in one, the event loop in the other, so that heartbeats and weights flow during a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from atpo_async import status, waits, wire
from atpo_async.config import Config
from atpo_async.errors import PeerLost, SetupError, WaitTimeout
from atpo_async.links import Client, LinkSettings
from atpo_async.messages import (
    Batch,
    BatchTree,
    BufferToLearner,
    Checkpointed,
    EvalQuery,
    EvalRequest,
    EvalResult,
    Exhausted,
    NotYet,
    Refused,
    RunFinished,
    SampleRequest,
    Trained,
    VersionPublished,
    WeightsAnnounced,
)
from atpo_async.metrics import MetricsWriter, read_metrics
from atpo_async.models import model_folder
from atpo_async.records import TurnRecords
from atpo_async.role import RoleContext
from atpo_async.rundir import RunDir, write_atomic
from atpo_async.waits import Patience
from learner import checkpoint
from learner.checkpoint import Progress
from learner.model import export_model, load_policy, make_accelerator
from learner.publisher import Publisher, WeightsStore, probe_token_ids
from learner.step import Abandoned, StepReport, Trainer
from learner.tree_samples import decoder, is_sampled, write_sample

T = TypeVar("T")

REQUEST_WAIT_S = 2.0
"""How long the buffer may hold a request before it answers "not yet"."""
REPEAT_S = 5.0
"""While waiting, the buffer is told again which version there is: it may have started anew."""
KEPT_BATCHES = 5
"""Batches of skipped updates that are kept for a look."""
MAX_WARNINGS = 5
"""Lines about trees left out that one batch may write to the log."""
LINEAGE_FILE = "lineage.jsonl"
FINISH_S = 10.0
"""For the last messages of a run to be acknowledged."""

WAITED_FOR = {
    **dict.fromkeys(("least", "wait_for_everyone"), "learner"),
    **dict.fromkeys(("save", "export", "resume"), waits.DISK),
}
"""What some calls in the torch thread wait for, other than torch: the other ranks, the disk."""


class TorchThread:
    """The one thread in which torch runs, in order.  ``await thread(function, …)``."""

    def __init__(self, num_threads: int | None) -> None:
        def begin() -> None:
            if num_threads is not None:
                torch.set_num_threads(num_threads)

        self._executor = ThreadPoolExecutor(1, thread_name_prefix="torch", initializer=begin)

    async def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        name = getattr(function, "__name__", "a call").strip("_")
        with waits.waiting("the learner", name.replace("_", " "), on=WAITED_FOR.get(name, waits.TORCH)):
            return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def probe_length(config: Config) -> int:
    """Tokens of the probe: an engine scores a prompt only if there is room for one token more."""
    return min(config.weights.probe_tokens, config.model.max_context_tokens - 1)


class _Wanted(IntEnum):
    """What a rank has when it has stopped waiting; all ranks do what the one with the least says."""

    STOP = 0
    """Nothing: it is asked to, or has failed."""
    END = 1
    """The buffer has no further batch."""
    CHECKPOINT = 2
    """The buffer wants one before it can go on."""
    TRAIN = 3
    """A batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learned:
    """What the torch thread hands back after a batch."""

    report: StepReport
    version: int
    step_s: float
    publish_s: float
    announcement: WeightsAnnounced | None
    checkpoint_wanted: bool


class Learner:
    """One rank of the learner.

    Args:
        config, run, rundir: of this run.
        trainer: policy and optimizer; touched in the torch thread only.
        buffer: link to the buffer.
        publisher: rank 0's; None on the others.
        metrics: rank 0's; None on the others.
        torch_thread: where the trainer lives.
        stopping: set when the role has to end.
    """

    def __init__(
        self,
        *,
        config: Config,
        run: str,
        rundir: RunDir,
        trainer: Trainer,
        buffer: Client,
        publisher: Publisher | None,
        metrics: MetricsWriter | None,
        torch_thread: TorchThread,
        stopping: asyncio.Event,
        log: logging.Logger,
    ) -> None:
        self.config = config
        self.run_id = run
        self.rundir = rundir
        self.trainer = trainer
        self.buffer = buffer
        self.publisher = publisher
        self._decode = decoder(model_folder(config.model.path)) if metrics is not None else str
        self.metrics = metrics
        self.torch_thread = torch_thread
        self.stopping = stopping
        self.log = log
        self.step = 0
        """Batches trained."""
        self.version = 0
        """Of the weights now."""
        self.published = 0
        """The newest version that actors can get."""
        self._links = LinkSettings.from_config(config.links)
        self._rank = trainer.accelerator.process_index
        self._num_ranks = trainer.accelerator.num_processes
        self._stop_torch = threading.Event()
        self._evaluations: set[asyncio.Task[None]] = set()
        self._checkpointed: int | None = None
        self._stepped_at = 0.0
        self._in_hand: Batch | None = None
        """A batch that has to wait until all ranks have saved a checkpoint."""
        self._exhausted = False
        """There is no further batch, whatever run.steps says."""
        self._failure: WaitTimeout | PeerLost | None = None
        """Why this rank goes no further; the others learn of it at the next batch."""
        self._probe = probe_token_ids(
            int(trainer.policy.hf.config.vocab_size), probe_length(config), seed=config.run.seed
        )

        status.publish("learner", self._facts)

    def _facts(self) -> dict[str, object]:
        """For the learner's picture."""
        return {"step": self.step, "of": self.config.run.steps, "version": self.version, "published": self.published}

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Train to the last step, or until asked to stop, or until the buffer is lost; the state is on disk afterwards.

        Waits for: batches.  Unblocked by: the buffer.

        Raises:
            WaitTimeout: nothing came within ``links.give_up_s``.
            PeerLost: the buffer did not take a message in that time.
        """
        watcher = asyncio.create_task(self._tell_torch_to_stop(), name="stop torch")
        try:
            await self._begin()
            while self.step < self.config.run.steps and await self._one_batch():
                pass
            if (self._exhausted or self.step >= self.config.run.steps) and not self.stopping.is_set():
                await self._finish()
            else:
                await self._checkpoint()
                if self._failure is not None:
                    raise self._failure
        finally:
            for task in (watcher, *self._evaluations):
                task.cancel()
            await asyncio.gather(watcher, *self._evaluations, return_exceptions=True)

    async def _tell_torch_to_stop(self) -> None:
        await self.stopping.wait()
        self._stop_torch.set()

    # --- the beginning and the end

    async def _begin(self) -> None:
        """Resume, publish the first weights, and evaluate them before anything is learned."""
        resumed = await self.torch_thread(self._resume)
        self.version = await self.torch_thread(self._next_version)
        if self.config.learner.lineage:
            write_start(self.rundir.path / LINEAGE_FILE, step=self.step, version=self.version, rank=self._rank)
        began = self._now
        announcement = await self.torch_thread(self._store)
        evaluate = self.config.eval.at_start and not resumed and self._rank == 0
        if evaluate:
            # Before the version is known: no training lease may slip in ahead of the evaluation.
            await self._request_evaluation(blocking=True)
        await self._announce(announcement)
        await self._tell_checkpoint()
        if self.metrics is not None:
            self.metrics.write(step=self.step, version=self.version, metrics={"weights/publish_s": self._now - began})
        if evaluate:
            await self._evaluated(self.step, self.version, blocking=True)
        elif resumed and self._rank == 0 and await asyncio.to_thread(self._evaluation_is_missing):
            self.log.info("an evaluation due by step %d has no result; asking for it with the weights now", self.step)
            await self._begin_evaluation()
        self._stepped_at = self._now

    def _evaluation_is_missing(self) -> bool:
        """Whether the latest evaluation due by this step was lost when the run stopped.

        It is made up for under this step's number: the weights of the step it was due at may be gone.
        """
        every = self.config.eval.every_steps
        due = self.step // every * every if every else 0
        if due == 0 or self.step >= self.config.run.steps:
            return False
        records = read_metrics(self.rundir.metrics_path)
        return not any("eval/success" in r.metrics and due <= r.step <= self.step for r in records)

    def _resume(self) -> bool:
        for path in reversed(checkpoint.list_checkpoints(self.rundir.checkpoints)):
            progress = checkpoint.load(path, self.trainer)
            self.step = self._checkpointed = progress.step
            self.log.info(
                "resumed from %s: %d batches trained, weights of version %d", path, self.step, progress.version
            )
            return True
        return False

    async def _finish(self) -> None:
        """Evaluate what was learned, save it, and tell everybody that the run is over."""
        await self._checkpoint()
        await self.torch_thread(self._export)
        if self._rank == 0:
            if self._evaluations:
                await asyncio.wait(self._evaluations, timeout=self._links.give_up_s)
            if self.config.eval.at_end:
                await self._request_evaluation(blocking=True)
                await self._evaluated(self.step, self.published, blocking=True)
            if not self.stopping.is_set():
                await self.buffer.send(RunFinished(run=self.run_id))
        with contextlib.suppress(PeerLost):  # the buffer may end first: it knows that the run is over
            await self.buffer.drain(timeout_s=FINISH_S)

    def _export(self) -> None:
        tensors = self.trainer.tensors()
        if self.trainer.accelerator.is_main_process:
            target = self.rundir.path / "model"
            export_model(self.trainer.policy, tensors, model_folder(self.config.model.path), target)
            self.log.info("the trained policy is in %s", target)

    # --- one batch

    async def _one_batch(self) -> bool:
        """Wait, learn, publish, confirm.  False when the role has to stop.

        Waits for: ``next_batch``, then the torch thread.  Ranks stay in step: if one has no batch, none trains.
        """
        asked_at = self._now
        found: Batch | _Wanted | None = self._in_hand
        try:
            if found is None and self._failure is None:
                found = await self.next_batch()
        except (WaitTimeout, PeerLost) as exc:
            self._failure = exc
        batch = found if isinstance(found, Batch) else None
        own = _Wanted.TRAIN if batch is not None else found or _Wanted.STOP
        wanted = await self.torch_thread(self._agree, own, 0 if batch is None else batch.batch_id)
        waited_s = self._now - asked_at
        if wanted == _Wanted.CHECKPOINT:
            self._in_hand = batch
            await self._checkpoint()
            return True
        self._in_hand = None
        self._exhausted = wanted == _Wanted.END
        if wanted != _Wanted.TRAIN or batch is None:
            return False
        try:
            learned = await self.torch_thread(self._learn, batch)
        except Abandoned:
            return False
        self.step += 1
        self.version = learned.version
        # From the second batch on: what is compiled for the first one takes longer than any later one.
        waits.phase("training")
        waits.progress("batches")
        try:
            await self._tell(batch, learned, waited_s=waited_s)
        except PeerLost as exc:
            # The other ranks are on their way to the next batch: there they learn that this one has failed.
            self._failure = exc
        if learned.report.fault is not None:
            self._keep(batch, learned.report.fault)
        if self.step % self.config.learner.checkpoint_every == 0 or learned.checkpoint_wanted:
            await self._checkpoint()
        return True

    def _agree(self, own: _Wanted, batch_id: int) -> _Wanted:
        """In the torch thread: what all ranks do.

        Raises:
            SetupError: they were given shares of different batches.
        """
        wanted = _Wanted(int(self.trainer.least(float(own))))
        if wanted == _Wanted.TRAIN and self._num_ranks > 1:
            first, last = self.trainer.least(float(batch_id)), -self.trainer.least(-float(batch_id))
            if first != last:
                raise SetupError(
                    f"step {self.step}: the ranks were given shares of batches {first:.0f} to {last:.0f}; the buffer "
                    "has lost its journal since the first rank was served: start the run again, it goes on from its "
                    "checkpoint"
                )
        return wanted

    async def _tell(self, batch: Batch, learned: _Learned, *, waited_s: float) -> None:
        """What follows from a batch: the version announced, the batch confirmed, numbers written, evaluation asked for.

        Raises:
            PeerLost: the buffer takes nothing any more.
        """
        before_announcing = self._now
        if learned.announcement is not None:
            await self._announce(learned.announcement)
        publish_s = learned.publish_s + self._now - before_announcing
        await self.buffer.send(
            Trained(
                run=self.run_id,
                batch_id=batch.batch_id,
                version=self.version,
                priorities=learned.report.priorities,
                rank=self._rank,
            )
        )
        await self._record(batch, learned, waited_s=waited_s, publish_s=publish_s)
        every = self.config.eval.every_steps
        if self._rank == 0 and every and self.step % every == 0 and self.step < self.config.run.steps:
            await self._begin_evaluation()

    async def _begin_evaluation(self) -> None:
        await self._request_evaluation(blocking=False)
        self._evaluations.add(
            asyncio.create_task(self._evaluate_aside(self.step, self.published), name=f"evaluation {self.step}")
        )

    async def next_batch(self) -> Batch | _Wanted | None:
        """This rank's share of the next batch, or what is wanted instead; None when the role has to stop first.

        Waits for: enough fresh trees.  Unblocked by: the buffer's answer.

        Raises:
            WaitTimeout: no batch, and nothing towards one for ``links.give_up_s``; names what is missing.
            SetupError: the buffer refuses this learner.
        """
        wanted = self.config.staleness.trees_per_batch
        patience = Patience(
            "the learner",
            f"batch {self.step} of {wanted} trees",
            self._links,
            lambda: self._now,
            log=self.log,
            on="buffer",
        )
        told_at = self._now
        progress: int | None = None
        while not self.stopping.is_set():
            request = SampleRequest(
                run=self.run_id,
                rank=self._rank,
                num_ranks=self._num_ranks,
                step=self.step,
                version=self.version,
                num_trees=wanted,
                wait_s=REQUEST_WAIT_S,
            )
            reply = await self._ask(request)
            if isinstance(reply, Batch):
                return reply
            if isinstance(reply, Exhausted):
                self.log.info("no further batch: %s", reply.reason)
                return _Wanted.END
            if isinstance(reply, NotYet) and reply.checkpoint_wanted and self._checkpointed != self.step and self.step:
                return _Wanted.CHECKPOINT
            if isinstance(reply, NotYet) and reply.progress != progress:
                progress = reply.progress
                patience.moved()
            patience.again(reply.waiting_for if isinstance(reply, NotYet) else f"no answer from {self.buffer.endpoint}")
            if self._rank == 0 and self._now - told_at > REPEAT_S:
                told_at = self._now
                await self._tell_version()
        return None

    async def _ask(self, request: SampleRequest | EvalQuery) -> Any:
        """The buffer's reply; None if it gave none in time, or the role has to stop.  Raises SetupError if refused."""
        try:
            reply = await self._unless_stopping(
                self.buffer.request(request, timeout_s=REQUEST_WAIT_S + self._links.deadline_s)
            )
        except PeerLost as exc:
            self.log.warning("%s", exc)
            return None
        if isinstance(reply, Refused) and isinstance(request, SampleRequest):
            raise SetupError(f"the buffer at {self.buffer.endpoint} refuses the learner: {reply.reason}")
        return reply

    async def _unless_stopping(self, awaitable: Awaitable[T]) -> T | None:
        work = asyncio.ensure_future(awaitable)
        stop = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            return await work if work.done() else None
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    def _learn(self, batch: Batch) -> _Learned:
        """In the torch thread: train, count the version, write its weights if they are due."""
        clock = time.monotonic
        began = clock()
        report = self.trainer.train(batch, version=self.version, should_stop=self._stop_torch.is_set)
        if self.config.learner.lineage:
            write_lineage(self.rundir.path / LINEAGE_FILE, batch, version=self.version, rank=self._rank)
        for line in report.warnings[:MAX_WARNINGS]:
            self.log.warning("batch %d: %s", batch.step, line)
        if len(report.warnings) > MAX_WARNINGS:
            self.log.warning("batch %d: and %d more trees left out", batch.step, len(report.warnings) - MAX_WARNINGS)
        if report.fault is not None:
            self.log.warning("batch %d: update skipped, %s", batch.step, report.fault)
        trained = clock()
        version, checkpoint_wanted = self._next_version(), self._first_says(batch.checkpoint_wanted)
        done = self.step + 1
        due = done % self.config.staleness.publish_every == 0 or done == self.config.run.steps
        announcement = self._store(version) if due else None
        return _Learned(
            report=report,
            version=version,
            step_s=trained - began,
            publish_s=clock() - trained,
            announcement=announcement,
            checkpoint_wanted=checkpoint_wanted,
        )

    def _first_says(self, flag: bool) -> bool:
        """Rank 0's word, on every rank."""
        return bool(self.trainer.same_everywhere([float(flag)])[0])

    def _next_version(self) -> int:
        """Counted by rank 0, told to all."""
        own = self.rundir.next_version() if self._rank == 0 else 0
        return int(self.trainer.same_everywhere([own])[0])

    def _store(self, version: int | None = None) -> WeightsAnnounced | None:
        """Write the weights now as ``version`` where actors can get them; None on ranks other than 0."""
        tensors = self.trainer.tensors()
        logprobs = self.trainer.probe(self._probe)
        if self.publisher is None:
            return None
        return self.publisher.store.add(
            self.version if version is None else version,
            tensors,
            probe_token_ids=self._probe,
            probe_logprobs=np.nan_to_num(logprobs, nan=0.0, posinf=0.0, neginf=-1e4),
        )

    async def _announce(self, announcement: WeightsAnnounced | None) -> None:
        if announcement is None or self.publisher is None:
            return
        self.published = announcement.version
        await self.publisher.announce(announcement)
        await self._tell_version()

    async def _tell_version(self) -> None:
        assert self.publisher is not None
        await self.buffer.send(
            VersionPublished(
                run=self.run_id,
                version=self.published,
                weights_endpoint=self.publisher.weights_endpoint,
                announce_endpoint=self.publisher.announce_endpoint,
            )
        )

    async def _record(self, batch: Batch, learned: _Learned, *, waited_s: float, publish_s: float) -> None:
        now = self._now
        between_s, self._stepped_at = now - self._stepped_at, now
        if self.metrics is None:
            return
        found: dict[str, float] = {**batch.metrics, **learned.report.metrics}
        found["time/learner_wait_s"] = waited_s
        found["time/step_s"] = learned.step_s
        found["time/between_steps_s"] = between_s
        found["tokens/trained_per_s"] = found.get("tokens/trained", 0.0) / max(between_s, 1e-9)
        found["batch/trees"] = batch.num_trees
        found["batch/leaves"] = batch.num_leaves
        if learned.announcement is not None:
            found["weights/publish_s"] = publish_s
        if is_sampled(self.step, num_steps=self.config.run.steps):
            write_sample(
                self.rundir.trees_path,
                # Only what was trained on: credit is not defined on a tree that was refused.
                msgspec.structs.replace(
                    batch, trees=tuple(t for t in batch.trees if t.tree_id in learned.report.trained)
                ),
                step=self.step,
                version=self.version,
                settings=self.config.credit,
                decode=self._decode,
            )
        await self._write(self.step, self.version, found)
        self.log.info(
            "step %d: reward %s, lag %s, waited %.2f s, step %.2f s",
            self.step, _told(found.get("train/reward"), 3), _told(found.get("lag/mean"), 2), waited_s, learned.step_s,
        )  # fmt: skip

    async def _write(self, step: int, version: int, found: Mapping[str, float]) -> None:
        if self.metrics is None:
            return
        self.metrics.write(step=step, version=version, metrics=found)
        if self.config.learner.tensorboard:
            await self.torch_thread(self.trainer.accelerator.log, dict(found), step=step)

    def _keep(self, batch: Batch, reason: str) -> None:
        """Put a batch aside whose update was skipped; stop the run after too many."""
        folder = self.rundir.path / "skipped"
        folder.mkdir(exist_ok=True)
        save_batch(folder / f"step-{self.step:06d}-rank-{self._rank}.batch", batch)
        for old in sorted(folder.glob(f"step-*-rank-{self._rank}.batch"))[:-KEPT_BATCHES]:
            old.unlink()
        kept = checkpoint.list_checkpoints(self.rundir.checkpoints)
        self.trainer.skips.check(
            reason,
            limit=self.config.learner.max_skipped_updates,
            kept_in=str(folder),
            checkpoint=str(kept[-1]) if kept else None,
        )

    async def _checkpoint(self) -> None:
        """Save, unless this step is saved already.  Every rank calls it."""
        if self._checkpointed == self.step or self.step == 0:
            return
        self._checkpointed = self.step
        path = await self.torch_thread(
            checkpoint.save,
            self.rundir.checkpoints,
            self.trainer,
            Progress(step=self.step, version=self.version),
            keep=self.config.learner.keep_checkpoints,
        )
        if self._rank == 0:
            self.log.info("checkpoint %s", path)
        await self._tell_checkpoint()

    async def _tell_checkpoint(self) -> None:
        """The buffer may let go what was used up before: no batch below this step is asked for again."""
        if self._rank == 0 and self._checkpointed is not None:
            with contextlib.suppress(PeerLost):  # said again when the learner starts again
                await self.buffer.send(Checkpointed(run=self.run_id, step=self._checkpointed, version=self.version))

    # --- evaluation

    async def _request_evaluation(self, *, blocking: bool) -> None:
        version = self.published if self.step else self.version
        await self.buffer.send(
            EvalRequest(
                run=self.run_id,
                step=self.step,
                version=version,
                num_tasks=self.config.eval.num_tasks,
                blocking=blocking,
            )
        )

    async def _evaluate_aside(self, step: int, version: int) -> None:
        try:
            await self._evaluated(step, version, blocking=False)
        except (WaitTimeout, PeerLost) as exc:
            self.log.error("evaluation of step %d is given up: %s", step, exc)

    async def _evaluated(self, step: int, version: int, *, blocking: bool) -> None:
        """Wait for an evaluation and write its result with the step it was asked at.

        Waits for: actors to finish the held-out tasks.  Unblocked by: the buffer's result.
        """
        patience = Patience(
            "the learner", f"the evaluation of step {step}", self._links, lambda: self._now, log=self.log, on="buffer"
        )
        # A request may overtake the sends before it: let the buffer know of the evaluation first.
        await self._unless_stopping(self.buffer.drain(timeout_s=self._links.give_up_s))
        done = -1
        while not self.stopping.is_set():
            reply = await self._ask(EvalQuery(run=self.run_id, step=step, wait_s=REQUEST_WAIT_S))
            if isinstance(reply, EvalResult) and reply.done:
                if reply.success is None:
                    self.log.error("evaluation of step %d has no result: none of its tasks could be done", step)
                else:
                    found = {"eval/success": reply.success, "eval/tasks": float(reply.num_tasks)}
                    await self._write(step, version, found)
                    self.log.info("step %d: greedy success %.3f", step, reply.success)
                return
            if isinstance(reply, EvalResult):
                if reply.num_done != done:
                    done = reply.num_done
                    patience.moved()
                patience.again(f"{reply.num_done} of {reply.num_tasks} tasks are done")
                continue
            patience.again(reply.reason if isinstance(reply, Refused) else f"no answer from {self.buffer.endpoint}")
            if isinstance(reply, Refused):
                # The buffer started anew and has forgotten it.
                await self.buffer.send(
                    EvalRequest(
                        run=self.run_id,
                        step=step,
                        version=version,
                        num_tasks=self.config.eval.num_tasks,
                        blocking=blocking,
                    )
                )
                await self._unless_stopping(asyncio.sleep(0.5))


def _told(value: float | None, digits: int) -> str:
    """For the log: a step may have nothing new."""
    return "–" if value is None else f"{value:.{digits}f}"


def write_start(path: Path, *, step: int, version: int, rank: int) -> None:
    """Append that a learner starts at ``step``: lines before this one of that step and later count no more."""
    _append(path, {"starts_at": step, "rank": rank, "version": version})


def write_lineage(path: Path, batch: Batch, *, version: int, rank: int) -> None:
    """Append what a rank has trained on, one JSON object a line; those that ``write_start`` leaves made the weights."""
    line = {
        "step": batch.step,
        "rank": rank,
        "version": version,
        "batch_id": batch.batch_id,
        "trees": [
            {"tree_id": t.tree_id, "task_index": t.task_index, "uses": t.uses, "turns": len(t.turns), "hash": _hash(t)}
            for t in batch.trees
        ],
    }
    _append(path, line)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, json.dumps(line, separators=(",", ":")).encode() + b"\n")
    finally:
        os.close(fd)


def _hash(tree: BatchTree) -> str:
    """Of the turns as they were recorded, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in TurnRecords.of(tree.turns).parts:
        digest.update(part)
    return digest.hexdigest()


def save_batch(path: Path, batch: Batch) -> None:
    """Write a batch as the wire carries it: length and bytes of each frame."""
    frames = [bytes(frame) for frame in wire.encode(batch)]
    write_atomic(path, b"".join(struct.pack("<Q", len(frame)) + frame for frame in frames))


def load_batch(path: Path) -> Batch:
    """Read what ``save_batch`` wrote.  Raises BadMessage if it is none."""
    data, frames, at = path.read_bytes(), [], 0
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        frames.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    batch: Batch = wire.decode(frames, BufferToLearner)
    return batch


@contextlib.asynccontextmanager
async def _opened(ctx: RoleContext, thread: TorchThread) -> AsyncIterator[Learner]:
    """A learner with its model loaded and its links open."""
    config, rundir = ctx.config, ctx.rundir
    if rundir is None:
        raise SetupError("the learner needs the run's folder")
    trainer: Trainer = await thread(_load, config, rundir)
    rank = trainer.accelerator.process_index
    links = LinkSettings.from_config(config.links)
    async with contextlib.AsyncExitStack() as stack:
        publisher = metrics = None
        if rank == 0:
            store = WeightsStore(
                run=ctx.run_id, fallback=rundir.scratch, settings=config.weights, precision=config.model.dtype
            )
            publisher = await stack.enter_async_context(
                Publisher(
                    store,
                    weights_endpoint=ctx.endpoints.weights,
                    announce_endpoint=ctx.endpoints.announce,
                    settings=links,
                )
            )
            metrics = stack.enter_context(MetricsWriter(rundir.metrics_path, source="learner"))
        buffer = await stack.enter_async_context(
            Client(
                ctx.endpoints.learner,
                peer="buffer",
                identity="learner" if rank == 0 else f"learner-{rank}",
                receives=BufferToLearner,
                settings=links,
            )
        )
        yield Learner(
            config=config,
            run=ctx.run_id,
            rundir=rundir,
            trainer=trainer,
            buffer=buffer,
            publisher=publisher,
            metrics=metrics,
            torch_thread=thread,
            stopping=ctx.stopping,
            log=ctx.log,
        )


def _load(config: Config, rundir: RunDir) -> Trainer:
    torch.manual_seed(config.run.seed)
    accelerator = make_accelerator(config, project=rundir.path)
    if config.learner.tensorboard:
        accelerator.init_trackers("tensorboard")
    trainer = Trainer(config, accelerator=accelerator, policy=load_policy(config))
    trainer.warm_up()
    return trainer


async def learn(ctx: RoleContext) -> None:
    """The learner's main: load, then loop."""
    thread = TorchThread(ctx.config.learner.num_threads)
    try:
        async with _opened(ctx, thread) as learner:
            ctx.log.info(
                "learner: %d parameters on %s, %d process(es)",
                sum(p.numel() for p in learner.trainer.policy.parameters()),
                learner.trainer.accelerator.device,
                learner.trainer.accelerator.num_processes,
            )
            ctx.log.info("learner: %s layout: %s", learner.trainer.layout, learner.trainer.layout_reason)
            await learner.run()
            if ctx.config.learner.tensorboard:
                await thread(learner.trainer.accelerator.end_training)
            # A rank that leaves while others still use the group's threads may abort.
            await thread(learner.trainer.accelerator.wait_for_everyone)
    finally:
        thread.close()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
