"""Reads a tool's docstring: the first paragraph describes the tool; a list in Google or numpy style, its arguments."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

SECTIONS = ("args", "arguments", "parameters", "params")
_HEADING = re.compile(r"(\w[\w ]*):?")
_GOOGLE = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_NUMPY = re.compile(r"\*{0,2}(\w+)\s*(?::.*)?")


class Described(NamedTuple):
    summary: str
    """On one line; empty without a docstring."""
    arguments: dict[str, str]
    """Name -> description, on one line."""


def described(function: object) -> Described:
    """What the docstring of ``function`` says."""
    lines = (inspect.getdoc(function) or "").splitlines()
    summary: list[str] = []
    for line in lines:
        if not line.strip() or _section(line) is not None:
            break
        summary.append(line.strip())
    return Described(" ".join(summary), _arguments(lines))


def _section(line: str) -> str | None:
    """The name of a section of arguments, in lower case."""
    found = _HEADING.fullmatch(line.strip())
    name = found[1].lower() if found else ""
    return name if name in SECTIONS else None


def _arguments(lines: list[str]) -> dict[str, str]:
    start = next((i for i, line in enumerate(lines) if _section(line)), None)
    if start is None:
        return {}
    numpy_style = start + 1 < len(lines) and set(lines[start + 1].strip()) == {"-"}
    body = lines[start + 1 + numpy_style :]
    base = _indent(lines[start])
    found: dict[str, list[str]] = {}
    first: int | None = None
    for line in body:
        if not line.strip():
            continue
        indent = _indent(line)
        if indent < base or (indent == base and not numpy_style):
            break
        first = indent if first is None else first
        match = (_NUMPY if numpy_style else _GOOGLE).fullmatch(line.strip()) if indent == first else None
        if match:
            found[match[1]] = [] if numpy_style else [match[2]]
        elif indent <= first:
            break  # the next section
        elif found:
            next(reversed(found.values())).append(line.strip())
    return {name: " ".join(text).strip() for name, text in found.items()}


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
