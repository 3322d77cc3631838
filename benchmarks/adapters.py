"""What travels where LoRA's adapters travel alone, and how long an actor takes to make whole weights of them.

Made-up weights and adapters in the shapes of a Qwen3, at every linear layer, as ``learner.lora.targets`` has it by
default.  ``merge`` is what an actor does beside generation, between fetching a version and swapping it in: it reads the
model folder, merges, and writes a file in the engine's precision.  ``copy`` writes as many bytes into such a file.

    .venv/bin/python benchmarks/adapters.py                                    # 0.6b, rank 16
    .venv/bin/python benchmarks/adapters.py --model 4b --rank 32 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# A script's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config

from actors.engines.base import WeightsFile
from actors.weights.merging import Merging
from atpo_async.config import WeightsConfig
from atpo_async.models import adapters
from atpo_async.transports.base import OfferedVersion
from benchmarks.learner_parts.sides import SIZES, Size
from benchmarks.learner_parts.tables import machine
from benchmarks.weights_parts.memory import tensors_of
from learner.weights.staging import Stager
from learner.weights.store import WeightsStore

RUN = "benchmark-adapters"


def write_model(size: Size, folder: Path) -> dict[str, tuple[int, ...]]:
    """A model folder in bfloat16; the shapes of its linear layers' weights."""
    tensors = tensors_of(size, torch.bfloat16)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    Qwen3Config(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, head_dim=size.head_dim,
        tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return {n.removesuffix(".weight"): tuple(t.shape) for n, t in tensors.items() if n.endswith("_proj.weight")}


def pairs_of(shapes: dict[str, tuple[int, ...]], rank: int) -> Iterator[tuple[str, Tensor]]:
    """Adapters of every layer."""
    source = torch.Generator().manual_seed(1)
    for layer, (rows, columns) in shapes.items():
        yield layer + adapters.A, torch.randn(rank, columns, generator=source)
        yield layer + adapters.B, torch.randn(rows, rank, generator=source)


def offered(shapes: dict[str, tuple[int, ...]], rank: int, store: WeightsStore) -> OfferedVersion:
    """A version of adapters in the learner's store."""
    staged = Stager("float32").stage(dict(pairs_of(shapes, rank)), copied=True)
    assert staged is not None
    store.add(
        1, staged, probe_tokens=np.zeros((1, 2), np.int32), probe_logprobs=np.zeros(1, np.float32), adapter_scale=2.0
    )
    staged.release()
    return store._versions[1]


def rounds(version: OfferedVersion, model: Path, count: int) -> tuple[list[float], list[float], int]:
    """Seconds of each merge and of each copy, after a round that warms both up; bytes of a merged version."""
    merging = Merging(run=RUN, model=model, precision="bfloat16")
    merges, copies, total = [], [], 0
    try:
        for number in range(count + 1):
            began = time.perf_counter()
            whole = asyncio.run(merging.whole(WeightsFile(path=version.path, manifest=version.manifest)))
            merged = time.perf_counter()
            total = whole.manifest.total_bytes
            data = whole.path.read_bytes()
            copied = time.perf_counter()
            whole.path.with_suffix(".copy").write_bytes(data)
            if number:
                merges.append(merged - began)
                copies.append(time.perf_counter() - copied)
            whole.path.with_suffix(".copy").unlink()
            whole.path.unlink()
    finally:
        merging.close()
    return merges, copies, total


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES), default="0.6b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    print(machine("cpu", torch.get_num_threads()))
    with tempfile.TemporaryDirectory(prefix="atpo-bench-") as folder:
        store = WeightsStore(run=RUN, fallback=Path(folder), settings=WeightsConfig())
        try:
            version = offered(write_model(SIZES[args.model], Path(folder)), args.rank, store)
            merges, copies, total = rounds(version, Path(folder), args.rounds)
        finally:
            store.close()
    travels = version.manifest.total_bytes
    print(f"{args.model}, rank {args.rank}: {travels / 1e6:.1f} MB travel, {total / 1e6:.1f} MB merged: ", end="")
    print(f"{total / travels:.0f} times less")
    for name, times in (("merge", merges), ("copy", copies)):
        print(f"{name}: {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f}, {len(times)} rounds)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
