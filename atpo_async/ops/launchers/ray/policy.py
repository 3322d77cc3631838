"""A policy's folder on its way to a node that lacks it: its files, name by name and part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from atpo_async.core.errors import SetupError

PART_BYTES = 32 << 20
"""That travel at once, by way of Ray's object store."""


def files_of(folder: Path) -> dict[str, int] | None:
    """Name -> bytes of the files of a model folder; None where it is no folder here (a name on the Hub)."""
    if not (folder / "config.json").is_file():
        return None
    return {
        str(file.relative_to(folder).as_posix()): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }


def is_lacking(folder: Path, files: Mapping[str, int] | None) -> bool:
    """Whether a node lacks a policy: its folder is not there, or has other files than on the supervisor's node.

    Args:
        files: ``files_of`` there; None: it is no folder there, and every node finds it by its name.
    """
    return files is not None and files_of(folder) != dict(files)


def parts(folder: Path, files: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """(name, next part of that file), of all files; an empty file is one part."""
    for name in files:
        with (folder / name).open("rb") as file:
            data = file.read(PART_BYTES)
            yield name, data
            while data := file.read(PART_BYTES):
                yield name, data


def append(folder: Path, name: str, data: bytes) -> None:
    """Append a part to a file in ``folder``.  Raises SetupError for a name that leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise SetupError(f"{name!r} is no name of a policy's file")
    target = folder.joinpath(*path.parts)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with target.open("ab") as file:
        file.write(data)
