"""Loading a configuration in a program: TOML files, with the program's own values on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atpo_async.api import arguments
from atpo_async.config import Config, resolved


def load(files: Path | str | Sequence[Path | str] = (), **values: Any) -> Config:
    """The configuration of TOML files, with a program's own values on top.

    Args:
        files: one or several, later ones over earlier ones; none: the defaults.
        values: by section (``learner={"lr": 1e-5}``) or by dotted path (``**{"learner.lr": 1e-5}``).

    Raises ConfigError with one line a fault: its path, its value, the way out.
    """
    return resolved(arguments.files_or_config(files, call="load"), values)
