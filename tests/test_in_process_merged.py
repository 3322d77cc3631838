"""The forward pass of few operations: it computes what the model does, or the model itself is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from inprocess.generation.forward import MergedForward
from inprocess.generation.requests import ScoreRequest
from inprocess.generation.rows import Rows
from tests.engine_support import VOCABULARY, save_model, tiny_model
from tests.test_in_process import decoded, decoder_of, error_of, request

SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0, "dtype": "float32",
}  # fmt: skip
STRETCHED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 32}  # fmt: skip


def shaken(model: Any) -> Any:
    """Norms and biases are at ones and zeros at first, at which a mistake would show nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def model_of(layout: str) -> Any:
    if layout == "qwen3":
        return shaken(tiny_model(3))
    if layout == "qwen2":
        return shaken(Qwen2ForCausalLM(Qwen2Config(**SIZE, num_key_value_heads=1, tie_word_embeddings=True)))
    rotary = STRETCHED if layout == "llama, stretched" else None
    config = LlamaConfig(**SIZE, num_key_value_heads=4, rope_parameters=rotary, attention_bias=True, mlp_bias=True)
    if layout == "gelu":
        config.hidden_act = "gelu"
    return shaken(LlamaForCausalLM(config))


@pytest.mark.parametrize("layout", ["qwen3", "qwen2", "llama", "llama, stretched", "gelu"])
def test_actions_have_the_log_probs_that_the_model_gives_them(layout: str, tmp_path: Path) -> None:
    decoder = decoder_of(save_model(model_of(layout), tmp_path))
    assert (decoder._merged is None) == (layout == "gelu")
    prompts = [np.arange(5, 5 + length) for length in (1, 4, 9, 30)]
    first = decoded(decoder, [request(prompt) for prompt in prompts for _ in range(3)])
    later = decoded(
        decoder, [request(np.concatenate([each.prompt, each.generation().token_ids, [7, 8]])) for each in first]
    )
    assert all(each.cached for each in later)
    assert error_of(decoder, *first, *later) < 1e-4


def test_the_model_itself_is_used_where_the_merged_weights_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = decoder_of(save_model(tiny_model(1), tmp_path))
    other = tiny_model(2).state_dict()
    monkeypatch.setattr(MergedForward, "load", lambda self: None)
    decoder.load(other)
    assert decoder._merged is None
    assert "its log-probs differ from those of its merged weights by" in caplog.text
    done = decoded(decoder, [request(np.array([5, 9, 200]))])
    assert error_of(decoder, *done) < 1e-4
    assert decoder.score_after([ScoreRequest(np.array([5]), np.array([9]))])[0].shape == (1,)


def test_rows_that_stand_side_by_side_are_read_where_they_are() -> None:
    rows = Rows(10)
    for _ in range(8):
        rows.take(())
    assert rows.best_begin([5, 6, 7], in_all=3) == 5
    assert rows.gather([5, 6, 7], begin=5) == ([], [])
    begin = rows.best_begin([2, 3, 6], in_all=4)
    assert 0 <= begin <= 4
    holes, others = rows.gather([2, 3, 6], begin=begin)
    assert len(holes) == len(others) == 1
    assert sorted(rows.row_at(begin + i) for i in range(3)) == [2, 3, 6]
