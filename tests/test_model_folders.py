"""Model folders: files that may lie beside the weights, tensors that must be there, names of published tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from actors.engines.base import EngineSettings
from actors.engines.common.checks import checkpoint_shapes
from actors.engines.transformers.engine import TransformersEngine
from actors.engines.vllm.engine import VllmEngine
from atpo_async.core.errors import SetupError
from atpo_async.models import causal_lm
from atpo_async.models.policy import assemble
from atpo_async.models.tensor_files import INDEX, WEIGHTS, counting_files, weight_files
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.engine_support import reference_logprobs, weights_file
from tests.learner_support import make_config, make_model

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip


def experts() -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    )


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))


FUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "qwen3_moe": (experts, "model.layers.0.mlp.experts.1.gate_proj.weight"),
    "mixtral": (mixtral, "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
}


def made(make: Callable[[], Any], folder: Path, *, seed: int = 0, shard: str = "50GB") -> Path:
    torch.manual_seed(seed)
    make().save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def sharded(folder: Path) -> Path:
    """A Qwen3 folder of several files under an index, with all that people leave beside one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(make_model(folder / "whole", tie=False))
    model.save_pretrained(folder / "parts", max_shard_size="5KB")
    return folder / "parts"


def litter(folder: Path) -> None:
    """Other formats' files beside the weights; none of them counts."""
    wrong = {"model.embed_tokens.weight": torch.zeros(3, 3), "layers.0.wq.weight": torch.zeros(2)}
    for name in ("consolidated.safetensors", "ema.safetensors", "adapter_model.safetensors"):
        save_file(wrong, folder / name)
    (folder / "consolidated.safetensors.index.json").write_text("{}")
    (folder / "half.safetensors").write_bytes(b"cut short")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}')
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def add(folder: Path, **tensors: torch.Tensor) -> None:
    file = weight_files(folder)[0]
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def remove(folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


async def started(folder: Path) -> TransformersEngine:
    engine = TransformersEngine(
        EngineSettings(model=folder, device="cpu", max_num_seqs=2, max_model_len=64, num_threads=1)
    )
    await engine.start()
    return engine


@pytest.mark.parametrize("parts", [False, True])
async def test_files_of_other_formats_beside_the_weights_harm_nothing(tmp_path: Path, parts: bool) -> None:
    folder = sharded(tmp_path) if parts else make_model(tmp_path, tie=False)
    clean = checkpoint_shapes(folder)
    expected = load_policy(make_config(folder)).hf.state_dict()
    litter(folder)
    if parts:  # the index decides even against a file of the usual name
        save_file({"lm_head.weight": torch.zeros(1)}, folder / WEIGHTS)
        assert len(weight_files(folder)) > 1
    assert checkpoint_shapes(folder) == clean
    found = load_policy(make_config(folder)).hf.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    engine = await started(folder)
    assert torch.equal(engine.runner.model.lm_head.weight, expected["lm_head.weight"])
    await engine.close()
    with counting_files(folder) as counting:
        left = {path.name for path in counting.glob("*.safetensors")}
        assert left == {path.name for path in weight_files(folder)}
        assert (counting / "config.json").is_file()
        assert not (counting / "adapter_config.json").exists()
        assert not list(counting.glob("consolidated*"))
    assert not counting.exists()


def test_links_that_stay_have_the_same_name_every_time_and_another_for_other_files(tmp_path: Path) -> None:
    folder, kept = make_model(tmp_path / "model"), tmp_path / "cache" / "models"
    (folder / "adapter_config.json").write_text("{}")
    with counting_files(folder, kept_in=kept) as first:
        assert {path.name for path in first.iterdir()} == {p.name for p in folder.iterdir()} - {"adapter_config.json"}
    with counting_files(folder, kept_in=kept) as again:
        assert again == first
    (folder / "notes.txt").write_text("")
    with counting_files(folder, kept_in=kept) as other:
        assert (other / "notes.txt").is_file()
        assert other != first
    assert sorted(kept.iterdir()) == sorted([first, other])


def test_links_that_can_stay_nowhere_or_were_tampered_with_are_made_for_once(tmp_path: Path) -> None:
    folder, kept = make_model(tmp_path / "model"), tmp_path / "cache"
    (folder / "adapter_config.json").write_text("{}")
    kept.write_text("no folder")
    with counting_files(folder, kept_in=kept) as links:
        assert (links / WEIGHTS).is_file()
        assert not links.is_relative_to(kept)
    kept.unlink()
    with counting_files(folder, kept_in=kept) as links:
        (links / WEIGHTS).unlink()
        (links / WEIGHTS).symlink_to(folder / "config.json")
    with counting_files(folder, kept_in=kept) as links:
        assert (links / WEIGHTS).resolve() == folder / WEIGHTS


def test_a_folder_without_strays_is_taken_as_it_is(tmp_path: Path) -> None:
    with counting_files(make_model(tmp_path)) as counting:
        assert counting == tmp_path


async def test_a_file_that_the_index_names_and_nobody_has_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    gone = weight_files(folder)[1]
    gone.unlink()
    named = rf"model file {gone} is missing \(1 of the \d+ that {INDEX} names\)"
    with pytest.raises(SetupError, match=named):
        load_policy(make_config(folder))
    with pytest.raises(SetupError, match=named):
        await started(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_file_that_is_no_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(SetupError, match=rf"model file {tmp_path / INDEX} is no index of safetensors files"):
        weight_files(tmp_path)


def test_a_folder_without_weights_that_count_says_what_it_has(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    with pytest.raises(SetupError, match=rf"{folder} has neither {WEIGHTS} nor {INDEX} \(it has consolidated"):
        load_policy(make_config(folder))


async def test_tensors_that_the_model_does_not_take_are_named_and_not_expected_in_a_published_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model(tmp_path)
    expected = checkpoint_shapes(folder)
    add(folder, **{
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(2, 2),
        "steps": torch.tensor([7]),
    })  # fmt: skip
    assert checkpoint_shapes(folder) == expected
    with caplog.at_level("WARNING", logger="atpo.models"):
        load_policy(make_config(folder))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "atpo.models"]
    assert "not part of Qwen3ForCausalLM and stay unused: mtp.layers.0.mlp.up_proj.weight, steps" in said
    engine = await started(folder)
    assert engine.runner.shapes == expected
    await engine.close()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
async def test_a_tensor_that_the_files_lack_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path, tie=False)
    remove(folder, name)
    named = f"model.path = {str(folder)!r}: {name} of Qwen3ForCausalLM is missing from its files"
    with pytest.raises(SetupError, match=named):
        load_policy(make_config(folder))
    with pytest.raises(SetupError, match=named):
        await started(folder)


@pytest.mark.parametrize("held", ["model.embed_tokens.weight", "lm_head.weight"])
def test_of_tied_tensors_one_in_the_files_is_enough(tmp_path: Path, held: str) -> None:
    folder = make_model(tmp_path, tie=True)
    tensors = load_file(folder / WEIGHTS)
    tensors[held] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    policy = load_policy(make_config(folder))
    assert torch.equal(policy.hf.lm_head.weight, tensors[held])
    assert policy.hf.lm_head.weight is policy.hf.model.embed_tokens.weight


def test_tied_tensors_with_two_values_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, tie=True)
    add(folder, **{"lm_head.weight": load_file(folder / WEIGHTS)["model.embed_tokens.weight"] + 1})
    with pytest.raises(SetupError, match=r"ties lm_head.weight to model.embed_tokens.weight, but the files hold both"):
        load_policy(make_config(folder))


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    add(folder, **{"model.norm.weight": torch.ones(5)})
    with pytest.raises(SetupError, match=r"model.norm.weight has shape \(5,\), config.json wants \(16,\)"):
        load_policy(make_config(folder))


def test_a_quantised_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError, match=r"is quantised \(fp8\)"):
        load_policy(make_config(folder))


@pytest.mark.parametrize("kind", FUSED)
async def test_fused_experts_are_published_as_the_files_have_them_and_taken_up_again(tmp_path: Path, kind: str) -> None:
    make, single = FUSED[kind]
    old, new = made(make, tmp_path / "old"), made(make, tmp_path / "new", seed=1)
    config = make_config(new)
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    assert any(name.endswith("experts.gate_up_proj") for name in trainer.whole.tensors())
    stream, files = trainer.whole.published(), load_file(new / WEIGHTS)
    assert single in stream
    assert stream.keys() == files.keys()
    assert all(torch.equal(stream[name], tensor) for name, tensor in files.items())

    engine = await started(old)
    model = transformers.AutoModelForCausalLM.from_pretrained(new).eval()
    file = weights_file(model, tmp_path / "1", version=1, tensors=stream)
    before = await engine.score(np.arange(2, 20))
    await engine.swap(file)
    after = await engine.score(np.arange(2, 20))
    assert np.abs(after - reference_logprobs(model, np.arange(2, 20))).max() < 1e-5
    assert np.abs(after - before).max() > 0.05
    await engine.close()


async def test_experts_are_refused_where_vllm_cannot_change_them(tmp_path: Path) -> None:
    engine = VllmEngine(EngineSettings(model=made(experts, tmp_path), device="cpu", max_model_len=64, max_num_seqs=2))
    with pytest.raises(SetupError, match=r"has experts \(model\.layers\.0\.mlp\.experts\.0\..*use --actor.engine tran"):
        await engine.start()
    await engine.close()


def test_what_cannot_be_published_under_the_files_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(experts, tmp_path)
    monkeypatch.setattr(causal_lm, "published", lambda model, tensors: dict(tensors))
    named = r"does not give model.layers.0.mlp.experts.gate_up_proj back as it was: .* in the files no such tensor"
    with pytest.raises(SetupError, match=named):
        load_policy(make_config(folder))


def test_a_checkpoint_of_fused_experts_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    source, target = made(experts, tmp_path / "source"), tmp_path / "target"
    held = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    (tmp_path / "checkpoint").mkdir()
    changed = {f"hf.{name}": tensor + 1 for name, tensor in held.items()}
    save_file(changed, tmp_path / "checkpoint" / WEIGHTS)
    target.mkdir()
    assemble(source, tmp_path / "checkpoint", target)
    files = load_file(source / WEIGHTS)
    found = load_file(target / WEIGHTS)
    assert found.keys() == files.keys()
    assert all(torch.equal(tensor, files[name] + 1) for name, tensor in found.items())
    shutil.rmtree(target)
