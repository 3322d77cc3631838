"""The folder for temporary files, under a name that is short enough for sockets.

Engines and multiprocessing put their sockets into it, and the path of a socket has at most 107 bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from atpo_async.core.errors import SetupError

MAX_SOCKET_PATH = 107
"""Bytes: sun_path of sockaddr_un, without its end."""
_RESERVED = 60
"""For what comes after the folder: a UUID (vLLM's sockets), a folder and a name (multiprocessing's)."""
MAX_FOLDER = MAX_SOCKET_PATH - _RESERVED

SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def make_temporary_folder_fit(
    say: Callable[[str], None] = lambda line: None, *, places: Sequence[str] = SHORT_PLACES
) -> None:
    """Have this process, and those that it starts, use a folder for temporary files that is there, can be written and
    has a short name.

    A long TMPDIR keeps its files: a link with a short name leads to it, the same one for everybody who has that TMPDIR,
    so that none are left behind by the dozen.

    Args:
        say: a line for the user, where TMPDIR cannot be used as it is.
        places: where such a link may lie.

    Raises:
        SetupError: no folder can be written, or no short name be made.
    """
    asked = os.environ.get("TMPDIR", "")
    tempfile.tempdir = None  # what was found out earlier may be of another TMPDIR
    try:
        found = tempfile.gettempdir()
    except OSError as exc:
        raise SetupError(f"no folder for temporary files: {exc}; set TMPDIR to one that can be written") from None
    if asked and found != os.path.abspath(asked):
        say(f"TMPDIR = {_shown(asked)} cannot be written; temporary files go to {found}")
    if len(os.fsencode(found)) > MAX_FOLDER:
        found = _short_name(found, places)
    elif not asked or found == os.path.abspath(asked):
        return
    os.environ["TMPDIR"] = tempfile.tempdir = found


def _short_name(folder: str, places: Sequence[str]) -> str:
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    uid = os.getuid() if hasattr(os, "getuid") else 0
    for place in places:
        link = Path(place) / f"atpo-{uid}-{digest}"
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                link.symlink_to(folder)
            # Another user may have made it, in a folder that all users may write to, to redirect our files.
            if link.lstat().st_uid == uid and link.is_symlink() and os.readlink(link) == folder:
                return str(link)
    raise SetupError(
        f"the folder for temporary files, {_shown(folder)}, has a name of {len(os.fsencode(folder))} bytes: sockets in "
        f"it would have longer ones than the {MAX_SOCKET_PATH} that the system allows, and no short link to it can be "
        f"made in {', '.join(places)}; set TMPDIR to a folder with a name of up to {MAX_FOLDER} bytes"
    )


def _shown(folder: str) -> str:
    return repr(folder) if len(folder) <= 100 else repr(folder[:60] + "…" + folder[-20:])
