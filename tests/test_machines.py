"""The command of a learner that joins by address, and of its ranks on each of several machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from atpo_async.cli import main
from atpo_async.config import build
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.ops.role import _context
from atpo_async.ops.specs import Machines, RoleSpec, learner_spec
from atpo_async.run import launch

WORDS = ("--config", "c.toml", "--join", "head:5000")


def spec(index: int = 0, *, ranks: int = 4, count: int = 2, meet_at: str = "10.0.0.7:29511") -> RoleSpec:
    config = build({"learner": {"num_processes": ranks, "device": "cpu"}})
    machines = Machines(count=count, index=index, meet_at=meet_at)
    return learner_spec(config, WORDS, has_cuda=lambda: False, python="python", environ={}, machines=machines)


def test_each_machine_starts_its_ranks_which_meet_at_the_first() -> None:
    first, second = spec(0), spec(1)
    for index, each in enumerate((first, second)):
        argv = each.argv
        assert argv[:6] == ("python", "-P", "-m", "accelerate.commands.launch", "--num_processes", "4")
        at = argv.index("--num_machines")
        assert argv[at : at + 6] == (
            "--num_machines", "2", "--machine_rank", str(index), "--main_process_ip", "10.0.0.7",
        )  # fmt: skip
        assert argv[argv.index("--main_process_port") + 1] == "29511"
        assert argv[-6:] == (launch.HERE, "learner", *WORDS)
        assert (each.env["PET_STANDALONE"], each.env["ACCELERATE_USE_CPU"]) == ("0", "true")
    alone = learner_spec(build({}), WORDS, has_cuda=lambda: False, python="python", environ={})
    assert alone.argv == ("python", "-P", launch.HERE, "learner", *WORDS)
    assert "PET_STANDALONE" not in alone.env


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ranks": 3}, "3 ranks cannot be spread evenly over 2 machines, of which this is number 0"),
        ({"index": 2}, "of which this is number 2"),
        ({"meet_at": "10.0.0.7:0"}, "meet at a port that all of them know, which 0 is not"),
        ({"meet_at": "fd00::5:29511"}, "is no address of machine 0: an IPv6 address has to be in brackets"),
    ],
)
def test_ranks_that_cannot_be_spread_and_places_that_cannot_be_met_at_are_refused(
    changes: dict[str, object], says: str
) -> None:
    with pytest.raises(SetupError, match=says):
        spec(**changes)  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "c.toml").write_text('[model]\npath = "model"\n[learner]\ndevice = "cpu"\n')
    return "c.toml"


def test_a_learner_by_hand_joins_by_address(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda file, argv, env: started.append(argv))
    words = ["learner", config, "--join", "localhost:1", "--dir", "far", "--learner.lr", "1e-4"]
    main.main(words)
    main.main([*words, "--learner.num_processes", "2", "--machine", "1/2@head:29511"])
    role = ["--config", config, "--join", "localhost:1", "--dir", "far", "--model.path=model", "--learner.lr=1e-4"]
    assert started[0][-len(role) :] == role
    assert started[1][started[1].index("--machine_rank") + 1] == "1"
    assert started[1][started[1].index("--main_process_ip") + 1] == "head"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dir", "far"], "--dir far is for a learner that joins by address: give --join HOST:PORT"),
        (["--join", "h:1", "--machine", "two"], "--machine two: expected I/N@HOST:PORT"),
        (["--join", "h"], "--join h: neither a run folder nor an address"),
    ],
)
def test_what_a_learner_by_hand_is_told_wrong_is_said_in_one_line(
    config: str, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["learner", config, *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("buffer", ["--join", "h:1"], "a buffer works in the run's folder"),
        ("actor", ["--join", "h:1", "--dir", "far"], "--dir is for a learner that joins by address"),
        ("learner", ["--join", "h:1", "--name", "x"], "a learner that joins by address is called learner"),
        ("learner", ["--join", "h:1", "--index", "-1"], "the ranks of a learner count from 0"),
    ],
)
def test_a_role_refuses_words_that_do_not_fit_together(config: str, name: str, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _context(name, ["--config", config, *words])
