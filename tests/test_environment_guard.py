"""What a tool may do to the whole process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actors.hosting import guard
from actors.hosting.host import HostedEnvironment
from atpo_async.config.doors import ENVIRONMENT
from atpo_async.core.errors import SetupError
from atpo_async.ops import exits, role
from tests.actor_support import CountingEnvironment

ROOT = Path(__file__).resolve().parent.parent


def test_signal_handlers_and_working_folder_are_put_back(tmp_path: Path) -> None:
    before, folder = signal.getsignal(signal.SIGTERM), os.getcwd()
    with guard.put_back():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.chdir(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    assert os.getcwd() == folder


async def test_an_environment_that_changes_the_folder_while_it_is_made_leaves_the_actor_where_it_was(
    tmp_path: Path,
) -> None:
    folder = os.getcwd()

    def make() -> CountingEnvironment:
        os.chdir(tmp_path)
        return CountingEnvironment()

    async with HostedEnvironment(make, name="world", step_timeout_s=60.0):
        assert os.getcwd() == folder


def test_a_stray_alarm_is_logged_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with guard.stray_signals_end_nothing():
        for _ in range(3):
            signal.raise_signal(signal.SIGVTALRM)
    assert caplog.text.count("SIGVTALRM reached the actor") == 1
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


def test_programs_that_a_tool_starts_meanwhile_take_an_alarm_as_ever() -> None:
    with guard.stray_signals_end_nothing():
        code = "import os, signal; os.kill(os.getpid(), signal.SIGVTALRM)"
        assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGVTALRM


def test_a_handler_that_was_there_before_is_left_alone() -> None:
    got: list[int] = []
    signal.signal(signal.SIGVTALRM, lambda number, frame: got.append(number))
    try:
        with guard.stray_signals_end_nothing():
            signal.raise_signal(signal.SIGVTALRM)
    finally:
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    assert got == [signal.SIGVTALRM]


@pytest.mark.parametrize("line", ["raise SystemExit(0)", "raise KeyboardInterrupt", "import no_such_module_at_all"])
def test_a_module_that_cannot_be_imported_is_named_also_where_it_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    (tmp_path / "exits_at_import.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SetupError, match=r"module 'exits_at_import' cannot be imported: \w+"):
        ENVIRONMENT.make("exits_at_import:make", tmp_path)


async def test_a_tool_may_close_the_standard_error_and_the_log_goes_on(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from atpo_async.ops import role\n"
        "log = role._logger('r')\n"
        "sys.stderr.close(); os.closerange(1, 3)\n"
        "log.info('still here')\n"
        "role._print('nowhere')\n"
    )
    ran = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "still here" in ran.stderr


def test_what_a_role_says_last_reaches_the_supervisor_without_a_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(exits.ERROR_FILE, str(tmp_path / "error"))
    with (tmp_path / "closed").open("w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
    assert role._say(SetupError("no model"), supervised=True, debug=False) == exits.EXIT_USER
    assert "no model" in (tmp_path / "error").read_text()
