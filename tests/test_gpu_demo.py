"""The demo on CUDA, short: it starts, learns, and every version passes the probe.

``scripts/demo_seeds.py`` is the whole of it: each engine and precision with three seeds.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from actors.engines.probe import BOUNDS
from scripts.demo_seeds import Outcome, outcome_of, run_demo

SHORT = ["--run.steps", "20", "--eval.every_steps", "20"]
"""On a CPU greedy success goes from 0.3 or 0.4 to 0.9 and more in as many."""


def check_learned(found: Outcome, *, device: str, dtype: str) -> None:
    assert len(found.greedy) >= 2
    assert found.greedy[-1] > max(0.75, found.greedy[0] + 0.2)
    assert 0 < found.probe < BOUNDS[device, dtype].never_good


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_short_demo_learns(engine: str, dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM for CUDA is not installed; pip install 'atpo-async[vllm]'")
    # One folder for all: the warm-started policy is made once.
    folder = tmp_path_factory.getbasetemp() / "demo"
    folder.mkdir(exist_ok=True)
    found = run_demo(folder, device="cuda", engine=engine, dtype=dtype, seed=1, options=SHORT, limit_s=600.0)
    check_learned(found, device="cuda", dtype=dtype)


def test_what_a_run_came_to_is_read_from_its_metrics(tmp_path: Path) -> None:
    lines = [
        '{"time": 1.0, "source": "actor-0", "step": 0, "version": 0, "metrics": {"engine/probe_error": 0.01}}',
        '{"time": 2.0, "source": "learner", "step": 0, "version": 0, "metrics": {"eval/success": 0.4}}',
        '{"time": 3.0, "source": "learner", "step": 1, "version": 1, "metrics": {"train/success": 0.5}}',
        '{"time": 4.0, "source": "learner", "step": 2, "version": 2, "metrics": {"train/success": 0.9}}',
        '{"time": 5.0, "source": "learner", "step": 2, "version": 2, "metrics": {"eval/success": 0.98}}',
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found = outcome_of(tmp_path, seconds=7.0)
    assert found == Outcome(greedy=[0.4, 0.98], sampled=0.9, probe=0.01, seconds=7.0)
    check_learned(found, device="cpu", dtype="bfloat16")
    with pytest.raises(AssertionError):
        check_learned(outcome_of(tmp_path, seconds=7.0), device="cpu", dtype="float32")
