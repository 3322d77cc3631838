"""Where what is compiled is kept, and that the next process finds it there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atpo_async.models import compiled
from atpo_async.models.compiled import TORCH, TRITON, VLLM, model_links, variables, variables_for_vllm

HOME = Path("/home/anyone")


def writable(folder: Path) -> bool:
    return True


def nowhere(folder: Path) -> bool:
    return False


def test_what_torch_compiles_stays_in_the_users_cache() -> None:
    found = {TORCH: "/home/anyone/.cache/atpo-async/torch"}
    assert variables({}, usable=writable, home=HOME) == (found, "")
    assert variables({"XDG_CACHE_HOME": "/big/cache"}, usable=writable, home=HOME) == (
        {TORCH: "/big/cache/atpo-async/torch"},
        "",
    )


def test_what_the_user_has_set_is_left() -> None:
    assert variables({TORCH: "/mine"}, usable=writable, home=HOME) == ({}, "")
    assert variables_for_vllm({VLLM: "/mine"}, usable=nowhere, home=HOME) == {}


def test_a_home_that_cannot_be_written_is_told_and_the_folder_for_temporary_files_serves() -> None:
    found, line = variables({}, usable=nowhere, home=HOME)
    assert set(found) == {TORCH, TRITON}
    assert "/home/anyone/.cache/atpo-async/torch cannot be written" in line
    assert f"set {TORCH}" in line
    again, _ = variables({TRITON: "/mine"}, usable=nowhere, home=HOME)
    assert again == {TORCH: found[TORCH]}
    assert Path(variables_for_vllm({}, usable=nowhere, home=HOME)[VLLM]).parent == Path(found[TORCH]).parent


def test_vllms_own_choice_stands_where_it_can_be_written() -> None:
    assert variables_for_vllm({}, usable=writable, home=HOME) == {}


def test_links_to_models_stay_beside_it() -> None:
    assert model_links({}, home=HOME) == HOME / ".cache/atpo-async/models"
    assert model_links({"XDG_CACHE_HOME": "/big"}, home=HOME) == Path("/big/atpo-async/models")


def test_a_folder_that_is_a_file_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "atpo-async").write_text("")
    found, line = variables({"XDG_CACHE_HOME": str(tmp_path)})
    assert "cannot be written" in line
    assert not found[TORCH].startswith(str(tmp_path))


COMPILE = """
import json, sys
from atpo_async.models import compiled
compiled.keep(lambda line: sys.exit(line))
import torch
from torch._dynamo.utils import counters

@torch.compile
def f(x):
    return x @ x  # calls a library: nothing that a C++ compiler would have to make

f(torch.ones(8, 8))
print(json.dumps({name: counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}))
"""


@pytest.mark.slow
def test_a_second_process_takes_what_the_first_one_compiled(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (TORCH, TRITON)}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}

    def start() -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    assert start() == {"fxgraph_cache_hit": 0, "fxgraph_cache_miss": 1}
    assert start() == {"fxgraph_cache_hit": 1, "fxgraph_cache_miss": 0}
    assert any((tmp_path / "atpo-async" / "torch").iterdir())


def test_roles_keep_it_from_their_first_line_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(TORCH, raising=False)
    said: list[str] = []
    compiled.keep(said.append)
    kept = os.environ[TORCH]
    compiled.keep(said.append)  # two starts, one folder
    assert (kept, os.environ[TORCH], said) == (str(tmp_path / "atpo-async" / "torch"), kept, [])
