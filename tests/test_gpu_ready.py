"""make test-gpu on a machine that has no environment of ours: what is missing is named first, and nothing is set up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gpu_ready

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_missing_is_named_with_the_way_out() -> None:
    skipped, missing = gpu_ready.complaints(lambda name: name not in ("pytest-asyncio", "lmdb", "vllm"))
    assert skipped == ["vllm is not installed: the tests of the real engine are skipped"]
    assert missing is not None
    assert "lacks lmdb, pytest-asyncio, which the tests need; pip install lmdb pytest-asyncio, or name" in missing
    assert gpu_ready.complaints(lambda name: True) == ([], None)
    assert {"torch", "pyzmq", "renderers", "pytest"} <= set(gpu_ready.needed())


def test_this_python_has_what_the_tests_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_ready.main() == 0
    monkeypatch.setattr(gpu_ready, "needed", lambda: ["torch", "no-such-distribution"])
    assert gpu_ready.main() == 1


def test_without_pytest_timeout_its_marker_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("import pytest\n\n@pytest.mark.timeout(5)\ndef test_it() -> None: ...\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    words = [sys.executable, "-m", "pytest", "-q", "--strict-markers", "-p", "no:timeout", "-p", "no:cacheprovider"]
    done = subprocess.run([*words, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_make_test_gpu_sets_nothing_up_and_takes_the_python_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    done = subprocess.run(
        ["make", "-n", "test-gpu", "PYTHON=/usr/bin/python3.12", "ARGS=-k sharded"], cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "/usr/bin/python3.12 scripts/gpu_ready.py" in done.stdout
    assert "/usr/bin/python3.12 -m pytest -q -m gpu -k sharded" in done.stdout
    assert "setup_env" not in done.stdout
