"""A role that saves what it has done is waited for, told, and ended only where it stands still or the user says so."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from atpo_async.api.notes import saved
from atpo_async.ops import stopping
from atpo_async.ops.stopping import Watch
from atpo_async.ops.supervisor import Outcome, Supervisor
from atpo_async.run.metrics import MetricsWriter
from atpo_async.run.rundir import RunDir
from atpo_async.status.hangs import ObservedRole
from atpo_async.status.waits import DISK, SAVING, TORCH
from tests.hang_support import DEADLINE_S, make_run, spec_of, status, status_of, until_async, wait

SAVES = """
    waits.phase("working")
    await context.stopping.wait()
    waits.phase(waits.SAVING)
    with waits.waiting("the learner", "save checkpoint", on=waits.DISK):
        while not {over}:
            sum(range(100_000))
            waits.progress("parts")
            await asyncio.sleep(0.01)
    print("saved", flush=True)
"""
STANDS_STILL = """
    waits.phase("working")
    await context.stopping.wait()
    waits.phase(waits.SAVING)
    await asyncio.sleep(1000)
"""


def saving(*, processor_s: float = 0.0, moved_mb: float = 0.0, **changes: object) -> ObservedRole:
    made = status("learner", phase=SAVING, waits=(wait("save checkpoint", DISK, 7.0),), **changes)
    return ObservedRole(role="learner", statuses=(made,), processor_s=processor_s, moved_mb=moved_mb)


def test_a_role_that_saves_is_waited_for_and_told_again_whenever_it_has_lasted_twice_as_long() -> None:
    watch = Watch(hang_s=60.0)
    told: dict[int, str] = {}
    for second in range(40):
        look = watch.look([saving(moved_mb=second * 10.0)], 1000.0 + second)
        assert look.waited_for == ("learner",)
        told |= dict.fromkeys([second] if look.lines else [], "".join(look.lines))
    assert list(told) == [2, 4, 8, 16, 32]
    assert told[8] == (
        "waiting for learner to save what was trained: save checkpoint, 8.0 s so far; Ctrl-C again ends everything at "
        "once and loses what no checkpoint holds"
    )


@pytest.mark.parametrize("sign", ["progress", "processor", "written"])
def test_whatever_shows_that_it_gets_on_keeps_it_waited_for(sign: str) -> None:
    watch = Watch(hang_s=10.0)
    for second in range(100):
        observed = saving(
            progress={"micro-batches": second if sign == "progress" else 1},
            processor_s=second * 0.5 if sign == "processor" else 0.0,
            moved_mb=second * 5.0 if sign == "written" else 0.0,
        )
        assert watch.look([observed], 1000.0 + second).waited_for == ("learner",)


def test_one_that_stands_still_is_waited_for_no_more_and_the_loss_is_told() -> None:
    watch = Watch(hang_s=10.0)
    room = wait("space for the checkpoint of step 6 in c (No space left on device)", DISK, 9.0)
    observed = ObservedRole(
        role="learner", statuses=(status("learner", phase=SAVING, waits=(wait("learn", TORCH), room)),)
    )
    looks = [watch.look([observed], 1000.0 + second) for second in range(12)]
    assert looks[9].waited_for == ("learner",)
    assert looks[11].waited_for == ()
    assert looks[11].lines == (
        "learner has stood still for 11 s while it saved (space for the checkpoint of step 6 in c (No space left on "
        "device)) and is ended; what no checkpoint holds is trained on again",
    )


def test_a_role_that_has_nothing_to_save_is_not_waited_for() -> None:
    assert Watch(hang_s=10.0).look([ObservedRole(role="actor-0", statuses=(status("actor-0"),))], 0.0).waited_for == ()


@pytest.mark.parametrize(
    ("signum", "line"),
    [
        (signal.SIGINT, "stopping; Ctrl-C again ends everything at once"),
        (signal.SIGTERM, "stopping, as SIGTERM asks; a second SIGTERM ends everything at once"),
    ],
)
def test_a_stop_says_which_signal_asks_for_it_and_ends_everything_the_second_time(signum: int, line: str) -> None:
    assert stopping.stopping_line(signum) == line
    watch = Watch(hang_s=60.0, again=stopping.again(signum))
    looks = [watch.look([saving(processor_s=float(second))], 1000.0 + second) for second in range(4)]
    (told,) = [line for look in looks for line in look.lines]
    assert f"; {stopping.again(signum)} ends everything at once and loses what" in told


class Clock:
    """The supervisor's: real time, and whatever a test lets pass at once."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@contextlib.asynccontextmanager
async def stopping_learner(
    folder: Path, body: str, **settings: float
) -> AsyncIterator[tuple[Supervisor, Clock, list[str], Callable[[], str]]]:
    """A run that is asked to stop while its learner works: the supervisor, its clock, what it says, and the log.

    The grace is longer than a busy machine takes to show that the learner saves; the clock makes it pass.
    """
    run = make_run(folder, supervisor={"stop_grace_s": DEADLINE_S, **settings})
    said: list[str] = []
    clock = Clock()
    spec = spec_of(run, "learner", body, ends_run=True)
    supervisor = Supervisor(run, [spec], settings=run.config.supervisor, say=said.append, clock=clock)
    task = asyncio.create_task(supervisor.run())
    await until_async(lambda: (p := status_of(run, "learner")) is not None and p.phase == "working")
    supervisor.interrupt()
    yield supervisor, clock, said, run.log_path("learner", 0).read_text
    assert await asyncio.wait_for(task, DEADLINE_S) is Outcome.INTERRUPTED


def told_to_save(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("waiting for learner to save")]


def has_stood_still(said: list[str]) -> bool:
    return any("has stood still for" in line for line in said)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_saving_outlasts_the_grace_of_a_stop(tmp_path: Path) -> None:
    over = tmp_path / "over"
    body = SAVES.format(over=f"Path({str(over)!r}).exists()")
    async with stopping_learner(tmp_path, body) as (_, clock, said, log):
        await until_async(lambda: told_to_save(said))
        clock.ahead_s += 10 * DEADLINE_S
        await until_async(lambda: len(told_to_save(said)) >= 2)
        assert "saved" not in log()
        over.touch()
    assert "saved" in log()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_a_second_interrupt_ends_the_wait_for_saving(tmp_path: Path) -> None:
    async with stopping_learner(tmp_path, STANDS_STILL, hang_s=1000.0) as (supervisor, _, said, _):
        await until_async(lambda: told_to_save(said))
        supervisor.interrupt()
    assert not has_stood_still(said)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_saving_that_stands_still_ends_the_wait_for_it(tmp_path: Path) -> None:
    async with stopping_learner(tmp_path, STANDS_STILL, hang_s=4.0) as (_, clock, said, _):
        await until_async(lambda: has_stood_still(said))
        clock.ahead_s += 10 * DEADLINE_S


def test_the_closing_line_says_where_the_run_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, run={"dir": str(tmp_path), "name": "r", "steps": 60})
    assert saved(run) == "Nothing is saved: the run begins with step 1 of 60."
    _trained(run, 2)
    assert saved(run) == (
        "Nothing is saved: the run begins with step 1 of 60.  Steps 1 to 2 were not saved and are done again."
    )
    (run.checkpoints / "step-000002-v000002").mkdir()
    assert saved(run) == "Saved: step 2 of 60."
    _trained(run, 3)
    assert saved(run) == ("Saved: step 2 of 60.  What was done after it, to step 3, was not saved and is done again.")


def _trained(run: RunDir, step: int) -> None:
    with MetricsWriter(run.metrics_path, source="learner") as writer:
        writer.write(step=step, version=step, metrics={"train/loss": 1.0})
