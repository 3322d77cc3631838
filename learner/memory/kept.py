"""How large a forward pass may be, as this run has learned it from running out of memory: a file in the run's folder.

It holds as long as everything that it depends on is as it was: the device, and the settings below.  A user who changes
one of them by hand, the micro-batch above all, gets what the configuration says, and it is learned anew.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from atpo_async.config import Config
from atpo_async.run.files import write_atomic

FILE = "memory.json"

DEPENDS_ON = (
    "micro_batch_tokens",
    "gradient_checkpointing",
    "optimizer",
    "mixed_precision",
    "packing",
    "pack_tokens",
    "num_processes",
    "accelerate_config",
    "kernels",
    "compile",
    "lora",
)
"""Settings of the learner."""

LEARNED = {"micro_batch_tokens": 1, "checkpointed_layers": 0}
"""What is kept -> the least that it can be."""

log = logging.getLogger("atpo.learner")


class KeptFit:
    """Reads and writes what this run has learned of its memory.

    Args:
        file: None: nothing is kept.
    """

    def __init__(self, file: Path | None, config: Config, *, device: str) -> None:
        self._file = file
        learner = config.learner.model_dump(mode="json")
        self._depends_on = {
            "device": device,
            "model.path": config.model.path,
            **{f"learner.{name}": learner[name] for name in DEPENDS_ON if name in learner},
        }

    def read(self) -> dict[str, int]:
        """``micro_batch_tokens`` and ``checkpointed_layers``; empty where nothing was learned, or under other
        settings."""
        if self._file is None or not self._file.is_file():
            return {}
        try:
            said: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
            depended_on = dict(said["learned_with"])
            found = {name: _number(said, name, least) for name, least in LEARNED.items()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
            log.warning("%s is damaged (%s): the size of a pass that fits is learned anew", self._file, exc)
            return {}
        now = json.loads(json.dumps(self._depends_on))
        changed = [name for name in sorted({*now, *depended_on}) if now.get(name) != depended_on.get(name)]
        if changed:
            log.info("%s was learned with another %s: it no longer counts", self._file, ", ".join(changed))
            return {}
        return found

    def write(self, *, micro_batch_tokens: int, checkpointed_layers: int) -> None:
        """Keep it for later starts of this run.  A folder that refuses it is told, and no more: the run goes on."""
        if self._file is None:
            return
        found = {
            "micro_batch_tokens": micro_batch_tokens,
            "checkpointed_layers": checkpointed_layers,
            "learned_with": self._depends_on,
        }
        try:
            write_atomic(self._file, json.dumps(found, indent=2) + "\n")
        except OSError as exc:
            log.warning("%s cannot be written (%s): the next start learns it anew", self._file, exc.strerror or exc)


def _number(said: dict[str, Any], name: str, least: int) -> int:
    """Raises ValueError for anything but a whole number from ``least`` on, KeyError where there is none."""
    value = said[name]
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r:.50}, not a whole number from {least} on")
    return value
