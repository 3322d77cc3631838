"""A tiny random Qwen3 folder, weight files made from a state dict, and log-probs by plain transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from actors.engines.base import Generation, Sampling, WeightsFile
from atpo_async.wire.digests import digest_of
from atpo_async.wire.messages import TensorSpec, WeightsManifest

VOCABULARY = 256
END = 1
PROBE = np.array([7, 11, 200, 13, 42, 42, 5, 99, 250, 17, 3, 64], dtype=np.int32)


def tiny_model(seed: int, *, tied: bool = True, layers: int = 2) -> Qwen3ForCausalLM:
    """Random weights wide enough apart that other weights give clearly other log-probs."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=END,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.1,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config).eval()


def save_model(model: Qwen3ForCausalLM, folder: Path) -> Path:
    """The model and a word-level tokenizer, as an ordinary Hugging Face folder."""
    words = ["<pad>", "<end>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def reference_logprobs(model: Qwen3ForCausalLM, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """float32[len - 1]: log-prob of each token given those before it, by transformers."""
    tokens = torch.as_tensor(np.asarray(token_ids, dtype=np.int64))[None]
    logprobs = torch.log_softmax(model(tokens).logits[0, :-1].float(), dim=-1)
    return logprobs.gather(1, tokens[0, 1:, None])[:, 0].numpy()


def reference_rows(model: Qwen3ForCausalLM, sequences: np.ndarray) -> np.ndarray:
    """float32[S * (T - 1)] of int32[S, T], as a probe has them."""
    return np.concatenate([reference_logprobs(model, tokens) for tokens in sequences])


@torch.no_grad()
def sampled(model: Qwen3ForCausalLM, *, sequences: int, length: int) -> np.ndarray:
    """int32[sequences, length] by the model, each after another token."""
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (sequences, 1), generator=source)
    for _ in range(length - 1):
        p = torch.softmax(model(tokens).logits[:, -1].float(), dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=source)], dim=1)
    return tokens.numpy().astype(np.int32)


def weights_file(
    model: Qwen3ForCausalLM,
    path: Path,
    *,
    version: int,
    drop: str | None = None,
    tolerance: float | None = 1e-4,
    tensors: Mapping[str, torch.Tensor] | None = None,
    probe: np.ndarray = PROBE,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> WeightsFile:
    """Every tensor of ``state_dict()`` (the tied head too), or ``tensors``, but ``drop``; ``probe``: int32[(S,) T]."""
    specs, payload = [], bytearray()
    sequences = np.atleast_2d(probe)
    for name, tensor in (model.state_dict() if tensors is None else tensors).items():
        if name == drop:
            continue
        bits = tensor.detach().to(getattr(torch, dtype)).contiguous().view(torch.uint8)
        data = bits.numpy().tobytes()
        specs.append(
            TensorSpec(
                name=name,
                dtype=dtype,
                shape=tuple(tensor.shape),
                offset=len(payload),
                nbytes=len(data),
                digest=digest_of(data),
            )
        )
        payload += data
    path.write_bytes(payload)
    return WeightsFile(
        path=path,
        manifest=WeightsManifest(
            run="test",
            version=version,
            total_bytes=len(payload),
            chunk_bytes=1 << 20,
            tensors=tuple(specs),
            probe_token_ids=sequences.reshape(-1),
            probe_logprobs=reference_rows(model, sequences),
            probe_tolerance=tolerance,
            probe_sequences=len(sequences),
        ),
    )


def largest_error(
    generation: Generation, prompt: Sequence[int], models: dict[int, Qwen3ForCausalLM], *, temperature: float = 1.0
) -> float:
    """Largest difference, nats, of each token's log-prob from its own version's model, over the whole action."""
    tokens = np.concatenate([np.asarray(prompt), generation.token_ids])
    worst = 0.0
    for span in generation.spans:
        with torch.no_grad():
            logits = models[span.version](torch.as_tensor(tokens, dtype=torch.long)[None]).logits[0].float()
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        for i in range(span.start, span.end):
            expected = float(logprobs[len(prompt) + i - 1, int(generation.token_ids[i])])
            worst = max(worst, abs(expected - float(generation.logprobs[i])))
    return worst


@torch.no_grad()
def truncated(model: Qwen3ForCausalLM, prompt: Sequence[int], sampling: Sampling) -> dict[int, float]:
    """Token -> log-prob of the next token under top-k, then top-p of what is left."""
    logits = model(torch.tensor([prompt])).logits[0, -1].numpy().astype(np.float64) / sampling.temperature
    order = np.argsort(-logits)[: sampling.top_k]
    p = np.exp(logits[order]) / np.exp(logits[order]).sum()
    left = 1 + int(np.searchsorted(np.cumsum(p), sampling.top_p))
    assert left < sampling.top_k
    return dict(zip(order[:left].tolist(), np.log(p[:left] / p[:left].sum()), strict=True))


REJECTED = [
    ("missing file", "cannot read .*weights"),
    ("short file", "has 100 bytes"),
    ("wrong shape", r"model.norm.weight has shape \(64, 2\)"),
    ("missing tensor", "model.norm.weight is missing"),
    ("unknown tensor", "model.nonsense is not part"),
    ("past the end", "model.norm.weight ends past"),
    ("wrong size", "model.norm.weight has 4 bytes"),
]
"""Faults of ``altered`` that every engine finds before it touches its weights, and what is said of them."""


def altered(good: WeightsFile, fault: str) -> WeightsFile:
    """The same weights with one thing wrong."""
    manifest = good.manifest
    norm = next(spec for spec in manifest.tensors if spec.name == "model.norm.weight")
    others = tuple(spec for spec in manifest.tensors if spec is not norm)
    replaced = msgspec.structs.replace
    match fault:
        case "missing file":
            good.path.unlink()
        case "short file":
            good.path.write_bytes(good.path.read_bytes()[:100])
        case "altered file":
            payload = bytearray(good.path.read_bytes())
            # The exponents: every scale of the last norm is halved or doubled.
            for end in range(norm.offset + 2, norm.offset + norm.nbytes, 4):
                payload[end] ^= 0x80
            good.path.write_bytes(payload)
        case "wrong shape":
            manifest = replaced(manifest, tensors=(*others, replaced(norm, shape=(64, 2))))
        case "missing tensor":
            manifest = replaced(manifest, tensors=others)
        case "unknown tensor":
            manifest = replaced(manifest, tensors=(*others, norm, replaced(norm, name="model.nonsense")))
        case "past the end":
            manifest = replaced(manifest, tensors=(*others, replaced(norm, offset=manifest.total_bytes)))
        case "wrong size":
            manifest = replaced(manifest, tensors=(*others, replaced(norm, nbytes=4)))
        case "other probe":
            manifest = replaced(manifest, probe_logprobs=manifest.probe_logprobs - np.float32(0.5))
        case _:
            raise AssertionError(fault)
    return WeightsFile(path=good.path, manifest=manifest)
