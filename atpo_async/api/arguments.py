"""Checks what a program passes to ``train``, ``load``, ``evaluate`` and ``open_run``: a wrong kind is one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atpo_async.config import Config
from atpo_async.core.errors import ConfigError

LONGEST = 60
"""Characters of a value that an error message shows."""


def files_or_config(given: Any, *, call: str) -> Config | list[Path]:
    """What a program passed as a configuration to ``call``.

    Raises ConfigError where it is none.  An empty list is refused, because a search for files that found none would
    else train with the defaults; the empty tuple stands for the defaults.
    """
    if isinstance(given, Config):
        return given
    if isinstance(given, str | Path):
        return [Path(given)]
    takes = f"{call}() takes a Config, a path or a list of paths"
    if isinstance(given, Mapping):
        raise ConfigError(
            f"{takes}, got {shown(given)}; values go on top by section: {call}('a.toml', run={{'steps': 20}})"
        )
    if isinstance(given, bytes | bytearray) or not isinstance(given, Sequence | Iterator):
        raise ConfigError(f"{takes}, got {shown(given)}")
    paths = list(given)
    wrong = next((item for item in paths if not isinstance(item, str | Path)), None)
    if wrong is not None or None in paths:
        raise ConfigError(f"{takes}, got a list that holds {shown(wrong)}")
    if not paths and given != ():
        raise ConfigError(f"{takes}, got a list without any; leave it out for the defaults")
    return [Path(path) for path in paths]


def path_of(given: Any, *, call: str, takes: str) -> Path:
    """A path that a program passed to ``call``.  Raises ConfigError, with ``takes`` in it, where it is none."""
    if isinstance(given, str | Path):
        return Path(given)
    raise ConfigError(f"{call}() takes {takes}, got {shown(given)}")


def switch(given: Any, *, call: str, name: str, meaning: str) -> bool:
    """A ``True`` or ``False`` that a program passed to ``call`` by ``name``.  Raises ConfigError for anything else."""
    if isinstance(given, bool):
        return given
    raise ConfigError(f"{call}({name}=…) takes True or False, got {shown(given)}; {meaning}")


def begin_from_text(given: Any) -> str | None:
    """``RUN`` or ``RUN:STEP`` of ``train(begin_from=…)``, or None.  Raises ConfigError for anything else."""
    if given is None:
        return None
    if isinstance(given, str | Path):
        return str(given)
    raise ConfigError(f"train(begin_from=…) takes 'RUN' or 'RUN:STEP', as in 'runs/echo:20', got {shown(given)}")


def shown(value: Any) -> str:
    """A value and its kind, for an error message: short, on one line."""
    if value is None:
        return "None"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}"
