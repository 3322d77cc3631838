"""Which files of a model folder hold its weights, and what their headers say, read without the tensors.

safetensors: u64 little-endian length, a JSON header of that length, the data that its offsets point into.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atpo_async.core.errors import SetupError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

_LFS_POINTER = b"version https://git-lfs"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: those its index names, or the one file of a model without an index.

    Others may lie beside them (another format's consolidated file, averaged weights, an adapter): they do not count.

    Raises SetupError naming the file that is missing or the index that is none, and the way out.
    """
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in _named_by(index)]
        if missing := [file for file in files if not file.is_file()]:
            raise SetupError(
                f"model file {missing[0]} is missing ({len(missing)} of the {len(files)} that {INDEX} names); fetch or "
                "copy it into that folder"
            )
        return files
    if not (folder / WEIGHTS).is_file():
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        others = f" (it has {', '.join(found[:3])})" if found else ""
        raise SetupError(
            f"model folder {folder} has neither {WEIGHTS} nor {INDEX}{others}, no *.safetensors file that counts; save "
            "the model in that format (save_pretrained)"
        )
    return [folder / WEIGHTS]


def _named_by(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({str(Path(name)) for name in names})
        if not files:
            raise ValueError("it names no file")
    except OSError as exc:
        raise SetupError(
            f"model file {index} cannot be read: {exc.strerror}; check that it is there and yours"
        ) from exc
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise SetupError(
            f"model file {index} is no index of safetensors files ({exc or type(exc).__name__}); save or fetch it again"
        ) from exc
    return files


@contextlib.contextmanager
def counting_files(folder: Path, *, kept_in: Path | None = None) -> Iterator[Path]:
    """A model folder as its index describes it: the folder itself, or links to what counts of it, removed afterwards.

    For programs that take every ``*.safetensors`` beside an index for weights, or an adapter's for the model's.
    Raises SetupError as ``weight_files`` does.

    Args:
        folder: of the model.
        kept_in: where the links stay, under the same name every time: for programs that remember what they made of a
            model by the name of its folder.  None: they are removed.
    """
    counting = set(weight_files(folder))
    astray = {file for file in folder.glob("*.safetensors") if file not in counting}
    astray |= {file for file in folder.glob("*.safetensors.index.json") if file.name != INDEX}
    astray |= {file for file in (folder / "adapter_config.json",) if file.is_file()}
    if not astray:
        yield folder
        return
    links = {file.relative_to(folder): file.resolve() for file in {*folder.iterdir(), *counting} - astray}
    if kept_in is not None and (kept := _kept(links, kept_in)) is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="atpo-model-") as temporary:
        _link(links, Path(temporary))
        yield Path(temporary)


def _link(links: Mapping[Path, Path], into: Path) -> None:
    for name, file in links.items():
        if file.is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).symlink_to(file)


def _kept(links: Mapping[Path, Path], parent: Path) -> Path | None:
    """A folder of these links in ``parent``, made once and renamed when whole; None where there can be none."""
    listed = sorted((str(name), str(file)) for name, file in links.items())
    path = parent / hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
    with contextlib.suppress(OSError):
        if not path.is_dir():
            parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(prefix=".", dir=parent) as aside:
                _link(links, Path(aside) / "model")
                with contextlib.suppress(OSError):  # another process was faster
                    (Path(aside) / "model").rename(path)
        if all((path / name).resolve() == file for name, file in links.items() if file.is_file()):
            return path
    return None


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


def read_headers(folder: Path) -> dict[str, dict[str, Any]]:
    """The headers of all files that hold a folder's weights.  Raises SetupError as they do."""
    entries: dict[str, dict[str, Any]] = {}
    for file in weight_files(folder):
        entries |= read_header(file)
    return entries
