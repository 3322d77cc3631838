"""Texts of others, however long or odd, take a line of a log and no more."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from atpo_async.core import texts
from atpo_async.run.files import last_lines


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def test_an_errors_text_is_one_line_of_a_few_hundred_characters_whatever_it_holds() -> None:
    assert texts.of_error(ValueError("two\nlines")) == "ValueError: two lines"
    assert texts.of_error(KeyError()) == "KeyError"
    long = texts.of_error(ValueError("page " * 10_000_000))
    assert len(long) < 400
    assert long.endswith("(50000000 characters)")
    assert texts.of_error(Mute()) == "Mute: (its text cannot be read: RuntimeError)"


def test_a_value_is_shown_short_and_never_raises() -> None:
    assert texts.of_value(0.5) == "0.5"
    assert len(texts.of_value("x" * 10_000_000)) < 120
    assert len(texts.of_value(list(range(1_000_000)))) < 120
    assert "Mute" in texts.of_value(Mute()) or "cannot be shown" in texts.of_value(Mute())


def test_a_record_of_a_log_is_cut_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    formatter = texts.BoundedFormatter("%(message)s")
    log = logging.getLogger("bounded")
    try:
        raise ValueError("page " * 1_000_000)
    except ValueError:
        log.exception("a tool failed: %s", "x" * 1_000_000)
    said = formatter.format(caplog.records[-1])
    assert said.startswith("a tool failed: xxx")
    assert "characters left out" in said
    assert len(said) < 2 * texts.MOST_OF_A_RECORD


def test_a_traceback_is_cut_and_had_in_any_case() -> None:
    assert len(texts.trace_of(ValueError("page " * 1_000_000))) < 2 * texts.MOST_OF_A_RECORD
    assert "Mute" in texts.trace_of(Mute())


def test_a_role_that_ends_with_a_huge_text_says_it_short_and_so_does_its_error_file(tmp_path: Path) -> None:
    code = """
import sys
from atpo_async.ops import role

async def main(ctx):
    raise ValueError("page " * 10_000_000)

role._context = lambda name, argv: role.RoleContext(
    config=None, run_id="", rundir=None, endpoints=None, name=name, index=0, stopping=None,
    log=role._logger(name))
async def serve(main, context, reporter):
    await main(context)
role._serve = serve
role.run("actor", main, [])
"""
    file = tmp_path / "error.json"
    env = {"ATPO_ERROR_FILE": str(file), "ATPO_SUPERVISOR_PID": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: ValueError: page page" in done.stderr
    assert len(done.stderr) < 2 * texts.MOST_OF_A_RECORD
    assert len(json.loads(file.read_text())["error"]) < 1500


def test_the_last_lines_of_a_log_are_cut_each(tmp_path: Path) -> None:
    log = tmp_path / "actor-0.0.log"
    log.write_text("short\n" + "x" * 50_000 + "\nend\n")
    short, long, end = last_lines(log, 3)
    assert (short, end) == ("short", "end")
    assert len(long) < 1100


def test_nothing_is_lost_of_what_is_short() -> None:
    assert texts.middle_cut("a\nb") == "a\nb"
    assert texts.shortened("a b") == "a b"
