"""Tensors straight into parameters: what goes where, when that is as good as vLLM's own reload, and what is checked."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actors.engines.base import WeightsFile
from actors.engines.common import direct
from actors.engines.common.direct import SpotCheck, compare, copy_all, placements, uncovered
from actors.engines.vllm.loading import load, read_ahead
from actors.engines.vllm.plugin import LOAD, READ, READ_MARK, UNTOUCHED
from atpo_async.core.errors import WeightsRejected
from tests.engine_support import tiny_model, weights_file

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

WIDTH, VOCABULARY, PADDED = 8, 20, 24


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(WIDTH, 16 + 4 + 4)
        self.o_proj = nn.Linear(16, WIDTH, bias=False)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(WIDTH, 2 * 12, bias=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()
        self.norm = nn.RMSNorm(WIDTH)


class Stacked(nn.Module):
    """As vLLM holds a model: stacks, a padded vocabulary, one tied head."""

    packed_modules_mapping = {  # noqa: RUF012  (as vLLM has it)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(PADDED, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()


def published() -> dict[str, Tensor]:
    """In a file's names and shapes; the head lies where the embeddings do."""
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    found = {"embed.weight": drawn(VOCABULARY, WIDTH)}
    for i in range(2):
        for part, rows in (("q", 16), ("k", 4), ("v", 4)):
            found[f"layers.{i}.self_attn.{part}_proj.weight"] = drawn(rows, WIDTH)
            found[f"layers.{i}.self_attn.{part}_proj.bias"] = drawn(rows)
        found[f"layers.{i}.self_attn.o_proj.weight"] = drawn(WIDTH, 16)
        for part in ("gate", "up"):
            found[f"layers.{i}.mlp.{part}_proj.weight"] = drawn(12, WIDTH)
        found[f"layers.{i}.norm.weight"] = drawn(WIDTH)
    return {**found, "lm_head.weight": found["embed.weight"]}


def test_every_tensor_lands_in_its_rows_of_a_stack_and_padding_stays() -> None:
    model, tensors = Stacked(), published()
    places = placements(model, tensors)
    assert uncovered(model, tensors, places) == []
    copy_all(places, tensors)
    attention: Any = model.layers[1].self_attn
    assert torch.equal(
        attention.qkv_proj.weight, torch.cat([tensors[f"layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
    )
    assert torch.equal(model.embed.weight[:VOCABULARY], tensors["embed.weight"])
    assert not model.embed.weight[VOCABULARY:].any()
    assert compare(places, tensors) == ({name for name, _ in model.named_parameters()}, set())


def test_what_has_no_place_of_its_own_is_named() -> None:
    model, tensors = Stacked(), published()
    del tensors["layers.0.self_attn.k_proj.weight"]
    left = uncovered(model, tensors, placements(model, tensors))
    assert left[0] == "layers.0.self_attn.qkv_proj.weight"
    assert "layers.0.self_attn.q_proj.weight" in left
    packed = published() | {"layers.1.self_attn.o_proj.weight": torch.zeros(WIDTH, 17)}
    assert uncovered(model, packed, placements(model, packed))[0] == "layers.1.self_attn.o_proj.weight"
    untied = published() | {"lm_head.weight": torch.zeros(VOCABULARY, WIDTH)}
    assert uncovered(model, untied, placements(model, untied)) == ["lm_head.weight"]


def test_a_parameter_that_was_not_taken_up_is_found_within_a_round_of_spot_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct, "PART_ELEMENTS", 4 * WIDTH)
    model, tensors = Stacked(), published()
    places = placements(model, tensors)
    copy_all(places, tensors)
    check = SpotCheck(100)
    parts = sum(sum(1 for _ in place.rows(tensors)) for place in places)
    assert parts > len(places)
    assert [check.first_wrong(places, tensors) for _ in range(parts)] == [None] * parts
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter[VOCABULARY - 1 if "embed" in name else -1].add_(1.0)
        found = {check.first_wrong(places, tensors) for _ in range(parts)}
        assert found == {None, name}
        with torch.no_grad():
            parameter.copy_(before)


# --- inside vLLM's worker


@needs_vllm
def test_a_copy_replaces_the_reload_only_after_a_reload_has_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.engines.vllm import inside

    engine = worker(monkeypatch)
    said = []
    for _ in range(3):
        take(engine, published())
        said.append(engine._why_layerwise)
    assert said == ["embed.weight was not yet seen to be equal to a file", None, None]
    take(engine, published(), directly=False)
    assert engine._why_layerwise == "the weights before were refused"
    monkeypatch.setattr(inside, "derives", lambda model: "experts has FusedMoEMethod")
    take(engine, published())
    assert engine._why_layerwise == "experts has FusedMoEMethod"


@needs_vllm
def test_a_parameter_that_a_direct_load_left_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.engines.vllm import inside

    engine = worker(monkeypatch)
    take(engine, published())
    other = {name: tensor + 1 for name, tensor in published().items() if name != "lm_head.weight"}
    monkeypatch.setattr(inside, "copy_all", lambda places, tensors: copy_all(places[1:], tensors))
    with pytest.raises(ValueError, match=r"not all was taken up: embed.weight"):
        take(engine, other)
    take(engine, other)
    assert engine._why_layerwise is not None  # all are compared again first


def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our transfer engine around a model that needs no vLLM, whose reload is a copy."""
    from actors.engines.vllm import inside

    engine = inside.FileWeightTransferEngine.__new__(inside.FileWeightTransferEngine)
    monkeypatch.setattr(
        inside.FileWeightTransferEngine.__mro__[1], "__init__", lambda self, model: setattr(self, "model", model)
    )
    engine.__init__(Stacked())  # type: ignore[misc]
    monkeypatch.setattr(inside, "derives", lambda model: None)
    monkeypatch.setattr(engine, "_reload", lambda tensors: copy_all(placements(engine.model, tensors), tensors))
    return engine


def take(engine: Any, tensors: dict[str, Tensor], *, directly: bool = True) -> None:
    class Given:
        def tensors(self, info: object) -> dict[str, Tensor]:
            return tensors

    engine._reader = Given()
    engine.start_weight_update()
    engine.receive_weights(update(directly=directly))
    engine.finish_weight_update()


def update(path: Path = Path("v1.bin"), size: int = 8, *, directly: bool = True) -> Any:
    from actors.engines.vllm.payload import FileUpdateInfo

    return FileUpdateInfo(
        path=str(path), total_bytes=size, names=["w"], dtypes=["float32"], shapes=[[2]], offsets=[0], nbytes=[8],
        directly=directly,
    )  # fmt: skip


@needs_vllm
@pytest.mark.parametrize("pinned", [True, False])
def test_a_file_that_was_read_ahead_is_what_is_loaded_and_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    from actors.engines.vllm import payload

    monkeypatch.setattr(payload, "pinned", lambda size: torch.empty(size, dtype=torch.uint8) if pinned else None)
    monkeypatch.setattr(payload, "READ_BYTES", 3)
    reader = payload.Reader()
    for number in (1.0, 2.0):
        path = tmp_path / f"v{number}.bin"
        path.write_bytes(torch.full((2,), number).numpy().tobytes())
        reader.read_ahead(update(path))
        found = reader.tensors(update(path))["w"]
        assert found.tolist() == [number, number]
        assert path.with_name(path.name + READ_MARK).exists()
        if pinned:
            path.write_bytes(bytes(8))  # it is not read again
            assert found.tolist() == [number, number]
    with pytest.raises(ValueError, match="has 8 bytes, expected 9"):
        reader.read_ahead(update(path, size=9))
    reader.close()


@needs_vllm
def test_a_file_that_ends_early_while_it_is_read_is_named_by_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.engines.vllm import payload

    path = tmp_path / "v1.bin"

    def shortened(size: int) -> torch.Tensor:
        path.write_bytes(bytes(5))
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(payload, "pinned", shortened)
    path.write_bytes(bytes(8))
    reader = payload.Reader()
    reader.read_ahead(update(path))
    with pytest.raises(OSError, match="the file ends at 5, 3 bytes early"):
        reader.tensors(update(path))
    assert path.with_name(path.name + READ_MARK).exists()
    reader.close()


# --- the actor's side


class Worker:
    """vLLM's front end: notes what it is asked, and reads files as a worker does."""

    def __init__(self, *, fails: bool = False) -> None:
        self.asked: list[str] = []
        self.fails = fails
        self.may_read = threading.Event()

    async def start_weight_update(self) -> None:
        self.asked.append("start")

    async def update_weights(self, request: Any) -> None:
        self.asked.append(request.update_info["stage"])
        if self.fails:
            raise RuntimeError(f"worker: {UNTOUCHED} the file is short")
        if request.update_info["stage"] == READ:
            threading.Thread(target=self._read, args=(request.update_info["path"],)).start()

    def _read(self, path: str) -> None:
        self.may_read.wait(60)
        Path(path + READ_MARK).touch()

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.asked.append(f"version {weight_version}")


@pytest.fixture
def weights(tmp_path: Path) -> WeightsFile:
    return weights_file(tiny_model(0), tmp_path / "v3.bin", version=3)


@needs_vllm
async def test_generation_may_be_paused_once_the_worker_has_read_the_file(weights: WeightsFile) -> None:
    llm = Worker()
    reading = asyncio.create_task(read_ahead(llm, weights))
    while llm.asked != ["start", READ]:  # noqa: ASYNC110  (what runs is the other task alone)
        await asyncio.sleep(0)
    assert not reading.done()
    llm.may_read.set()
    await reading
    await load(llm, weights, tensor_parallel_size=1, was_read=True)
    assert llm.asked == ["start", READ, LOAD, "version 3"]
    assert [path.name for path in weights.path.parent.iterdir()] == ["v3.bin"]


@needs_vllm
async def test_a_file_that_cannot_be_read_ahead_is_refused_before_any_pause(weights: WeightsFile) -> None:
    with pytest.raises(WeightsRejected, match="version 3: the file is short"):
        await read_ahead(Worker(fails=True), weights)
