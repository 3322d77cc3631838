"""A role that is stuck is told, with who waits for it, and started again; one that works or waits for others never is.

First the judgement on snapshots made up, then every role blocked in turn under the real supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atpo_async.config import SupervisorConfig
from atpo_async.core.errors import RoleCrashed
from atpo_async.ops.specs import RoleSpec
from atpo_async.ops.supervisor import Outcome, Supervisor
from atpo_async.run import processes
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot
from atpo_async.status.chains import Stuck, by_role, explain
from atpo_async.status.hangs import ObservedRole, Verdict, Watch
from atpo_async.status.snapshot import ENDING, StatusSnapshot
from tests.hang_support import (
    BLOCKS_ITS_LOOP,
    DEADLINE_S,
    SERVES,
    WAITS_FOR_THE_BUFFER,
    make_run,
    observed,
    spec_of,
    status,
    status_of,
    until_async,
    wait,
)

TORCH = wait("learn", "torch", 500.0)


class Looks:
    """A watch that looks once a second at roles whose status threads live."""

    def __init__(self, *, deadline_s: float = 10.0, hang_s: float = 100.0) -> None:
        self.watch = Watch(deadline_s=deadline_s, hang_s=hang_s, every_s=1.0)
        self.now = 1000.0
        self.sequence = 0

    def look(
        self, *observed_roles: ObservedRole, living: bool = True, others: tuple[StatusSnapshot, ...] = ()
    ) -> list[Verdict]:
        self.now += 1.0
        self.sequence += living
        renewed = [
            ObservedRole(
                role=s.role,
                statuses=tuple(_numbered(p, self.sequence) for p in s.statuses),
                stopped=s.stopped,
                processor_s=s.processor_s,
                moved_mb=s.moved_mb,
            )
            for s in observed_roles
        ]
        return self.watch.look(renewed, self.now, others=others)

    def often(self, times: int, *observed_roles: ObservedRole, living: bool = True) -> list[Verdict]:
        return [verdict for _ in range(times) for verdict in self.look(*observed_roles, living=living)]


def _numbered(made: StatusSnapshot, sequence: int) -> StatusSnapshot:
    return status(**{f: getattr(made, f) for f in made.__struct_fields__} | {"sequence": sequence})


def ended(verdicts: list[Verdict]) -> list[str]:
    return [verdict.ends for verdict in verdicts if verdict.ends is not None]


# --- who is stuck -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"loop_age_s": 500.0, "stack": ("loop.py:7 spin: x()",)},
            "stands still: its loop last ran 8 min ago, in loop",
        ),
        ({"waits": (TORCH,)}, "has been at learn for 8 min"),
        ({"phase": ENDING, "phase_s": 500.0}, "has not come to its end for 8 min"),
        ({"stopped": (4711,)}, "is stopped by a signal (kill -CONT 4711 lets it go on)"),
    ],
)
def test_a_stuck_role_is_told_past_the_deadline_and_ended_past_the_second(changes: dict[str, object], why: str) -> None:
    looks = Looks()
    assert looks.often(10, observed(**changes)) == []  # type: ignore[arg-type]
    told = looks.often(20, observed(**changes))  # type: ignore[arg-type]
    assert ended(told) == []
    assert len(told) == 2, "told at the deadline, and again when it has lasted twice as long"
    assert why in told[0].line
    assert ended(looks.often(75, observed(**changes)))[:1] == ["learner"]  # type: ignore[arg-type]


def test_a_process_without_a_sign_of_life_is_stuck() -> None:
    looks = Looks()
    looks.look(observed())
    told = looks.often(120, observed(), living=False)
    assert "has given no sign of life" in told[0].line
    assert ended(told)[:1] == ["learner"]


def test_a_role_that_never_writes_a_status_and_does_nothing_is_stuck_and_one_that_loads_is_not() -> None:
    looks = Looks()
    assert ended(looks.often(120, ObservedRole(role="learner", statuses=())))[:1] == ["learner"]
    for work in ({"processor_s": 0.5}, {"moved_mb": 5.0}):
        looks = Looks()
        for second in range(300):
            done = {name: each_s * second for name, each_s in work.items()}
            assert looks.look(ObservedRole(role="learner", statuses=(), **done)) == []  # type: ignore[arg-type]


def test_who_waits_for_another_role_is_never_stuck_however_long() -> None:
    looks = Looks()
    waiting = observed(waits=(wait("batch 3", "buffer", 900.0), wait("a full disk", "disk", 900.0), wait("a slot", "")))
    assert ended(looks.often(500, waiting, observed("buffer"))) == []


def test_progress_sets_the_clock_back() -> None:
    looks = Looks()
    for step in range(50):
        assert looks.often(9, observed(waits=(TORCH,), progress={"micro-batches": step})) == []


def test_a_change_of_phase_is_progress() -> None:
    looks = Looks()
    for step in range(50):
        assert looks.often(9, observed(waits=(TORCH,), phase=f"loading part {step}")) == []


def test_computing_is_progress_while_a_role_starts_and_only_then() -> None:
    looks, used = Looks(), 0.0
    for _ in range(300):
        used += 0.5
        assert looks.look(observed(waits=(TORCH,), starting=True, processor_s=used)) == []
    # A busy loop computes too: after the start it is no progress.
    told: list[Verdict] = []
    for _ in range(120):
        used += 0.5
        told += looks.look(observed(waits=(TORCH,), processor_s=used))
    assert ended(told)[:1] == ["learner"]


def test_the_beats_of_an_idle_role_do_not_count_as_computing() -> None:
    looks, told = Looks(), []
    for second in range(120):
        told += looks.look(observed(waits=(TORCH,), starting=True, processor_s=0.01 * second))
    assert ended(told)[:1] == ["learner"]


def test_what_ends_by_itself_is_left_to_that() -> None:
    looks = Looks()
    assert looks.often(300, observed("actor-0", waits=(wait("an action", "engine", 250.0, limit_s=600.0),))) == []
    overdue = observed("actor-0", waits=(wait("an action", "engine", 620.0, limit_s=600.0),))
    assert ended(looks.often(120, overdue))[:1] == ["actor-0"]


def test_a_role_that_was_stopped_and_goes_on_has_all_its_time_again() -> None:
    looks = Looks()
    looks.look(observed())
    looks.often(90, observed(stopped=(1,)), living=False)
    # Its waits are older than any deadline: it slept all the while.
    assert looks.often(9, observed(waits=(TORCH,))) == []
    assert ended(looks.often(80, observed(waits=(TORCH,)))) == []


def test_a_watcher_that_slept_itself_has_no_role_restarted() -> None:
    looks = Looks()
    looks.often(5, observed(waits=(TORCH,)))
    looks.now += 10_000.0
    assert looks.often(9, observed(waits=(TORCH,))) == []


def test_a_new_attempt_of_a_role_has_all_its_time() -> None:
    looks = Looks()
    looks.often(95, observed(waits=(TORCH,)))
    assert looks.often(9, observed(waits=(TORCH,), mark="r/learner/1")) == []


def test_one_rank_that_is_stuck_ends_the_role() -> None:
    looks = Looks()
    both = ObservedRole(role="learner", statuses=(status(), status("learner-1", loop_age_s=500.0)))
    assert ended(looks.often(120, both))[:1] == ["learner"]


def test_a_run_in_which_nothing_moves_is_told_though_nobody_is_stuck() -> None:
    looks = Looks()
    learner = observed(waits=(wait("batch 3", "buffer", 900.0),))
    buffer = observed("buffer", waits=(wait("trees", "actors", 900.0),))
    told = looks.often(50, learner, buffer)
    assert ended(told) == []
    assert len(told) == 3, "at the deadline, and whenever it has lasted twice as long"
    assert "nothing has moved for 10 s, though no role is stuck: learner waits" in told[0].line
    assert "for trees from actors, of which none is there" in told[0].line


# --- who waits for whom -----------------------------------------------------------------------------------------


def said(*statuses: StatusSnapshot, **stuck: str) -> list[str]:
    return explain(by_role(statuses), {role: Stuck(role=role, for_s=60.0, why=why) for role, why in stuck.items()})


def test_a_chain_is_followed_to_the_one_that_holds_it_up() -> None:
    actor = status("actor-0", waits=(wait("a lease", "buffer", 12.0),))
    buffer = status("buffer", waits=(wait("room", "learner", 3.0),))
    learner = status("learner", waits=(wait("learn", "torch", 2.0),))
    chain = "actor-0 waits 12 s for a lease from buffer, which waits 3.0 s for room from learner, which "
    assert said(actor, buffer, learner) == [f"{chain}is at work: learn (torch, 2.0 s)"]
    assert said(actor, buffer, learner, learner="is stopped") == [f"{chain}is stopped"]


def test_a_chain_that_closes_says_so() -> None:
    a = status("buffer", waits=(wait("x", "learner"),))
    b = status("learner", waits=(wait("y", "buffer"),))
    assert said(a, b) == [
        "buffer waits 1.0 s for x from learner, which waits 1.0 s for y from buffer, which closes the circle"
    ]


def test_a_circle_is_told_once_however_many_wait_in_it_or_for_it() -> None:
    buffer = status("buffer", waits=(wait("trees", "actor-0", 5.0),))
    actor = status("actor-0", waits=(wait("weights", "learner", 6.0),))
    learner = status("learner", waits=(wait("batch 3", "buffer", 7.0),))
    other = status("actor-1", waits=(wait("a lease", "buffer", 8.0),))
    assert len(said(buffer, actor, learner)) == 1
    (sentence,) = said(buffer, actor, learner, other)
    assert sentence.startswith("actor-1 waits 8.0 s for a lease from buffer, which waits 5.0 s for trees from actor-0")
    assert sentence.endswith("for batch 3 from buffer, which closes the circle")


def test_a_circle_is_no_deadlock_while_one_of_its_waits_is_young() -> None:
    statuses = by_role(
        [status("buffer", waits=(wait("x", "learner", 9.0),)), status("learner", waits=(wait("y", "buffer", 0.5),))]
    )
    assert explain(statuses, {}, circle_s=3.0) == []
    assert len(explain(statuses, {}, circle_s=0.5)) == 1


def test_who_is_waited_for_and_waits_for_no_other_is_said_to_be_at_what_it_is_at() -> None:
    learner = status("learner", waits=(wait("batch 6 (8 trees)", "buffer", 2.0),))
    assert said(learner, status("buffer", phase="serving")) == [
        "learner waits 2.0 s for batch 6 (8 trees) from buffer, which is serving, and waits for no other role"
    ]


def test_an_actor_that_joined_by_address_is_one_of_the_actors_that_are_waited_for() -> None:
    peers = [{"peer": "actor-far-7", "silent_s": 0.4}, {"peer": "learner", "silent_s": 0.1}, {"garbage": 1}, 7]
    buffer = status("buffer", waits=(wait("trees", "actors", 20.0),), links={"buffer at a": {"peers": peers}})
    looks = Looks()
    told = looks.often(12, observed("buffer", waits=buffer.waits, links=buffer.links))
    assert told[0].line.endswith("waits 20 s for trees from actor-far-7, which joined by address (heard 0.4 s ago)")


def test_an_actor_of_another_hosts_key_is_one_of_the_actors_that_are_waited_for() -> None:
    peers = [{"peer": "gpu-7/actor-0", "silent_s": 0.4}]
    buffer = status("buffer", waits=(wait("trees", "actors", 20.0),), links={"buffer at a": {"peers": peers}})
    told = Looks().often(12, observed("buffer", waits=buffer.waits, links=buffer.links))
    assert "trees from gpu-7/actor-0, which joined by address" in told[0].line


def test_a_run_that_stands_still_for_a_restart_says_when_that_comes() -> None:
    watch = Watch(deadline_s=10.0, hang_s=100.0, every_s=1.0)
    actor = observed("actor-0", waits=(wait("a lease", "buffer", 20.0),))
    told = []
    for second in range(20):
        (status_of_it,) = actor.statuses
        seen = ObservedRole(role="actor-0", statuses=(_numbered(status_of_it, second),))
        told += watch.look([seen], 100.0 + second, restarts={"buffer": 30.0 - second})
    assert [verdict.line for verdict in told] == [
        "nothing has moved for 10 s; the supervisor starts buffer again in 20 s: actor-0 waits 20 s for a lease from "
        "buffer, which is started again in 20 s"
    ]


def test_of_several_actors_the_stuck_one_is_the_reason() -> None:
    buffer = status("buffer", waits=(wait("trees", "actors"),))
    assert said(buffer, status("actor-0"), status("actor-1"), **{"actor-1": "stands still"}) == [
        "buffer waits 1.0 s for trees from actor-1, which stands still"
    ]


def test_a_wait_does_not_lead_back_where_another_one_leads_on() -> None:
    learner = status("learner", waits=(wait("batch 3", "buffer", 60.0),))
    buffer = status("buffer", waits=(wait("room", "learner", 90.0), wait("trees", "actors", 5.0)))
    actor = status("actor-0", waits=(wait("an action", "engine", 4.0),))
    assert said(learner, buffer, actor) == [
        "learner waits 60 s for batch 3 from buffer, which waits 5.0 s for trees from actor-0, which is at work: "
        "an action (engine, 4.0 s)"
    ]


def test_the_disk_is_an_end_of_its_own() -> None:
    learner = status("learner", waits=(wait("batch 3", "buffer", 60.0),))
    buffer = status("buffer", waits=(wait("a commit", "disk", 50.0),))
    assert said(learner, buffer) == [
        "learner waits 60 s for batch 3 from buffer, which waits 50 s for a commit from disk"
    ]


def test_of_a_role_without_a_status_nothing_is_known() -> None:
    (sentence,) = said(status("learner", waits=(wait("batch 3", "buffer"),)))
    assert sentence.endswith("for batch 3 from buffer, of which nothing is known here")


def test_a_stuck_role_for_which_nobody_waits_is_told_all_the_same() -> None:
    assert said(status("actor-0"), **{"actor-0": "stands still"}) == ["actor-0 stands still"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_a_process_does_is_read_from_the_system() -> None:
    me = os.getpid()
    sum(range(2_000_000))
    Path("/proc/self/stat").read_bytes()
    assert processes.processor_s([me]) > 0
    assert processes.moved_mb([me]) > 0
    assert processes.stopped([me]) == []
    assert processes.started(me) is not None
    gone = 2**22 + 1  # above the largest id that a kernel gives
    assert (processes.processor_s([gone]), processes.moved_mb([gone])) == (0.0, 0.0)
    assert processes.stopped([gone]) == []
    assert processes.started(gone) is None


# --- every role blocked in turn, under the supervisor -----------------------------------------------------------

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
QUICK = SupervisorConfig(max_restarts=2, backoff_s=0.0, stop_grace_s=5.0, hang_s=2.0)

TORCH_HANGS = """
    waits.phase("training")
    def learn():
        time.sleep(1000)
    with waits.waiting(WHO, "learn", on=waits.TORCH):
        if first_time():
            await asyncio.get_running_loop().run_in_executor(None, learn)
    print("second attempt", flush=True)
    await context.stopping.wait()
"""
ENGINE_HANGS = """
    waits.phase("growing trees")
    if first_time():
        with waits.waiting("tree t1", "an action", on=waits.ENGINE):
            await asyncio.Event().wait()
    print("second attempt", flush=True)
    await context.stopping.wait()
"""
ENVIRONMENT_HANGS = ENGINE_HANGS.replace("an action", "the environment's step").replace("ENGINE", "ENVIRONMENT")
WORKS = """
    waits.phase("training")
    with waits.waiting(WHO, "a long step", on=waits.TORCH):
        while not context.stopping.is_set():
            waits.progress("micro-batches")
            await asyncio.sleep(0.1)
"""
SECOND_SERVES = """
    waits.phase("serving")
    if not first_time():
        print("second attempt", flush=True)
    await context.stopping.wait()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path)


class Supervised:
    """A supervisor at work on scripted roles."""

    def __init__(self, run: RunDir, specs: list[RoleSpec], settings: SupervisorConfig = QUICK) -> None:
        self.said: list[str] = []
        self.run = run
        self.supervisor = Supervisor(run, specs, settings=settings, say=self.said.append)
        self.task = asyncio.create_task(self.supervisor.run())

    def story(self) -> str:
        logs = [f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted((self.run.path / "logs").glob("*"))]
        return "\n".join([*self.said, *logs])

    def log(self, role: str, attempt: int) -> str:
        path = self.run.log_path(role, attempt)
        return path.read_text() if path.exists() else ""

    def said_of_working_roles(self) -> list[str]:
        """Without what is said of a role that a busy machine lets begin late, and of where others join."""
        return [line for line in self.said if "has not begun" not in line and " with --join " not in line]

    async def until_again(self, role: str) -> None:
        await until_async(lambda: "second attempt" in self.log(role, 1), self.story)

    def line(self, beginning: str) -> str:
        return next((line for line in self.said if line.startswith(beginning)), "")


@contextlib.asynccontextmanager
async def supervised(run: RunDir, *specs: RoleSpec, settings: SupervisorConfig = QUICK) -> AsyncIterator[Supervised]:
    job = Supervised(run, list(specs), settings)
    try:
        yield job
    finally:
        job.supervisor.interrupt()
        job.supervisor.interrupt()
        with contextlib.suppress(RoleCrashed):
            assert await asyncio.wait_for(job.task, DEADLINE_S) is Outcome.INTERRUPTED
        assert not processes.marked(*(f"{run.run_id}/{spec.name}/{n}" for spec in specs for n in range(4)))


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    "blocked",
    [
        dict.fromkeys(("buffer", "learner", "actor-0"), (BLOCKS_ITS_LOOP, "stands still: its loop last ran")),
        {
            "learner": (TORCH_HANGS, "has been at learn for"),
            "actor-0": (ENGINE_HANGS, "has been at an action for"),
            "actor-1": (ENVIRONMENT_HANGS, "has been at the environment's step for"),
        },
    ],
    ids=["loops", "parts"],
)
async def test_every_role_that_is_stuck_is_started_again_and_one_that_waits_for_it_is_not(
    run: RunDir, blocked: dict[str, tuple[str, str]]
) -> None:
    specs = [spec_of(run, role, body) for role, (body, _) in blocked.items()]
    waiting = spec_of(run, "actor-7", WAITS_FOR_THE_BUFFER.replace("buffer", "learner"))
    async with supervised(run, *specs, waiting) as job:
        for role, (_, why) in blocked.items():
            await job.until_again(role)
            again = job.line(f"{role} ended: stuck for more than 2 s (supervisor.hang_s): ")
            assert why in again, job.story()
            assert "starting it again in 0 s" in again, job.story()
            assert why in run.log_path(role, 0).with_suffix(".stuck.txt").read_text()
        assert "for a batch from learner, which " in job.line("learner ended"), job.story()
        assert not run.log_path("actor-7", 1).exists(), job.story()


@pytest.mark.slow
@linux
async def test_every_role_that_a_signal_has_stopped_is_started_again(run: RunDir) -> None:
    roles = ("buffer", "learner", "actor-0")
    async with supervised(run, *(spec_of(run, role, SECOND_SERVES) for role in roles)) as job:
        for role in roles:
            await until_async(lambda role=role: status_of(run, role) is not None, job.story)  # type: ignore[misc]
            os.kill(job.supervisor.pids[role], signal.SIGSTOP)
        for role in roles:
            await job.until_again(role)
            assert "is stopped by a signal" in job.line(f"{role} ended: stuck"), job.story()


@linux
async def test_a_role_that_is_stopped_for_a_short_while_goes_on(run: RunDir) -> None:
    settings = QUICK.model_copy(update={"hang_s": 1000.0})
    async with supervised(run, spec_of(run, "buffer", SECOND_SERVES), settings=settings) as job:
        await until_async(lambda: status_of(run, "buffer") is not None, job.story)
        pid = job.supervisor.pids["buffer"]
        os.kill(pid, signal.SIGSTOP)
        await until_async(lambda: job.line("buffer is stopped by a signal"), job.story)
        os.kill(pid, signal.SIGCONT)
        before = status_of(run, "buffer")
        await until_async(lambda: status_of(run, "buffer") != before, job.story)
        assert job.supervisor.pids["buffer"] == pid


@pytest.mark.slow
@linux
async def test_a_role_that_hangs_again_and_again_stops_the_run_with_the_status_of_every_role(run: RunDir) -> None:
    always = ENGINE_HANGS.replace("first_time()", "True")
    settings = QUICK.model_copy(update={"max_restarts": 1})
    actor = spec_of(run, "actor-0", always)
    job = Supervised(run, [actor, spec_of(run, "learner", WAITS_FOR_THE_BUFFER.replace("buffer", "actors"))], settings)
    with pytest.raises(RoleCrashed) as caught:
        await asyncio.wait_for(job.task, DEADLINE_S)
    assert "actor-0 crashed 2 times" in str(caught.value)
    assert "learner waits" in str(caught.value)
    assert "from actor-0, which has been at an action for" in str(caught.value)
    assert "tree t1 for an action from engine" in run.log_path("actor-0", 1).with_suffix(".stuck.txt").read_text()


@pytest.mark.slow
@linux
async def test_a_long_step_that_gets_on_and_whoever_waits_for_it_are_left_alone(run: RunDir) -> None:
    waiting = WAITS_FOR_THE_BUFFER.replace("buffer", "learner")
    async with supervised(run, spec_of(run, "learner", WORKS), spec_of(run, "actor-0", waiting)) as job:

        def statuses(role: str) -> int:
            found = status_of(run, role)
            return 0 if found is None else found.sequence

        await until_async(lambda: statuses("learner") > 6 and statuses("actor-0") > 6, job.story)
        assert job.said_of_working_roles() == []
        assert set(job.supervisor.pids) == {"learner", "actor-0"}


@linux
async def test_a_damaged_status_file_does_not_keep_the_supervisor_from_looking(run: RunDir) -> None:
    folder = run.path / snapshot.FOLDER
    folder.mkdir()
    (folder / "garbage.json").write_text("{")
    async with supervised(run, spec_of(run, "buffer", SERVES)) as job:
        await until_async(lambda: (p := status_of(run, "buffer")) is not None and p.sequence > 2, job.story)
        assert job.said_of_working_roles() == []
