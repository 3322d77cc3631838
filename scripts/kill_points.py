"""Kill points: whole runs of ``atpo train`` whose real learner, or real engine, stands still at a named place.

    supervisor.launcher = "scripts.kill_points:KillPointLauncher"    starts the roles so that they come by them:
    python -m scripts.kill_points learner RUN_DIR                    as the learner, and an actor likewise

A driver writes the name of a kill point into ``<run>/stop-at`` (``ask_for``); the role that comes by takes the file
away, writes ``<run>/stopped-at`` and stops, all threads of it, as a machine that loses its power does.  The product
knows nothing of this: its functions are wrapped here, in the role's process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from atpo_async.ops import role
from atpo_async.ops.launchers.base import StartOrder
from atpo_async.ops.launchers.processes import LocalRole, ProcessLauncher
from atpo_async.run import launch
from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import RunDir

STOP_AT = "stop-at"
STOPPED_AT = "stopped-at"
RUN_DIR = "ATPO_KILL_POINTS_OF"
"""Environment variable: the run's folder, for the engine's own processes."""

ON_THE_WAY = {
    "batch": "a batch in hand",
    "gradients": "in mid-step: gradients there, weights not changed yet",
    "numbered": "the step taken and its version number with it, no weights written",
    "unannounced": "weights written, not announced",
    "confirmed": "the batch confirmed (`Trained`)",
    "half": "in mid-checkpoint: the model written, the optimizer not",
    "written": "in mid-checkpoint: all files written, not renamed",
    "renamed": "the checkpoint in place, not reported to the buffer",
    "told": "the checkpoint reported (`Checkpointed`), the next version not published",
}
"""Kill points of the learner that each batch comes by, or each checkpoint; in this order."""

AT_THE_END = {
    "exported": "the last checkpoint reported, the trained policy exported, the end of the run not reported",
    "finished": "the end of the run reported (`RunFinished`)",
}
"""Kill points of the learner that a run comes by once, unless it is killed there."""

KILL_POINTS = {**ON_THE_WAY, **AT_THE_END}

ENGINE_STEP = "engine-step"
"""Kill point of an engine: its next step does not return.  Only its thread, or its process, stands still."""


# --- the driver's side -----------------------------------------------------------------------------------------


def ask_for(run: Path, point: str) -> None:
    (run / STOPPED_AT).unlink(missing_ok=True)
    write_atomic(run / STOP_AT, point)


def stopped_at(run: Path) -> str:
    """The kill point that a role stands at; empty while none does."""
    with contextlib.suppress(FileNotFoundError):
        return (run / STOPPED_AT).read_text()
    return ""


# --- the roles' side -------------------------------------------------------------------------------------------


def _is_wanted(run: Path, point: str) -> bool:
    """Whether the driver wants this one; takes the wish away."""
    path = run / STOP_AT
    try:
        if path.read_text() != point:
            return False
    except FileNotFoundError:
        return False
    path.unlink()
    return True


def passes(run: Path, point: str) -> None:
    """Stop this process here if the driver wants it."""
    if not _is_wanted(run, point):
        return
    write_atomic(run / STOPPED_AT, point)
    while True:  # the signal may reach another thread first: this one must not go on meanwhile
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.1)


def _before(owner: Any, name: str, act: Callable[[], None]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, act: Callable[[], None]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        act()
        return result

    setattr(owner, name, wrapped)


def _put_one_between_the_files_of_a_checkpoint(checkpoint: Any, act: Callable[[], None]) -> None:
    write = checkpoint.write_tensors

    def wrapped(path: Path | None, tensors: Any) -> None:
        if path is not None and path.name == "optimizer.safetensors":
            act()
        write(path, tensors)

    checkpoint.write_tensors = wrapped


def _put_kill_points_into_the_learner(run: Path) -> None:
    """Wrap what it calls on its way.  What it does at its start has the same names, and is passed by."""
    from accelerate.optimizer import AcceleratedOptimizer

    from atpo_async.links.client import Client
    from atpo_async.wire.messages import Checkpointed, RunFinished, Trained
    from learner.checkpoints import checkpoint
    from learner.checkpoints.durable import Durable
    from learner.checkpoints.saving import Saving
    from learner.ranks import Ranks
    from learner.training.trainer import Trainer
    from learner.weights.publication import Publication

    trained = False

    def train_begins() -> None:
        nonlocal trained
        trained = True
        passes(run, "batch")

    def point(name: str) -> Callable[[], None]:
        return lambda: passes(run, name) if trained else None

    _before(Trainer, "train", train_begins)
    _before(AcceleratedOptimizer, "step", point("gradients"))
    _after(Ranks, "next_version", point("numbered"))
    _before(Publication, "announce", point("unannounced"))
    _put_one_between_the_files_of_a_checkpoint(checkpoint, point("half"))
    _before(checkpoint, "publish", point("written"))
    _before(Durable, "report", point("renamed"))
    _after(Saving, "export", lambda: passes(run, "exported"))
    send = Client.send
    told: dict[Any, str] = {Trained: "confirmed", Checkpointed: "told", RunFinished: "finished"}

    async def send_and_stop(self: Client, message: object) -> None:
        await send(self, message)
        name = told.get(type(message))
        if name is not None and (trained or name == "finished"):
            path = run / STOP_AT
            if path.exists() and path.read_text() == name:
                await self.drain(
                    timeout_s=60.0
                )  # it is on the buffer's disk, or this kill point would be the one before
            passes(run, name)

    Client.send = send_and_stop  # type: ignore[method-assign]


def _block_engine_step(owner: Any, name: str, run: Path) -> None:
    """From the driver's word on this method does not return; nothing else stands still, and nothing is computed."""

    def block() -> None:
        if _is_wanted(run, ENGINE_STEP):
            write_atomic(run / STOPPED_AT, ENGINE_STEP)
            time.sleep(10_000)

    _before(owner, name, block)


def _put_kill_point_into_the_engine_core() -> None:
    """In vLLM's engine core, which imports this module again: once the plugin has loaded, its scheduler's step."""

    def patch() -> None:
        from actors.engines.vllm import inside

        _block_engine_step(inside.ProbeScheduler, "schedule", Path(os.environ[RUN_DIR]))

    from actors.engines.vllm import plugin

    _after(plugin, "register", patch)


class KillPointLauncher(ProcessLauncher):
    """A launcher (``supervisor.launcher``) that starts learner and actors by way of this module."""

    async def start(self, order: StartOrder) -> LocalRole:
        words = list(order.argv)
        at = words.index(launch.HERE)
        if words[at + 1] in ("learner", "actors"):
            words[at : at + 1] = ["-m", "scripts.kill_points"]
        return await super().start(replace(order, argv=tuple(words)))


def main(argv: Sequence[str]) -> None:
    command, *words = argv
    rundir = RunDir.open(words[0])
    run = rundir.path
    if command == "learner":
        from learner.__main__ import main as learn

        begin = role.run

        def run_with_kill_points(*args: Any) -> NoReturn:
            # Only now: the learner sets up its environment before it loads torch.
            _put_kill_points_into_the_learner(run)
            begin(*args)

        role.run = run_with_kill_points  # type: ignore[assignment]
        learn(words)
    else:
        from actors.__main__ import main as act

        os.environ[RUN_DIR] = str(run)
        if rundir.config.actor.engine == "transformers":
            from actors.engines.transformers.engine import TransformersEngine

            _block_engine_step(TransformersEngine, "_step", run)
        act(words)


if __name__ == "__main__":
    main(sys.argv[1:])
elif __name__ == "__mp_main__" and RUN_DIR in os.environ:
    _put_kill_point_into_the_engine_core()
