"""The small files of a run's folder that a follower keeps beside the journal, so that the run can go on there.

What the learner writes in bulk (checkpoints, metrics, lineage) is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from atpo_async.run.endpoints import ENDPOINTS, FORMER_ENDPOINTS
from atpo_async.wire.followers.messages import SmallFile

VERSION = "version"
NAMES = ("run.json", "config.json", "versions.json", VERSION, "memory.json", FORMER_ENDPOINTS)
"""As a follower has them."""
MAX_FILE_BYTES = 1 << 20
_SOURCES = {FORMER_ENDPOINTS: ENDPOINTS}
"""Where the roles listen now is where they listened before for a run that goes on elsewhere."""


class SmallFiles:
    """The files of one run's folder.

    Args:
        folder: of the run; None: there are none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def changed(self, known: Mapping[str, bytes]) -> list[SmallFile]:
        """Those whose content is another than ``known``.  A file that is not there, or too large, is left out."""
        found = []
        for name in NAMES if self._folder is not None else ():
            assert self._folder is not None
            data = _read(self._folder / _SOURCES.get(name, name))
            if data is not None and known.get(name) != data:
                found.append(SmallFile(name=name, data=np.frombuffer(data, np.uint8)))
        return found


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        return None
    return data if len(data) <= MAX_FILE_BYTES else None
