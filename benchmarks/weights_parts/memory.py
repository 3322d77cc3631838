"""Publishing, fetching and loading made-up weights on this host, each against a copy of the same bytes."""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.engines.base import WeightsFile
from actors.engines.common.direct import SpotCheck, compare, copy_all, placements, uncovered
from actors.engines.transformers.loading import read
from actors.weights.fetcher import WeightsFetcher
from atpo_async.config import WeightsConfig
from atpo_async.transports.verification import NOTE
from atpo_async.wire.messages import ActorToLearner, LearnerToActor, ManifestRequest, WeightsAnnounced
from benchmarks.learner_parts.sides import Size, Times
from learner.weights.staging import Stager
from learner.weights.store import WeightsStore

RUN = "benchmark-weights"
Sides = dict[str, Callable[[], Times]]


def tensors_of(size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights in the names and shapes of a Qwen3 file, the head tied."""
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float32).to(dtype)

    w = size.width
    found = {"model.embed_tokens.weight": drawn(size.vocab, w)}
    for i in range(size.layers):
        prefix = f"model.layers.{i}."
        for part, heads in (("q", size.heads), ("k", size.kv_heads), ("v", size.kv_heads)):
            found[f"{prefix}self_attn.{part}_proj.weight"] = drawn(heads * size.head_dim, w)
        found[f"{prefix}self_attn.o_proj.weight"] = drawn(w, size.heads * size.head_dim)
        for part in ("q", "k"):
            found[f"{prefix}self_attn.{part}_norm.weight"] = drawn(size.head_dim)
        for part in ("gate", "up"):
            found[f"{prefix}mlp.{part}_proj.weight"] = drawn(size.inner, w)
        found[f"{prefix}mlp.down_proj.weight"] = drawn(w, size.inner)
        for part in ("input", "post_attention"):
            found[f"{prefix}{part}_layernorm.weight"] = drawn(w)
    found["model.norm.weight"] = drawn(w)
    return {**found, "lm_head.weight": found["model.embed_tokens.weight"]}


class Stacked(nn.Module):
    """Parameters as vLLM holds those of a Qwen3 on a GPU: some in stacks."""

    packed_modules_mapping: Mapping[str, list[str]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._held: dict[str, nn.Parameter] = {}
        for name, tensor in tensors.items():
            stack = next((s for s, parts in self.packed_modules_mapping.items() if f".{parts[0]}." in name), None)
            if stack is not None:
                parts = self.packed_modules_mapping[stack]
                rows = sum(len(tensors[name.replace(f".{parts[0]}.", f".{part}.")]) for part in parts)
                self._add(name.replace(f".{parts[0]}.", f".{stack}."), (rows, *tensor.shape[1:]), tensor.dtype)
            elif name != "lm_head.weight" and not any(
                f".{part}." in name for parts in self.packed_modules_mapping.values() for part in parts
            ):
                self._add(name, tuple(tensor.shape), tensor.dtype)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._held[name] = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._held.items())


class Host:
    """A learner's store, and a copy of the same bytes to measure against.

    Args:
        size: of the model.
        dtype: that training holds the weights in; they are published in bfloat16.
        folder: for what does not go into shared memory.
    """

    def __init__(self, size: Size, dtype: torch.dtype, folder: Path) -> None:
        self.tensors = tensors_of(size, dtype)
        self.store = WeightsStore(run=RUN, fallback=folder, settings=WeightsConfig())
        self.stager = Stager("bfloat16")
        self.version = 0
        first = self.publish()
        self.total_bytes = int(first["bytes"])
        self.flat = torch.zeros(self.total_bytes, dtype=torch.uint8)
        self.kept = torch.zeros(self.total_bytes, dtype=torch.uint8)
        self.beside = Path("/dev/shm" if Path("/dev/shm").is_dir() else folder) / f"atpo-{RUN}-raw"

    # --- publish

    def publish(self) -> Times:
        """A version as the learner publishes it: what holds training up, and what is done aside."""
        began = time.perf_counter()
        staged = self.stager.stage(self.tensors, copied=False)
        held = time.perf_counter()
        if staged is None:
            raise AssertionError("nothing asked it to stop")
        self.version += 1
        probe = np.zeros((1, 2), dtype=np.int32)
        self.announced: WeightsAnnounced = self.store.add(
            self.version, staged, probe_tokens=probe, probe_logprobs=np.zeros(1, dtype=np.float32)
        )
        total = staged.total_bytes
        staged.release()
        return {"held": held - began, "aside": time.perf_counter() - held, "bytes": float(total)}

    def copied_to_file(self) -> Times:
        """The same bytes into a new mapped file in shared memory."""
        began = time.perf_counter()
        with self.beside.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, self.total_bytes)
            with mmap.mmap(file.fileno(), self.total_bytes) as mapped:
                np.copyto(np.frombuffer(mapped, dtype=np.uint8)[:], self.flat.numpy())
        took = time.perf_counter() - began
        self.beside.unlink()
        return {"s": took}

    def copied(self) -> Times:
        """The same bytes into memory that is used again."""
        began = time.perf_counter()
        self.kept.copy_(self.flat)
        return {"s": time.perf_counter() - began}

    def written_and_hashed(self) -> Times:
        """The way of one thread: tensor after tensor is cast, written to a file, and put into one SHA-256."""
        began = time.perf_counter()
        digest = hashlib.sha256()
        with self.beside.open("wb") as file:
            for tensor in self.tensors.values():
                data = tensor.to(torch.bfloat16).contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                digest.update(data)
        took = time.perf_counter() - began
        self.beside.unlink()
        return {"s": took}

    def publishing(self) -> Sides:
        return {
            "copy": self.copied, "copy to file": self.copied_to_file, "publish": self.publish,
            "write + sha256": self.written_and_hashed,
        }  # fmt: skip

    # --- fetch

    def fetched(self, actors: int, *, each: bool = False) -> Times:
        """Until every actor of this host has the version, verified.

        Args:
            each: every actor hashes it itself.
        """
        for note in Path(self.announced.shm_path or "").parent.glob(f"*{NOTE}"):
            note.unlink()
        fetchers = [
            WeightsFetcher(run=RUN, client=Local(self.store), listener=Silent(), settings=WeightsConfig())  # type: ignore[arg-type]
            for _ in range(actors)
        ]
        if each:
            for fetcher in fetchers:
                fetcher.forget(self.version)

        async def together() -> None:
            await asyncio.gather(*(fetcher.fetch(self.announced) for fetcher in fetchers))

        began = time.perf_counter()
        asyncio.run(together())
        took = time.perf_counter() - began
        hashed = sum(fetcher.hashed for fetcher in fetchers)
        for fetcher in fetchers:
            fetcher.close()
        return {"s": took, "hashed": float(hashed)}

    def fetching(self) -> Sides:
        return {
            "copy": self.copied,
            "1 actor": lambda: self.fetched(1),
            "3 actors": lambda: self.fetched(3),
            "3 actors, each for itself": lambda: self.fetched(3, each=True),
        }

    # --- load

    def loading(self) -> Sides:
        """A version from its mapped file into parameters in host memory."""
        manifest = self.store.answer(ManifestRequest(run=RUN, version=self.version))
        weights = WeightsFile(path=Path(self.announced.shm_path or ""), manifest=manifest)  # type: ignore[arg-type]
        model, check = Stacked(self.tensors), SpotCheck(1 << 25)

        def directly() -> Times:
            began = time.perf_counter()
            mapped = read(weights)
            places = placements(model, mapped)
            if uncovered(model, mapped, places):
                raise AssertionError("the model is made for these tensors")
            copy_all(places, mapped)
            loaded = time.perf_counter()
            if check.first_wrong(places, mapped) is not None:
                raise AssertionError("a copy went wrong")
            return {"s": time.perf_counter() - began, "load": loaded - began}

        def compared() -> Times:
            began = time.perf_counter()
            cloned = {name: tensor.clone() for name, tensor in read(weights).items()}
            places = placements(model, cloned)
            copy_all(places, cloned)
            if compare(places, cloned)[1]:
                raise AssertionError("a copy went wrong")
            return {"s": time.perf_counter() - began}

        return {"copy": self.copied, "load": directly, "clone + load + compare": compared}

    def close(self) -> None:
        self.store.close()
        self.beside.unlink(missing_ok=True)


class Local:
    """The learner's store without sockets between."""

    endpoint = "this process"

    def __init__(self, store: WeightsStore) -> None:
        self._store = store

    async def request(self, message: ActorToLearner, *, timeout_s: float) -> LearnerToActor:
        return self._store.answer(message)


class Silent:
    """Announces nothing: what is fetched is given."""

    async def next(self, *, timeout_s: float) -> None:
        return None
