"""Facts that the parts of a role publish about themselves; the role's status snapshots carry them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

LINKS = "link."
"""Prefix of the name under which a link publishes its facts; ``StatusSnapshot.links`` has the name without it."""

Facts = Callable[[], Mapping[str, Any]]

_published: dict[str, Facts | weakref.WeakMethod[Facts]] = {}


def publish_facts(name: str, facts: Facts) -> None:
    """Add ``facts()``, a flat mapping, to this role's snapshot under ``name``; the newest of a name holds.

    ``facts`` is called in the event loop about once a second and must not block.  A bound method is held weakly: it is
    withdrawn when its object goes.  Links use names that begin with ``LINKS``.
    """
    _published[name] = weakref.WeakMethod(facts) if hasattr(facts, "__self__") else facts


def withdraw_facts(name: str) -> None:
    _published.pop(name, None)


def published_facts() -> dict[str, dict[str, Any]]:
    """Name -> the facts that are published under it now; for a part that fails, its error."""
    said: dict[str, dict[str, Any]] = {}
    for name, held in list(_published.items()):
        facts = held() if isinstance(held, weakref.WeakMethod) else held
        if facts is None:
            _published.pop(name, None)
            continue
        try:
            said[name] = dict(facts())
        # A fault of one part must not cost the whole snapshot.
        except Exception as exc:
            said[name] = {"error": f"{type(exc).__name__}: {exc}"}
    return said
