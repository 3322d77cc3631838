"""The configurations for GPUs: each loads, says what card it is for and whether it was run, and its estimate fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from atpo_async.cli import main
from atpo_async.config import load
from atpo_async.models.memory.cards import cards
from atpo_async.models.memory.shape import shape_of

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("gpu_*.toml"))
OTHERS = [ROOT / "configs" / "search_qa.toml", ROOT / "configs" / "at2po_qwen3_4b.toml"]
MIB = {24: 24564, 80: 81559}
"""What nvidia-smi reports of a card of so many GB."""

each = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def head_of(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("[run]")[0]


def test_there_is_one_for_a_small_card_one_for_a_large_one_and_one_for_eight() -> None:
    assert [path.stem for path in CONFIGS] == ["gpu_24gb_lora", "gpu_80gb", "gpu_8x80gb"]


@each
def test_its_head_names_the_install_the_estimate_and_whether_it_was_run(path: Path) -> None:
    head = head_of(path)
    name = path.relative_to(ROOT)
    assert 'pip install -e ".[vllm,gpu]"' in head
    assert re.search(rf"atpo doctor {re.escape(str(name))} --gpu-gb (24|80)\b", head)
    assert f"atpo train  {name}" in head
    assert re.search(r"^# (Not run: |Run on )", head, re.MULTILINE)


@pytest.mark.parametrize("path", [*CONFIGS, *OTHERS], ids=lambda path: path.stem)
def test_its_estimate_fits_its_card_and_leaves_some_of_it(path: Path) -> None:
    config = load(path)
    size = MIB[24 if "24gb" in path.stem else 80] * 2**20
    shape = shape_of(config.model.path)
    assert shape is not None
    found = cards(config, shape, card_bytes=size, engine="vllm")
    assert [card.number for card in found] == list(range(8 if "8x" in path.stem or path in OTHERS else 1))
    for card in found:
        assert card.fits, card.verdict()
        assert card.needed < 0.97 * card.num_bytes, card.verdict()


@each
def test_the_doctor_says_so_too(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = re.search(r"--gpu-gb (\d+)", head_of(path))
    assert said is not None
    assert main.main(["doctor", str(path), "--gpu-gb", said[1]]) == 0
    assert "to spare" in capsys.readouterr().out


def test_the_small_card_trains_adapters_and_the_large_one_all_weights() -> None:
    small, large, several = (load(path) for path in CONFIGS)
    assert small.learner.lora.rank > 0
    assert large.learner.lora.rank == several.learner.lora.rank == 0
    assert {config.learner.mixed_precision for config in (small, large, several)} == {"bf16"}
