"""What vLLM is at while it starts, and the variables that its processes are started with."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import pytest

from actors.engines.base import EngineSettings
from actors.engines.vllm import stages
from actors.engines.vllm.engine import _at_stage
from actors.engines.vllm.starting import variables
from atpo_async.status import waits

SETTINGS = EngineSettings(model=Path("model"), max_model_len=64)


@pytest.mark.parametrize(
    ("message", "stage"),
    [
        ("Initializing a V1 LLM engine (v0.32.0) with config: model='m'", stages.DEVICE),
        ("Starting to load model m...", stages.WEIGHTS),
        ("Loading model from scratch...", stages.WEIGHTS),
        ("Model loading took 1.12 GiB memory and 3.500000 seconds", stages.MEMORY),
        ("[backbone] Starting torch.compile", stages.COMPILING),
        ("Dynamo bytecode transform time: 4.20 s", stages.COMPILING),
        ("Compiling a graph for compile range (1, 8192) takes 9.00 s", stages.COMPILING),
        ("Directly load the compiled graph(s) for compile range (1, 8192) from the cache, took 0.5 s", stages.COMPILED),
        ("Directly load AOT compilation from path /c/model", stages.COMPILED),
        ("torch.compile took 21.00 s in total", stages.MEMORY),
        ("torch.compile and initial profiling/warmup run together took 21.00 s in total", stages.MEMORY),
        ("Available KV cache memory: 60.1 GiB", stages.CACHE),
        ("GPU KV cache size: 580,000 tokens, Maximum concurrency for 4,096 tokens per request: 141.6x", stages.CACHE),
        ("Compile and warming up model for size 8192", stages.WARMING_UP),
        ("Rank 0: Torch profiler disabled for CUDA graph capture", stages.GRAPHS),
        ("CG Capture: mode=FULL, batch_desc=d", stages.GRAPHS),
        ("Graph capturing finished in 7 secs, took 0.60 GiB", stages.WARMING_UP),
        ("init engine (profile, create kv cache, warmup model) took 40.00 s", stages.WARMING_UP),
        ("Using Flash Attention backend.", None),
        ("", None),
    ],
)
def test_each_stage_is_known_by_what_vllm_says_of_it(message: str, stage: str | None) -> None:
    assert stages.stage_of(message) == stage


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_the_installed_vllm_says_every_text_that_a_stage_is_known_by() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    files = [
        "v1/engine/core.py", "v1/worker/gpu_model_runner.py", "v1/worker/gpu_worker.py",
        "v1/worker/gpu/model_runner.py", "v1/worker/gpu/cudagraph_utils.py", "v1/worker/cpu_model_runner.py",
        "v1/core/kv_cache_utils.py", "compilation/backends.py", "compilation/monitor.py", "compilation/decorators.py",
    ]  # fmt: skip
    text = "\n".join((folder / file).read_text(encoding="utf-8") for file in files)
    assert [part for part, _ in stages._SAID if part not in text] == []


@pytest.fixture
def vllm_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """As vLLM sets it up: a level, a handler of that level, and nothing above it."""
    monkeypatch.setenv(stages.STAGES_VARIABLE, str(tmp_path / "stages"))
    logger = logging.Logger("vllm-of-a-test", logging.ERROR)
    logger.propagate = False
    return logger


class Printed(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.mark.parametrize("level", [logging.ERROR, logging.NOTSET])
def test_stages_are_written_once_each_and_nothing_more_is_printed(
    vllm_logger: logging.Logger, tmp_path: Path, level: int
) -> None:
    (file := tmp_path / "stages").touch()
    vllm_logger.addHandler(printed := Printed(level))
    assert stages.attach(vllm_logger) is not None
    assert stages.attach(vllm_logger) is None  # plugins are loaded more than once
    for text in ("Starting to load model m...", "a word", "Loading model from scratch...", "torch.compile took 1.0 s"):
        vllm_logger.info(text)
    vllm_logger.error("a failure")
    assert file.read_text().splitlines() == [stages.WEIGHTS, stages.MEMORY]
    assert printed.texts == ["a failure"]
    file.unlink()
    vllm_logger.info("Starting torch.compile")
    assert not file.exists()  # the start is over


def test_a_logger_whose_records_go_to_others_is_left_alone(vllm_logger: logging.Logger) -> None:
    vllm_logger.propagate = True
    assert stages.attach(vllm_logger) is None
    assert vllm_logger.level == logging.ERROR


def test_without_the_variable_nothing_is_attached(vllm_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stages.STAGES_VARIABLE)
    assert stages.attach(vllm_logger) is None
    assert vllm_logger.handlers == []


async def test_the_actor_hears_of_each_stage_and_leaves_nothing_behind() -> None:
    told: list[str] = []
    async with stages.Stages(told.append) as start:
        start.at(stages.IMPORTING)
        start.file.write_text(f"{stages.WEIGHTS}\n{stages.WEIGHTS}\n{stages.COMPILING}\ncut off")
        start.read()
    assert told == [stages.IMPORTING, stages.WEIGHTS, stages.COMPILING]
    assert not start.file.parent.exists()


async def test_a_start_that_can_tell_no_stages_is_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engines.vllm.stages.Scratch", lambda *_: (_ for _ in ()).throw(OSError("full")))
    async with stages.Stages(lambda stage: None) as start:
        start.at(stages.IMPORTING)
        assert start.file == Path(os.devnull)


def test_a_stage_is_a_phase_of_the_start_so_that_it_counts_as_progress() -> None:
    _at_stage(stages.COMPILING)
    first = waits.current_phase()
    _at_stage(stages.COMPILING)
    assert waits.current_phase() is first
    _at_stage(stages.GRAPHS)
    now = waits.current_phase()
    assert (now.what, now.starting) == ("loading its engine: capturing CUDA graphs", True)
    assert now.since >= first.since


@pytest.mark.parametrize(
    ("device", "installed", "asked", "said"),
    [
        ("cuda", False, None, "0"),
        ("cuda:1", False, "1", "1"),
        ("cuda", True, None, None),
        ("cpu", False, None, None),
    ],
)
def test_flashinfers_sampler_is_off_where_the_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: bool, asked: str | None, said: str | None
) -> None:
    monkeypatch.setattr(
        "actors.engines.vllm.starting.importlib.util.find_spec", lambda name: object() if installed else None
    )
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    if asked is not None:
        monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", asked)
    assert variables(SETTINGS, device).get("VLLM_USE_FLASHINFER_SAMPLER") == said
