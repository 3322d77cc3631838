"""The estimate of memory: against transformers' own parameters, against what autograd keeps, against measured facts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from atpo_async.api import machine
from atpo_async.cli import main
from atpo_async.config import Config, load
from atpo_async.core.errors import SetupError
from atpo_async.models.memory import report
from atpo_async.models.memory.advice import advice
from atpo_async.models.memory.cards import Card, cards
from atpo_async.models.memory.learner import (
    CARD_SHARE,
    LOGITS,
    activation_bytes,
    adapter_parameters,
    learner_parts,
    logit_bytes,
    per_token,
)
from atpo_async.models.memory.parts import GB, total
from atpo_async.models.memory.settings import LearnerMemory, learner_memory
from atpo_async.models.memory.shape import PUBLISHED, ModelShape, of_config, of_folder, shape_of
from learner.policy import head
from learner.policy.model import Policy, policy_of

H100 = 81559 * 2**20
"""Bytes of a card of 80 GB, as nvidia-smi reports it."""
SMALL = {
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True,
    "dtype": "float32",
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "untied": SMALL | {"tie_word_embeddings": False},
    "qwen2": SMALL | {"model_type": "qwen2", "head_dim": 8},
    "llama": SMALL | {"model_type": "llama", "tie_word_embeddings": False},
    "experts": SMALL | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": []},
}  # fmt: skip


def settings(**changes: Any) -> LearnerMemory:
    kept: dict[str, Any] = {
        "ranks": 1, "sharding": "none", "tokens": 16384, "precision": "bf16", "kernels": False, "compiled": False,
        "checkpointing": False, "optimizer": "adamw", "lora_rank": 0, "reference": False,
    }  # fmt: skip
    return LearnerMemory(**(kept | changes))


def qwen3(name: str) -> ModelShape:
    return of_config(PUBLISHED[f"Qwen/Qwen3-{name}"])


def config_of(**values: str) -> Config:
    return load((), {"model.path": "Qwen/Qwen3-4B"} | {name.replace("__", "."): text for name, text in values.items()})


# --- shapes


@pytest.mark.parametrize("said", [PUBLISHED["Qwen/Qwen3-0.6B"], PUBLISHED["Qwen/Qwen3-4B"], SMALL, *OTHERS.values()])
def test_parameters_are_those_that_transformers_makes(said: dict[str, Any]) -> None:
    kind = str(said["model_type"])
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(AutoConfig.for_model(**said))
    shape = of_config(said)
    layer = real.base_model.layers[0]
    assert shape.parameters == sum(p.numel() for p in real.parameters()), kind
    assert shape.layer_parameters == sum(p.numel() for p in layer.parameters()), kind


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_read_from_its_headers(tied: bool, tmp_path: Path) -> None:
    real = Qwen3ForCausalLM(Qwen3Config(**(SMALL | {"tie_word_embeddings": tied})))
    real.save_pretrained(tmp_path)
    assert of_folder(tmp_path) == of_config(SMALL | {"tie_word_embeddings": tied})
    assert shape_of(str(tmp_path)) == of_folder(tmp_path)


def test_a_model_that_is_nowhere_has_no_shape_and_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    assert shape_of("example/nothing-of-this-name") is None
    assert shape_of("Qwen/Qwen3-4B-Base") == qwen3("4B")
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(SetupError, match=r"config\.json gives no size of the model: 'num_hidden_layers'"):
        shape_of(str(tmp_path))


@pytest.mark.parametrize(
    ("odd", "named"),
    [({"num_attention_heads": 0}, "num_attention_heads is 0"), ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
     ({"hidden_size": float("inf")}, "infinity"), ({"num_experts": [4]}, "not 'list'"), ({"head_dim": "x"}, "'x'"),
     ({"vocab_size": -1}, "vocab_size is -1"), ({"text_config": "x"}, "not 'str'")],
)  # fmt: skip
def test_a_config_with_odd_sizes_is_refused_by_name(odd: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | odd))
    with pytest.raises(SetupError, match=rf"config\.json gives no size of the model: .*{named}"):
        shape_of(str(tmp_path))


# --- activations


def kept_bytes(size: dict[str, Any], *, tokens: int, precision: str, checkpointed: bool = False,
               compiled: bool = False) -> float:  # fmt: skip
    """What autograd keeps of a forward pass on the CPU, each storage once, parameters and their casts apart."""
    torch.manual_seed(0)
    hf = Qwen3ForCausalLM(Qwen3Config(**size, attn_implementation="sdpa")).train()
    if precision == "bf16":
        hf = hf.to(torch.bfloat16)
    if compiled:  # as Inductor divides a layer's work, without its code
        for layer in hf.base_model.layers:
            layer.compile(dynamic=True, backend="aot_eager_decomp_partition")
    if checkpointed:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(hf)
    matrices = {tuple(p.shape) for p in hf.parameters()} | {tuple(p.shape)[::-1] for p in hf.parameters()}
    found: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in matrices:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    places, autocast = torch.arange(4), precision == "fp16"  # of the same size on a CPU, which has bfloat16 alone
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, autocast):
        policy(tokens=torch.zeros((1, tokens), dtype=torch.long), predictor=places, target=places)
    return float(sum(found.values()))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [{}, {"hidden_size": 160, "intermediate_size": 608, "num_attention_heads": 16}])
def test_activations_are_what_autograd_keeps_to_a_tenth(precision: Any, shape: dict[str, Any]) -> None:
    size = SMALL | shape
    tokens = 512
    counted = of_config(size).layers * per_token(settings(precision=precision)).of(of_config(size)) * tokens
    assert counted == pytest.approx(kept_bytes(size, tokens=tokens, precision=precision), rel=0.1)


def test_checkpointing_keeps_a_layers_input_alone() -> None:
    tokens, shape = 512, of_config(SMALL)
    kept = kept_bytes(SMALL, tokens=tokens, precision="no", checkpointed=True)
    boundaries = shape.layers * 4.0 * shape.width * tokens
    assert boundaries <= kept <= 2.5 * boundaries  # the last norm's, and positions, weigh as much in so small a model
    memory = settings(precision="no", tokens=tokens)
    whole, less = (activation_bytes(shape, memory, checkpointed=checkpointed) for checkpointed in (False, True))
    assert less < 0.75 * whole


def test_the_measured_facts_of_one_h100_come_out() -> None:
    # One H100 80GB, 26 November 2026, half precision by autocast, no kernels: 39 GB at 16,384 tokens a pass, 2.4 MB a
    # token, and 32,768 run out of memory.
    shape, then = qwen3("0.6B"), settings(precision="fp16")
    assert shape.layers * per_token(then).of(shape) == pytest.approx(2.4e6, rel=0.02)
    assert activation_bytes(shape, then, checkpointed=False) == pytest.approx(39e9, rel=0.05)
    fits, too_much = (
        total(tuple(learner_parts(shape, replace(then, tokens=tokens), checkpointed=False, card_bytes=H100)))
        for tokens in (16384, 32768)
    )
    assert fits < H100 < too_much


def test_kernels_and_compiled_layers_keep_less_and_half_precision_less_than_autocast() -> None:
    shape = qwen3("0.6B")
    sizes = [
        per_token(settings(**changes)).of(shape)
        for changes in ({"compiled": True}, {"kernels": True}, {}, {"precision": "fp16"}, {"precision": "no"})
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.7 * sizes[2]


@pytest.mark.slow
def test_compiled_layers_keep_what_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._functorch.config.aggressive_recomputation", True)
    tokens = 512
    size = SMALL | {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 16, "num_key_value_heads": 8}
    kept = kept_bytes(size, tokens=tokens, precision="bf16", compiled=True)
    counted = of_config(size).layers * per_token(settings(compiled=True)).of(of_config(size)) * tokens
    assert counted == pytest.approx(kept, rel=0.15)


def test_logits_and_the_heads_gradient_are_those_of_the_head() -> None:
    assert (head.MAX_LOGITS, head.CARD_SHARE) == (LOGITS, CARD_SHARE)
    small, large = of_config(SMALL), qwen3("0.6B")
    assert (
        logit_bytes(small, settings(tokens=10), H100)
        < logit_bytes(large, settings(), 0)
        < logit_bytes(large, settings(), H100)
    )
    assert logit_bytes(large, settings(lora_rank=8), 0) == LOGITS * 6


def test_adapters_are_what_peft_makes_and_frozen_weights_stay_as_the_files_have_them(tmp_path: Path) -> None:
    config = load((), {"learner.lora.rank": "4", "learner.mixed_precision": "bf16"})
    policy = policy_of(Qwen3ForCausalLM(Qwen3Config(**SMALL)), config, tmp_path)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert adapter_parameters(of_config(SMALL), 4) == trained
    memory = learner_memory(config, on_gpu=True)
    for half, size in ((True, 2), (False, 4)):
        shape = replace(of_config(SMALL), in_half=half)
        weights, *_ = learner_parts(shape, memory, checkpointed=False)
        assert weights.num_bytes == size * shape.parameters + 4 * trained


# --- cards


def found(config: Config, size: float = 80 * GB, engine: str = "vllm") -> list[Card]:
    shape = shape_of(config.model.path)
    assert shape is not None
    return cards(config, shape, card_bytes=size, engine=engine)


def amount(card: Card, name: str) -> float:
    return sum(part.num_bytes for part in card.parts if part.name.startswith(name))


def test_roles_without_numbers_share_the_first_gpu_and_the_engine_takes_its_share() -> None:
    (card,) = found(config_of(actor__gpu_memory_utilization="0.3"))
    assert card.roles == ("learner rank 0", "actor 0")
    assert amount(card, "engine of actor 0") == pytest.approx(0.3 * 80 * GB)
    assert card.parts[0].name == "weights"
    assert card.parts[0].num_bytes == 4 * qwen3("4B").parameters
    assert card.needed == total(card.parts)
    assert amount(card, "CUDA context") > GB


def test_named_gpus_hold_what_was_named_and_a_role_on_the_cpu_is_on_none() -> None:
    several = {"actor__count": "2", "actor__tensor_parallel_size": "2", "actor__gpus": "[0, 1, 2, 3]"}
    places = {card.number: card.roles for card in found(config_of(learner__gpus="[5]", **several))}
    assert places == {0: ("actor 0",), 1: ("actor 0",), 2: ("actor 1",), 3: ("actor 1",), 5: ("learner rank 0",)}
    assert [card.roles for card in found(config_of(learner__device="cpu"))] == [("actor 0",)]


@pytest.mark.parametrize(
    ("text", "divided"),
    [
        (None, {"weights": 1, "gradients": 1, "optimizer states": 1}),
        ("distributed_type: FSDP\n", {"weights": 2, "gradients": 2, "optimizer states": 2}),
        ("distributed_type: 'FSDP'  # two\n", {"weights": 2}),
        ("distributed_type: MULTI_GPU\n", {"weights": 1}),
    ],
)
def test_ranks_divide_what_their_file_says(text: str | None, divided: dict[str, int], tmp_path: Path) -> None:
    values = {"learner__num_processes": "2", "actor__count": "0"}
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
        values["learner__accelerate_config"] = str(tmp_path / "a.yaml")
    one, two = found(config_of(actor__count="0"))[0], found(config_of(**values))
    assert [card.number for card in two] == [0, 1]
    for name, parts in divided.items():
        names = [part for part in one.parts if part.name == name or part.name.startswith(f"{name} (")]
        same = [part for part in two[0].parts if part.name == names[0].name]
        assert same[0].num_bytes == pytest.approx(names[0].num_bytes / parts), name


def test_an_implicit_reward_model_takes_a_second_policys_place() -> None:
    plain, rewarded = (found(config_of(implicit_reward__enabled=enabled))[0] for enabled in ("false", "true"))
    assert amount(rewarded, "implicit reward model") >= 16 * qwen3("4B").parameters
    assert rewarded.needed > plain.needed


def test_a_reference_policy_and_a_longer_context_than_a_pass_count() -> None:
    plain, with_reference = (found(config_of(objective__kl_coef=coef))[0] for coef in ("0", "0.1"))
    assert amount(with_reference, "reference policy") == 4 * qwen3("4B").parameters
    assert with_reference.needed > plain.needed
    longer = learner_memory(config_of(model__max_context_tokens="40000"), on_gpu=True)
    assert longer.tokens == 40000


def test_an_engine_whose_share_is_below_its_weights_does_not_fit_though_the_card_has_space() -> None:
    (card,) = found(config_of(learner__device="cpu", actor__gpu_memory_utilization="0.05", model__dtype="bfloat16"))
    assert not card.fits
    assert card.needed < card.num_bytes
    assert "the engine's share will not do: it lacks" in card.verdict()


def test_transformers_own_engine_takes_weights_and_a_slot_for_each_request() -> None:
    one, two = (
        found(config_of(learner__device="cpu", actor__max_num_seqs=n), engine="transformers")[0] for n in ("1", "2")
    )
    shape = qwen3("4B")
    assert two.needed - one.needed == pytest.approx(512 * 2 * shape.layers * shape.key * 4)


# --- what would help


def test_each_setting_that_is_named_saves_what_it_says_and_the_largest_comes_first() -> None:
    config = config_of(learner__mixed_precision="bf16", actor__gpu_memory_utilization="0.5")
    (card,) = found(config)
    shape = shape_of(config.model.path)
    assert shape is not None
    assert not card.fits
    named = advice(config, shape, card, card_bytes=80 * GB, engine="vllm")
    assert len(named) == 3
    assert sorted((one.saved for one in named), reverse=True) == [one.saved for one in named]
    for one in named:
        section, name = one.setting.rsplit(".", 1)
        again = load((), {"model.path": "Qwen/Qwen3-4B", "learner.mixed_precision": "bf16",
                          "actor.gpu_memory_utilization": "0.5", f"{section}.{name}": one.value})  # fmt: skip
        (after,) = found(again)
        assert card.needed - after.needed == pytest.approx(one.saved), one.setting
        assert one.fits is after.fits
        assert f"--{one.setting} {one.value} saves {one.saved / GB:.1f} GB" in one.sentence()


def test_a_setting_that_is_enough_alone_is_named_at_its_mildest_value() -> None:
    config = config_of(learner__mixed_precision="bf16", learner__gradient_checkpointing="true", actor__count="0",
                       learner__micro_batch_tokens="65536")  # fmt: skip
    (card,) = found(config)
    shape = shape_of(config.model.path)
    assert shape is not None
    assert not card.fits
    tokens = next(
        one for one in advice(config, shape, card, card_bytes=80 * GB, engine="vllm") if "micro" in one.setting
    )
    assert tokens.fits
    assert tokens.sentence().endswith("GB, and is enough")
    more = config_of(learner__mixed_precision="bf16", learner__gradient_checkpointing="true", actor__count="0",
                     learner__micro_batch_tokens=str(2 * int(tokens.value)))  # fmt: skip
    assert not found(more)[0].fits


def test_nothing_is_named_that_the_run_would_be_refused_with_or_that_this_machine_lacks(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("distributed_type: FSDP\n")
    shards = config_of(
        learner__num_processes="2", learner__accelerate_config=str(tmp_path / "a.yaml"), actor__count="0"
    )
    shape = shape_of(shards.model.path)
    assert shape is not None
    named = advice(shards, shape, found(shards, 8 * GB)[0], card_bytes=8 * GB, engine="vllm")
    assert [one.value for one in named if one.setting == "learner.optimizer"] != ["offload"]
    engine = config_of(learner__device="cpu")
    for gpus, there in (({0: 8 * GB}, False), ({0: 8 * GB, 1: 8 * GB}, True)):
        (card,) = cards(engine, shape, card_bytes=gpus, engine="vllm")
        said = advice(engine, shape, card, card_bytes=gpus, engine="vllm")
        assert any(one.setting == "actor.tensor_parallel_size" for one in said) is there


# --- the commands


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


RUN = """[model]
path = "Qwen/Qwen3-4B"
dtype = "bfloat16"
[learner]
mixed_precision = "bf16"
[actor]
gpu_memory_utilization = 0.3
"""


def test_the_doctor_estimates_for_cards_that_are_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, RUN)
    assert main.main(["doctor", path, "--gpu-gb", "24"]) == 1
    out = capsys.readouterr().out
    assert "Qwen/Qwen3-4B, 4.02 billion parameters in 36 layers" in out
    assert "GPU 0 (learner rank 0, actor 0): about" in out
    assert "will not fit: GPU 0" in out
    assert out.count("would help: --") == 3
    assert "and is enough" in out or "all of these together: about" in out
    assert main.main(["doctor", path, "--gpu-gb", "300"]) == 0
    out = capsys.readouterr().out
    assert "to spare" in out
    assert "would help" not in out


def test_an_engines_share_that_is_too_small_is_helped_by_a_larger_one_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, RUN)
    assert main.main(["doctor", path, "--gpu-gb", "300", "--actor.gpu_memory_utilization", "0.02"]) == 1
    out = capsys.readouterr().out
    assert "but the engine's share will not do: it lacks" in out
    helps = [line.strip() for line in out.splitlines() if "would help" in line]
    assert all("leaves the engine" in line or "--actor." in line or "--model." in line for line in helps)
    assert "--actor.gpu_memory_utilization" in out
    assert "and is enough" in out
    assert main.main(["doctor", path, "--gpu-gb", "9"]) == 1
    out = capsys.readouterr().out
    assert "GB besides" in out
    assert "all of these together: about" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu-gb", "80"], "--gpu-gb 80 needs a configuration: atpo doctor CONFIG --gpu-gb 80"),
        (["FILE", "--gpu-gb", "0"], "--gpu-gb must be above 0, got 0"),
    ],
)
def test_an_estimate_of_nothing_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [written(tmp_path, RUN) if word == "FILE" else word for word in words]
    assert main.main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_doctor_on_a_gpu_machine_ends_with_what_will_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpu_bytes", lambda: {0: 24.0 * GB})
    assert main.main(["doctor", written(tmp_path, RUN)]) == 1
    out = capsys.readouterr().out
    assert "GPU 0 (learner rank 0, actor 0): about" in out
    assert out.rstrip().splitlines()[-1].endswith("memory of GPU 0")


def test_training_begins_with_one_line_and_a_warning_where_it_will_not_fit() -> None:
    config = config_of(learner__mixed_precision="bf16", model__dtype="bfloat16", actor__gpu_memory_utilization="0.3")
    warning = report.at_the_start(config, gpus={0: 24.0 * GB}, engine="vllm")
    assert warning is not None
    assert warning.startswith("warning: memory, estimated: GPU 0 (learner rank 0, actor 0)")
    assert warning.count("--") == 3
    assert "\n" not in warning
    line = report.at_the_start(config, gpus={0: 300.0 * GB}, engine="vllm")
    assert line is not None
    assert line.startswith("memory, estimated: GPU 0")
    assert "to spare" in line
    assert report.at_the_start(config, gpus={}, engine="vllm") is None
    assert report.at_the_start(Config(), gpus={0: 24.0 * GB}, engine="vllm") is None


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        (None, {0: 1, 1: 2, 3: 4}),
        ("3,0", {0: 4, 1: 1}),
        ("GPU-bb", {0: 2}),
        ("1,7,0", {0: 2}),
        ("", {}),
    ],
)
def test_cards_are_counted_as_cuda_counts_them(visible: str | None, numbers: dict[int, int]) -> None:
    said = "0, GPU-aa1, 1\n1, GPU-bb2, 2\n3, GPU-cc3, 4\nunknown error\n"
    assert machine.visible_gpus(said, visible) == {number: mib * 2**20 for number, mib in numbers.items()}


def test_a_run_on_the_cpu_is_told_what_it_takes(tmp_path: Path) -> None:
    Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(tmp_path)
    config = load((), {"model.path": str(tmp_path), "actor.count": "2", "learner.device": "cpu"})
    said = report.of_this_machine(config, engine="vllm")
    assert said is not None
    text, needed = said
    assert text.startswith(f"about {needed:.1f} GB: learner ")
    one = report.of_this_machine(config.model_copy(update={"actor": config.actor.model_copy(update={"count": 1})}),
                                 engine="vllm")  # fmt: skip
    assert one is not None
    assert needed - one[1] > config.actor.kv_cache_gb
