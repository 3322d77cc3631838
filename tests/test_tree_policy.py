"""The policy over packed trees: log-probs, loss and gradient of flat rows, and which models can take such trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from atpo_async.config import CorrectionConfig, ObjectiveConfig
from atpo_async.core.errors import SetupError
from atpo_async.core.vocabulary import Aggregation
from learner.loss.loading import load_surrogate
from learner.loss.objective import atpo_loss
from learner.loss.tokens import ActionTokens, OffPolicyTokens
from learner.packing import attention, attention_kernel, attention_parts
from learner.packing.attention import DeviceLayout, Way, to_device
from learner.packing.rows import MicroBatch, Row, micro_batches
from learner.packing.tree import tree_micro_batches
from learner.policy import head as policy_head
from learner.policy.model import Policy, load_policy
from learner.policy.packing_check import layout_for
from tests.attention_support import CPU, WAYS, cheap_calls, largest_difference
from tests.learner_support import VOCAB, correction_for, make_config, make_model
from tests.tree_support import FORESTS, VERSION, Sketch, forest, rows_of


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if calls cost nothing, so that even small trees are cut into many parts."""
    cheap_calls(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def forget_costs() -> Any:
    yield
    attention_parts._chain_cost.cache_clear()


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    # The model's own computes in float32 whatever the precision, and a sum over siblings is then rounded elsewhere.
    def exact(self: Qwen3RMSNorm, hidden: Tensor) -> Tensor:
        out: Tensor = self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return out

    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact)


def float64_policy(folder: Path, **learner: object) -> Policy:
    policy = load_policy(make_config(make_model(folder), learner=learner))
    policy.hf.double()
    return policy


def passes(rows: Sequence[Row], kind: str, **limits: Any) -> list[MicroBatch]:
    limits = {"max_tokens": 4000} | limits
    if kind == "flat":
        return micro_batches(rows, version=VERSION, **limits)
    limits.setdefault("pack_tokens", None)
    return tree_micro_batches(rows, version=VERSION, **limits)


def scored(policy: Policy, batch: MicroBatch, way: Way | None = None) -> Tensor:
    """float64[M] with a gradient."""
    layout = None if batch.layout is None else to_device(batch.layout, CPU, way=way)
    logp: Tensor = policy(
        torch.from_numpy(batch.tokens), torch.from_numpy(batch.predictor), torch.from_numpy(batch.target), layout=layout
    )
    return logp if batch.occurrence is None else logp[torch.from_numpy(batch.occurrence)]


def loss_of(
    policy: Policy, batches: Sequence[MicroBatch], objective: ObjectiveConfig, off_policy: CorrectionConfig,
    way: Way | None = None,
) -> tuple[float, list[Tensor]]:  # fmt: skip
    """The loss over all passes, and its gradient."""
    surrogate, correction = load_surrogate(objective), correction_for(off_policy)
    policy.zero_grad()
    total = 0.0
    for batch in batches:
        logp = scored(policy, batch, way)
        mu, advantage, weight = (torch.from_numpy(v) for v in (batch.mu, batch.advantage, batch.weight))
        turn, row = torch.from_numpy(batch.turn), torch.from_numpy(batch.row)
        # Somewhere near, some of it outside the clip range, and the same token by token in every layout.
        prox = logp.detach() + 0.3 * torch.sin(1e3 * mu)
        weights = correction.weights(OffPolicyTokens(numerator=prox, mu=mu, advantage=advantage, turn=turn, row=row))
        tokens = ActionTokens(
            logp=logp, prox=prox, mu=mu, advantage=advantage, turn=turn, row=row, weight=weight,
            correction=weights.per_token,
        )  # fmt: skip
        result = atpo_loss(tokens, objective, surrogate)
        result.loss.backward()
        total += float(result.loss.detach())
    return total, [p.grad.clone() for p in policy.parameters() if p.grad is not None]


MIXED = forest(
    [
        # Turns of mixed lengths, none, one or several leaves each, and adjacent turns without observations.
        (5, [Sketch(0, 0, 3), Sketch(1, 2, 5), Sketch(1, 2, 1), Sketch(2, 0, 4), Sketch(2, 0, 2), Sketch(0, 0, 6)]),
        # One turn.
        (3, [Sketch(0, 0, 4)]),
        # A stale turn above, one below, siblings with observations of their own.
        (
            4,
            [
                Sketch(0, 0, 2, stale=True), Sketch(1, 3, 3), Sketch(1, 2, 3, own_observation=True),
                Sketch(2, 1, 2, stale=True), Sketch(2, 1, 4), Sketch(0, 0, 1),
            ],
        ),
        (7, [Sketch(0, 0, 2), Sketch(1, 4, 2), Sketch(2, 4, 2), Sketch(3, 4, 2), Sketch(3, 4, 3), Sketch(2, 4, 5)]),
    ],
    seed=5,
)  # fmt: skip


def assert_same(one: tuple[float, list[Tensor]], other: tuple[float, list[Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-12, rel=0)
    scale = max(1.0, max(float(g.abs().max()) for g in other[1]))
    assert largest_difference(one[1], other[1]) < 1e-12 * scale
    assert max(float(g.abs().max()) for g in other[1]) > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("limits", [{}, {"max_tokens": 30}, {"max_tokens": 40, "pack_tokens": 20}, {"max_tokens": 9}])
def test_packed_log_probs_are_those_of_flat_rows(
    tmp_path: Path, way: Way, limits: dict[str, int], small_parts: None
) -> None:
    policy = float64_policy(tmp_path)
    rows = rows_of(MIXED)

    def by_token(batches: list[MicroBatch]) -> np.ndarray:
        """Sorted by turn and behaviour log-prob, which tell a token apart."""
        values = [np.stack([b.number, b.mu, scored(policy, b, way).detach().numpy()]) for b in batches if b.num_targets]
        table = np.concatenate(values, axis=1)
        return np.asarray(table[:, np.lexsort(table[:2])])

    flat, packed = by_token(passes(rows, "flat")), by_token(passes(rows, "tree", **limits))
    assert np.array_equal(flat[:2], packed[:2])
    assert np.abs(flat[2] - packed[2]).max() < 1e-12


@pytest.mark.parametrize(
    "aggregation",
    ["seq-mean-token-mean", "seq-mean-token-sum", "token-mean", "unique-token-mean", "branch-prob",
     "branch-prob-token-sum"],
)  # fmt: skip
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradient_are_the_same_under_every_aggregation(
    tmp_path: Path, aggregation: Aggregation, way: Way, small_parts: None
) -> None:
    policy = float64_policy(tmp_path)
    rows = rows_of(MIXED, aggregation=aggregation)
    objective = ObjectiveConfig(clip_low=0.2, clip_high=0.3)
    flat = loss_of(policy, passes(rows, "flat"), objective, CorrectionConfig())
    assert_same(loss_of(policy, passes(rows, "tree"), objective, CorrectionConfig(), way), flat)


@pytest.mark.parametrize("level", ["token", "turn", "prefix", "sequence"])
@pytest.mark.parametrize("ratio_level", ["token", "turn", "sequence"])
def test_loss_and_gradient_are_the_same_at_every_level(tmp_path: Path, ratio_level: Any, level: Any) -> None:
    policy = float64_policy(tmp_path)
    rows = rows_of(MIXED)
    objective = ObjectiveConfig(ratio_level=ratio_level, clip_low=0.2, clip_high=0.3)
    off_policy = CorrectionConfig(level=level)
    flat = loss_of(policy, passes(rows, "flat"), objective, off_policy)
    assert_same(loss_of(policy, passes(rows, "tree"), objective, off_policy), flat)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_tokens": 9},
        {"max_tokens": 25},
        {"max_tokens": 60, "pack_tokens": 30},
        {"max_tokens": 4000, "pack_tokens": 33},
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_the_same_however_trees_are_split_and_packed(
    tmp_path: Path, limits: dict[str, int], checkpointing: bool, small_parts: None
) -> None:
    policy = float64_policy(tmp_path, gradient_checkpointing=checkpointing)
    rows = rows_of(MIXED)
    objective = ObjectiveConfig(ratio_level="sequence", clip_low=0.2, clip_high=0.3)
    off_policy = CorrectionConfig(level="sequence")
    flat = loss_of(policy, passes(rows, "flat", max_tokens=50), objective, off_policy)
    for way in WAYS:
        assert_same(loss_of(policy, passes(rows, "tree", **limits), objective, off_policy, way), flat)


def test_gradient_checkpointing_computes_each_layer_again_with_the_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = float64_policy(tmp_path, gradient_checkpointing=True)
    (packed,) = passes(rows_of(MIXED), "tree")
    kernel, calls = attention_kernel._kernel, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return kernel(*args)

    monkeypatch.setattr(attention_kernel, "_kernel", counted)
    logp = scored(policy, packed)
    forward = len(calls)
    logp.sum().backward()
    assert forward > 0
    assert len(calls) == 2 * forward


def test_trees_of_any_shape_have_the_loss_and_gradient_of_flat_rows(tmp_path: Path) -> None:
    policy = float64_policy(tmp_path)
    objective = ObjectiveConfig(clip_low=0.2, clip_high=0.3)

    @settings(max_examples=25)
    @given(FORESTS, st.sampled_from([20, 4000]), st.sampled_from(WAYS))
    def check(sketches: list[tuple[int, list[Sketch]]], max_tokens: int, way: Way) -> None:
        rows = rows_of(forest(sketches))
        flat = loss_of(policy, passes(rows, "flat"), objective, CorrectionConfig())
        packed = loss_of(policy, passes(rows, "tree", max_tokens=max_tokens), objective, CorrectionConfig(), way)
        assert packed[0] == pytest.approx(flat[0], abs=1e-12, rel=0)
        if flat[1]:
            scale = max(1.0, max(float(g.abs().max()) for g in flat[1]))
            assert largest_difference(packed[1], flat[1]) < 1e-12 * scale

    check()


@pytest.mark.parametrize("chunk", [None, 7])
def test_entropies_are_of_the_whole_tempered_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    policy = float64_policy(tmp_path)
    if chunk is not None:
        monkeypatch.setattr(policy_head, "MAX_LOGITS", chunk * VOCAB)
    tokens = torch.arange(24).reshape(2, 12) % VOCAB
    predictor, target = torch.arange(1, 23), torch.arange(1, 23) % VOCAB
    both = policy(tokens, predictor, target, temperature=0.7, with_entropy=True)
    logits = policy.hf(input_ids=tokens).logits.reshape(24, VOCAB)[predictor] / 0.7
    expected = torch.distributions.Categorical(logits=logits)
    assert both.shape == (2, 22)
    assert torch.allclose(both[0], expected.log_prob(target), atol=1e-12)
    assert torch.allclose(both[1], expected.entropy(), atol=1e-12)
    assert torch.allclose(both[0], policy(tokens, predictor, target, temperature=0.7), atol=1e-12)
    weights = list(policy.parameters())
    ours = torch.autograd.grad(both[1].sum(), weights)
    theirs = torch.autograd.grad(expected.entropy().sum(), weights)
    assert largest_difference(ours, theirs) < 1e-11


# Which models can.

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=256, n_embd=32, n_layer=2, n_head=2)
    )


def mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    )


def mistral(window: int) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=window))


MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), "tree", "log-probs of flat"),
    "gpt2": (gpt2, "tree", "log-probs of flat rows"),
    "a window longer than any context": (lambda: mistral(512), "tree", "log-probs of flat rows"),
    "a window": (lambda: mistral(8), "flat", "slides over 8 tokens, fewer than model.max_context_tokens = 512"),
    "gemma3": (
        lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, sliding_window=8)),
        "flat",
        "layers of type sliding_attention",
    ),
    "convolutions": (
        lambda: transformers.Lfm2ForCausalLM(
            transformers.Lfm2Config(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, layer_types=["conv", "full_attention"],
            )
        ),
        "flat",
        "layers of type conv",
    ),
    "mamba": (mamba, "flat", "recurrent layers"),
    "positions by distance": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2)
        ),
        "flat",
        "takes no position_ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_follows_what_the_models_layers_are(tmp_path: Path, name: str) -> None:
    make, kind, reason = MODELS[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    config = make_config(tmp_path)
    policy = load_policy(config)
    found, why = layout_for(policy, config)
    assert (found, reason in why) == (kind, True), why
    forced = make_config(tmp_path, learner={"packing": "tree"})
    if kind == "tree":
        assert layout_for(policy, forced)[0] == "tree"
        return
    named = f"{type(policy.hf).__name__} in model.path = {str(tmp_path)!r} cannot score packed trees: "
    with pytest.raises(SetupError) as caught:
        layout_for(policy, forced)
    assert named in str(caught.value)
    assert why in str(caught.value)
    assert "--learner.packing flat" in str(caught.value)
    assert layout_for(policy, make_config(tmp_path, learner={"packing": "flat"})) == (
        "flat",
        "learner.packing = 'flat'",
    )


def test_a_model_that_can_still_has_flat_rows_where_asked(tmp_path: Path) -> None:
    config = make_config(make_model(tmp_path), learner={"packing": "flat"})
    assert layout_for(load_policy(config), config)[0] == "flat"


def test_a_model_that_lets_the_layout_drop_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(make_model(tmp_path))
    policy = load_policy(config)
    assert layout_for(policy, config)[0] == "tree"
    whole = DeviceLayout.model_arguments

    def dropped(self: DeviceLayout) -> dict[str, Any]:
        return {"position_ids": whole(self)["position_ids"]}

    monkeypatch.setattr(DeviceLayout, "model_arguments", dropped)
    kind, why = layout_for(policy, config)
    assert (kind, "log-probs differ from flat ones by" in why) == ("flat", True), why


def test_a_model_is_asked_through_its_wrappers_where_only_they_can_run_it(tmp_path: Path) -> None:
    config = make_config(make_model(tmp_path))
    policy = load_policy(config)
    calls = []

    class Wrapped(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(kwargs["layout"])
            out: Tensor = policy(*args, **kwargs)
            return out

    assert layout_for(policy, config, Wrapped())[0] == "tree"
    assert [getattr(layout, "way", None) for layout in calls] == [None, None, "parts"]


def test_a_way_of_attention_that_fails_on_the_device_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(make_model(tmp_path))
    policy = load_policy(config)
    kernel = attention_kernel._kernel
    monkeypatch.setattr(attention_kernel, "_kernel", lambda q, *rest: kernel(q * 0, *rest))
    assert layout_for(policy, config)[0] == "tree"
    assert policy.attention_way == "dense"
    assert "attention over packed trees, computed by 'parts', is not this model's: their log-probs" in caplog.text


def test_a_model_that_raises_on_a_layout_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(make_model(tmp_path))
    policy = load_policy(config)

    def fails(self: DeviceLayout) -> dict[str, Any]:
        raise TypeError("forward() got an unexpected keyword argument 'tree_layout'\nand more")

    monkeypatch.setattr(DeviceLayout, "model_arguments", fails)
    kind, why = layout_for(policy, config)
    assert kind == "flat"
    assert why == "it raises TypeError: forward() got an unexpected keyword argument 'tree_layout'"


def test_a_model_is_saved_without_a_word_of_its_attention(tmp_path: Path) -> None:
    policy = load_policy(make_config(make_model(tmp_path / "one")))
    assert policy.hf.config._attn_implementation == attention.NAME
    policy.hf.save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        assert "attn" not in (tmp_path / name / "config.json").read_text()
