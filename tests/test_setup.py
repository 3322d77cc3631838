"""The set-up script's decisions, and the check that no process outlives the tests."""

from __future__ import annotations

import http.server
import os
import re
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts import setup_env

ROOT = Path(__file__).resolve().parent.parent
GLIBC = ("glibc", "2.36")


def a_checkout(folder: Path) -> Path:
    (folder / "requirements").mkdir(parents=True)
    (folder / "requirements" / "cpu.txt").write_text("# pins\nnumpy==2.3.5\ntorch==2.13.0+cpu\n")
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1"\n[tool.ruff]\nline-length = 99\n')
    return folder


class FakePip(setup_env.Installer):
    """Answers each `pip install` with the next of `outputs`; an empty one is a success."""

    def __init__(self, *outputs: str) -> None:
        self.outputs = list(outputs)
        self.asked: list[list[str]] = []

    def install(self, what: str, arguments: list[str], num_packages: int = 1) -> str:
        self.asked.append(arguments)
        return self.outputs.pop(0)


NOT_FOUND = "WARNING: noise\nERROR: No matching distribution found for torch==2.13.0+cpu"


@pytest.mark.parametrize(
    ("version", "system", "machine", "libc", "words"),
    [
        ((3, 10), "Linux", "x86_64", GLIBC, "Python 3.11 to 3.14 is needed; this is 3.10"),
        ((3, 15), "Linux", "x86_64", GLIBC, "this is 3.15"),
        ((3, 12), "Darwin", "arm64", ("", ""), "this is Darwin on arm64"),
        ((3, 12), "Linux", "riscv64", GLIBC, "this is Linux on riscv64"),
        ((3, 12), "Linux", "x86_64", ("glibc", "2.28"), "glibc 2.31 or newer; this system has glibc 2.28"),
        ((3, 12), "Linux", "x86_64", ("musl", "1.2.5"), "this system has musl 1.2.5"),
    ],
)
def test_an_unsuitable_machine_is_told_why(
    version: tuple[int, int], system: str, machine: str, libc: tuple[str, str], words: str
) -> None:
    assert words in setup_env.unsuitable(version, system, machine, libc)


def test_linux_with_a_python_of_the_list_is_suitable() -> None:
    for minor in (11, 12, 13, 14):
        assert setup_env.unsuitable((3, minor), "Linux", "x86_64", GLIBC) == ""
    assert setup_env.unsuitable((3, 11), "Linux", "aarch64", ("glibc", "2.31")) == ""


def test_the_state_follows_pins_metadata_and_folder_but_not_comments_times_or_linting(tmp_path: Path) -> None:
    root = a_checkout(tmp_path / "a")
    before = setup_env.wanted_state(str(root))

    pins = root / "requirements" / "cpu.txt"
    pins.write_text("# other words\n" + pins.read_text())
    os.utime(pins, (1, 1))
    project = root / "pyproject.toml"
    project.write_text(project.read_text().replace("99", "120"))
    assert setup_env.wanted_state(str(root)) == before

    pins.write_text(pins.read_text().replace("2.3.5", "2.3.6"))
    after_pins = setup_env.wanted_state(str(root))
    assert {key for key in before if before[key] != after_pins[key]} == {"pins"}
    project.write_text(project.read_text().replace('version = "1"', 'version = "2"'))
    assert setup_env.wanted_state(str(root))["project"] != before["project"]
    assert setup_env.wanted_state(str(a_checkout(tmp_path / "b")))["root"] != before["root"]


def test_nothing_is_installed_when_the_stamp_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = a_checkout(tmp_path)
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").touch()
    setup_env.write_stamp(str(root / ".venv" / "atpo-setup.json"), setup_env.wanted_state(str(root)))
    monkeypatch.setattr(setup_env, "make_environment", lambda *_: pytest.fail("set up again"))
    setup_env.set_up(str(root))


def test_an_unfinished_set_up_is_begun_anew_with_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = a_checkout(tmp_path)
    venv = root / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    made: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        made.append(command)
        return subprocess.CompletedProcess(command, 0, b"3.12" if "-c" in command else b"")

    monkeypatch.setattr(subprocess, "run", run)
    state = setup_env.wanted_state(str(root))
    setup_env.make_environment(str(venv), state, {"root": str(root), "python": "3.12.1"})
    assert "--clear" in made[-1]
    assert set(setup_env.read_stamp(str(venv / "atpo-setup.json"))) == {"root", "python"}

    made.clear()
    setup_env.make_environment(str(venv), state, dict(state))
    assert len(made) == 1, "a finished one stays, whatever Python asks"
    assert "-c" in made[0]


def test_a_damaged_stamp_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "stamp").write_text('{"pins": ')
    assert setup_env.read_stamp(str(tmp_path / "stamp")) == {}
    assert setup_env.read_stamp(str(tmp_path / "absent")) == {}


def test_torch_in_the_users_own_sources_asks_no_further_index() -> None:
    pip = FakePip("")
    setup_env.install_torch(pip, "torch==2.13.0+cpu", "http://127.0.0.1:9/whl")
    assert len(pip.asked) == 1
    assert "--extra-index-url" not in pip.asked[0]


def test_torch_comes_from_the_cpu_index_when_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "index_trouble", lambda url: "")
    pip = FakePip(NOT_FOUND, "")
    setup_env.install_torch(pip, "torch==2.13.0+cpu", "https://index.example/whl")
    assert pip.asked[1][-3:] == ["--extra-index-url", "https://index.example/whl", "torch==2.13.0+cpu"]


class Index(http.server.BaseHTTPRequestHandler):
    """Refuses the listing, as some mirrors do to all but pip."""

    def do_GET(self) -> None:
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


def test_an_index_that_answers_anything_is_reachable() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Index) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert setup_env.index_trouble(f"http://127.0.0.1:{server.server_port}/whl/torch/", 30.0) == ""
        thread.join()


def test_an_index_that_does_not_answer_us_is_left_to_pip_without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "index_trouble", lambda url: "no answer within 5 s")
    pip = FakePip(NOT_FOUND, "")
    setup_env.install_torch(pip, "torch==2.13.0+cpu", "https://index.example/whl")
    assert pip.asked[1][1:5] == ["--retries", "0", "--timeout", "5"]
    assert "--extra-index-url" in pip.asked[1]


def a_python(path: Path, version: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return str(path)


def test_a_python_named_for_an_environment_of_another_one_is_told_apart(tmp_path: Path) -> None:
    venv = tmp_path / ".venv"
    named = a_python(tmp_path / "python3.12", "3.12")
    assert setup_env.other_python(str(venv), named) == "", "there is none yet"
    a_python(venv / "bin" / "python", "3.11")
    note = setup_env.other_python(str(venv), named)
    assert note == f"{venv} stays with Python 3.11; for 3.12 ({named}) remove it first: rm -rf {venv}"
    assert setup_env.other_python(str(venv), "") == "", "none was named"
    a_python(venv / "bin" / "python", "3.12")
    assert setup_env.other_python(str(venv), named) == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("words", "named"), [([], ""), (["PYTHON=echo"], "echo")])
def test_make_tells_the_set_up_whether_a_python_was_named(words: list[str], named: str) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    shown = subprocess.run(
        ["make", "-n", "setup", *words], cwd=ROOT, env=environ, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert f'SETUP_PYTHON="{named}" ' in shown


def test_torch_found_nowhere_says_what_is_missing_and_the_ways_out() -> None:
    pip = FakePip(NOT_FOUND, NOT_FOUND)
    with pytest.raises(setup_env.SetupProblem) as problem:  # nothing listens on port 9
        setup_env.install_torch(pip, "torch==2.13.0+cpu", "http://127.0.0.1:9/whl")
    text = str(problem.value)
    for words in ("torch==2.13.0+cpu", "http://127.0.0.1:9/whl", "refused", "PIP_FIND_LINKS", "PYTHON="):
        assert words in text


def test_another_failure_of_pip_is_shown_as_it_is() -> None:
    pip = FakePip("Collecting torch\nERROR: Could not install packages: No space left on device")
    with pytest.raises(setup_env.SetupProblem, match="No space left on device"):
        setup_env.install_torch(pip, "torch==2.13.0+cpu")


def test_every_requirement_is_pinned_once_and_the_builds_that_break_torch_are_absent() -> None:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.+]+( ; [a-z_]+ [=>]= \"[a-z0-9_.]+\")?", pin) for pin in pins), pins
    names = [pin.split("==")[0] for pin in pins]
    assert names == sorted(set(names))
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & set(names)
    assert setup_env.pinned(str(ROOT), "torch") == "torch==2.13.0+cpu"


LEAVES_AN_ORPHAN = """
import pathlib, subprocess, sys, time

def test_leaves_an_orphan():
    there = pathlib.Path("there")
    child = "import pathlib, time; pathlib.Path('there').touch(); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-c", parent], check=True)
    while not there.exists():
        time.sleep(0.01)
"""


STARTS_COMPILE_WORKERS = """
import subprocess, sys
import torch._inductor.config

def start():
    torch._inductor.config.compile_threads = 2
    from torch._inductor.async_compile import AsyncCompile
    AsyncCompile.warm_pool()
    AsyncCompile.wait_pool_ready()

def test_starts_compile_workers():
    start()

def test_a_role_with_compile_workers_is_killed():
    line = "import test_alone, sys; test_alone.start(); print('ready', flush=True); sys.stdin.read()"
    role = subprocess.Popen([sys.executable, "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert role.stdout.readline() == b"ready\\n"
    role.kill()
    role.wait()
"""


def nested_suite(
    folder: Path, test: str, *, grace_s: float = 10.0, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """A run of pytest over ``test`` alone, under this suite's rule about what outlives it."""
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    (folder / "conftest.py").write_text(conftest.replace("GRACE_S = 10.0", f"GRACE_S = {grace_s}"))
    (folder / "test_alone.py").write_text(test)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, *options, str(folder)],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "ATPO_TEST_SESSION": f"nested-{os.getpid()}",
        },
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.mark.slow
def test_the_workers_in_which_torch_compiles_are_no_leftovers(tmp_path: Path) -> None:
    run = nested_suite(tmp_path, STARTS_COMPILE_WORKERS)
    assert "2 passed" in run.stdout, run.stdout + run.stderr
    assert run.returncode == 0, run.stdout
    assert "outlived" not in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "with a worker"])
def test_a_run_that_leaves_an_orphan_behind_fails_and_ends_it(tmp_path: Path, options: Sequence[str]) -> None:
    run = nested_suite(tmp_path, LEAVES_AN_ORPHAN, grace_s=0.1, options=options)
    assert "1 passed" in run.stdout, run.stdout + run.stderr
    assert run.returncode == 1
    outlived = re.search(r"outlived the tests and was killed: (\d+): .*time\.sleep\(600\)", run.stdout)
    assert outlived is not None, run.stdout
    try:
        handle = os.pidfd_open(int(outlived[1]))
    except ProcessLookupError:
        return
    assert select.select([handle], [], [], 30)[0], "still there after it was killed"
    os.close(handle)


def test_the_set_up_leaves_another_checkouts_environment_behind_a_link_alone(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / ".venv"
    link.symlink_to(tmp_path / "there")
    setup_env.refuse_anothers(str(link), str(tmp_path))  # an empty folder, on another disk perhaps
    setup_env.write_stamp(str(tmp_path / "there" / "atpo-setup.json"), {"root": str(tmp_path)})
    setup_env.refuse_anothers(str(link), str(tmp_path))
    with pytest.raises(setup_env.SetupProblem, match=r"a link to .*there, an environment of .*remove the link"):
        setup_env.refuse_anothers(str(link), "/another/checkout")
    setup_env.refuse_anothers(str(tmp_path / "there"), "/another/checkout")


def test_the_set_up_takes_no_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--help"])
    monkeypatch.setattr(setup_env, "set_up", lambda root: pytest.fail("set up"))
    assert setup_env.main() == 2
    assert "takes no arguments, got --help" in capsys.readouterr().err
