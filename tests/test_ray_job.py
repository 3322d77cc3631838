"""Drivers of a run on Ray: what they are told, how they stop it, what they do while its supervisor is gone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from atpo_async.api.places import on_ray
from atpo_async.cli.main import main
from atpo_async.config import build
from atpo_async.core.errors import AtpoError, RoleCrashed, RunMismatch, SetupError
from atpo_async.ops.launchers.ray.job.desk import MOST_EVENTS, Desk, Outcome
from atpo_async.run.metrics import Record
from atpo_async.status.loading import RoleStart

driver = pytest.importorskip("atpo_async.ops.launchers.ray.job.driver", reason="needs the extra `ray`")

DONE = Outcome(code="done")


class Shown:
    """What a driver has shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[Record] = []
        self.is_over = False

    def say(self, line: str) -> None:
        self.lines.append(line)

    def feed(self, records: Sequence[Record]) -> None:
        self.records += records

    def starting(self, found: Sequence[RoleStart]) -> None:
        self.lines.append(f"starting {len(found)}")

    def over(self) -> None:
        self.is_over = True


class Away(Exception):
    """What Ray raises for an actor whose node may come back."""


class Gone(Exception):
    """And for one that is gone for good."""


class Actor:
    """A supervisor: a call is a function that is evaluated when its value is asked for."""

    def __init__(self, desk: Desk, before: Callable[[int], None] = lambda call: None) -> None:
        self.desk = desk
        self.stops: list[str] = []
        self._before = before
        self._calls = 0
        self.answer = self.stop = self

    def remote(self, *words: Any) -> Callable[[], Any]:
        if len(words) == 1:
            self.stops.append(words[0])
            self.desk.stop(words[0])
            return lambda: None

        def value() -> Any:
            self._calls += 1
            self._before(self._calls)
            return self.desk.answer(*words)

        return value


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Ray's calls made up; the actors that were ended."""
    ended: list[Any] = []
    calls = {
        "get": lambda ref, timeout_s: ref(),
        "is_for_a_while": lambda exc: isinstance(exc, Away),
        "is_lost": lambda exc: isinstance(exc, Gone),
        "end": ended.append,
        "one_line": str,
    }
    for name, call in calls.items():
        monkeypatch.setattr(driver.cluster, name, call)
    monkeypatch.setattr(driver, "AGAIN_S", 0.0)
    return ended


def follow(actor: Actor, shown: Shown) -> Outcome:
    found: Outcome = driver.follow(actor, shown, run="r", pinned="node 10.0.0.5")
    return found


def ends(desk: Desk, at: int) -> Callable[[int], None]:
    return lambda call: desk.end(DONE) if call == at else None


def test_a_driver_shows_lines_figures_and_starts_in_their_order_to_the_end() -> None:
    desk, shown = Desk("one"), Shown()
    record = Record(step=1, version=1, time=0.0, source="learner", metrics={"train/loss": 1.0})
    desk.say("first\nsecond")
    desk.feed([record])
    desk.starting([RoleStart(role="actor-0", stage="loading", for_s=1.0, loads=True)])
    desk.over()
    desk.say("done")
    desk.end(DONE)
    assert follow(Actor(desk), shown) == DONE
    assert shown.lines == ["first", "second", "starting 1", "done"]
    assert shown.records == [record]
    assert shown.is_over
    assert desk.is_left


def test_a_driver_that_attaches_late_gets_the_latest_events_and_how_many_are_left_out() -> None:
    desk, shown = Desk("one"), Shown()
    for number in range(MOST_EVENTS + 7):
        desk.say(str(number))
    desk.end(DONE)
    follow(Actor(desk), shown)
    assert shown.lines[0] == "(7 earlier lines and figures are not kept)"
    assert shown.lines[1:] == [str(number) for number in range(7, MOST_EVENTS + 7)]


def test_the_past_of_a_run_that_goes_on_is_cut_to_its_latest_figures() -> None:
    desk, shown = Desk("one"), Shown()
    desk.feed([Record(step=n, version=n, time=0.0, source="learner", metrics={}) for n in range(5000)])
    desk.end(DONE)
    follow(Actor(desk), shown)
    assert [record.step for record in shown.records] == list(range(4000, 5000))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_the_stop_and_a_second_one_for_one_at_once(signum: signal.Signals) -> None:
    desk, shown = Desk("one"), Shown()
    asked: list[str] = []
    desk.answers_stops(asked.append)

    def before(call: int) -> None:
        if call in (2, 4):
            signal.raise_signal(signum)
        elif call == 6:
            desk.end(Outcome(code="interrupted"))

    actor = Actor(desk, before)
    assert follow(actor, shown).code == "interrupted"
    words = "Ctrl-C again" if signum == signal.SIGINT else "a second SIGTERM"
    assert actor.stops == asked == [words, words]
    assert [line for line in shown.lines if line.startswith("stopping")] == [
        "stopping; Ctrl-C again ends everything at once"
        if signum == signal.SIGINT
        else "stopping, as SIGTERM asks; a second SIGTERM ends everything at once"
    ]
    assert signal.getsignal(signum) is not None  # the test's own again


def test_a_stop_that_was_asked_for_before_the_roles_ran_is_not_forgotten() -> None:
    desk = Desk("one")
    desk.stop("Ctrl-C again")
    asked: list[str] = []
    desk.answers_stops(asked.append)
    assert asked == ["Ctrl-C again"]


def test_a_supervisor_whose_node_is_gone_is_waited_for_and_its_new_life_shown_from_its_beginning() -> None:
    first, second, shown = Desk("one"), Desk("two"), Shown()
    first.say("before")
    second.say("again")
    second.end(DONE)
    actor = Actor(first)

    def before(call: int) -> None:
        if call in (2, 3):
            raise Away("unavailable")
        if call == 4:
            actor.desk = second

    actor._before = before
    assert follow(actor, shown) == DONE
    assert shown.lines[0] == "before"
    assert shown.lines[1].startswith(
        "the supervisor of run r is out of reach: the run goes on once its node (node 10.0.0.5)"
    )
    assert shown.lines[2:] == ["the supervisor has started again, and goes on with the run", "again"]


def test_ctrl_c_twice_gives_a_supervisor_up_that_does_not_come_back(ray: list[Any]) -> None:
    def before(call: int) -> None:
        if call in (2, 3):
            signal.raise_signal(signal.SIGINT)
        raise Away("unavailable")

    actor = Actor(Desk("one"), before)
    found = follow(actor, Shown())
    assert (found.code, ray) == ("interrupted", [actor])
    assert "its node had not come back" in found.message


def test_a_supervisor_that_is_gone_for_good_is_an_error_with_the_reason() -> None:
    def before(call: int) -> None:
        raise Gone("killed by ray.kill")

    with pytest.raises(SetupError, match=r"the run's supervisor is gone for good: killed by ray\.kill"):
        follow(Actor(Desk("one"), before), Shown())


@pytest.mark.parametrize(
    ("name", "kind"), [("SetupError", SetupError), ("Exception", RoleCrashed), ("annotations", RoleCrashed)]
)
def test_a_run_fails_in_a_driver_with_the_error_that_it_failed_with(name: str, kind: type[AtpoError]) -> None:
    error = driver.error_of(Outcome(code="failed", error=name, message="no GPU"))
    assert type(error) is kind
    assert str(error) == "no GPU"


def test_a_driver_that_is_gone_does_not_keep_the_supervisor() -> None:
    now = [0.0]
    desk = Desk("one", clock=lambda: now[0])
    desk.answer("a", "", 0)
    desk.end(DONE)
    assert not desk.is_left  # it may still ask
    now[0] = 10.0
    assert desk.is_left


def test_in_a_thread_a_driver_leaves_the_signals_alone() -> None:
    desk, shown = Desk("one"), Shown()
    desk.end(DONE)
    thread = threading.Thread(target=follow, args=(Actor(desk), shown))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("ray://demo", ("auto", "demo", "atpo")),
        ("ray://10.0.0.5:6379/demo", ("10.0.0.5:6379", "demo", "atpo")),
        ("ray://demo?namespace=team-a", ("auto", "demo", "team-a")),
    ],
)
def test_a_run_on_a_cluster_is_named_by_cluster_name_and_namespace(url: str, parts: tuple[str, ...]) -> None:
    assert on_ray.parse_url(url) == parts


@pytest.mark.parametrize("url", ["ray://", "ray://a/b/c", "ray://demo?name=x"])
def test_what_names_no_run_on_a_cluster_is_refused(url: str) -> None:
    with pytest.raises(SetupError, match="names no run on Ray: ray://RUN, or ray://HOST:PORT/RUN"):
        on_ray.parse_url(url)


def test_without_ray_the_way_to_have_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["status", "ray://demo"]) == 2
    assert "--on ray needs ray, which is not installed here: pip install 'atpo-async[ray]'" in capsys.readouterr().err


def test_a_run_of_that_name_with_other_settings_is_not_attached_to(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    running = build({"run": {"name": "demo"}, "learner": {"lr": 1e-5}})
    facts = {"config": running.model_dump_json(), "pinned": "node 10.0.0.5", "from": "base:3"}
    same = build({"run": {"name": "demo"}, "learner": {"lr": 1e-5}, "ray": {"address": "10.0.0.5:6379"}})
    for begin_from in (None, "base:3"):
        assert on_ray._attached(same, facts, Console(), begin_from=begin_from) == "node 10.0.0.5"
    with pytest.raises(RunMismatch, match="was started with --from base:3: --from base:4 has no effect on it"):
        on_ray._attached(same, facts, Console(), begin_from="base:4")
    for other, words in (
        ({"run": {"name": "demo"}}, "learner.lr is 1e-05 there"),
        ({"run": {"name": "demo", "dir": "/else"}, "learner": {"lr": 1e-5}}, "run.dir is "),
    ):
        with pytest.raises(RunMismatch, match=words):
            on_ray._attached(build(other), facts, Console())
    assert "run demo is going on; attached to it" in capsys.readouterr().out
