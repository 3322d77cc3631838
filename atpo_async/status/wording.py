"""Status snapshots, waits, facts and durations as lines of text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atpo_async.status.snapshot import StatusSnapshot, Wait


def status_lines(status: StatusSnapshot) -> list[str]:
    """A snapshot in lines, the first one for the role itself."""
    loop = "no event loop yet" if status.loop_age_s is None else f"loop ticked {duration(status.loop_age_s)} ago"
    told = [f"{status.role} (process {status.pid}): {status.phase} for {duration(status.phase_s)}, {loop}"]
    if status.progress:
        done = ", ".join(f"{count} {name}" for name, count in status.progress.items())
        told.append(f"  done: {done}; the last {duration(status.still_s)} ago")
    told += [f"  waits: {wait_line(wait)}" for wait in status.waits]
    told += [f"  link {name}: {flat(facts)}" for name, facts in status.links.items()]
    told += [f"  {name}: {flat(facts)}" for name, facts in status.facts.items()]
    if status.stack:
        told += ["  the loop stands still in:", *(f"    {line}" for line in status.stack)]
    return told


def wait_line(wait: Wait) -> str:
    on = f" from {wait.on}" if wait.on else ""
    limit = f", {wait.limit_s:g} s at most" if wait.limit_s is not None else ""
    more = f", and {wait.count - 1} more" if wait.count > 1 else ""
    return f"{wait.who} for {wait.what}{on}, {duration(wait.since_s)}{limit}{more}"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


MOST_FACTS, MOST_PARTS = 24, 8
"""Of a mapping, and of a list, in one line; of the others their number."""


def flat(facts: Mapping[str, Any]) -> str:
    """Facts in one line."""
    said = [f"{name} {_word(value)}" for name, value in list(facts.items())[:MOST_FACTS]]
    return ", ".join(said + _more(len(facts) - MOST_FACTS))


def _more(number: int) -> list[str]:
    return [f"and {number} more"] if number > 0 else []


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, Mapping):
        return "{" + flat(value) + "}"
    if isinstance(value, list | tuple):
        return "[" + "; ".join([_word(part) for part in value[:MOST_PARTS]] + _more(len(value) - MOST_PARTS)) + "]"
    return str(value)
