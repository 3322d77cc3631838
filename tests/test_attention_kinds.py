"""Windows, chunks, caps and sinks: every path through a model is the model's own, or the model is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from actors.engines.base import EngineSettings, Sampling
from actors.engines.transformers.attention import windows_of
from actors.engines.transformers.engine import TransformersEngine
from actors.engines.transformers.runner import ModelRunner
from atpo_async.core.errors import SetupError
from learner.policy.model import load_policy
from learner.policy.packing_check import layout_for
from tests.learner_support import make_config

WINDOW, CONTEXT, VOCABULARY = 8, 64, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.3,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
LLAMA4: dict[str, Any] = {**SIZES, "head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2}


def mistral() -> Any:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=WINDOW, tie_word_embeddings=False)
    )


def qwen2() -> Any:
    config = transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    return transformers.Qwen2ForCausalLM(config)


def gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=WINDOW, layer_types=kinds)
    )


def gemma2(cap: float | None, head_cap: float | None = None) -> Any:
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SIZES, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=cap, final_logit_softcapping=head_cap
        )
    )


def llama4(chunk: int) -> Any:
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**LLAMA4, attention_chunk_size=chunk))


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **SIZES, head_dim=16, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.GptOssForCausalLM(config)


def saved(make: Callable[[], Any], folder: Path) -> Path:
    torch.manual_seed(0)
    make().save_pretrained(folder)
    return folder


def own_logprobs(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """float32[len - 1]: by transformers' plain attention, which leaves nothing out."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    found: np.ndarray = logs.gather(1, ids[0, 1:, None])[:, 0].numpy()
    return found


RESPECTED: dict[str, Callable[[], Any]] = {
    "a window in every layer": mistral,
    "a window in some layers": qwen2,
    "windows and two kinds of positions": gemma3,
    "a window, its caps switched off": lambda: gemma2(None),
    "chunks longer than any context": lambda: llama4(512),
}


@pytest.mark.parametrize("kind", RESPECTED)
async def test_what_the_engine_samples_from_is_the_models_own_distribution(tmp_path: Path, kind: str) -> None:
    folder = saved(RESPECTED[kind], tmp_path)
    engine = TransformersEngine(
        EngineSettings(model=folder, device="cpu", max_num_seqs=2, max_model_len=CONTEXT, num_threads=1)
    )
    await engine.start()
    try:
        prompt = np.arange(2, 22, dtype=np.int32)
        told = await engine.generate(prompt, Sampling(max_tokens=30, stop_token_ids=(), seed=3), request_id="a")
        tokens = np.concatenate([prompt, told.token_ids])
        expected = own_logprobs(folder, tokens)
        assert np.abs(told.logprobs - expected[len(prompt) - 1 :]).max() < 1e-4
        assert np.abs(await engine.score(tokens) - expected).max() < 1e-4
    finally:
        await engine.close()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "capped attention": (lambda: gemma2(5.0), "attention with capped logits"),
    "chunks": (lambda: llama4(WINDOW), "layers of type chunked_attention"),
    "sinks": (gpt_oss, "GptOssForCausalLM does not support"),
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_the_engine_refuses_by_name_what_it_would_leave_out(tmp_path: Path, kind: str) -> None:
    make, named = REFUSED[kind]
    engine = TransformersEngine(
        EngineSettings(model=saved(make, tmp_path), device="cpu", max_model_len=CONTEXT, num_threads=1)
    )
    with pytest.raises(SetupError, match=named) as caught:
        await engine.start()
    assert str(tmp_path) in str(caught.value)
    await engine.close()


async def test_a_layer_that_hides_its_window_from_its_attention_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(mistral, tmp_path)
    plain = transformers.models.mistral.modeling_mistral.MistralAttention.forward

    def hides(self: Any, *args: Any, **kwargs: Any) -> Any:
        window, self.config.sliding_window = self.config.sliding_window, None
        try:
            return plain(self, *args, **kwargs)
        finally:
            self.config.sliding_window = window

    monkeypatch.setattr(transformers.models.mistral.modeling_mistral.MistralAttention, "forward", hides)
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_model_len=CONTEXT, num_threads=1))
    with pytest.raises(SetupError, match="layer 0 does not pass its attention its window of 8 tokens"):
        await engine.start()
    await engine.close()


@pytest.mark.parametrize("change", ["positions", "reuse"])
async def test_a_model_that_reads_in_parts_otherwise_than_in_one_piece_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder = saved(mistral, tmp_path)
    plain = ModelRunner.next_logits

    def wrong(self: Any, slots: list[int], begins: list[int], fed: list[list[int]]) -> torch.Tensor:
        if change == "positions":
            return plain(self, slots, begins, [[*part[:-1], 5] for part in fed])
        return plain(self, slots, [0 for _ in begins], fed)

    monkeypatch.setattr(ModelRunner, "next_logits", wrong)
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_model_len=CONTEXT, num_threads=1))
    with pytest.raises(SetupError, match=r"after text read in parts .* use --actor.engine vllm"):
        await engine.start()
    await engine.close()


def test_windows_are_those_that_a_context_can_reach() -> None:
    mixed = qwen2().config
    assert windows_of(mixed, max_tokens=64) == [None, None, 8, 8]
    assert windows_of(mixed, max_tokens=8) == [None] * 4
    assert windows_of(mistral().config, max_tokens=64) == [8] * 4
    assert windows_of(transformers.Qwen3Config(**SIZES), max_tokens=64) == [None] * 4


SCORED: dict[str, Callable[[], Any]] = {
    **{kind: make for kind, make in RESPECTED.items() if kind != "chunks longer than any context"},
    "capped attention": lambda: gemma2(5.0),
    "sinks": gpt_oss,
}


@pytest.mark.parametrize("kind", SCORED)
def test_the_learners_rows_are_the_models_own_and_a_tree_is_not_packed_where_it_would_not_be(
    tmp_path: Path, kind: str
) -> None:
    config = make_config(saved(SCORED[kind], tmp_path))
    policy = load_policy(config)
    tokens = (np.arange(2 * 40).reshape(2, 40) * 7 + 3) % VOCABULARY
    rows = torch.from_numpy(tokens.copy())
    places = torch.cat([torch.arange(39), 40 + torch.arange(39)])
    with torch.no_grad():
        found = policy(rows, places, torch.cat([rows[0, 1:], rows[1, 1:]])).numpy()
    expected = np.concatenate([own_logprobs(tmp_path, row) for row in tokens])
    assert np.abs(found - expected).max() < 1e-4
    layout, why = layout_for(policy, config)
    assert layout == "flat", why
    assert config.model.max_context_tokens > WINDOW


def test_a_model_without_a_body_of_its_own_is_refused_by_the_learner(tmp_path: Path) -> None:
    config = make_config(saved(lambda: llama4(WINDOW), tmp_path))
    with pytest.raises(SetupError, match="Llama4ForCausalLM does not let its body and its output head be run"):
        load_policy(config)


def test_a_capped_head_is_refused_by_the_learner(tmp_path: Path) -> None:
    config = make_config(saved(lambda: gemma2(None, 0.5), tmp_path))
    with pytest.raises(SetupError, match="Gemma2ForCausalLM does more to its logits than the output head"):
        load_policy(config)
