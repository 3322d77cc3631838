"""Doors: built-in and user's own things by name, checked when they are loaded."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atpo_async.core.doors import Door
from atpo_async.core.errors import AtpoError, ConfigError, SetupError

PACKAGE = "doors_of_this_test"


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door[Any]]:
    """A door with the built-in ones `plain` and `two-words`, and a module `mine` of a user."""
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "_shared.py").write_text("")
    (folder / "plain.py").write_text("def shape(x): return x + 1\n")
    (folder / "two_words.py").write_text("def shape(x, *, by=2): return x * by\n")
    (tmp_path / "mine_of_this_test.py").write_text(
        "def tripled(x): return 3 * x\n"
        "def greedy(): pass\n"
        "number = 7\n"
        "class Thing:\n"
        "    part = 1\n"
        "    def __init__(self, x, size=0): self.size = size + x\n"
        "class Half:\n"
        "    def __init__(self, x): pass\n"
        "def nothing(x): pass\n"
        "def fails(x): raise ValueError('no such size')\n"
        "async def later(x): pass\n"
        "def typed(x, *, size: int = 1, note: 'str | None' = None): return x * size\n"
    )
    (tmp_path / "broken_of_this_test.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Door(
        field="figure.shape",
        what="a shape",
        protocol="docs/shapes.md",
        package=PACKAGE,
        attribute="shape",
        hyphens=True,
        call=("x",),
        parts=("part",),
    )
    for name in [n for n in sys.modules if n.endswith("of_this_test") or n.startswith(PACKAGE)]:
        del sys.modules[name]


def test_a_module_in_the_doors_package_is_a_built_in_one(door: Door[Any]) -> None:
    assert door.names() == ("plain", "two-words")
    assert (door.load("plain")(4), door.load("two-words")(4)) == (5, 8)


def test_names_are_known_without_loading_what_they_stand_for(door: Door[Any]) -> None:
    assert door.target("two-words") == f"{PACKAGE}.two_words:shape"
    assert door.target("mine_of_this_test:tripled") == "mine_of_this_test:tripled"
    assert not any(
        name.startswith(f"{PACKAGE}.") or name.endswith("of_this_test") for name in sys.modules if name != PACKAGE
    )


def test_a_users_own_comes_in_by_its_module_and_name(door: Door[Any]) -> None:
    assert door.load("mine_of_this_test:tripled")(5) == 15
    assert door.make("mine_of_this_test:Thing", 5, options={"size": 2}).size == 7


def test_options_are_bound_by_name(door: Door[Any]) -> None:
    assert door.load("two-words", {"by": 10})(4) == 40


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "plane",
            {},
            r"^figure.shape = 'plane' is unknown; did you mean plain\?  Known: plain, two-words, "
            "or 'package.module:name' for a shape of your own$",
        ),
        ("two_words", {}, "is unknown"),
        ("_shared", {}, "is unknown"),
        ("mine:", {}, "is unknown"),
        ("mine_of_this_test.tripled", {}, "did you mean mine_of_this_test:tripled?"),
        ("./shapes/mine.py:tripled", {}, "did you mean shapes.mine:tripled?"),
        ("mine.py:tripled", {}, "did you mean mine:tripled?"),
        ("__main__:tripled", {}, "cannot see what a script or a notebook defines: put it into a module"),
        ("mine_of_this_test:tripped", {}, "has no 'tripped'; did you mean mine_of_this_test:tripled?"),
        ("a b:c", {}, "is unknown"),
        ("mine_of_this_test:absent", {}, "has no 'absent'"),
        ("mine_of_this_test:number", {}, "has no function or class, but an int, as 'number'"),
        (
            "mine_of_this_test:greedy",
            {},
            r"a shape is called as \(x, \*\*options\), mine_of_this_test:greedy takes \(\)",
        ),
        ("plain", {"by": 3}, "unexpected keyword argument 'by'"),
        ("mine_of_this_test:typed", {"size": "big"}, "its option 'size' is int, not str 'big'"),
        ("mine_of_this_test:typed", {"size": True}, "its option 'size' is int, not bool True"),
        ("mine_of_this_test:typed", {"note": 1.5}, "its option 'note' is str, not float 1.5"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_with_what_would(
    door: Door[Any], name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(door, parts=()).load(name, options)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("mine_of_this_test:Half", ConfigError, "Half is not a shape: it lacks part; see docs/shapes.md"),
        ("mine_of_this_test:nothing", ConfigError, "its factory returned None; it must return a shape"),
        ("mine_of_this_test:later", ConfigError, "its factory is async"),
        ("broken_of_this_test:x", SetupError, "'broken_of_this_test' cannot be imported: .*a_module_that_nobody_has"),
        ("no_module_of_this_test:x", SetupError, "'no_module_of_this_test' cannot be imported"),
        ("mine_of_this_test:fails", SetupError, "could not be made: .*no such size"),
    ],
)
def test_a_factory_that_fails_or_returns_something_else_is_refused_with_the_protocol(
    door: Door[Any], name: str, error: type[AtpoError], said: str
) -> None:
    with pytest.raises(error, match=said):
        door.make(name, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine_of_this_test:later", r"is async \(async def\): a shape is called and not awaited"),
        ("mine_of_this_test:Thing", "is a class: a shape is a function, or an object that is called like one"),
    ],
)
def test_a_function_is_neither_async_nor_a_class(door: Door[Any], name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(door, parts=()).load(name)


def test_a_class_whose_methods_are_not_async_is_refused_before_it_is_made(door: Door[Any], tmp_path: Path) -> None:
    (tmp_path / "plain_of_this_test.py").write_text(
        "class Slow:\n    def __init__(self, x): 1 / 0\n    def part(self): pass"
    )
    with pytest.raises(ConfigError, match="Slow is not a shape: part must be async"):
        dataclasses.replace(door, coroutines=("part",)).make("plain_of_this_test:Slow", 1)


def test_a_module_or_factory_that_changes_the_working_folder_changes_it_for_nobody_else(
    door: Door[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mover_of_this_test.py").write_text(
        "import os\nos.chdir('/')\nclass Mover:\n    part = 1\n    def __init__(self, x): os.chdir('/')\n"
    )
    monkeypatch.chdir(tmp_path)
    door.make("mover_of_this_test:Mover", 1)
    assert Path.cwd() == tmp_path


def test_what_is_not_awaited_must_not_be_async(door: Door[Any], tmp_path: Path) -> None:
    (tmp_path / "eager_of_this_test.py").write_text(
        "class Eager:\n    def __init__(self, x): ...\n    async def part(self): ..."
    )
    with pytest.raises(ConfigError, match="Eager is not a shape: part must not be async, for nothing awaits it"):
        dataclasses.replace(door, plain=("part",)).offered("eager_of_this_test:Eager")


def test_a_module_that_fails_is_named_with_its_own_line_and_a_near_name(
    door: Door[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bad_of_this_test.py").write_text("def shape(*a, **o):\n    return None + 1\n\n\nopen('nowhere')\n")
    (tmp_path / "made_of_this_test.py").write_text("def shape(*a, **o):\n    return None + 1\n")
    with pytest.raises(SetupError, match=r"\(at bad_of_this_test\.py:5, in <module>: open\('nowhere'\)\)"):
        door.make("bad_of_this_test:shape", 1)
    with pytest.raises(
        SetupError, match=r"could not be made: TypeError.* \(at made_of_this_test\.py:2, in shape: return None \+ 1\)"
    ):
        door.make("made_of_this_test:shape", 1)
    with pytest.raises(SetupError, match="did you mean 'made_of_this_test'"):
        door.make("mode_of_this_test:shape", 1)
