"""What a run demands of a model folder is checked before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atpo_async.core.errors import ConfigError
from atpo_async.models.sources import check_positions


def folder_with(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("nested", [False, True])
def test_a_context_of_more_positions_than_the_model_has_is_refused_with_both_numbers(
    tmp_path: Path, nested: bool
) -> None:
    said: dict[str, Any] = {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default"}}
    folder = folder_with(tmp_path, **({"text_config": said} if nested else said))
    check_positions(folder, 512)
    with pytest.raises(
        ConfigError, match=r"model\.max_context_tokens = 1000 is above the 512 positions of .* at most 512"
    ):
        check_positions(folder, 1000)


@pytest.mark.parametrize(
    "config",
    [{}, {"max_position_embeddings": 512, "rope_scaling": {"type": "yarn"}}, {"max_position_embeddings": None}],
    ids=["not said", "scaled", "none"],
)
def test_a_model_without_a_number_of_positions_is_left_to_the_engine(tmp_path: Path, config: dict[str, Any]) -> None:
    check_positions(folder_with(tmp_path, **config), 100_000)


def test_a_model_configuration_that_cannot_be_read_is_left_to_another_check(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    check_positions(tmp_path, 1000)
