"""What Accelerate may not change unseen: gradients, precision, and the log-probs that clips are measured on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from atpo_async.core.errors import SetupError
from atpo_async.run import accelerate_environment
from atpo_async.wire.messages import Batch, BatchTree
from learner.checkpoints import checkpoint
from learner.checkpoints.checkpoint import Progress
from learner.loss.guards import overflowed
from learner.policy import precision
from learner.policy.accelerator import make_accelerator
from learner.policy.half import HalfPolicy
from learner.policy.model import Policy, load_policy
from learner.training.trainer import Trainer
from tests.learner_support import batch_of, make_batch, make_config, make_model

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "configs" / "accelerate_fsdp.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def in_fp16(folder: Path, scaler: torch.amp.GradScaler, **learner: object) -> Trainer:
    """A trainer that scales its loss as under fp16; its arithmetic stays float32, for there is no GPU."""
    config = make_config(folder, learner=learner)
    accelerator = make_accelerator(config)
    accelerator.scaler = scaler
    trainer = Trainer(config, accelerator=accelerator, policy=load_policy(config))
    optimizer: Any = trainer.optimizer

    def unscale(_: object = None) -> None:
        scaler.unscale_(optimizer.optimizer)

    accelerator.unscale_gradients = unscale
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.whole.tensors().items()}


def unchanged(trainer: Trainer, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in trainer.whole.tensors().items())


def heavy_batch() -> Batch:
    trees = tuple(
        BatchTree(**{**{n: getattr(t, n) for n in t.__struct_fields__}, "weight": 100.0}) for t in make_batch().trees
    )
    return batch_of(trees, trees)


def test_under_fp16_an_update_that_a_guard_refuses_changes_nothing_and_the_next_one_is_taken(folder: Path) -> None:
    trainer = in_fp16(folder, torch.amp.GradScaler("cpu", init_scale=1024.0), max_grad_spike=3.0, lr=1e-6)
    for _ in range(12):
        assert trainer.train(make_batch(), version=3).fault is None
    before, steps = weights(trainer), trainer.history.updates
    report = trainer.train(heavy_batch(), version=3)
    assert report.fault is not None
    assert "times the median" in report.fault
    assert unchanged(trainer, before)
    assert (trainer.history.updates, trainer.history.skips.total, trainer.history.overflows) == (steps, 1, 0)
    assert trainer.train(make_batch(), version=3).fault is None
    assert not unchanged(trainer, before)


def test_a_gradient_that_does_not_fit_fp16_lowers_the_scale_and_is_no_fault(folder: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-30)
    trainer = in_fp16(folder, scaler)
    trainer.history.grad_norms = trainer.history.grad_norms.of([1.0] * 20)
    before = weights(trainer)
    report = trainer.train(heavy_batch(), version=3)
    assert report.fault is None
    assert unchanged(trainer, before)
    assert (trainer.history.overflows, trainer.history.skips.total, trainer.history.updates) == (1, 0, 0)
    assert report.metrics["guard/fp16_overflows"] == 1
    assert report.metrics["guard/skipped_updates"] == 0
    assert "grad_norm" not in report.metrics
    assert scaler.get_scale() == pytest.approx(1e8)
    assert trainer.train(make_batch(), version=3).fault is None
    assert trainer.history.updates == 1
    assert not unchanged(trainer, before)


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "expected"),
    [
        (1.0, float("inf"), 65536.0, True),
        (1.0, float("nan"), 2.0, True),
        (1.0, float("inf"), 1.0, False),  # nothing is scaled any more: the gradient itself is not finite
        (float("nan"), float("nan"), 65536.0, False),  # the loss is never scaled in the forward pass
        (1.0, 5.0, 65536.0, False),
        (1.0, float("inf"), None, False),
    ],
)
def test_only_what_the_loss_scale_did_is_an_overflow(
    loss: float, norm: float, scale: float | None, expected: bool
) -> None:
    assert overflowed(loss=loss, grad_norm=norm, scale=scale) is expected


def test_the_loss_scale_is_in_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    trainer = in_fp16(folder, torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2))
    for _ in range(3):
        trainer.train(make_batch(), version=3)
    trainer.history.overflows = 4
    path = checkpoint.save(tmp_path, trainer, Progress(step=3, version=3), keep=1)
    resumed = in_fp16(folder, torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2))
    checkpoint.load(path, resumed)
    scaler, old = resumed.accelerator.scaler, trainer.accelerator.scaler
    assert scaler is not None
    assert old is not None
    assert scaler.state_dict() == old.state_dict()
    assert scaler.get_scale() == 1024.0
    assert resumed.history.overflows == 4
    state = json.loads((path / "state.json").read_text())
    del state["scaler"], state["overflows"]  # as checkpoints were
    (path / "state.json").write_text(json.dumps(state))
    assert checkpoint.load(path, resumed) == Progress(step=3, version=3)


def test_fp16_on_a_cpu_is_refused_with_the_way_out(folder: Path) -> None:
    with pytest.raises(SetupError, match=r"'fp16' is for a GPU.* use --learner\.mixed_precision bf16, or no"):
        make_accelerator(make_config(folder, learner={"mixed_precision": "fp16"}))


def test_the_shells_settings_for_accelerate_change_no_gradient_and_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strays = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "FSDP_VERSION": "2", "ACCELERATE_USE_FSDP": "true",
    }  # fmt: skip
    config = make_config(folder)
    plain = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    expected = plain.train(make_batch(), version=3).metrics["grad_norm"]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in strays.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level("WARNING", logger="atpo.learner"):
        accelerator = make_accelerator(config)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"
    assert not strays.keys() & os.environ.keys()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "atpo.learner"]
    for name, value in strays.items():
        assert f"{name}={value}" in said
    trainer = Trainer(config, accelerator=accelerator, policy=load_policy(config))
    assert trainer.train(make_batch(), version=3).metrics["grad_norm"] == pytest.approx(expected, rel=1e-6)


def test_what_the_launcher_of_plain_ranks_sets_is_not_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for name, value in {"LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level("WARNING", logger="atpo.learner"):
        precision.leave_out_environment(make_config(tmp_path).learner)
    assert not caplog.records


def test_a_launchers_file_that_would_divide_gradients_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "gradient_accumulation_steps", 8)
    with pytest.raises(SetupError, match=r"would divide every gradient by 8 .* set it to 1"):
        make_accelerator(make_config(folder))


def test_settings_are_those_that_accelerate_obeys() -> None:
    environ = {"ACCELERATE_LOG_LEVEL": "info", "FSDP_VERSION": "2", "PATH": "/bin", "ACCELERATE_TORCH_DEVICE": "meta"}
    assert accelerate_environment.settings(environ) == {"ACCELERATE_TORCH_DEVICE": "meta", "FSDP_VERSION": "2"}


def test_products_of_float32_numbers_on_cuda_are_of_float32_whatever_a_library_has_set(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from torch._inductor.kernel.flex.flex_attention import get_float32_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert "tf32" in get_float32_precision()
        with caplog.at_level("INFO", logger="atpo.learner"):
            precision.keep_float32()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert get_float32_precision() == "'ieee'"
        assert caplog.messages == ["products of float32 numbers on CUDA are of float32, not of TF32"]
    finally:
        torch.set_float32_matmul_precision(before)


def test_log_probs_that_a_wrapper_casts_are_refused() -> None:
    precision.check_outputs(torch.zeros(2))
    precision.check_outputs(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(SetupError, match="log-probs come back as bfloat16 through what accelerate wraps"):
        precision.check_outputs(torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.slow
def test_log_probs_are_float32_on_several_ranks_and_through_the_shipped_sharding(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env = {**os.environ, **rank, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(folder), str(out)], env=env, capture_output=True, text=True,
        timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["ranks"] == {"wrapper": "Policy", "dtype": "torch.float32", "error": 0.0}
    assert found["fsdp2"]["wrapper"] == "FSDPPolicy"
    assert found["fsdp2"]["dtype"] == "torch.float32"
    # The weights are cast, as for an engine in bfloat16; what follows the logits is not.
    assert found["fsdp2"]["error"] < 1e-5
    assert found["fsdp2"]["steps_of_bfloat16"] > 1e-3
    assert found["fsdp2"]["layout"] == "tree"
    assert found["fsdp2"]["names"] == found["names"]
    assert found["fsdp2"]["reduce"] == "torch.float32"


def one_rank(folder: Path, out: Path) -> None:
    """In a process of its own: the policy alone, as a rank of several, and in FSDP2, each computing in bfloat16."""
    torch.set_num_threads(1)
    config = make_config(folder, learner={"mixed_precision": "bf16"})
    accelerator = make_accelerator(config)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    tokens = torch.arange(40).reshape(2, 20) * 7 % 31
    inputs = (tokens, torch.arange(39).remainder(39), tokens.reshape(-1)[1:])
    with torch.no_grad():
        alone = HalfPolicy(load_policy(config), trains=True)(*inputs)
        cast = in_bfloat16(load_policy(config))(*inputs)
        ranked = Trainer(config, accelerator=accelerator, policy=load_policy(config))
        assert ranked.half is not None
        through_rank = ranked.half(*inputs)
    names = sorted(ranked.whole.published())
    accelerator.free_memory()
    # Accelerate shards on GPUs only; the wrapping itself works on a CPU as well.
    sharded = sharding()
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = sharded
    config = make_config(folder, learner={"mixed_precision": "bf16", "accelerate_config": str(SHIPPED)})
    fsdp = Trainer(config, accelerator=accelerator, policy=load_policy(config))
    fsdp.warm_up()
    with torch.no_grad():
        through_fsdp = fsdp.model(*inputs)
    assert fsdp.train(make_batch(), version=3).fault is None
    found = {
        "ranks": {
            "wrapper": type(ranked.model).__name__,
            "dtype": str(through_rank.dtype),
            "error": float((through_rank - alone).abs().max()),
        },
        "fsdp2": {
            "wrapper": type(fsdp.model).__name__,
            "dtype": str(through_fsdp.dtype),
            "error": float((through_fsdp - cast).abs().max()),
            "steps_of_bfloat16": float((through_fsdp - through_fsdp.bfloat16().float()).abs().max()),
            "layout": fsdp.layout,
            "names": sorted(fsdp.whole.published()),
            "reduce": str(sharded.mixed_precision_policy.reduce_dtype),
        },
        "names": names,
    }
    out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def in_bfloat16(policy: Policy) -> Policy:
    """Its parameters only: buffers hold the frequencies of positions."""
    for parameter in policy.parameters():
        parameter.data = parameter.data.bfloat16()
    return policy


def sharding() -> Any:
    """As ``accelerate launch`` would make it from the file that is shipped."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    said = yaml.safe_load(SHIPPED.read_text())
    for key, value in said["fsdp_config"].items():
        os.environ[key.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision(said["mixed_precision"])
    return plugin


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), Path(sys.argv[2]))
