"""FSDP2 and DDP, on one rank and on two: loss, gradient and weights of a policy in one piece, and checkpoints."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from safetensors.torch import load_file

from atpo_async.core.errors import SetupError
from learner.checkpoints.tensors import read_tensors, write_tensors
from learner.policy.accelerator import make_accelerator
from tests.learner_support import make_config, make_model
from tests.sharded_support import Sections, job_resume, launch, make_trainer, trained

pytestmark = pytest.mark.timeout(600)  # the first test waits for all jobs, on a busy machine too

# Several passes to a step, two steps to the batch, clipped gradients, and every term that the loss may have.
ALL: Sections = {
    "learner": {"packing": "tree", "micro_batch_tokens": 100, "pack_tokens": 64, "epochs": 2, "max_grad_norm": 0.5},
    "objective": {
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
        "terms": ["lp-reg", "epo"],
        "term_options": {"lp-reg": {"noise": 0.01, "share": 0.8}},
        "token_weights": ["entropy-advantage", "clip-cov"],
    },
}
TRACED: Sections = {**ALL, "credit": {"value_mode": "tree_trace"}, "correction": {"exponent": "ess"}}
LORA: Sections = {**ALL, "learner": {**ALL["learner"], "lora": {"rank": 4}}}
CHECKPOINTED: Sections = {**ALL, "learner": {**ALL["learner"], "gradient_checkpointing": True}}
COMPILED: Sections = {**ALL, "learner": {**ALL["learner"], "compile": "on"}}
HALF: Sections = {**ALL, "learner": {**ALL["learner"], "mixed_precision": "bf16"}}
TRAINED = {
    1: [("fsdp2", "all"), ("fsdp2", "compiled"), ("fsdp2", "half"), ("plain", "half")],
    2: [
        ("plain", "all"),
        ("plain", "compiled"),
        ("plain", "checkpointed"),
        ("plain", "half"),
        ("fsdp2", "all"),
        ("fsdp2", "traced"),
        ("fsdp2", "half"),
        ("fsdp2", "idle"),
        ("fsdp2", "lora"),
        ("fsdp2", "checkpointed"),
    ],
}
"""By the number of ranks: how a policy is wrapped, and with which settings it trains; ``idle``: rank 1 has no tree."""
CASES = [(ranks, kind, name) for ranks, cases in TRAINED.items() for kind, name in cases]


@dataclass(frozen=True, slots=True)
class Found:
    """What came of it in one process without any group, and on one and two ranks."""

    alone: dict[str, dict[str, Any]]
    by_ranks: dict[int, dict[tuple[str, ...], Any]]
    checkpoints: Path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("sharded")
    model = make_model(folder / "model")
    before = job_resume(str(model), "plain", ALL, None, str(folder / "alone"), True)
    adapted = job_resume(str(model), "plain", LORA, None, str(folder / "adapted"), True)
    by_ranks = {}
    settings = {
        "all": ALL,
        "traced": TRACED,
        "half": HALF,
        "lora": LORA,
        "compiled": COMPILED,
        "checkpointed": CHECKPOINTED,
    }
    for ranks, cases in TRAINED.items():
        work: dict[tuple[str, ...], list[Any]] = {
            (kind, name): ["train", str(model), kind, settings.get(name, ALL), [1] if name == "idle" else []]
            for kind, name in cases
        }
        work["fsdp2", "overflow"] = ["overflow", str(model), "fsdp2", str(folder / f"overflow-{ranks}")]
        work["fsdp2", "copied"] = ["resume", str(model), "fsdp2", ALL, before, str(folder / f"copy-{ranks}"), False]
        work["fsdp2", "resumed"] = ["resume", str(model), "fsdp2", ALL, before, str(folder / f"on-{ranks}"), True]
        if ranks == 2:
            work["fsdp2", "adapters"] = ["resume", str(model), "fsdp2", LORA, adapted, str(folder / "adapters"), False]
            work["fsdp2", "former"] = ["former", str(model), str(folder / "former")]
            work["fsdp2", "full"] = ["full_disk", str(model), "fsdp2", str(folder / "full")]
        made = launch(folder / f"ranks-{ranks}", list(work.values()), ranks=ranks)
        by_ranks[ranks] = dict(zip(work, made, strict=True))
    alone = {name: trained(make_trainer(model, "plain", settings[name]), (0,)) for name in ("all", "traced", "lora")}
    return Found(alone, by_ranks, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kind", "name"), [case for case in CASES if case[2] != "half"])
def test_in_float32_loss_gradient_weights_and_probe_are_those_of_one_piece(
    found: Found, ranks: int, kind: str, name: str
) -> None:
    check_float32(found.alone.get(name, found.alone["all"]), found.by_ranks[ranks][kind, name], rtol=1e-5)


def check_float32(one: dict[str, Any], other: dict[str, Any], *, rtol: float) -> None:
    """``other`` is ``one`` within float32's rounding (``sharded_support.trained``)."""
    assert other["layout"] == one["layout"] == "tree"
    assert other["names"] == one["names"]
    assert other["from_reference"] <= 1e-6
    for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
        for metric in ("train/loss", "grad_norm", "loss/entropy", "loss/kl_reference", "tokens/trained"):
            assert theirs[metric] == pytest.approx(mine[metric], rel=rtol, abs=1e-2 * rtol), metric
    assert len(one["gradients"]) == len(other["gradients"]) == 2
    for mine, theirs in zip(one["gradients"], other["gradients"], strict=True):
        for tensor, values in mine.items():
            np.testing.assert_allclose(theirs[tensor], values, rtol=rtol, atol=0.1 * rtol)
    np.testing.assert_allclose(other["probe"], one["probe"], atol=rtol)
    for tensor, values in one["weights"].items():
        # AdamW's first steps are of one size whatever the gradient's: where that is all but zero its sign is noise.
        assert np.mean(np.abs(np.subtract(other["weights"][tensor], values)) > 0.1 * rtol) < 0.01, tensor


def flat(result: dict[str, Any], step: int) -> np.ndarray:
    return np.concatenate([values for _, values in sorted(result["gradients"][step].items())])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kind"), [(ranks, kind) for ranks, kind, name in CASES if name == "half"])
def test_in_bfloat16_the_gradient_is_as_near_to_float32s_as_that_of_one_whole_rank(
    found: Found, ranks: int, kind: str
) -> None:
    check_half(found.alone["all"], found.by_ranks[1]["plain", "half"], found.by_ranks[ranks][kind, "half"])


def check_half(exact: dict[str, Any], usual: dict[str, Any], other: dict[str, Any]) -> None:
    """``other``, in bfloat16, is as near to ``exact``, in float32, as ``usual``, on one whole rank, is."""
    gradient = flat(exact, 0)
    errors = [float(np.linalg.norm(flat(half, 0) - gradient)) for half in (usual, other)]
    assert 0 < errors[1] < 2 * errors[0] < 0.2 * np.linalg.norm(gradient)
    assert other["layout"] == "tree"
    assert other["from_reference"] == 0.0
    assert other["metrics"][0]["train/loss"] == pytest.approx(exact["metrics"][0]["train/loss"], abs=0.01)
    np.testing.assert_allclose(other["probe"], exact["probe"], atol=0.1)


# --- checkpoints


def same_files(one: str, other: str, *, model: str = "model") -> bool:
    for name in (model, "optimizer"):
        mine, theirs = (load_file(Path(path) / f"{name}.safetensors") for path in (one, other))
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[key], theirs[key]) for key in mine):
            return False
    return True


def state_of(path: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((Path(path) / "state.json").read_text())
    return {key: state[key] for key in ("step", "updates", "skips", "grad_norms", "overflows", "scaler")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_shards_load_a_checkpoint_of_whole_tensors_and_write_the_same_one(found: Found, ranks: int) -> None:
    before = str(found.checkpoints / "alone" / "step-000001-v000001")
    copy = found.by_ranks[ranks]["fsdp2", "copied"]
    assert same_files(before, copy)
    assert state_of(before) == state_of(copy)
    assert {path.suffix for path in Path(copy).rglob("*")} == {".safetensors", ".json"}


@pytest.mark.slow
def test_a_checkpoint_in_accelerates_format_is_read_in_shards_and_becomes_an_ordinary_one(found: Found) -> None:
    written, read = found.by_ranks[2]["fsdp2", "former"]
    assert same_files(written, read)
    assert state_of(written)["updates"] == state_of(read)["updates"] == 1


@pytest.mark.slow
def test_shards_load_adapters_and_write_the_same_ones(found: Found) -> None:
    before = str(found.checkpoints / "adapted" / "step-000001-v000001")
    assert same_files(before, found.by_ranks[2]["fsdp2", "adapters"], model="adapter_model")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_shards_have_saved_goes_on_in_one_piece_as_if_it_had_never_been_in_shards(
    found: Found, ranks: int, tmp_path: Path
) -> None:
    model, before = str(found.checkpoints / "model"), str(found.checkpoints / "alone" / "step-000001-v000001")
    expected = job_resume(model, "plain", ALL, before, str(tmp_path / "whole"), True)
    made = found.by_ranks[ranks]["fsdp2", "resumed"]
    for name in ("model", "optimizer"):
        mine, theirs = (load_file(Path(path) / f"{name}.safetensors") for path in (expected, made))
        for key, values in mine.items():
            torch.testing.assert_close(theirs[key], values, rtol=1e-5, atol=1e-6)
    assert state_of(made)["updates"] == 4
    again = job_resume(model, "plain", ALL, made, str(tmp_path / "again"), False)
    assert same_files(made, again)


@pytest.mark.slow
def test_a_full_disk_of_rank_0_is_the_same_error_on_every_rank_and_leaves_nothing(found: Found) -> None:
    full = found.by_ranks[2]["fsdp2", "full"]
    assert full["numbers"] == [errno.ENOSPC, errno.ENOSPC]
    assert full["left"] == []
    assert load_file(Path(full["path"]) / "model.safetensors")


def test_tensors_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(2, 3).T, "c": torch.tensor(4.0),
        "d": torch.randn(5).bfloat16(), "e": torch.arange(4), "f": torch.zeros(0, 2), "g": torch.tensor([True]),
    }  # fmt: skip
    write_tensors(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert dict(read_tensors(tmp_path / "file", {})).keys() == tensors.keys()
    with pytest.raises(ValueError, match=r"a has the shape \[3\], the model's has \[4\]"):
        dict(read_tensors(tmp_path / "file", {"a": torch.zeros(4)}))


# --- what is refused


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, "is for DEEPSPEED, which takes optimizer steps by itself"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "is for MEGATRON_LM, .* use FSDP2, as configs/"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "is for the first version of FSDP; set fsdp_version: 2"),
        (
            {"fsdp_plugin": SimpleNamespace(fsdp_version=2, activation_checkpointing=True)},
            "has fsdp_activation_checkpointing; set it to false: learner.gradient_checkpointing does it",
        ),
        (
            {"parallelism_config": SimpleNamespace(tp_size=2)},
            "has tp_size = 2, but each rank of this learner has trees",
        ),
        ({"dynamo_plugin": SimpleNamespace(backend=DynamoBackend.INDUCTOR)}, "has a dynamo_config; leave it out"),
    ],
)
def test_what_would_train_otherwise_than_the_configuration_says_is_refused_with_the_way_out(
    state: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, learner={"accelerate_config": "mine.yaml"})
    kind = DistributedType.FSDP if "fsdp_plugin" in state else DistributedType.NO
    made: Any = SimpleNamespace(**{"distributed_type": kind, "gradient_accumulation_steps": 1, **state})
    made.state = made
    monkeypatch.setattr("learner.policy.accelerator.Accelerator", lambda **_: made)
    with pytest.raises(SetupError, match=rf"learner\.accelerate_config = 'mine\.yaml' {said}"):
        make_accelerator(config)


# --- fp16


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gradient_that_overflows_in_one_ranks_shard_lowers_every_ranks_scale_and_is_no_fault(
    found: Found, ranks: int
) -> None:
    made = found.by_ranks[ranks]["fsdp2", "overflow"]
    assert made["scales"] == [[scale] * ranks for scale in (32768.0, 16384.0, 8192.0, 8192.0)]
    assert made["faults"] == [None] * 4
    assert (made["overflows"], made["skipped"], made["updates"]) == (3, 0, 1)
    assert made["unchanged"]
    assert made["restored"] == [8192.0, 3]
