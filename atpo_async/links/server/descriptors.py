"""How many connections this process may hold: each takes a file descriptor."""

from __future__ import annotations

import logging

log = logging.getLogger("atpo.links")

OTHERS = 256
"""Descriptors of a role besides its clients: its journal, logs, libraries."""


def raise_limit(needed: int) -> int:
    """Raise the process's limit of open files to what the system lets it have, and return for how many clients it
    leaves space.

    Args:
        needed: clients that a server would take; fewer are logged, with the way out.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return needed
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and soft != resource.RLIM_INFINITY:
        wanted = needed + OTHERS if hard == resource.RLIM_INFINITY else min(hard, max(soft, needed + OTHERS))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        except (ValueError, OSError) as exc:
            log.warning("the limit of open files stays at %d: %s", soft, exc)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed + OTHERS:
        return needed
    space = max(soft - OTHERS, soft // 2, 1)
    log.info("at most %d clients may connect: this process may open %d files (ulimit -n)", space, soft)
    return space
