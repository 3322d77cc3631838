"""Roles load our packages, whatever files lie beside the task."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from atpo_async.config.doors import ENVIRONMENT
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.run import launch

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
    import multiprocessing
    import sys

    import task_of_mine

    def tell(who):
        import actors, atpo_async, buffer, inprocess, learner, random, types
        for module in (actors, atpo_async, buffer, inprocess, learner, random, types):
            print(who, module.__name__, module.__file__)
        print(who, "arguments", *sys.argv[1:], flush=True)

    if __name__ == "__main__":
        tell("role")
        child = multiprocessing.get_context("spawn").Process(target=task_of_mine.tell, args=("child",))
        child.start()
        child.join()
        sys.exit(child.exitcode)
"""
OURS = ("actors", "atpo_async", "buffer", "inprocess", "learner")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's, with a task and files whose names others have too."""
    for name in (*OURS, "random", "types", "yaml"):
        (tmp_path / f"{name}.py").write_text(f'raise SystemExit("{name}.py of the user was imported")\n')
    (tmp_path / "probe.py").write_text(textwrap.dedent(PROBE))
    (tmp_path / "task_of_mine.py").write_text("def tell(who):\n    import probe\n    probe.tell(who)\n")
    return tmp_path


def run(command: Sequence[str], folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("start", ["by a role's command", "by a launcher of ranks"])
def test_a_file_beside_the_task_replaces_neither_our_modules_nor_a_librarys(folder: Path, start: str) -> None:
    """Nor in what the role spawns; while the task itself is found there."""
    command = launch.command("probe", "one", "two")
    if start == "by a launcher of ranks":
        command = (sys.executable, "-u", *command[2:])
    ran = run(command, folder)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 16
    for who in ("role", "child"):
        files = {words[1]: Path(words[2]) for words in map(str.split, lines) if words[0] == who and len(words) == 3}
        assert {name for name, file in files.items() if file.is_relative_to(ROOT)} == set(OURS)
        assert not [file for file in files.values() if file.is_relative_to(folder)]
    assert "role arguments one two" in lines


def test_a_folder_on_pythonpath_does_not_replace_our_packages(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in OURS:
        (folder / f"{name}.py").rename(other / f"{name}.py")
    (other / "only_there.py").write_text("print('found', __file__)\n")
    (folder / "probe.py").write_text("import actors, buffer, only_there\nprint(actors.__file__, buffer.__file__)\n")
    ran = run(launch.command("probe"), folder, other)
    assert ran.returncode == 0, ran.stderr
    assert f"found {other / 'only_there.py'}" in ran.stdout
    assert str(ROOT / "actors" / "__init__.py") in ran.stdout


def test_a_script_beside_such_files_loads_a_configuration(folder: Path) -> None:
    """The roles' packages are not imported in this process; which choices they bring is known all the same."""
    for name in ("atpo_async", "random", "types"):
        (folder / f"{name}.py").unlink()
    (folder / "script.py").write_text(
        "from atpo_async import load\nfrom atpo_async.config.doors import DOORS\n"
        "print(load().buffer.sampling, *(door.field for door in DOORS if not door.names()))\n"
    )
    ran = run((sys.executable, "script.py"), folder, ROOT)
    assert ran.stdout.split() == ["prioritized"], ran.stderr


def test_a_script_that_has_imported_its_own_module_of_a_packages_name_is_told_its_file(folder: Path) -> None:
    for name in ("atpo_async", "random", "types"):
        (folder / f"{name}.py").unlink()
    (folder / "learner.py").write_text("")
    (folder / "script.py").write_text("import learner\nfrom atpo_async import load\nload()\n")
    ran = run((sys.executable, "script.py"), folder, ROOT)
    assert f"{folder}/learner.py was imported under the name of this program's package 'learner'" in ran.stderr
    assert "give it another name" in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("role", ["buffer", "learner", "actors"])
def test_every_role_answers_from_such_a_folder(folder: Path, role: str) -> None:
    ran = run(launch.command(role, "no-such-run"), folder)
    assert ran.returncode != 0
    assert "of the user was imported" not in ran.stdout + ran.stderr
    assert "no-such-run" in ran.stderr


def test_the_working_folder_comes_last_on_the_path_and_the_launchers_folder_is_not_on_it() -> None:
    own = str(Path(launch.HERE).parent)
    assert launch.search_path([own, "/a", "/here", "/b", ""], "/here") == ["/a", "/b", "/here"]


def test_a_task_that_gets_another_module_of_its_files_name_is_a_setup_error_naming_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "buffer.py").write_text("def store(): ...\n")
    (tmp_path / "task_with_a_buffer.py").write_text("from buffer import store\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", launch.search_path([str(ROOT), *sys.path], str(tmp_path)))
    import buffer

    with pytest.raises(SetupError, match=r"import name 'store'.*give another name to .*/buffer\.py, in whose") as e:
        ENVIRONMENT.make("task_with_a_buffer:make", tmp_path)
    assert str(buffer.__file__) in str(e.value)
    with pytest.raises(ConfigError, match=r"module 'buffer' \(.*\) has no 'make'; give another name"):
        ENVIRONMENT.make("buffer:make", tmp_path)
