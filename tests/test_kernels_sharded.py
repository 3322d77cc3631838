"""``learner.optimizer = "adamw8bit"`` under FSDP2: two ranks, and their checkpoint in one piece (make test-kernels)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.learner_support import make_model
from tests.sharded_support import Sections, job_resume, launch

pytestmark = pytest.mark.kernels

ROUNDED: Sections = {"learner": {"optimizer": "adamw8bit"}}


def test_moments_in_8_bits_go_from_two_ranks_to_one_piece_and_back(tmp_path: Path) -> None:
    # Some matrices of 4,096 numbers and more to a rank, which are rounded; the rest is not.
    model = str(make_model(tmp_path / "model", hidden_size=256))
    before = job_resume(model, "plain", ROUNDED, None, str(tmp_path / "one"), True)
    made, on = launch(
        tmp_path / "ranks",
        [
            ["resume", model, "fsdp2", ROUNDED, None, str(tmp_path / "two"), True],
            ["resume", model, "fsdp2", ROUNDED, before, str(tmp_path / "on"), True],
        ],
        ranks=2,
    )
    again = job_resume(model, "plain", ROUNDED, made, str(tmp_path / "again"), False)
    one, two, back = (load_file(Path(path) / "model.safetensors") for path in (before, made, again))
    for name, tensor in two.items():
        assert torch.equal(back[name], tensor)
        # Blocks differ, and so do the roundings; AdamW's first step is of one size.
        assert float((tensor - one[name]).abs().mean()) < 1e-4
    moments, rounded = (load_file(Path(path) / "optimizer.safetensors") for path in (made, again))
    assert not any("codes" in name for name in moments)
    assert any("codes" in name for name in rounded)
    assert Path(on, "state.json").is_file()
