"""What is installed is named without loading it; a vLLM outside the supported range is refused."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from atpo_async.api import machine
from atpo_async.cli import main
from atpo_async.cli.setup import doctor
from atpo_async.run import installed
from atpo_async.run.installed import version_line, vllm_range, vllm_unfit

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5+cpu", "0.32.1rc2", None, "dev"])
def test_a_version_in_the_range_and_one_that_cannot_be_read_are_taken(version: str | None) -> None:
    assert vllm_unfit(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "0.33.0.dev7"])
def test_another_version_is_named_with_the_range_and_the_way_out(version: str) -> None:
    said = vllm_unfit(version)
    assert said is not None
    assert said.startswith(f"vLLM {version} is not one that the engine is made for (>=0.32,<0.33)")
    assert "pip install 'vllm>=0.32,<0.33', or use --actor.engine transformers" in said


def test_the_package_asks_for_the_same_range() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["vllm"] == [f"vllm{vllm_range()}"]
    pinned = [
        line for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines() if "vllm" in line and "==" in line
    ]
    assert pinned
    assert all(vllm_unfit(line.partition("==")[2]) is None for line in pinned)


def test_the_doctor_names_a_vllm_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_module", lambda name: True)
    monkeypatch.setattr(doctor, "version_of", lambda *names: "0.34.0" if "vllm" in names else None)
    found = doctor._vllm()
    assert (found.level, found.found) == ("missing", "0.34.0, not one that the engine is made for")
    assert "vllm>=0.32,<0.33" in found.way_out


def test_the_version_line_names_what_it_runs_on_and_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "version_of", lambda *names: "9.1" if "torch" in names else None)
    line = version_line()
    assert line.startswith("atpo-async ")
    assert line.endswith("torch 9.1, no transformers, no accelerate, no vllm)")


@pytest.mark.parametrize("words", [["--version"], ["version"]])
def test_the_version_is_an_option_and_a_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == 0
    assert capsys.readouterr().out == f"{version_line()}\n"


def test_the_package_can_be_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "atpo_async", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{version_line()}\n"
