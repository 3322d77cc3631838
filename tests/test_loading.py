"""A role that loads is told with its seconds, and those that wait for it do not give up meanwhile."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from atpo_async.config import LinksConfig
from atpo_async.core.errors import WaitTimeout
from atpo_async.report.progress import Progress, panel
from atpo_async.status import snapshot, waits
from atpo_async.status.loading import Loads, RoleStart, line, starts
from atpo_async.status.reporter import grouped
from atpo_async.status.waits import BoundedWait
from tests.hang_support import status, wait

ENGINE = wait("the engine's start", "engine", 20.0)
WEIGHTS = wait("the run's first weights", "learner", 20.0)


def loading(role: str = "actor-0", **changes: Any) -> snapshot.StatusSnapshot:
    fields: dict[str, Any] = {"phase": "loading its engine", "phase_s": 20.0, "starting": True, "waits": (ENGINE,)}
    return status(role, **(fields | changes))


def found(*statuses: snapshot.StatusSnapshot) -> list[RoleStart]:
    return starts(statuses, now=time.monotonic(), wall=time.time())


def put(folder: Path, *statuses: snapshot.StatusSnapshot) -> None:
    for made in statuses:
        (folder / f"{made.role}.json").write_bytes(msgspec.json.encode(made))


# --- who starts ---------------------------------------------------------------------------------------------------


def test_roles_that_start_are_named_with_stage_and_seconds_those_first_that_are_at_work() -> None:
    learner = loading("learner", phase="waiting for the first evaluation", waits=(wait("it", "buffer", 9.0),))
    said = line(found(learner, loading(), status("buffer", phase="serving"), loading("actor-1", phase_s=1.0)))
    assert said == "actor-0: loading its engine (20 s); learner: waiting for the first evaluation (20 s)"


def test_what_an_engine_is_at_while_it_loads_is_told_at_once() -> None:
    said = line(found(loading(phase="loading its engine: capturing CUDA graphs", phase_s=4.0)))
    assert said == "actor-0: loading its engine: capturing CUDA graphs (4.0 s)"


@pytest.mark.parametrize(
    ("stage", "reason", "said"),
    [
        (
            "waiting for its first batch",
            "trees: 3 of 12 ready, 4 under lease, 0 without signal; 1 actors alive; no turn yet",
            "waiting for its first batch (trees: 3 of 12 ready, 4 under lease, 0 without signal; 20 s)",
        ),
        (
            "waiting for the first evaluation",
            "4 of 8 tasks are done",
            "waiting for the first evaluation (4 of 8 tasks are done; 20 s)",
        ),
        ("waiting for its first batch", "x" * 500, f"waiting for its first batch ({'x' * 20}"),
    ],
)
def test_a_role_that_waits_for_the_buffer_says_how_far_that_is(stage: str, reason: str, said: str) -> None:
    own_wait = BoundedWait("the learner", "it", LinksConfig(), Time(), log=logging.getLogger("far"), on="buffer")
    own_wait.again(reason)
    own = grouped([known for known in waits.open_waits() if known["who"] == "the learner"])
    told = line(found(loading("learner", phase=stage, waits=own)))
    assert told.startswith(f"learner: {said}")
    assert told.endswith("; 20 s)")
    assert len(told) < 250
    still = line(found(loading("learner", phase=stage, waits=(*own, ENGINE))))
    assert still == f"learner: {stage} (20 s)", "while it loads itself, that is what it waits for"


def test_who_has_gone_or_was_last_seen_long_ago_does_not_start() -> None:
    gone = loading(pid=1, started=7)
    old = loading("actor-1", host="another", at=time.time() - 1000.0)
    assert found(gone, old) == []


# --- waits for it are extended ----------------------------------------------------------------------------------


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def bounded(tmp_path: Path) -> Iterator[tuple[BoundedWait, Time]]:
    """The learner's, which gives up after 10 s."""
    clock = Time()
    waits.extend_while(Loads(tmp_path, "learner"))
    deadlines = LinksConfig(deadline_s=5.0, give_up_s=10.0)
    yield BoundedWait("the learner", "batch 3", deadlines, clock, log=logging.getLogger("loads"), on="buffer"), clock
    waits.extend_while(None)


def test_a_wait_past_its_end_goes_on_while_an_engine_loads_and_says_why(
    bounded: tuple[BoundedWait, Time], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wait_for_it, clock = bounded
    put(tmp_path, loading())
    for clock.now in range(0, 60, 6):
        wait_for_it.again("no tree")
    assert "and waits on, as actor-0 is loading its engine for 20 s" in caplog.text
    put(tmp_path, loading(phase="growing trees", starting=False))
    began = clock.now
    wait_for_it.again("no tree")
    clock.now = began + 20.0
    with pytest.raises(WaitTimeout, match=r"the learner waited \d+ s for batch 3 \(links.give_up_s\): no tree"):
        wait_for_it.again("no tree")


def test_a_role_that_starts_by_waiting_for_others_extends_no_wait(
    bounded: tuple[BoundedWait, Time], tmp_path: Path
) -> None:
    wait_for_it, clock = bounded
    put(tmp_path, loading(waits=(WEIGHTS,)), loading("learner"))  # the learner's own loading neither
    clock.now = 11.0
    with pytest.raises(WaitTimeout):
        wait_for_it.again("no tree")


def test_an_actor_that_joined_by_address_and_has_asked_for_nothing_yet_is_waited_for(
    bounded: tuple[BoundedWait, Time], tmp_path: Path
) -> None:
    wait_for_it, clock = bounded
    peers = [{"peer": "learner", "silent_s": 0.1, "handled": 0}, {"peer": "actor-far-7", "silent_s": 0.1, "handled": 0}]
    put(tmp_path, status("buffer", links={"buffer at a": {"peers": peers}}))
    clock.now = 11.0
    wait_for_it.again("no tree")
    peers[1]["handled"] = 5
    put(tmp_path, status("buffer", links={"buffer at a": {"peers": peers}}))
    clock.now = 22.0
    with pytest.raises(WaitTimeout):
        wait_for_it.again("no tree")


@pytest.mark.parametrize("name", ["buffer", "buffer, followers"])
def test_a_relay_or_a_follower_that_never_asks_for_trees_extends_no_wait(tmp_path: Path, name: str) -> None:
    peer = {"peer": "site-1/far", "silent_s": 0.1, "handled": 0}
    facts = {"buffer": {"relays": {"site-1/far": "on h, 0 actors: none"}}} if name == "buffer" else {}
    put(tmp_path, status("buffer", links={"buffer at a": {"name": name, "peers": [peer]}}, facts=facts))
    assert Loads(tmp_path, "learner")() is None


def test_a_role_that_its_supervisor_starts_or_starts_again_is_waited_for(tmp_path: Path) -> None:
    loads = Loads(tmp_path, "actor-0", ("buffer", "learner", "actor-0"))
    put(tmp_path, status("buffer", phase="serving"))
    assert loads() == "learner is being started"
    put(tmp_path, loading("learner", pid=1, started=7))
    assert loads() == "learner is being started"
    for phase in ("training", snapshot.ENDED):
        put(tmp_path, status("learner", phase=phase))
        assert loads() is None
    (tmp_path / "learner.json").unlink()
    assert Loads(tmp_path, "actor-0")() is None, "nobody starts it"


def test_no_wait_is_extended_for_ever(bounded: tuple[BoundedWait, Time], tmp_path: Path) -> None:
    wait_for_it, clock = bounded
    put(tmp_path, loading())
    clock.now = waits.LOADS_AT_MOST_S + 1.0
    with pytest.raises(WaitTimeout):
        wait_for_it.again("no tree")


# --- the screen ---------------------------------------------------------------------------------------------------


def of(for_s: float) -> list[RoleStart]:
    return [RoleStart(role="actor-0", stage="loading its engine", for_s=for_s, loads=True)]


def test_outside_a_terminal_a_line_comes_every_ten_seconds_and_later_less_often() -> None:
    out, clock = io.StringIO(), Time()
    with Progress(Console(file=out, width=200), title="t", total_steps=3, clock=clock) as progress:
        for clock.now in range(121):
            progress.starting(of(float(clock.now)))
        progress.starting([])
    said = out.getvalue().splitlines()
    assert said[:3] == [f"actor-0: loading its engine ({n} s)" for n in (10, 20, 30)]
    assert 6 < len(said) < 12


def test_nothing_is_said_of_what_starts_quickly() -> None:
    out, clock = io.StringIO(), Time()
    with Progress(Console(file=out), title="t", total_steps=3, clock=clock) as progress:
        for clock.now in range(30):
            progress.starting(of(1.0))
    assert out.getvalue() == ""


def test_on_a_terminal_the_panel_shows_it() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with Progress(console, title="t", total_steps=3, clock=Time()) as progress:
        progress.starting(of(20.0))
    assert "actor-0: loading its engine (20 s)" in out.getvalue()
    console.print(panel(progress.state, title="t", elapsed_s=1.0))
