"""Which machine this is, so that a role knows whether another shares its memory and its process ids."""

from __future__ import annotations

import socket
from pathlib import Path

from atpo_async.core.bounds import MAX_NAME_BYTES


def host_id() -> str:
    """Identity of this machine and boot: equal for two processes exactly if they can share its memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{boot}:{socket.gethostname()}"


def host_name() -> str:
    """The name of this machine for people, as a message may have it; empty where it has no printable one."""
    return as_name(socket.gethostname())


def as_name(text: str) -> str:
    """``text`` within the bounds of a ``Name``; empty where it is not printable."""
    return text.encode()[:MAX_NAME_BYTES].decode(errors="ignore") if text.isprintable() else ""
