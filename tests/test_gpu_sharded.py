"""FSDP2, DDP and fp16 on CUDA, held to the policy in one piece on the same card, by the jobs of the CPU's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learner_support import make_model
from tests.sharded_support import Sections, job_resume, launch, make_trainer, trained
from tests.test_sharded import ALL, check_float32, check_half, same_files

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(400)]

CUDA_RTOL = 1e-4
"""float32 sums in other orders from kernel to kernel."""


def on_cuda(sections: Sections, **learner: Any) -> Sections:
    return {**sections, "learner": {**sections["learner"], "device": "cuda", **learner}}


WHOLE = on_cuda(ALL)
HALF = on_cuda(ALL, mixed_precision="bf16")
# A rate that moves nothing: every loss is that of the first weights, however many updates overflow.
SCALED = on_cuda(ALL, mixed_precision="fp16", lr=1e-9)
NUM_SCALED = 12
KINDS = [("plain", "DistributedDataParallel"), ("fsdp2", "FSDPPolicy")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Heads wide enough for FlexAttention.
    return make_model(tmp_path_factory.mktemp("model"), head_dim=32)


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Any]:
    """In one piece, in float32."""
    return trained(make_trainer(model, "plain", WHOLE), (0,))


@pytest.fixture(scope="module")
def still(model: Path) -> dict[str, Any]:
    """In one piece, in float32, at the rate of the runs in fp16."""
    return trained(make_trainer(model, "plain", on_cuda(ALL, lr=1e-9)), range(NUM_SCALED))


@pytest.fixture(scope="module")
def before(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the policy in one piece."""
    return job_resume(str(model), "plain", WHOLE, None, str(tmp_path_factory.mktemp("before")), True)


def work_of(model: Path, before: str, folder: Path) -> dict[tuple[str, str], list[Any]]:
    work: dict[tuple[str, str], list[Any]] = {}
    for kind, _ in KINDS:
        work[kind, "whole"] = ["train", str(model), kind, WHOLE, []]
        work[kind, "half"] = ["train", str(model), kind, HALF, []]
        work[kind, "scaled"] = ["train", str(model), kind, SCALED, [], NUM_SCALED]
    work["fsdp2", "copied"] = ["resume", str(model), "fsdp2", WHOLE, before, str(folder / "copy"), False]
    work["fsdp2", "resumed"] = ["resume", str(model), "fsdp2", WHOLE, before, str(folder / "on"), True]
    return work


@pytest.fixture(scope="module", params=[1, 2])
def wrapped(
    request: pytest.FixtureRequest, model: Path, before: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Any]:
    """What came of it under DDP and FSDP2, on as many ranks."""
    if request.param > torch.cuda.device_count():
        pytest.skip(f"needs {request.param} CUDA devices, one for each rank; there is one")
    folder = tmp_path_factory.mktemp("wrapped")
    work = work_of(model, before, folder)
    return dict(zip(work, launch(folder / "ranks", list(work.values()), ranks=request.param), strict=True))


@pytest.mark.parametrize(("kind", "wrapper"), KINDS)
def test_in_float32_loss_gradient_weights_and_probe_are_those_of_one_piece(
    alone: dict[str, Any], wrapped: dict[tuple[str, str], Any], kind: str, wrapper: str
) -> None:
    assert wrapped[kind, "whole"]["wrapper"] == wrapper
    check_float32(alone, wrapped[kind, "whole"], rtol=CUDA_RTOL)


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_in_bfloat16_the_gradient_is_as_near_to_float32s_as_that_of_autocast(
    alone: dict[str, Any], wrapped: dict[tuple[str, str], Any], kind: str
) -> None:
    check_half(alone, wrapped["plain", "half"], wrapped[kind, "half"])


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_in_fp16_the_scale_finds_its_size_and_no_step_is_a_fault(
    still: dict[str, Any], wrapped: dict[tuple[str, str], Any], kind: str
) -> None:
    check_scaled(still, wrapped[kind, "scaled"])


def check_scaled(still: dict[str, Any], made: dict[str, Any]) -> None:
    """Every update was taken or left out as an overflow, each of which has halved the scale; most were taken."""
    last = made["metrics"][-1]
    assert len(made["metrics"]) == NUM_SCALED
    assert last["guard/skipped_updates"] == 0
    assert last["train/updates"] + last["guard/fp16_overflows"] == 2 * NUM_SCALED
    assert last["train/updates"] > NUM_SCALED
    assert last["guard/fp16_scale"] == 65536.0 * 0.5 ** last["guard/fp16_overflows"]
    for mine, theirs in zip(still["metrics"], made["metrics"], strict=True):
        assert theirs["train/loss"] == pytest.approx(mine["train/loss"], abs=2e-3)


def test_fp16_in_one_piece_does_the_same(still: dict[str, Any], model: Path, tmp_path: Path) -> None:
    # In a process of its own: Accelerate has one precision in each.
    (made,) = launch(tmp_path / "alone", [["train", str(model), "alone", SCALED, [], NUM_SCALED]], ranks=1)
    assert made["wrapper"] == "Policy"
    check_scaled(still, made)


def test_shards_load_a_checkpoint_of_whole_tensors_and_write_the_same_one(
    wrapped: dict[tuple[str, str], Any], before: str, model: Path, tmp_path: Path
) -> None:
    assert same_files(before, wrapped["fsdp2", "copied"])
    resumed = wrapped["fsdp2", "resumed"]
    again = job_resume(str(model), "plain", WHOLE, resumed, str(tmp_path / "again"), False)
    assert same_files(resumed, again)
