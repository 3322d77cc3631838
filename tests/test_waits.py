"""The registry of named waits, and the counters of progress."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass

import pytest

from atpo_async.status import waits
from atpo_async.status.waits import BoundedWait, DeferredAnswers, waiting


def of(who: str) -> list[dict[str, object]]:
    """The waits of a test; others may have some of their own."""
    return [wait for wait in waits.open_waits() if wait["who"] == who]


@dataclass(frozen=True)
class Soon:
    deadline_s: float = 1.0
    give_up_s: float = 2.0


def test_a_wait_is_in_the_registry_while_its_block_runs() -> None:
    with waiting("t1", "batch 12", on="buffer", limit_s=5.0) as wait:
        (found,) = of("t1")
        assert (found["what"], found["on"], found["limit_s"]) == ("batch 12", "buffer", 5.0)
        assert waits.open_waits(wait.since + 7.0)[0]["since_s"] >= 7.0
    assert of("t1") == []


def test_waits_nest_and_an_exception_ends_them() -> None:
    def fail() -> None:
        with waiting("t2", "outer"), waiting("t2", "inner"):
            assert {wait["what"] for wait in of("t2")} == {"outer", "inner"}
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert of("t2") == []


async def test_a_cancelled_coroutine_waits_no_longer() -> None:
    async def wait_for_ever() -> None:
        with waiting("t3", "nothing"):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait_for_ever())
    await asyncio.sleep(0)
    assert len(of("t3")) == 1
    task.cancel()
    await asyncio.wait([task])
    assert of("t3") == []


def test_the_longest_wait_comes_first_and_is_never_negative() -> None:
    with waiting("t4", "first"), waiting("t4", "second"):
        assert [wait["what"] for wait in of("t4")] == ["first", "second"]
        assert all(wait["since_s"] == 0.0 for wait in waits.open_waits(now=0.0) if wait["who"] == "t4")


def test_a_bounded_wait_is_registered_as_long_as_it_is_held() -> None:
    wait = BoundedWait("t5", "batch 3", Soon(), lambda: 0.0, log=logging.getLogger("t5"), on="buffer")
    (found,) = of("t5")
    assert (found["what"], found["on"], found["limit_s"]) == ("batch 3", "buffer", 2.0)
    wait.on = "learner"
    assert of("t5")[0]["on"] == "learner"
    del wait
    assert of("t5") == []


def test_deferred_answers_last_over_repeated_questions_until_one_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = DeferredAnswers("t9")
    assert of("t9") == []
    answers.goes_on("trees: 0 of 4", on="actors")
    (first,) = of("t9")
    answers.goes_on("trees: 3 of 4", on="actors")
    (second,) = of("t9")
    assert second["what"] == "trees: 3 of 4"
    assert second["since_s"] >= first["since_s"]  # type: ignore[operator]
    answers.over()
    assert of("t9") == []
    answers.goes_on("trees", on="actors")
    monkeypatch.setattr(waits, "FORGET_S", 0.0)  # nobody asks any more
    assert of("t9") == []


def test_the_registry_can_be_read_while_other_threads_wait() -> None:
    stop = threading.Event()

    def churn(number: int) -> None:
        while not stop.is_set():
            with waiting(f"t6-{number}", "churn"):
                held = BoundedWait(f"t6-{number}", "a batch", Soon(), lambda: 0.0, log=logging.getLogger("t6"))
                waits.progress(f"t6-{number}")
                del held

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2000):
            waits.open_waits()
            waits.progress_made()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [wait for wait in waits.open_waits() if str(wait["who"]).startswith("t6")] == []


def test_progress_adds_up_by_name() -> None:
    before = waits.progress_made().get("t7", 0)
    waits.progress("t7")
    waits.progress("t7", 41)
    assert waits.progress_made()["t7"] == before + 42


def test_a_phase_begins_anew_only_when_it_changes() -> None:
    waits.phase("t8", starting=True)
    first = waits.current_phase()
    waits.phase("t8", starting=True)
    assert waits.current_phase() is first
    waits.phase("t8")
    assert waits.current_phase() is not first
    assert not waits.current_phase().starting
