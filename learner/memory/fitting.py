"""How large a forward pass may be, and how many layers are computed twice, so that a step fits into memory.

Both begin as they are configured, and only ever become smaller, after an out-of-memory error: first more layers are
computed twice, where that is left to the learner (``learner.gradient_checkpointing = "auto"``), then the micro-batch
is halved, down to the longest path of a tree.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from atpo_async.config import Config
from atpo_async.core.errors import OutOfMemory, SetupError
from atpo_async.ops import notices
from learner.memory.checkpointed_layers import checkpoint_first, checkpointed, layers_of
from learner.memory.kept import KeptFit
from learner.memory.out_of_memory import device_name, ways_out
from learner.policy.accelerator import is_sharded

log = logging.getLogger("atpo.learner")

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The size of a step's passes."""

    micro_batch_tokens: int
    """Padded tokens of a pass, at most; a longer path goes alone."""
    checkpointed_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The passes of a step that ran out of memory."""

    tokens: int
    """Padded, of the largest pass."""
    longest_path: int
    """Tokens of the longest path in them: no pass can be smaller than the one that holds it."""


def smaller(now: Fit, failed: Failed, *, layers: int) -> Fit | None:
    """What to try after ``failed`` ran out of memory with ``now``; None: nothing smaller is left.

    Args:
        layers: that may be computed twice; 0: the user has decided about that.
    """
    if now.checkpointed_layers < layers:
        more = (layers - now.checkpointed_layers + 1) // 2
        return dataclasses.replace(now, checkpointed_layers=now.checkpointed_layers + more)
    if failed.tokens <= failed.longest_path:
        return None
    # Of what failed: a limit that no pass has reached would change nothing.
    half = min(now.micro_batch_tokens, failed.tokens) // 2
    return dataclasses.replace(now, micro_batch_tokens=max(half, failed.longest_path))


class Fitting:
    """The present fit of this rank, equal on all ranks, and how it becomes smaller.

    Args:
        config: the run's.
        hf: the transformers model, whose layers may be computed twice.
        accelerator: of the ranks and the device.
        file: where what was learned is kept over restarts (``memory.kept``); None: nowhere.
        notify: told in one line whenever the fit becomes smaller.
    """

    def __init__(
        self,
        config: Config,
        *,
        hf: Any,
        accelerator: Accelerator,
        file: Path | None = None,
        notify: Notify = notices.post,
    ) -> None:
        self._config, self.hf, self._accelerator, self._notify = config, hf, accelerator, notify
        self._device = device_name(accelerator.device)
        self._kept = KeptFit(file, config, device=self._device)
        self.micro_batch_tokens = config.learner.micro_batch_tokens
        found = self._kept.read()
        self.is_kept = bool(found)
        if found:
            self.micro_batch_tokens = min(self.micro_batch_tokens, found["micro_batch_tokens"])
            if self.selects_layers:
                self.checkpoint(found["checkpointed_layers"])
            log.info(
                "passes of at most %d tokens, %d of %d layers computed twice: what fitted before this start",
                self.micro_batch_tokens,
                self.checkpointed_layers,
                len(layers_of(hf)),
            )

    @property
    def selects_layers(self) -> bool:
        """Whether how many layers are computed twice is left to the learner."""
        return self._config.learner.gradient_checkpointing == "auto"

    @property
    def checkpointed_layers(self) -> int:
        return checkpointed(self.hf)

    @property
    def now(self) -> Fit:
        return Fit(micro_batch_tokens=self.micro_batch_tokens, checkpointed_layers=self.checkpointed_layers)

    def checkpoint(self, count: int) -> None:
        """Let the first ``count`` layers be computed twice."""
        checkpoint_first(self.hf, count)

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "pack/micro_batch_tokens": self.micro_batch_tokens,
            "pack/checkpointed_layers": self.checkpointed_layers,
        }

    def make_smaller(self, failed: Failed, said: str) -> None:
        """After an out-of-memory error: less from now on, told in one line and kept over restarts.

        Args:
            failed: what ran out; nothing of it is held any more.
            said: the error's own words.

        Raises:
            SetupError: nothing smaller is left.
            OutOfMemory: other ranks are in the middle of a step that this one has left: all must start again.
        """
        clear_device_cache(garbage_collection=True)
        before = self.now
        after = smaller(before, failed, layers=len(layers_of(self.hf)) if self.selects_layers else 0)
        if after is None:
            raise SetupError(
                f"a path of {failed.longest_path} tokens does not fit into the memory of {self._device}, alone in its "
                f"pass: {said}; use {ways_out(self._config, of_a_pass=True)}"
            )
        self.micro_batch_tokens = after.micro_batch_tokens
        self._kept.write(micro_batch_tokens=after.micro_batch_tokens, checkpointed_layers=after.checkpointed_layers)
        line = (
            f"a pass of {failed.tokens} tokens ran out of the memory of {self._device}: {self._change(before, after)}"
        )
        if self._accelerator.num_processes > 1 or is_sharded(self._accelerator):
            raise OutOfMemory(f"{line}; all ranks start again with it, from the last checkpoint")
        if self.selects_layers:
            self.checkpoint(after.checkpointed_layers)
        self._notify(f"{line} ({said})")

    def _change(self, before: Fit, after: Fit) -> str:
        if after.checkpointed_layers != before.checkpointed_layers:
            return (
                f"{after.checkpointed_layers} layers are computed twice from here on, it was "
                f"{before.checkpointed_layers} of {len(layers_of(self.hf))} (learner.gradient_checkpointing = 'auto')"
            )
        return (
            f"passes hold at most {after.micro_batch_tokens} tokens from here on, it was {before.micro_batch_tokens} "
            f"(learner.micro_batch_tokens = {self._config.learner.micro_batch_tokens}; set it lower, or --learner."
            "gradient_checkpointing auto, to begin with what fits)"
        )
