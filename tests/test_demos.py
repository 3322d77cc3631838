"""Demos by name: which file each is, and the run that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atpo_async.cli import main
from atpo_async.cli import train as command
from atpo_async.config import Config, load

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", command.DEMOS)
def test_a_demo_by_name_is_its_file_in_a_new_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Config] = []

    def train(config: Config, **_: Any) -> int:
        trained.append(config)
        (config.run.dir / config.run.name).mkdir(parents=True)
        return 0

    monkeypatch.setattr(command, "train", train)
    for _ in range(2):
        assert main.main(["demo", name, "--run.seed", "3", "--run.dir", str(tmp_path)]) == 0
    assert [config.run.name for config in trained] == [f"demo-{name}-3-1", f"demo-{name}-3-2"]
    file = load([ROOT / "configs" / f"demo_{name}.toml"])
    assert file.model.warm_start
    assert trained[0].named_environments()[0][1] == file.named_environments()[0][1]
