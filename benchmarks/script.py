"""What the benchmarks of the buffer take on the command line, and how they state what they measured, and where."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BYTES = "of a turn's arrays"


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark of the buffer takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="where journals go; a folder on the disk to measure")
    parser.add_argument("--profile", type=Path, default=None, help="folder for profiles of the buffer process")
    parser.add_argument("--markdown", action="store_true", help="tables at the end")
    return parser


def add_peers(parser: argparse.ArgumentParser) -> None:
    """What a comparison with other buffers takes besides."""
    parser.add_argument("--no-sync", action="store_true", help="buffer.journal_sync = false")
    parser.add_argument("--peers", type=Path, default=None, help="folder for the peers' environments")


def machine() -> dict[str, Any]:
    """Where it was measured."""
    model = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "system": platform.release(),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers with separators."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)])


def say(record: dict[str, Any]) -> None:
    """One JSON object a line, at once: a run that is cut short has told what it had."""
    print(json.dumps(record), flush=True)


@contextlib.contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A folder for run folders, gone at the end.  It must be on a real disk: that is what is measured."""
    with tempfile.TemporaryDirectory(prefix="atpo-bench-", dir=parent) as name:
        yield Path(name)
