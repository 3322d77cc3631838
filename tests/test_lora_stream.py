"""LoRA's stream of weights: adapters travel, actors merge them, and engines get what the learner means."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.engines.base import WeightsFile
from actors.weights.merging import Merging
from atpo_async.config import WeightsConfig
from atpo_async.core.errors import WeightsRejected
from atpo_async.models import adapters
from atpo_async.models.adapters import base_digest
from atpo_async.wire.messages import WeightsManifest
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from learner.weights.staging import Stager
from learner.weights.store import WeightsStore
from tests.e2e_support import Job, job
from tests.learner_support import VOCAB, make_batch, make_config, make_model


def make_moe(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def trained(folder: Path, **lora: object) -> Trainer:
    config = make_config(folder, learner={"lora": {"rank": 4, **lora}})
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    trainer.train(make_batch(), version=3)
    return trainer


def offered(trainer: Trainer, folder: Path) -> WeightsFile:
    """A version of the learner's store, as an actor has it once it is fetched."""
    scale = trainer.whole.adapter_scale
    staged = Stager("float32").stage(trainer.whole.published(), copied=False)
    assert staged is not None
    store = WeightsStore(run=folder.name, fallback=folder, settings=WeightsConfig())
    store.add(
        1, staged, probe_tokens=np.zeros((1, 2), np.int32), probe_logprobs=np.zeros(1, np.float32), adapter_scale=scale,
        adapter_base=None if scale is None else base_digest(trainer_folder(trainer)),
    )  # fmt: skip
    version = store._versions[1]
    path = folder / "fetched" / "v1.bin"
    path.parent.mkdir()
    path.write_bytes(version.path.read_bytes())
    store.close()
    return WeightsFile(path=path, manifest=version.manifest)


def trainer_folder(trainer: Trainer) -> Path:
    return Path(trainer.config.model.path)


def tensors_of(weights: WeightsFile) -> dict[str, torch.Tensor]:
    data = bytearray(weights.path.read_bytes())
    assert len(data) == weights.manifest.total_bytes
    return {
        spec.name: torch.frombuffer(data, dtype=torch.uint8, offset=spec.offset, count=spec.nbytes)
        .view(getattr(torch, spec.dtype))
        .view(spec.shape)
        for spec in weights.manifest.tensors
    }


@pytest.mark.parametrize(("kind", "precision"), [("tied", "float32"), ("untied", "bfloat16"), ("experts", "float32")])
async def test_an_actor_makes_of_adapters_what_the_learner_would_have_sent(
    kind: str, precision: Literal["float32", "bfloat16"], tmp_path: Path
) -> None:
    (model := tmp_path / "model").mkdir()
    folder = make_moe(model) if kind == "experts" else make_model(model, tie=kind == "tied")
    merged, alone = trained(folder), trained(folder, publish="adapter")
    fetched = offered(alone, tmp_path)
    assert fetched.manifest.adapter_scale == 8.0
    assert all(spec.dtype == "float32" for spec in fetched.manifest.tensors)
    merging = Merging(run=tmp_path.name, model=folder, precision=precision)
    try:
        whole = await merging.whole(fetched)
        assert whole.manifest.adapter_scale is None
        assert (whole.manifest.version, whole.manifest.probe_sequences) == (1, fetched.manifest.probe_sequences)
        found, expected = tensors_of(whole), dict(merged.whole.published())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.to(getattr(torch, precision))), name
        size = merged.policy.hf.num_parameters(exclude_embeddings=True)
        assert sum(spec.nbytes for spec in fetched.manifest.tensors) < 4 * size
    finally:
        merging.close()


async def test_adapters_that_do_not_fit_the_actors_model_are_rejected_by_name(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    (other := tmp_path / "other").mkdir()
    fetched = offered(trained(make_model(folder), publish="adapter"), tmp_path)
    # As an earlier learner sends it, without the digest of what lies under the adapters.
    fetched = replace(fetched, manifest=msgspec.structs.replace(fetched.manifest, adapter_base=None))

    async def rejected(model: Path, manifest: WeightsManifest) -> str:
        merging = Merging(run=tmp_path.name, model=model, precision="float32")
        with pytest.raises(WeightsRejected) as error:
            await merging.whole(WeightsFile(path=fetched.path, manifest=manifest))
        merging.close()
        return str(error.value)

    assert "down_proj.weight has an adapter, but the model folder has no such tensor" in await rejected(
        make_moe(other), fetched.manifest
    )
    lacking = msgspec.structs.replace(fetched.manifest, tensors=fetched.manifest.tensors[1:])
    assert "is no matrix of a pair lora_A.weight, lora_B.weight" in await rejected(folder, lacking)
    first = msgspec.structs.replace(fetched.manifest.tensors[0], shape=(2, 2), nbytes=16)
    odd = msgspec.structs.replace(fetched.manifest, tensors=(first, *fetched.manifest.tensors[1:]))
    assert "is no matrix of a pair" in await rejected(folder, odd)


async def test_adapters_over_weights_that_differ_in_one_number_are_rejected(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    fetched = offered(trained(make_model(folder), publish="adapter"), tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    merging = Merging(run=tmp_path.name, model=other, precision="float32")
    with pytest.raises(WeightsRejected, match=r"other' holds other weights here than the learner's"):
        await merging.whole(fetched)
    merging.close()


def test_the_digest_of_a_folder_is_of_its_tensors_in_whatever_files(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    make_model(folder)
    other = tmp_path / "other"
    Qwen3ForCausalLM.from_pretrained(folder).save_pretrained(other, max_shard_size=4000)
    assert len(list(other.glob("*.safetensors"))) > 1
    assert base_digest(other) == base_digest(folder)


# --- a whole run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_whose_adapters_travel_ends_with_both_exports(hopqa_policy: Path, tmp_path: Path) -> None:
    options: dict[str, object] = {
        "learner.lora.rank": 4, "learner.lora.publish": "adapter", "learner.lr": 2e-3, "objective.kl_coef": 0.01,
        "run.steps": 3,
    }  # fmt: skip
    with job(tmp_path, hopqa_policy, gated=False, **options) as run:
        assert run.exit_code(run.train()) == 0, run.story()
        assert [record.step for record in run.steps()] == [1, 2, 3]
        _saw_the_learner_and_the_engine_agree(run)
        whole, base = load_file(run.path / "model" / "model.safetensors"), load_file(hopqa_policy / "model.safetensors")
        pairs = adapters.read(run.path / "adapter")
        assert all(torch.equal(whole[name], pairs.whole(name, tensor)) for name, tensor in base.items())
        assert {name for name in base if not torch.equal(whole[name], base[name])} == {
            f"{layer}.weight" for layer in pairs.layers
        }
        newest = max((run.path / "checkpoints").iterdir())
        assert not (newest / "model.safetensors").exists()


def _saw_the_learner_and_the_engine_agree(run: Job) -> None:
    errors = [record.metrics["engine/probe_error"] for record in run.with_metric("engine/probe_error")]
    assert errors
    assert max(errors) < 1e-4
    assert all(np.isfinite(record.metrics["train/loss"]) for record in run.steps())
    assert max(record.metrics["loss/kl_reference"] for record in run.steps()) > 0
