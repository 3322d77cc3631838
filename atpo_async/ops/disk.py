"""Writing to a disk that may be full: which errors of a file system are temporary, and waiting until they pass.

A full disk is no fault of a role, and is temporary: a role that ended because of it would only lose its work in
progress.  So a role that has to write waits, logs that, and goes on when there is space again, as the buffer's journal
does.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from atpo_async.core.errors import SetupError
from atpo_async.status import waits

T = TypeVar("T")

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE})
"""Full, over quota, and the errors of a disk or a network file system that is in trouble."""

RETRY_S = 0.5
RETRY_MAX_S = 5.0
REPEAT_S = 30.0
"""Between two log lines about an error that lasts."""

_NUMBER = re.compile(r"os error (\d+)|\[Errno (\d+)\]")


def error_number(error: BaseException) -> int | None:
    """``errno`` of what a file system refused; None where ``error`` is something else.

    Libraries that write files in another language (safetensors) have the number in the text alone.
    """
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        if isinstance(here, OSError) and here.errno is not None:
            return here.errno
        found = _NUMBER.search(str(here))
        if found is not None:
            return int(found.group(1) or found.group(2))
        here = here.__cause__ or here.__context__
    return None


def until_written(
    what: str,
    write: Callable[[], T],
    *,
    log: logging.Logger,
    who: str = "the learner",
    give_up_s: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """``write()``, again and again while the disk is full; a named wait on the disk meanwhile.  Blocks its thread.

    Args:
        what: names what is written, and where to, in messages.
        write: leaves nothing behind where it fails; errors that come from no file system are passed on.
        give_up_s: seconds; None: wait as long as it takes.

    Raises:
        SetupError: free space would not mend the refusal, or it lasts for longer than ``give_up_s``.
    """
    began = told = clock()
    pause_s = RETRY_S
    waited = False
    while True:
        try:
            done = write()
        except Exception as exc:
            number = error_number(exc)
            if number is None:
                raise
            fault = os.strerror(number)
            now = clock()
            if number not in PASSING:
                raise SetupError(f"{what} cannot be written: {fault}; mend that and start the run again") from exc
            if give_up_s is not None and now - began > give_up_s:
                raise SetupError(
                    f"{what} could not be written for {now - began:.0f} s: {fault}; free some space and start the run "
                    "again"
                ) from exc
            if not waited or now - told >= REPEAT_S:
                told = now
                log.warning("%s cannot be written: %s; trying again until there is space", what, fault)
            waited = True
        else:
            if waited:
                log.info("%s is written, after %.1f s of waiting for the disk", what, clock() - began)
            return done
        with waits.waiting(who, f"space for {what} ({fault})", on=waits.DISK):
            sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_MAX_S)
