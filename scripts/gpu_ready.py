"""Whether this Python can run the tests that need a GPU (make test-gpu): names what is missing, and ends with 1."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_TESTS = ("pytest", "pytest-asyncio", "hypothesis")
WANTED = {
    "vllm": "the tests of the real engine are skipped",
    "pytest-timeout": "a test that hangs is not ended",
    "liger-kernel": "the tests of the fused kernels are skipped",
    "torchao": "the tests of moments in 8 bits are skipped",
}
"""Distribution -> what happens without it."""


def needed() -> list[str]:
    """The distributions that the project and its tests import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [re.split(r"[\s<>=!~;\[]", line)[0] for line in project["dependencies"]] + list(OF_TESTS)


def is_here(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def complaints(found: Callable[[str], bool] = is_here) -> tuple[list[str], str | None]:
    """What will be skipped, a line each; and what is missing, with the way out, if anything is."""
    skipped = [f"{name} is not installed: {what}" for name, what in WANTED.items() if not found(name)]
    absent = [name for name in needed() if not found(name)]
    if not absent:
        return skipped, None
    return skipped, (
        f"error: {sys.executable} lacks {', '.join(absent)}, which the tests need; pip install {' '.join(absent)}, or "
        "name another Python: make test-gpu PYTHON=/path/to/python3"
    )


def main() -> int:
    skipped, missing = complaints()
    for line in [*skipped, *([missing] if missing else [])]:
        print(line, file=sys.stderr)
    return int(missing is not None)


if __name__ == "__main__":
    sys.exit(main())
