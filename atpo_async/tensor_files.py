"""Headers of safetensors files, read without the tensors.

The format: u64 little-endian length, a JSON header of that length, the data that its offsets point into.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atpo_async.errors import SetupError

_LFS_POINTER = b"version https://git-lfs"


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> ``dtype``, ``shape`` and ``data_offsets`` of every tensor, from a file that is whole.

    Raises SetupError naming the file and the way out if it is a git-LFS pointer, is cut short, or is not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            begin = stream.read(8)
            length = int.from_bytes(begin, "little")
            if length > size - 8:
                if (begin + stream.read(len(_LFS_POINTER))).startswith(_LFS_POINTER):
                    raise SetupError(
                        f"model file {file} is a git-LFS pointer, not the weights; run `git lfs pull` in {file.parent}"
                    )
                raise ValueError(f"{size} bytes do not hold its header")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        for entry in entries.values():
            if not all(isinstance(n, int) for n in (*entry["shape"], *entry["data_offsets"])):
                raise ValueError("its header has no shapes")
        needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if needed > size:
            raise ValueError(f"it has {size} of {needed} bytes")
    except OSError as exc:
        raise SetupError(f"model file {file} cannot be read: {exc.strerror}; check that it is there and yours") from exc
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as exc:
        raise SetupError(
            f"model file {file} is damaged or no safetensors file ({exc or type(exc).__name__}); save or fetch it again"
        ) from exc
    return dict(entries)


def check_files(folder: Path) -> None:
    """Read the header of every safetensors file in a model folder.  Raises SetupError as ``read_header`` does."""
    for file in sorted(folder.glob("*.safetensors")):
        read_header(file)
