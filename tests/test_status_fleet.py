"""The actors in ``atpo status``: one by one where they are few, by host where they are many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atpo_async.config import build
from atpo_async.run.rundir import RunDir
from atpo_async.status.fleet import FLEET, MOST_ROWS, ActorRow, rows_of, table
from atpo_async.status.snapshot import FOLDER
from buffer.leases.overview import actor_rows
from buffer.leases.presence import Host
from tests.fleet_support import Virtual, VirtualFleet
from tests.hang_support import status
from tests.test_fleet import configuration, unlike
from tests.test_status import put, told


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    rundir = RunDir.create(build({"run": {"dir": tmp_path, "name": "fleet"}}))
    (rundir.path / FOLDER).mkdir(exist_ok=True)
    return rundir


def said(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "host": "gpu-7", "turns_per_s": 40.0, "share": 0.5, "lag": 1.25, "trees": 8, "done": 31, "silent_s": 0.4,
        "silent": False,
    }  # fmt: skip
    return fields | changes


def rows(number: int, **changes: Any) -> list[ActorRow]:
    """So many actors on 40 hosts; the ``i``-th makes ``i + 1`` turns a second."""
    return [
        ActorRow(
            name=f"a{i}",
            **(said(host=f"host-{i % 40:02d}", turns_per_s=i + 1.0, share=1 / number, silent=False) | changes),
        )
        for i in range(number)
    ]


def test_the_buffer_says_of_each_actor_where_it_is_how_fast_how_old_its_turns_are_and_what_share_it_has() -> None:
    fleet = VirtualFleet(configuration(), *unlike(), Virtual(name="leaver", turns_per_s=10.0, leaves=15.0))
    ledger = fleet.state.ledger
    ledger.actors.lives_on("x8", Host("gpu-8", "boot"))
    ledger.actors.heard("by-its-link-alone", 0.0)
    fleet.run(until=lambda: fleet.now > 20.0)
    found = actor_rows(ledger, fleet.now)
    assert set(found) == {"x1", "x2", "x4", "x8"}
    rates = {name: row["turns_per_s"] for name, row in found.items()}
    assert rates == pytest.approx({"x1": 5.0, "x2": 10.0, "x4": 20.0, "x8": 40.0}, rel=0.05)
    shares = {name: row["share"] for name, row in found.items()}
    assert shares == pytest.approx({"x1": 1 / 15, "x2": 2 / 15, "x4": 4 / 15, "x8": 8 / 15}, abs=0.02)
    assert [found["x8"][name] for name in ("host", "silent")] == ["gpu-8", False]
    assert all(0 <= float(str(row["lag"])) <= 4 for row in found.values())
    assert found["x1"]["trees"] == len(fleet.actors["x1"].trees)
    ages = actor_rows(ledger, fleet.now + 100.0)["x1"]
    assert ages["silent"] is True


@pytest.mark.parametrize("number", [1, 4, MOST_ROWS])
def test_few_actors_are_listed_one_by_one(number: int) -> None:
    found = table(rows(number))
    assert found is not None
    assert [row[0] for row in found.rows] == [f"a{i}" for i in range(number)]
    assert found.notes == ()
    assert found.title.startswith(f"actors: {number} on {number} host")


@pytest.mark.parametrize("number", [40, 1000])
def test_many_actors_are_listed_by_host_with_the_slowest_and_the_silent_named(number: int) -> None:
    made = rows(number)
    made[5] = ActorRow(name="hung", **said(host="host-05", silent=True, silent_s=200.0, turns_per_s=50.0))
    made[6] = ActorRow(name="new", **said(host="host-06", turns_per_s=None, share=None, lag=None))
    found = table(made)
    assert found is not None
    assert len(found.rows) == MOST_ROWS
    assert found.header[:2] == ("host", "actors")
    text = "\n".join(found.notes)
    assert "and 28 hosts with no more actors each" in text
    assert "slowest: a0 on host-00, 1 turns/s; a1 on host-01, 2 turns/s; a2 on host-02, 3 turns/s" in text
    assert "of 1 the rate is not known yet" in text
    assert "silent: hung on host-05, for 3 min" in text
    assert max(map(len, (found.title, *found.notes))) < 160


def test_there_is_no_table_without_actors() -> None:
    assert table([]) is None


def test_status_shows_actors_that_joined_by_address_and_have_no_status_file(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = {"actor-0": said(), "far": said(host="site-b", turns_per_s=None, share=None, lag=None, silent_s=75.0)}
    put(run, status("buffer", facts={FLEET: fleet}), status("actor-0"))
    text = told(capsys, run)
    assert "actors: 2 on 2 hosts, 40 turns/s together, turns 1.2 versions behind the learner when they come" in text
    assert "actor-0 gpu-7 40 50.0% 1.2 8 31 0.4 s ago" in text
    assert "far site-b – – – 8 31 75 s ago" in text
    assert "fleet" not in text.replace(str(run.path), "").replace(run.run_id, "")
    assert json.loads(told(capsys, run, "--json"))["actors"]["far"]["host"] == "site-b"


def test_the_screen_of_a_thousand_actors_is_a_screen(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"pool-{i:04d}" for i in range(1000)]
    peers = [{"peer": name, "silent_s": 0.1, "queued": 0} for name in names]
    facts = {name: said(host=f"host-{i % 40}") for i, name in enumerate(names)}
    put(run, status("buffer", links={"buffer at tcp://127.0.0.1:1": {"peers": peers}}, facts={FLEET: facts}))
    text = told(capsys, run)
    assert "1000 actors last heard up to 0.1 s ago – joined by address" in text
    assert "and 992 more" in text
    assert len(text) < 3000
    assert len(json.loads(told(capsys, run, "--json"))["actors"]) == 1000


def test_rows_that_make_no_sense_are_left_out() -> None:
    bad: dict[str, Any] = {"a": said(), "b": 7, "c": {}, "d": said(trees="many"), "error": "KeyError"}
    assert [row.name for row in rows_of([status("buffer", facts={FLEET: bad})])] == ["a"]
