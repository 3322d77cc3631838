"""Which weights a model folder holds, told without reading all of them."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from atpo_async.core.errors import SetupError
from atpo_async.models.tensor_files import weight_files

SAMPLES, SAMPLE_BYTES = 64, 4096
"""Places of each file that are read.  Weights that were trained further differ almost everywhere."""


def identity_of(path: str) -> str:
    """Identity of the weights in a local model folder, hex; empty where there is none here.

    Of each file its size, its beginning and ``SAMPLES`` places of it: two folders of one identity hold the same weights
    unless one was made to deceive.
    """
    folder = Path(path) if path else None
    if folder is None or not (folder / "config.json").is_file():
        return ""
    found = blake3()
    try:
        for file in sorted(weight_files(folder)):
            _add(found, file)
    except (OSError, SetupError):
        return ""
    return str(found.hexdigest(length=16))


def _add(found: blake3, file: Path) -> None:
    with file.open("rb") as data:
        size = data.seek(0, 2)
        found.update(f"{size}\n".encode())
        for sample in range(SAMPLES):
            data.seek(sample * max(0, size - SAMPLE_BYTES) // max(1, SAMPLES - 1))
            found.update(data.read(SAMPLE_BYTES))
