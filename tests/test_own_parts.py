"""What of a run is a user's own is imported and looked at before anything heavy begins."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atpo_async.api import own_parts
from atpo_async.api.configuration import load
from atpo_async.api.own_parts_process import look_at, named
from atpo_async.cli import main
from atpo_async.config import build
from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from tests.learner_support import make_model

PARTS = """
import numpy as np
from atpo_async.core.loss_traits import CorrectionTraits, Needs, TermTraits, declares

calls = []

def loss(tokens, settings): ...
def values(arrays, ratio): return np.where(arrays.is_leaf, arrays.reward, 0.5), 0.5
def one_value(arrays, ratio): return np.zeros(len(arrays))
def nan(arrays, values, root_value): return values * np.nan
def wrong(arrays, values, root_value): raise KeyError("no such turn")

@declares(CorrectionTraits(corrects=False))
def nothing(ratios, settings): ...

def short(settings, *, reach=1):
    if reach > 9:
        raise ValueError(f"reach = {reach} is more than 9")

@declares(TermTraits(check=short, needs=Needs(entropy=True)))
def term(tokens, settings, *, reach=1): ...
def weight(tokens, now, settings): ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's, with parts in it; where the command is started."""
    (tmp_path / "parts_of_mine.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "parts_of_mine", raising=False)
    return tmp_path


def refused(**sections: dict[str, Any]) -> Callable[[], None]:
    config = build(sections)
    return lambda: look_at(config, lambda what: None)


@pytest.mark.parametrize(
    ("sections", "error", "said"),
    [
        ({"objective": {"surrogate": "parts_of_mine:los"}}, ConfigError, "did you mean parts_of_mine:loss?"),
        (
            {"objective": {"terms": ["parts_of_mine:term"], "term_options": {"parts_of_mine:term": {"reach": 10}}}},
            ConfigError,
            "objective.term_options.parts_of_mine:term: reach = 10 is more than 9",
        ),
        (
            {"objective": {"terms": ["parts_of_mine:term"]}, "correction": {"prox": "interpolate"}},
            ConfigError,
            "objective.terms, 'parts_of_mine:term', needs them",
        ),
        (
            {"objective": {"token_weights": ["parts_of_mine:term"]}},
            ConfigError,
            r"a token weight is called as \(tokens, now, settings,",
        ),
        (
            {"search": {"strategy": "parts_of_mine:loss", "expand": "online"}},
            ConfigError,
            "an online expansion rule is called as",
        ),
        (
            {"objective": {"surrogate": "parts_of_mine:loss", "surrogate_options": {"tau": 1}}},
            ConfigError,
            "unexpected keyword argument 'tau'",
        ),
        ({"credit": {"value_mode": "parts_of_mine:one_value"}}, SetupError, "returned ndarray; expected the values"),
        (
            {"credit": {"value_mode": "parts_of_mine:values", "advantage_mode": "parts_of_mine:nan"}},
            SetupError,
            "credit.advantage_mode = 'parts_of_mine:nan' returned nan for turn 0 of 4; .*in a trial before the run",
        ),
        ({"credit": {"advantage_mode": "parts_of_mine:wrong"}}, SetupError, "KeyError: 'no such turn'"),
        (
            {"correction": {"action": "parts_of_mine:nothing"}, "staleness": {"max_lag": 4}},
            ConfigError,
            "trains off-policy uncorrected: set --correction.action truncate, or --correction.accept_bias true",
        ),
        ({"metrics": {"sinks": ["parts_of_mine:absent"]}}, ConfigError, "^metrics.sinks = .* has no 'absent'"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_part_that_does_not_fit_is_refused_with_its_field(
    sections: dict[str, dict[str, Any]], error: type[AtpoError], said: str
) -> None:
    with pytest.raises(error, match=said):
        refused(**sections)()


@pytest.mark.usefixtures("folder")
def test_parts_that_fit_pass_and_those_of_actors_elsewhere_are_not_looked_at() -> None:
    refused(
        objective={"surrogate": "parts_of_mine:loss"},
        credit={"value_mode": "parts_of_mine:values"},
        environment={"name": "nowhere_here:Task"},
        actor={"count": 0},
    )()
    assert not named(build({}))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os._exit(0)", "its module ended the process that imported it .exit code 0."),
        ("import os; os.kill(os.getpid(), 9)", "its module ended the process that imported it .killed by SIGKILL."),
        ("import sys; sys.exit(0)", "cannot be imported: SystemExit: 0"),
        ("print('noise', end=''); import os; os.chdir('/'); x = 1", "has no function or class, but an int, as 'x'"),
    ],
)
def test_whatever_a_module_does_at_its_import_ends_in_one_line(folder: Path, code: str, said: str) -> None:
    (folder / "broken_of_mine.py").write_text(code)
    with pytest.raises(AtpoError, match=f"^objective.surrogate = 'broken_of_mine:x': .*{said}"):
        own_parts.check(build({"objective": {"surrogate": "broken_of_mine:x"}}))


def test_an_import_that_waits_for_ever_is_ended_with_the_line_at_which_it_waits(folder: Path) -> None:
    (folder / "waits_of_mine.py").write_text("import threading\n\nthreading.Event().wait()\n")
    config = folder / "run.toml"
    config.write_text("[objective]\nsurrogate = 'waits_of_mine:x'\n")
    code = f"from atpo_async.api import own_parts_process as p\np.IDLE_S = 0.3\np.main({str(config)!r})\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "its module, imported before the run, waits for something" in ended.stdout
    assert f" at {folder}/waits_of_mine.py:3" in ended.stdout


def test_a_run_with_a_broken_part_is_refused_before_anything_is_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken_of_mine.py").write_text("import nothing_like_it\n")
    model = make_model(folder / "model")
    config = folder / "run.toml"
    config.write_text(f"model.path = '{model}'\nactor.engine = 'transformers'\nrun.name = 'run'\n")
    assert main.main(["train", str(config), "--correction.action", "broken_of_mine:x"]) == 2
    assert (
        "correction.action = 'broken_of_mine:x': module 'broken_of_mine' cannot be imported" in capsys.readouterr().err
    )
    assert not (folder / "runs").exists()


def test_a_function_in_place_of_its_name_is_answered_with_the_name(folder: Path) -> None:
    def mine(tokens: object, settings: object) -> None: ...

    with pytest.raises(ConfigError, match=r"objective.surrogate takes the name of a surrogate .* put it into a module"):
        load(objective={"surrogate": mine})
    with pytest.raises(ConfigError, match=r"objective.surrogate takes .*: give 'tests.learner_support:make_model'"):
        load(objective={"surrogate": make_model})
    assert folder.is_dir()
