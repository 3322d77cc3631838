"""The benchmark's part for a GPU: its rows, what is measured in each (tried on the CPU), figures, limits of time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.learner import main, parse
from benchmarks.learner_parts.gpu import (
    MARK,
    NEEDS,
    Row,
    as_json,
    command_of,
    figures,
    measure,
    peak_tflops,
    rows_of,
    tables,
)
from benchmarks.learner_parts.gpu_side import held_bytes, num_bytes, stages
from benchmarks.learner_parts.plan import Plan, made_for
from benchmarks.learner_parts.sides import SIZES, make_trainer
from benchmarks.learner_parts.trees import SHAPES

ROOT = Path(__file__).resolve().parent.parent
ON_CPU = ("--part", "gpu", "--learner.device", "cpu", "--model", "demo", "--scale", "0.02", "--threads", "1")
MEASURED: dict[str, Any] = {
    "tokens": 2000.0, "flops": 4e12, "predicted": 2.0, "steps_s": [9.0, 5.0, 2.0, 2.0, 3.0],
    "compilations": [7, 1, 0, 0, 1],
    "peak_bytes": 3_000_000_000, "held_bytes": 1_000_000_000, "pass_tokens": 1000, "flat_s": [3.0, 3.8, 5.0],
    "bare_s": [1.0, 2.0, 4.0], "bare_tokens": 1000, "kinds_s": {"matrix products": 1.0, "norms": 0.25},
    "settings": {"kernels": "none"},
}  # fmt: skip


def plan(*words: str) -> Plan:
    _, found = parse([*ON_CPU, *words])
    return found


# --- rows


def test_rows_are_every_model_with_every_combination_of_values() -> None:
    rows = rows_of(["0.6b", "4b"], ["learner.packing=tree,flat", "learner.gradient_checkpointing=false,true"])
    assert len(rows) == 8
    assert rows[1].model == "0.6b"
    assert rows[1].varied == {"learner.packing": "tree", "learner.gradient_checkpointing": "true"}
    assert [row.varied for row in rows_of(["0.6b"], [])] == [{}]


@pytest.mark.parametrize("text", ["learner.packing", "packing=tree", "learner.packing=tree,", "=a"])
def test_what_names_no_values_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*ON_CPU, "--vary", text])
    assert "say FIELD=VALUE,VALUE" in capsys.readouterr().err


def test_a_rows_process_is_given_all_settings_and_a_large_model_what_it_needs_to_fit() -> None:
    (row,) = rows_of(["4b"], ["learner.gradient_checkpointing=true"])
    words = command_of(plan("--learner.minibatches", "2", "--trees", "3"), row, 0.5)
    assert words[words.index("--trees") + 1] == "3"
    assert words[words.index("--learner.minibatches") + 1] == "2"
    assert words[words.index("--learner.optimizer") + 1] == NEEDS["4b"]["learner.optimizer"]
    assert words.count("--learner.gradient_checkpointing") == 1
    given = command_of(plan("--learner.optimizer", "offload"), row, 0.5)
    assert given.count("--learner.optimizer") == 1
    assert given[given.index("--learner.optimizer") + 1] == "offload"


def test_the_shape_that_is_measured_on_a_gpu_has_twelve_leaves_of_four_turns() -> None:
    shape = SHAPES["m8"]
    assert (shape.leaves, shape.turns, shape.prompt, shape.observation, shape.action) == (12, 4, 512, 200, 128)


def test_the_qwen3_models_have_the_published_numbers_of_parameters() -> None:
    for name, millions in (("0.6b", 596), ("1.7b", 1721), ("4b", 4022)):
        model = SIZES[name].make(device="meta")
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


# --- limits of time


def saying(*stages: dict[str, Any], then: str = "") -> list[str]:
    lines = "; ".join(f"echo '{MARK}{json.dumps(stage)}'" for stage in stages)
    return ["sh", "-c", f"{lines}; {then or 'true'}"]


def test_a_row_keeps_what_it_told_when_its_time_is_over_and_later_rows_are_not_begun() -> None:
    rows = rows_of(["0.6b", "4b"], [])
    said: list[tuple[str, str, dict[str, Any]]] = []
    commands = {"0.6b": saying({"tokens": 1}, {"scored": 2}, then="sleep 600"), "4b": saying({"tokens": 3})}
    measure(
        rows, lambda row: commands[row.model], limit_s=4.0, least_s=2.0,
        told=lambda row: said.append((row.model, row.ended, dict(row.found))),
    )  # fmt: skip
    assert (rows[0].found, rows[0].ended) == ({"tokens": 1, "scored": 2}, "cut short by the limit of time")
    assert (rows[1].found, rows[1].ended) == ({}, "not run: no time left")
    assert [ended for _, ended, _ in said] == ["not run", "not run", rows[0].ended, rows[1].ended]
    assert next(found for model, _, found in said if model == "0.6b") == {"tokens": 1}


def test_a_row_that_fails_says_its_last_words_and_the_next_one_is_run() -> None:
    rows = rows_of(["0.6b", "4b"], [])
    words = "echo '# a stage' >&2; echo 'torch.OutOfMemoryError: CUDA out of memory' >&2; exit 3"
    commands = {"0.6b": saying({"tokens": 1}, then=words), "4b": saying({"tokens": 3})}
    measure(rows, lambda row: commands[row.model], limit_s=None, told=lambda row: None)
    assert rows[0].ended == "ended with status 3: torch.OutOfMemoryError: CUDA out of memory"
    assert (rows[1].ended, rows[1].found) == ("done", {"tokens": 3})


# --- figures


def test_figures_are_of_the_median_step_after_the_second() -> None:
    found = figures(MEASURED, 10.0)
    assert found == {
        "step_s": 2.0, "tokens_s": 1000.0, "slowest": 1.5, "compilations": 9, "compilations_later": 1, "mfu": 0.2,
        "mb_a_token": 2.0, "over_flat": 1.9, "of_prediction": 0.95, "over_bare": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("without", "missing"),
    [("flat_s", "over_flat"), ("bare_s", "over_bare"), ("pass_tokens", "mb_a_token"), ("steps_s", "step_s")],
)
def test_figures_of_a_stage_that_is_not_there_are_left_out(without: str, missing: str) -> None:
    found = figures({name: value for name, value in MEASURED.items() if name != without}, None)
    assert missing not in found
    assert "mfu" not in found  # no peak is known


def test_tables_name_what_varies_the_targets_and_how_a_row_ended() -> None:
    done = Row(model="0.6b", varied={"learner.kernels": "liger"}, found=MEASURED, ended="done")
    cut = Row(model="4b", varied={}, found={"settings": {"kernels": "none"}}, ended="not run: no time left")
    first, steps, kinds = tables([done, cut], card="a card", about="16 trees.", peak=10.0)
    assert "MFU (>= 40 %)" in first.head
    assert first.rows[0][:5] == ("0.6b", "kernels liger", "2.000", "1,000", "20.0 %")
    assert "1.90 / 2.00 = 0.95" in first.rows[0]
    assert first.rows[1][1] == "kernels none"
    assert first.rows[1][-1] == "not run: no time left"
    assert steps.rows[0][2:5] == ("9.000 5.000 2.000 2.000 3.000", "1.50", "9: 7 1 0 0 1")
    assert kinds.rows == [("0.6b", "kernels liger", "1000 (80 %)", "", "", "250 (20 %)", *[""] * 10)]
    assert as_json(done, 10.0)["figures"]["mfu"] == 0.2


def test_the_peak_is_the_given_one_or_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops(123.0) == 123.0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("Some Card", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peak_tflops(None) == peak


# --- a row, on the CPU


def test_a_row_tells_its_stages_one_by_one_and_every_figure_comes_out() -> None:
    tried = plan("--rounds", "1")
    shape = {"m8": SHAPES["m8"].scaled(0.02)}
    found = list(stages(Plan(**{**vars(tried), "shapes": shape})))
    assert [next(iter(stage)) for stage in found] == ["model", "steps_s", "kinds_s", "flat_s", "bare_tokens"]
    row = {name: value for stage in found for name, value in stage.items()}
    assert len(row["steps_s"]) == len(row["compilations"]) == 3
    assert {"matrix products", "attention, forward", "attention, backward"} <= set(row["kinds_s"])
    assert row["settings"]["gradient_checkpointing"] == "False"
    assert {"step_s", "mfu", "over_bare", "over_bare_every", "of_prediction"} <= set(figures(row, 1.0))
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(("mixed_precision", "num_bytes_each"), [("no", 16), ("bf16", 18)])
def test_what_is_held_are_weights_with_their_copy_gradients_and_states(
    mixed_precision: str, num_bytes_each: int
) -> None:
    AcceleratorState._reset_state(True)
    tried = plan("--learner.mixed_precision", mixed_precision)
    trainer = make_trainer(SIZES["demo"], tried.config)
    trainer.timed(made_for(trainer, tried, SHAPES["m8"].scaled(0.02), 1), "tree")
    parameters = sum(p.numel() for p in trainer.policy.parameters())
    counters = 4 * len(list(trainer.policy.parameters()))
    assert held_bytes(trainer) == num_bytes_each * parameters + counters
    assert trainer.largest_pass > 0
    AcceleratorState._reset_state(True)


def test_a_quantised_tensor_is_as_large_as_its_parts() -> None:
    class Parts:
        codes = torch.zeros(256, dtype=torch.uint8)
        scale = torch.zeros(1)

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scale"], None

    found: Any = Parts()
    assert num_bytes(found) == 260


@pytest.mark.slow
def test_as_a_command_it_prints_its_rows_and_writes_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = [*ON_CPU, "--trees", "1", "--rounds", "1", "--json", str(file), "--vary", "learner.minibatches=2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "learner.py"), *words],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "A step's time by kind of kernel" in done.stdout
    rows = json.loads(file.read_text())["rows"]
    assert [(row["model"], row["varied"], row["ended"]) for row in rows] == [
        ("demo", {"learner.minibatches": "2"}, "done")
    ]
    assert all(row["figures"]["tokens_s"] > 0 for row in rows)


def test_a_limit_of_no_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*ON_CPU, "--limit-s", "0"])
    assert "--limit-s must be above 0, got 0" in capsys.readouterr().err
