"""When faults of a task stop the run, when it goes on, and what the user hears of them."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec
import pytest

from actors.faults.fault import Fault, Place
from actors.faults.faults import Faults
from actors.faults.notices import CutActions
from actors.faults.watch import FaultWatch
from atpo_async.core.errors import AtpoError, ConfigError, EngineDead, EnvironmentBroken
from atpo_async.ops import notices
from tests.actor_support import leaf, lease

REWARD = Fault("environment_failed", "value of reward", "environment 'w:make', task 3 (train), step 2: reward is 'x'")
RAISES = Fault("environment_failed", "KeyError in step", "task 3 (train), step: KeyError: 'page'")
LATE = Fault("environment_timeout", "timeout of step", "task 3 (train), step took over 60 s")
UNANSWERED = Fault("generate_timeout", "generate_timeout", "request t3/4 took over 120 s")

Plan = Iterator[tuple[Place, float, Fault | None]]
"""Of one tree: where each chain belongs, seconds after the tree's beginning at which it ends, and its fault."""


@dataclass
class World:
    """Trees of ``plan(number)`` are grown, ``at_once`` of them, in a time of their own; the notices are collected."""

    at_once: int
    plan: Callable[[int], Plan]
    now: float = 0.0
    begun: int = 0
    notices_sent: list[str] = field(default_factory=list)
    error: AtpoError | None = None

    def run(self, trees: int) -> World:
        watch = FaultWatch(
            "w:make",
            least=min(8, max(4, self.at_once)),
            notify=lambda line, key: self.notices_sent.append(line),
            clock=lambda: self.now,
        )
        events: list[tuple[float, int, int, Place, Fault | None, bool]] = []
        order = 0

        def begin() -> None:
            nonlocal order
            watch.began(str(self.begun))
            chains = sorted(self.plan(self.begun), key=lambda chain: chain[1])
            for at, (place, seconds, fault) in enumerate(chains):
                order += 1
                last = at == len(chains) - 1
                heapq.heappush(events, (self.now + seconds, order, self.begun, place, fault, last))
            self.begun += 1

        for _ in range(self.at_once):
            begin()
        while events and self.begun < trees:
            self.now, _, tree, place, fault, last = heapq.heappop(events)
            try:
                watch.chain_ended(str(tree), place, fault)
            except AtpoError as exc:
                self.error = exc
                break
            if last:
                watch.over(str(tree))
                begin()
        return self


def chains(faults: list[Fault | None], *, seconds: float = 1.0, place: Place = "chain") -> Plan:
    return iter([(place, seconds * (1 + 0.01 * i), fault) for i, fault in enumerate(faults)])


@pytest.mark.parametrize("fault", [REWARD, RAISES, LATE])
@pytest.mark.parametrize("at_once", [1, 4, 16, 64])
def test_a_fault_in_every_chain_of_every_task_ends_the_run_within_the_first_trees(fault: Fault, at_once: int) -> None:
    world = World(at_once, lambda number: chains([fault] * 6)).run(1000)
    assert isinstance(world.error, EnvironmentBroken)
    assert str(world.error).startswith("environment 'w:make': ")
    assert fault.detail.removeprefix("environment 'w:make', ") in str(world.error)
    assert world.begun <= max(at_once, 8) + at_once


@pytest.mark.parametrize(
    "detail",
    ["task 3 (train): no", "environment 'w:make', task 3 (train): no", "environment 'w:make': task 3 (train): no"],
)
def test_the_error_that_ends_the_run_names_the_environment_once(detail: str) -> None:
    fault = Fault("environment_failed", "value of reward", detail)
    error = str(World(4, lambda number: chains([fault] * 6)).run(1000).error)
    assert error.startswith("environment 'w:make': ")
    assert error.endswith("; the latest: task 3 (train): no")
    assert error.count("w:make") == 1


@pytest.mark.parametrize("at_once", [1, 4, 16])
def test_trees_that_are_slow_are_not_waited_for_beyond_half_a_minute(at_once: int) -> None:
    world = World(at_once, lambda number: chains([RAISES] * 6, seconds=9.0)).run(1000)
    assert isinstance(world.error, EnvironmentBroken)
    assert world.now <= 30


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("at_once", "fault_s", "good_s"), [(4, 1.0, 1.0), (8, 0.01, 20.0), (16, 5.0, 0.5)])
def test_one_task_in_five_that_always_fails_lets_the_run_go_on_for_ever(
    seed: int, at_once: int, fault_s: float, good_s: float
) -> None:
    random = Random(seed)

    def plan(number: int) -> Plan:
        faulty = random.random() < 0.2
        return chains([REWARD if faulty else None] * 6, seconds=fault_s if faulty else good_s)

    world = World(at_once, plan).run(2000)
    assert world.error is None
    assert world.notices_sent[0] == f"a branch failed and is left out, the run goes on: {REWARD.detail}"


@pytest.mark.parametrize("seed", range(4))
def test_a_tool_that_raises_now_and_then_in_every_tree_lets_the_run_go_on(seed: int) -> None:
    random = Random(seed)
    world = World(8, lambda number: chains([RAISES if random.random() < 0.3 else None for _ in range(12)])).run(2000)
    assert world.error is None


@pytest.mark.parametrize("seed", range(4))
def test_a_value_of_the_wrong_type_in_half_of_the_chains_of_every_task_ends_the_run(seed: int) -> None:
    random = Random(seed)
    world = World(8, lambda number: chains([REWARD if random.random() < 0.5 else None for _ in range(12)])).run(2000)
    assert isinstance(world.error, EnvironmentBroken)
    assert world.now < 30


def test_forks_that_always_fail_end_the_run_though_the_first_chains_of_every_tree_are_fine() -> None:
    def plan(number: int) -> Plan:
        yield from chains([None] * 6)
        yield from chains([LATE] * 3, seconds=2.0, place="branch")

    world = World(8, plan).run(1000)
    assert isinstance(world.error, EnvironmentBroken)
    assert "trees in a row lost every chain that forked off another" in str(world.error)
    assert world.now < 30


def test_a_strategy_that_fails_on_every_tree_ends_the_run_with_the_name_of_its_setting() -> None:
    fault = Fault("expansion_failed", "KeyError in the strategy", "it failed on tree t1", "search.strategy = 'w:pick'")
    world = World(2, lambda number: iter([*chains([None] * 4), *chains([fault] * 3, seconds=2.0, place="branch")]))
    world.run(100)
    assert isinstance(world.error, ConfigError)
    assert re.match(
        r"search.strategy = 'w:pick': \d+ trees in a row lost every chain that forked off another, \d+ of them; the "
        "latest: it failed on tree t1$",
        str(world.error),
    )
    assert world.begun < 12
    assert world.notices_sent[0].endswith("the run goes on: search.strategy = 'w:pick': it failed on tree t1")


def test_different_errors_that_leave_no_chain_in_any_tree_end_the_run_too() -> None:
    errors = [Fault("environment_failed", f"E{i} in step", f"E{i}: no") for i in range(100)]
    world = World(8, lambda number: chains([errors[(6 * number + i) % 100] for i in range(6)])).run(1000)
    assert isinstance(world.error, EnvironmentBroken)
    assert "8 trees in a row ended without one finished chain" in str(world.error)


def test_a_task_that_breaks_in_the_middle_of_a_healthy_run_ends_it() -> None:
    world = World(8, lambda number: chains([None if number < 500 else RAISES] * 6)).run(1000)
    assert isinstance(world.error, EnvironmentBroken)
    assert 508 <= world.begun < 530


def test_an_engine_that_does_not_answer_is_not_taken_for_a_broken_environment() -> None:
    world = World(8, lambda number: chains([UNANSWERED] * 6)).run(1000)
    assert isinstance(world.error, EngineDead)
    assert "as the engine does not answer" in str(world.error)


def test_a_fault_is_reported_once_and_then_its_count_ever_more_rarely() -> None:
    world = World(1, lambda number: chains([REWARD] + [None] * 9, seconds=1.0)).run(1000)
    first, *later = world.notices_sent
    assert first.endswith(REWARD.detail)
    assert "more of" in later[0]
    assert len(later) == 4  # after 60, 180, 420 and 900 of 1,000 seconds
    assert world.now > 900


def test_of_endless_kinds_of_faults_only_fifty_are_reported() -> None:
    world = World(
        1,
        lambda number: chains([None, Fault("environment_failed", f"E{number} in step", "x"), None, None]),
    ).run(500)
    assert len(world.notices_sent) == 50


def test_a_turn_that_the_buffer_refuses_for_its_content_is_reported_and_in_every_tree_it_ends_the_run() -> None:
    notices_sent: list[str] = []
    faults = Faults("w:make", at_once=4, notify=lambda line, key: notices_sent.append(line), clock=lambda: 0.0)
    bad = msgspec.structs.replace(leaf(1, 0), reward=float("nan"))

    def grow(number: int) -> None:
        with faults.growing(lease(tree_id=f"t{number}")):
            for _ in range(2):
                faults.refused(f"t{number}", bad, "reward is nan")
            faults.chain_ended(f"t{number}", "chain", RAISES)

    for number in range(3):
        grow(number)
    with pytest.raises(EnvironmentBroken, match="the buffer refuses it: reward is nan"):
        grow(3)
    assert notices_sent[0].endswith("the buffer refuses it: reward is nan")


def test_turns_that_come_too_late_count_as_no_fault() -> None:
    notices_sent: list[str] = []
    faults = Faults("w:make", at_once=4, notify=lambda line, key: notices_sent.append(line), clock=lambda: 0.0)
    for number in range(100):
        with faults.growing(lease(tree_id=f"t{number}")):
            faults.refused(f"t{number}", leaf(1, 0), "tree t0 is leased under epoch 2")
    faults.refused("unknown", leaf(1, 0), "no lease")
    assert notices_sent == []


def test_a_fault_of_the_held_out_tasks_is_no_fault_of_the_training_ones() -> None:
    faults = Faults("w:make", at_once=4, notify=lambda line, key: None, clock=lambda: 0.0)

    def grow(number: int) -> None:
        with faults.growing(lease(tree_id=f"e{number}", kind="eval")):
            faults.chain_ended(f"e{number}", "chain", None)
        with faults.growing(lease(tree_id=f"t{number}")):
            faults.chain_ended(f"t{number}", "chain", REWARD)

    for number in range(7):
        grow(number)
    with pytest.raises(EnvironmentBroken):
        grow(7)


def test_actions_that_no_stop_token_ends_are_reported_once_with_the_settings_that_decide() -> None:
    notices_sent: list[str] = []
    cut = CutActions(64, notify=lambda line, key: notices_sent.append(line))
    for _ in range(20):
        cut.count(50, 10)
    assert notices_sent == []
    for _ in range(20):
        cut.count(50, 25)
    (line,) = notices_sent
    assert "50% of 200 actions were cut off at their longest" in line
    assert "search.max_action_tokens = 64" in line
    assert "stop_token_ids" in line


def test_a_notice_of_a_role_reaches_a_reader_that_reads_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notices.jsonl"
    monkeypatch.setenv(notices.FILE, str(path))
    monkeypatch.setattr(notices, "_posted", 0)
    notices.post("before")
    tail = notices.Tail(path)
    assert tail.new() == []
    notices.post("two\nlines")
    notices.post("x" * 100_000_000)
    first, second = tail.new()
    assert first == "two lines"
    assert len(second) < 1000
    with path.open("ab") as file:
        file.write(b'{"no": "text"}\nno json\n[1, 2]\n7\n["", "half')
    assert tail.new() == []
    with path.open("ab") as file:
        file.write(b' a line"]\n')
    assert tail.new() == ["half a line"]


def test_what_several_roles_tell_alike_is_heard_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    path = tmp_path / "notices.jsonl"
    monkeypatch.setenv(notices.FILE, str(path))
    monkeypatch.setattr(notices, "_posted", 0)
    tail = notices.Tail(path, clock=lambda: now)
    for actor in range(3):
        notices.post(f"actor {actor}: KeyError", "KeyError in step")
    notices.post("another", "another")
    assert tail.new() == ["actor 0: KeyError", "another"]
    now = 60.0
    notices.post("3 more", "KeyError in step")
    assert tail.new() == ["3 more"]


def test_a_fault_that_does_not_name_the_environment_is_reported_with_its_name() -> None:
    world = World(8, lambda number: chains([RAISES, None, None, None])).run(10)
    assert world.notices_sent[0].endswith(
        "the run goes on: environment 'w:make', task 3 (train), step: KeyError: 'page'"
    )


def test_a_role_that_cannot_tell_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notices.FILE, str(tmp_path / "absent" / "notices.jsonl"))
    notices.post("a line")
    assert notices.Tail(tmp_path / "absent" / "notices.jsonl").new() == []
