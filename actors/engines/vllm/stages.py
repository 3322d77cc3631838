"""What vLLM is at while it starts, found in its own log records and passed on to the actor.

vLLM logs its stages in the engine's processes, below the level that users see.  A handler there, attached by our
plugin, writes each new stage into a file that the actor made and reads (``STAGES_VARIABLE``); nothing more is printed.
vLLM is not imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from atpo_async.run.scratch import PREFIX, Scratch
from atpo_async.run.tail import Tail

STAGES_VARIABLE = "ATPO_VLLM_STAGES"
"""Environment variable: the file; inherited by the engine's processes."""

POLL_S = 0.25

IMPORTING = "importing vLLM"
PROCESSES = "starting its processes"
DEVICE = "setting up its device"
WEIGHTS = "loading the model"
COMPILING = "compiling the model"
COMPILED = "taking the compiled model from the cache"
MEMORY = "measuring its memory"
CACHE = "setting up its cache of keys and values"
GRAPHS = "capturing CUDA graphs"
WARMING_UP = "warming up"

_SAID = (
    ("Initializing a V1 LLM engine", DEVICE),
    ("Starting to load model", WEIGHTS),
    ("Loading model from scratch", WEIGHTS),
    ("Model loading took", MEMORY),
    ("Starting torch.compile", COMPILING),
    ("Dynamo bytecode transform time", COMPILING),
    ("Compiling a graph for", COMPILING),
    ("Cache the graph of compile range", COMPILING),
    ("Directly load the compiled graph", COMPILED),
    ("Directly load AOT compilation", COMPILED),
    ("torch.compile took", MEMORY),
    ("torch.compile and initial profiling", MEMORY),
    ("Initial profiling/warmup run took", MEMORY),
    ("Profiling CUDA graph memory", MEMORY),
    ("Available KV cache memory", CACHE),
    ("KV cache size", CACHE),
    ("Compile and warming up model for size", WARMING_UP),
    ("Warming up model for the compilation", WARMING_UP),
    ("for CUDA graph capture", GRAPHS),
    ("CG Capture: mode=", GRAPHS),
    ("Graph capturing finished", WARMING_UP),
    ("init engine (profile", WARMING_UP),
)
"""Part of a record's text, as vLLM 0.32 writes it -> the stage that it is at from there on."""

_DEBUG_LOGGERS = ("vllm.v1.worker.gpu.cudagraph_utils",)
"""Say which graph they capture at level DEBUG only."""


def stage_of(message: str) -> str | None:
    """The stage that begins, or goes on, with a record of this text; None where it tells nothing."""
    return next((stage for part, stage in _SAID if part in message), None)


class StageHandler(logging.Handler):
    """Writes each new stage, a line each, into a file that is there.

    Args:
        file: where to.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(logging.DEBUG)
        self._file = file
        self._last = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Never raises, and never makes the file: when it is gone, the start is over."""
        with contextlib.suppress(Exception):
            stage = stage_of(record.getMessage())
            if stage is None or stage == self._last:
                return
            self._last = stage
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(descriptor, f"{stage}\n".encode())
            finally:
                os.close(descriptor)


def attach(logger: logging.Logger | None = None) -> StageHandler | None:
    """Attach a handler to vLLM's logger, in a process of its engine; None where there is no file, or records would be
    printed by loggers above it.

    The logger lets INFO records pass from then on; its other handlers print no more than before.
    """
    file = os.environ.get(STAGES_VARIABLE)
    logger = logger or logging.getLogger("vllm")
    attached = any(isinstance(handler, StageHandler) for handler in logger.handlers)
    if not file or attached or logger.propagate:
        return None
    before = logger.getEffectiveLevel()
    for other in logger.handlers:
        other.setLevel(max(other.level, before))
    handler = StageHandler(Path(file))
    logger.addHandler(handler)
    logger.setLevel(min(before, logging.INFO))
    for name in _DEBUG_LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    return handler


class Stages:
    """Reads the stages of one start.  Use as an async context.

    Args:
        tell: called with each new stage.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._last = ""
        self._following: asyncio.Task[None] | None = None
        self._scratch: Scratch | None = None
        self.file = Path(os.devnull)
        with contextlib.suppress(OSError):  # a start that tells no stages is a start
            self._scratch = Scratch(Path(tempfile.gettempdir()), f"{PREFIX}stages-")
            self.file = self._scratch.path / "stages"
            self.file.touch()
        self._tail = Tail(self.file)

    async def __aenter__(self) -> Self:
        self._following = asyncio.create_task(self._follow(), name="stages of the engine's start")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
        self.read()
        if self._scratch is not None:
            self._scratch.remove()

    def at(self, stage: str) -> None:
        """A stage that this process itself is at."""
        if stage != self._last:
            self._last = stage
            self._tell(stage)

    def read(self) -> None:
        """Tell what has been written since it was last read."""
        for line in self._tail.new():
            self.at(line.decode(errors="replace").strip())

    async def _follow(self) -> None:
        """Waits for: the clock."""
        while True:
            await asyncio.sleep(POLL_S)
            self.read()
