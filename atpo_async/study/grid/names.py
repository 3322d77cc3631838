"""The names of axes, and what a value of one is called in a folder's name and by a reader.  Pure."""

from __future__ import annotations

import hashlib
import re

LAG, CORRECTION, RECIPE, CONFIG, TASK = "lag", "correction", "recipe", "config", "task"
NAMED = (LAG, CORRECTION, RECIPE, CONFIG, TASK)
FILES = (TASK, CONFIG, RECIPE)
"""Axes whose values are files, in the order in which these are laid over one another."""

LONGEST_NAME = 40


def slug(axis: str, value: str) -> str:
    """Part of the name of a cell's folder: always the same for a value, and another one for another."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", value)
    if axis in (CORRECTION, *FILES):
        return plain
    if axis == LAG:
        return f"lag{plain}"
    if plain != value or len(plain) > LONGEST_NAME:
        plain = f"{plain[:LONGEST_NAME].strip('-') or 'value'}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"
    return f"{axis}-{plain}"


def label(axis: str, value: str) -> str:
    """As a reader calls a value of an axis."""
    return value if axis in (CORRECTION, *FILES) else f"{axis} {value}"
