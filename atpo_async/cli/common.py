"""Shared by all commands: exit codes, the parsed command line, the demo's configuration."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atpo_async.core.errors import ConfigError

EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED = 0, 1, 2, 130

OPTIONS_NOTE = (
    "Every field of the configuration is also an option: --learner.lr 1e-5, --staleness.max_lag=0.  "
    "`atpo config CONFIG` lists them with their values."
)
LAYERS = "several are laid over one another, later ones over earlier ones"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One command as the user wrote it."""

    command: str
    args: argparse.Namespace
    options: Mapping[str, str]
    """Dotted path -> text."""
    words: Sequence[str]
    """All of the command line, ``--debug`` apart."""
    debug: bool

    @property
    def again(self) -> str:
        """The same command as one types it, for a hint."""
        return command_line(self.words)


def command_line(words: Sequence[str]) -> str:
    """Words as one command line, quoted for a shell."""
    return shlex.join(["atpo", *words])


def note(line: str) -> None:
    """Print one line that the user should know to stderr."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def demo_config(name: str = "demo") -> Path:
    """``configs/<name>.toml`` of the checkout or of the working folder.  Raises ConfigError."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        path = root / "configs" / f"{name}.toml"
        if path.is_file():
            with contextlib.suppress(ValueError):
                return path.relative_to(Path.cwd())
            return path
    raise ConfigError(
        f"configs/{name}.toml is not here: run `atpo demo` in a checkout, or name a file: atpo demo CONFIG"
    )
