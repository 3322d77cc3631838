"""Tie a process to the life of the one that started it, so that a killed parent leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> bool:
    """Ask the kernel to SIGKILL this process when its parent ends.  True if the tie holds (Linux only).

    Ends this process at once when ``parent_pid`` is no longer its parent: the parent died before the tie was made.
    The kernel counts the parent *thread* that forked as the parent, so that thread must live as long as the parent.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return False
    # After the call, not before it: a parent that dies in between would otherwise go unnoticed.
    if os.getppid() != parent_pid:
        os._exit(1)
    return True
