"""LoRA on a CUDA device: it trains, publishes and probes as on the CPU; frozen weights in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import AutoModelForCausalLM

from atpo_async.config import Config
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from learner.weights.staging import Stager
from tests.learner_support import VOCAB, make_batch, make_config, make_model

pytestmark = pytest.mark.gpu

DEVICE: Literal["cuda"] = "cuda"
PROBE = (np.arange(24).reshape(2, 12) * 5 % VOCAB).astype(np.int32)


def config_of(folder: Path, device: str, *, precision: str = "no") -> Config:
    learner = {"lora": {"rank": 4}, "device": device, "mixed_precision": precision, "lr": 1e-2}
    return make_config(folder, learner=learner, objective={"kl_coef": 0.1})


def trained(config: Config, patch: pytest.MonkeyPatch) -> Trainer:
    for state in (AcceleratorState, PartialState):
        patch.setattr(state, "_shared_state", {})  # another device and precision than other tests'
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    trainer.train(make_batch(), version=3)
    return trainer


def staged(trainer: Trainer, precision: Literal["float32", "bfloat16"]) -> dict[str, bytes]:
    """A version's bytes, merged on the stream that copies them."""
    made = Stager(precision).stage(trainer.whole.published(), copied=False)
    assert made is not None
    found = {spec.name: bytes(data) for spec, data in made.parts()}
    made.release()
    return found


def test_adapters_train_and_are_merged_as_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path)
    there, here = (trained(config_of(folder, device), monkeypatch) for device in (DEVICE, "cpu"))
    assert next(there.policy.parameters()).device.type == DEVICE
    mine, theirs = here.whole.tensors(), there.whole.tensors()
    apart = [float((theirs[name].cpu() - tensor).abs().mean()) for name, tensor in mine.items()]
    assert max(apart) < 1e-3
    published = dict(there.whole.published())
    for name, data in staged(there, "float32").items():
        assert data == published[name].cpu().numpy().tobytes(), name
    np.testing.assert_allclose(there.whole.probe(PROBE), here.whole.probe(PROBE), atol=0.05)


@torch.no_grad()
def test_in_bfloat16_frozen_weights_take_half_and_the_probe_is_of_what_engines_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    config = config_of(tmp_path / "half", DEVICE, precision="bf16")
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    with torch.enable_grad():
        trainer = trained(config, monkeypatch)
    matrices = [p for p in trainer.policy.parameters() if not p.requires_grad and p.dim() == 2]
    assert {p.dtype for p in matrices} == {torch.bfloat16}
    engine = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).to(DEVICE)
    held = engine.state_dict()
    for name, data in staged(trainer, "bfloat16").items():
        tensor = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(held[name].shape)
        held[name].copy_(tensor)
    inputs = torch.from_numpy(PROBE.astype(np.int64)).to(DEVICE)
    logs = engine(inputs).logits[:, :-1].log_softmax(-1).gather(-1, inputs[:, 1:, None])
    np.testing.assert_allclose(trainer.whole.probe(PROBE), logs.reshape(-1).cpu().numpy(), atol=1e-3)
