"""Compiled layers: the numbers of those that are not, few graphs for batches of any shape, and none where it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from accelerate.state import AcceleratorState

from atpo_async.core.errors import SetupError
from learner.packing import attention, attention_varlen
from learner.policy import compilation
from learner.policy.model import load_policy
from learner.policy.packing_check import small_pass
from tests.attention_support import flash_on_a_cpu
from tests.learner_support import make_batch, make_config, make_model
from tests.trained_support import VERSION, trained, trainer_of

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made as for a GPU, and run as they are."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    # What pytest would otherwise collect of the compiler's own records takes longer than the tests.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = torch._functorch.config.save_config()
    yield
    torch._functorch.config.load_config(settings)
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"packing": "tree"},
        {"packing": "flat", "micro_batch_tokens": 100},
        {"packing": "tree", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_compiled_layers_give_the_loss_and_gradient_of_others(folder: Path, settings: dict[str, object]) -> None:
    loss, gradient, plain = trained(folder, compile="off", **settings)
    assert plain.compiled == "none: learner.compile = 'off'"
    compiled_loss, compiled_gradient, trainer = trained(folder, compile="on", **settings)
    assert trainer.compiled == "2 of them (Qwen3DecoderLayer)"
    assert trainer.compilations.total > 0
    assert compiled_loss == pytest.approx(loss, abs=1e-6)
    assert float((compiled_gradient - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.slow
def test_thirty_batches_of_random_trees_compile_a_few_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_on_a_cpu(monkeypatch.setattr)
    monkeypatch.setattr(attention, "ways", lambda *_: ["varlen", "dense"])
    monkeypatch.setattr("learner.training.passes.ways", attention.ways)
    # With passes that measure first: graphs with a gradient and without.
    trainer = trainer_of(folder, compile="on", mixed_precision="bf16", minibatches=2, gradient_checkpointing=True)
    assert trainer.planner.way == "varlen"
    for step in range(30):
        report = trainer.train(make_batch(seed=step, step=step, num_trees=2 + step % 4), version=VERSION)
    assert report.metrics["pack/compilations"] == trainer.compilations.total
    assert 2 <= trainer.compilations.total <= 6
    assert trainer.history.updates == 60


@pytest.mark.slow
def test_norms_and_activations_are_computed_again_and_attention_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_on_a_cpu(monkeypatch.setattr)
    calls, kernel = [], attention_varlen.kernel

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return kernel(*arguments)

    monkeypatch.setattr(attention_varlen, "kernel", counted)
    monkeypatch.setattr(attention, "ways", lambda *_: ["varlen", "dense"])
    monkeypatch.setattr("learner.training.passes.ways", attention.ways)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager_decomp_partition")
    kept = {}
    for less in (False, True):
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            if not less:
                patch.setattr(compilation, "keep_little", lambda **_: None)
            trainer = trainer_of(folder, compile="on", mixed_precision="bf16")
            item = trainer.planner.on_device(small_pass(trainer.policy, "tree"))
            sizes: dict[int, int] = {}

            def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            calls.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                logp = trainer._run(**item.inputs)
            logp.sum().backward()
            assert len(calls) == 2, "once a layer, in the forward pass"
            kept[less] = sum(sizes.values())
    assert kept[True] < 0.9 * kept[False]


def broken(*_: object) -> None:
    raise RuntimeError("no code for this device")


def test_layers_that_do_not_compile_are_left_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", broken)
    with pytest.raises(
        SetupError, match=r"learner.compile = 'on', but the layers of Qwen3ForCausalLM .* do not compile"
    ):
        trainer_of(folder, compile="on")
    expected, _, _ = trained(folder, compile="off")
    monkeypatch.setattr(compilation, "chosen", lambda model, *_, **__: (compilation.layers(model), ""))
    loss, _, trainer = trained(folder, compile="auto")
    assert trainer.compiled == "none: they do not compile (RuntimeError: no code for this device)"
    assert loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("compile_", "device", "sharded", "number", "why"),
    [
        ("auto", CUDA, False, 2, "2 of them (Qwen3DecoderLayer)"),
        ("auto", CUDA, True, 0, "none: parameters are sharded (--learner.compile on compiles all the same)"),
        ("on", CUDA, True, 2, "2 of them (Qwen3DecoderLayer)"),
        ("auto", CPU, False, 0, "none: the learner is on a CPU"),
        ("on", CPU, False, 2, "2 of them (Qwen3DecoderLayer)"),
        ("off", CUDA, False, 0, "none: learner.compile = 'off'"),
    ],
)
def test_layers_are_compiled_where_it_is_asked_for_or_pays(
    folder: Path, compile_: str, device: torch.device, sharded: bool, number: int, why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = make_config(folder, learner={"compile": compile_})
    policy = load_policy(config)
    found, reason = compilation.chosen(policy.hf, config.learner, device=device, sharded=sharded)
    if (compile_, device, sharded) == ("auto", CUDA, False):
        assert (found, reason) == ([], "none: layers of 1968 parameters are too small to be worth it")
    monkeypatch.setattr(compilation, "SMALL_LAYER", 0)
    found, reason = compilation.chosen(policy.hf, config.learner, device=device, sharded=sharded)
    assert (len(found), reason) == (number, why)
    policy.hf._no_split_modules = None
    if number:
        without = compilation.chosen(policy.hf, config.learner, device=device, sharded=sharded)
        assert without == ([], "none: Qwen3ForCausalLM does not name its layers")


@pytest.mark.slow
def test_generated_code_has_the_numbers_of_the_layers_it_is_made_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, gradient, _ = trained(folder, compile="off", packing="flat")
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    compiled_loss, compiled, trainer = trained(folder, compile="on", packing="flat")
    assert trainer.compilations.total >= 1
    assert compiled_loss == pytest.approx(loss, abs=1e-5)
    assert float((compiled - gradient).norm() / gradient.norm()) < 1e-4
