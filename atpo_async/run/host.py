"""Which machine this is, so that a role knows whether another shares its memory and its process ids."""

from __future__ import annotations

import socket
from pathlib import Path


def host_id() -> str:
    """Identity of this machine and boot: equal for two processes exactly if they can share its memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{boot}:{socket.gethostname()}"
