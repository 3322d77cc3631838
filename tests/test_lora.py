"""LoRA: only adapters are trained; what is published, probed, saved and exported is what the policy computes."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.models import adapters
from atpo_async.models.policy import assemble
from atpo_async.models.sources import model_folder
from learner.checkpoints import checkpoint
from learner.checkpoints.checkpoint import Progress
from learner.policy import lora
from learner.policy.accelerator import make_accelerator
from learner.policy.export import export_adapter, export_model, precision
from learner.policy.model import Policy, load_policy, open_policy
from learner.training.trainer import Trainer
from learner.weights.staging import Stager
from tests.learner_support import VOCAB, in_double, make_batch, make_config, make_model

TOKENS = torch.arange(24).reshape(2, 12) % VOCAB
PLACES = torch.tensor([2, 5, 9, 14, 20])
TARGET = torch.tensor([7, 3, 30, 0, 11])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def with_lora(folder: Path, sections: Any = None, **settings: object) -> Config:
    data = {"learner": {"lora": {"rank": 4, **settings}, "minibatches": 2}} | (sections or {})
    return make_config(folder, **data)


def make_trainer(folder: Path, sections: Any = None, **settings: object) -> Trainer:
    config = with_lora(folder, sections, **settings)
    return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


def trained(folder: Path, **settings: object) -> Trainer:
    trainer = make_trainer(folder, **settings)
    trainer.train(make_batch(), version=3)
    return trainer


@pytest.fixture(scope="module")
def one(folder: Path) -> Trainer:
    """Trained for one batch; tests leave it as it is."""
    return trained(folder)


@pytest.fixture(scope="module")
def saved(one: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    return checkpoint.save(tmp_path_factory.mktemp("saved"), one, Progress(step=1, version=7), keep=1)


def merged(policy: Policy, folder: Path) -> Any:
    """The model of ``folder`` with the policy's adapters merged in by hand, in float64."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert policy.lora is not None
    with torch.no_grad():
        for name, layer in policy.lora.layers.items():
            pair = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            hf.get_parameter(f"{name}.weight").add_(policy.lora.scale * pair)
    return hf


@pytest.mark.parametrize("settings", [{}, {"rslora": True, "alpha": 3.0}, {"targets": ["q_proj", "0.mlp.down_proj"]}])
def test_log_probs_and_gradients_are_those_of_the_merged_model(folder: Path, settings: dict[str, object]) -> None:
    policy = trained(folder, **settings).policy
    own = in_double(policy)
    whole = in_double(Policy(merged(policy, folder)))
    (found := own.logprobs(TOKENS, PLACES, TARGET)).sum().backward()
    (expected := whole.logprobs(TOKENS, PLACES, TARGET)).sum().backward()
    assert torch.allclose(found, expected, atol=1e-10)
    assert policy.lora is not None
    assert policy.lora.layers
    for name, layer in policy.lora.layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        slope = whole.hf.get_parameter(f"{name}.weight").grad
        assert torch.allclose(a.grad, policy.lora.scale * b.T @ slope, atol=1e-9)
        assert torch.allclose(b.grad, policy.lora.scale * slope @ a.T, atol=1e-9)


def test_only_adapters_are_trained_and_only_what_has_one_changes(folder: Path) -> None:
    trainer = make_trainer(folder, targets=["v_proj"])
    own = trainer.policy.lora
    assert own is not None
    before = {name: tensor.clone() for name, tensor in trainer.whole.tensors().items()}
    trainer.train(make_batch(), version=3)
    after = trainer.whole.tensors()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)}
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in own.parameters().values()}
    assert all(p.dtype == torch.float32 for p in held)
    assert {name for name, p in trainer.policy.named_parameters() if p.grad is not None or p.requires_grad} == {
        name for name, _ in trainer.policy.named_parameters() if ".lora_" in name
    }


def test_adapters_begin_the_same_by_the_seed_alone_and_change_nothing(folder: Path) -> None:
    policy = load_policy(with_lora(folder))
    torch.manual_seed(99)
    again, other = load_policy(with_lora(folder)), load_policy(with_lora(folder, {"run": {"seed": 7}}))
    assert policy.lora is not None
    assert again.lora is not None
    assert other.lora is not None
    first, second, third = policy.lora.parameters(), again.lora.parameters(), other.lora.parameters()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(next(iter(first.values())), next(iter(third.values())))
    base = load_policy(make_config(folder))
    assert torch.equal(policy.logprobs(TOKENS, PLACES, TARGET), base.logprobs(TOKENS, PLACES, TARGET))


def test_what_is_published_is_what_peft_merges_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    trainer = trained(folder, rslora=True, alpha=3.0)
    assert trainer.policy.lora is not None
    export_adapter(trainer.policy.lora, trainer.whole.adapters(), tmp_path / "adapter", base=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    published = dict(trainer.whole.published())
    assert published.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in published.items())
    # The version's bytes are these too; tied tensors lie at one place, and no merged one is taken for tied.
    staged = Stager("float32").stage(trainer.whole.published(), copied=False)
    assert staged is not None
    assert len({spec.offset for spec in staged.specs}) == len(published) - 1
    for spec, data in staged.parts():
        assert data == published[spec.name].numpy().reshape(-1).view(np.uint8).data
    staged.release()
    assert any(".lora_" in name for name, _ in trainer.policy.named_parameters())  # the policy was not merged


def test_the_probe_is_of_the_weights_as_engines_hold_them(folder: Path) -> None:
    config = with_lora(folder)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    assert trainer.policy.lora is not None
    with torch.no_grad():
        for parameter in trainer.policy.lora.parameters().values():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    tokens = (np.arange(12).reshape(2, 6) * 5 % VOCAB).astype(np.int32)
    engine = AutoModelForCausalLM.from_pretrained(folder)
    published = trainer.whole.published()
    for name in trainer.policy.lora.layers:
        with torch.no_grad():
            engine.get_parameter(f"{name}.weight").copy_(published[f"{name}.weight"].bfloat16())
    inputs = torch.from_numpy(tokens.astype(np.int64))
    logs = engine(inputs).logits[:, :-1].log_softmax(-1).gather(-1, inputs[:, 1:, None])
    assert np.allclose(trainer.whole.probe(tokens), logs.detach().reshape(-1).numpy(), atol=1e-5)
    # Unrounded they would be others.
    target = inputs[:, 1:].reshape(-1)
    unrounded = trainer.policy.logprobs(inputs[:, :-1], torch.arange(10), target, temperature=1.0)
    assert not np.allclose(unrounded.detach().numpy(), logs.detach().reshape(-1).numpy(), atol=1e-3)
    assert torch.equal(unrounded, trainer.policy.logprobs(inputs[:, :-1], torch.arange(10), target, temperature=1.0))


def test_the_reference_is_the_same_model_without_adapters_and_no_copy(folder: Path) -> None:
    sections: dict[str, dict[str, object]] = {"objective": {"kl_coef": 0.1, "clip_low": 0.2, "clip_high": 0.3}}
    trainer = make_trainer(folder, sections)
    frozen = copy.deepcopy(load_policy(make_config(folder)))
    report = trainer.train(make_batch(), version=3)
    assert report.metrics["loss/kl_reference"] > 0
    reference = trainer._loss.reference
    assert reference is not None
    inputs = {"tokens": TOKENS, "predictor": PLACES, "target": TARGET}
    with torch.no_grad():
        assert torch.equal(reference(**inputs), frozen(**inputs))
        assert not torch.equal(trainer.model(**inputs), frozen(**inputs))
    held = sum(p.numel() for p in trainer.policy.parameters() if not p.requires_grad)
    assert held == sum(p.numel() for p in frozen.parameters())
    # The loss is that of a run whose reference is a copy.
    copied = make_trainer(folder, sections)
    copied._loss.reference = frozen
    again = copied.train(make_batch(), version=3).metrics
    assert again["loss/kl_reference"] == report.metrics["loss/kl_reference"]
    assert again["train/loss"] == report.metrics["train/loss"]


def test_compiled_layers_compute_without_adapters_and_with_merged_ones_too(folder: Path, one: Trainer) -> None:
    policy, adapted = load_policy(with_lora(folder)), one.policy.lora
    assert policy.lora is not None
    assert adapted is not None
    with torch.no_grad():
        for name, parameter in policy.lora.parameters().items():
            parameter.copy_(adapted.parameters()[name])
        expected = []
        for _ in range(2):
            found = [policy(TOKENS, PLACES, TARGET)]
            with policy.lora.switched_off():
                found.append(policy(TOKENS, PLACES, TARGET))
            with policy.lora.as_in_engines():
                found.append(policy(TOKENS, PLACES, TARGET))
            expected.append(found)
            for layer in policy.hf.model.layers:
                layer.compile(backend="eager")
    plain, compiled = expected
    assert not torch.equal(plain[0], plain[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, compiled, strict=True))


def test_gradient_checkpointing_changes_no_number(folder: Path) -> None:
    sections: dict[str, dict[str, object]] = {"objective": {"kl_coef": 0.1, "clip_low": 0.2, "clip_high": 0.3}}
    plain = make_trainer(folder, sections).train(make_batch(), version=3).metrics
    learner = {"lora": {"rank": 4}, "minibatches": 2, "gradient_checkpointing": True}
    saved = make_trainer(folder, sections | {"learner": learner}).train(make_batch(), version=3).metrics
    assert saved["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-6)
    assert saved["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-6)


def test_frozen_weights_are_held_in_half_where_that_loses_nothing_and_change_no_number(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    hf.model.norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    hf.save_pretrained(tmp_path)
    learner = {"lora": {"rank": 4}, "mixed_precision": "bf16"}
    sections = {"learner": learner, "objective": {"kl_coef": 0.1, "clip_low": 0.2, "clip_high": 0.3}}
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # another precision than the other tests'
    half = make_trainer(tmp_path, sections)
    with monkeypatch.context() as patch:
        patch.setattr(lora, "hold_in_half", lambda hf: (0, 0))
        full = make_trainer(tmp_path, sections)
    frozen = [p for p in half.policy.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen if p.dtype == torch.float32) == 2 * (2 * 16 + 2 * 8) + 16  # norms alone
    reports = [trainer.train(make_batch(), version=3).metrics for trainer in (half, full)]
    assert reports[0] == reports[1]
    probe = (np.arange(12).reshape(2, 6) * 5 % VOCAB).astype(np.int32)
    assert np.array_equal(half.whole.probe(probe), full.whole.probe(probe))
    tensors = full.whole.tensors()
    assert all(torch.equal(tensor.float(), tensors[name]) for name, tensor in half.whole.tensors().items())
    # In a folder in float32 there is more than bfloat16 can say: all of it stays.
    trained_folder = make_trainer(folder, sections)
    assert {p.dtype for p in trained_folder.policy.parameters()} == {torch.float32}


# --- checkpoints


def test_a_checkpoint_holds_adapters_and_a_resumed_run_takes_the_very_next_step(folder: Path, tmp_path: Path) -> None:
    trainer = trained(folder)
    path = checkpoint.save(tmp_path, trainer, Progress(step=1, version=7), keep=2)
    assert not (path / "model.safetensors").exists()
    held = load_file(path / adapters.WEIGHTS)
    assert all(name.startswith(adapters.PREFIX) and ".lora_" in name for name in held)
    moments = sum(tensor.numel() for tensor in load_file(path / "optimizer.safetensors").values())
    assert moments == 2 * sum(tensor.numel() for tensor in held.values()) + len(held)
    report = trainer.train(make_batch(seed=9, step=1), version=3)

    resumed = make_trainer(folder)
    assert checkpoint.load(path, resumed) == Progress(step=1, version=7)
    assert resumed.train(make_batch(seed=9, step=1), version=3).metrics == report.metrics
    expected = trainer.whole.tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.whole.tensors().items())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"rank": 2}, "holds adapters of rank 4, [learner.lora] makes it 2"),
        ({"alpha": 16.0}, "holds adapters of scale 8.0, [learner.lora] makes it 4.0"),
        ({"targets": ["q_proj"]}, "holds adapters of other layers than learner.lora.targets names"),
        ({"rank": 0}, "holds adapters, and with learner.lora.rank = 0 all weights are trained"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused_with_the_way_out(
    folder: Path, saved: Path, settings: dict[str, object], what: str
) -> None:
    with pytest.raises(SetupError) as refused:
        checkpoint.load(saved, make_trainer(folder, **settings))
    assert what in str(refused.value)
    assert str(refused.value).endswith("another run from the merged policy with `atpo train CONFIG --from RUN`")


def test_a_checkpoint_of_all_weights_or_over_another_model_is_refused(
    folder: Path, saved: Path, tmp_path: Path
) -> None:
    whole = checkpoint.save(tmp_path / "a", make_trainer(folder, rank=0), Progress(step=1, version=1), keep=1)
    with pytest.raises(SetupError, match=r"holds all weights, and with learner.lora.rank = 4 adapters are trained"):
        checkpoint.load(whole, make_trainer(folder))
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(SetupError, match=r"holds adapters over other weights than those of model.path = .*other"):
        checkpoint.load(saved, make_trainer(other))


def test_a_model_folder_is_assembled_from_a_checkpoint_of_adapters(
    folder: Path, one: Trainer, saved: Path, tmp_path: Path
) -> None:
    (whole := tmp_path / "model").mkdir()
    policy = open_policy(assemble(folder, saved, whole), make_config(whole))
    expected = one.whole.tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in policy.hf.state_dict().items())
    odd = shutil.copytree(saved, tmp_path / "odd")
    held = load_file(odd / adapters.WEIGHTS)
    held |= {name: torch.zeros(4, 3) for name in held if name.endswith("q_proj.lora_A.weight")}
    save_file(held, odd / adapters.WEIGHTS)
    with pytest.raises(SetupError, match=r"q_proj.weight has an adapter, but the model folder has shape \(16, 16\)"):
        assemble(folder, odd, whole)


# --- folders


def test_an_adapter_folder_names_the_whole_path_of_the_folder_under_it(
    folder: Path, one: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one.policy.lora is not None
    monkeypatch.chdir(folder.parent)
    one.policy.lora.write_settings(tmp_path, base=folder.name)
    assert json.loads((tmp_path / adapters.CONFIG).read_text())["base_model_name_or_path"] == str(folder.resolve())


def test_adapter_and_merged_model_are_both_exported(folder: Path, one: Trainer, tmp_path: Path) -> None:
    trainer = one
    assert trainer.policy.lora is not None
    tensors = trainer.whole.tensors()
    export_adapter(trainer.policy.lora, trainer.whole.adapters(), tmp_path / "adapter", base="org/base")
    export_model(trainer.policy, tensors, folder, tmp_path / "model", precision(folder, "source"))
    said = json.loads((tmp_path / "adapter" / adapters.CONFIG).read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (4, 32, "org/base")
    assert sorted(said["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in whole.items())


def test_a_run_begins_with_an_adapter_folder(folder: Path, one: Trainer, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(saved, path)  # a checkpoint is one
    begun = load_policy(with_lora(folder, init=str(path)))
    assert torch.equal(begun(TOKENS, PLACES, TARGET), one.policy(TOKENS, PLACES, TARGET))
    others: list[dict[str, object]] = [{"rank": 2}, {"alpha": 1.0}, {"targets": ["q_proj"]}]
    for other in others:
        with pytest.raises(SetupError, match=r"learner.lora.init = .* does not fit rank ., alpha"):
            load_policy(with_lora(folder, init=str(path), **other))
    with pytest.raises(SetupError, match="no adapter folder"):
        load_policy(with_lora(folder, init=str(folder)))
    with pytest.raises(SetupError, match=r"is an adapter folder: give the model .* --learner.lora.init"):
        model_folder(str(path))
    said = json.loads((path / adapters.CONFIG).read_text())
    (path / adapters.CONFIG).write_text(json.dumps(said | {"use_dora": True}))
    with pytest.raises(SetupError, match="has use_dora = True; this program takes plain LoRA adapters"):
        adapters.read(path)


def test_an_adapter_folder_with_numbers_that_are_not_finite_is_refused(
    folder: Path, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(saved, path)
    tensors = load_file(path / adapters.WEIGHTS)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, path / adapters.WEIGHTS)
    with pytest.raises(SetupError, match=r"model\.layers\.0\.mlp\.up_proj\.lora_B\.weight holds numbers that are not"):
        load_policy(with_lora(folder, init=str(path)))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (
            {"targets": ["w_proj"]},
            "'w_proj' matches no layer of Qwen3ForCausalLM; linear layers that can have one: down_",
        ),
        ({"targets": ["lm_head"]}, "'lm_head' matches lm_head and the output head, a Linear, which gets no adapter"),
        ({"targets": ["embed_tokens"]}, "matches model.embed_tokens, a Embedding, which gets no adapter"),
        ({"targets": ["proj"]}, "'proj' matches no layer"),
        ({"rank": 17}, "learner.lora.rank = 17 is above the smaller side of model.layers.0.self_attn.q_proj, (16, 16)"),
        ({"rank": 12, "targets": ["q_proj", "k_proj"]}, "above the smaller side of model.layers.0.self_attn.k_proj"),
    ],
)
def test_adapters_that_do_not_fit_the_model_are_refused_by_name(
    folder: Path, settings: dict[str, object], what: str
) -> None:
    with pytest.raises(SetupError) as refused:
        load_policy(with_lora(folder, **settings))
    assert what in str(refused.value)


def test_without_peft_the_way_out_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SetupError, match=r"^learner.lora.rank = 4 needs peft, which cannot be loaded .*: pip install"):
        load_policy(with_lora(folder))


def test_fused_experts_get_no_adapter_and_are_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1, max_position_embeddings=128,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    policy = load_policy(with_lora(tmp_path))
    assert policy.lora is not None
    assert {name.rpartition(".")[2] for name in policy.lora.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(SetupError, match=r"a tensor of several layers \(experts\) in one, which gets no adapter"):
        load_policy(with_lora(tmp_path, targets=["gate_up_proj"]))
