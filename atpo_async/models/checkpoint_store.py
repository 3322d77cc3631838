"""Checkpoints at a URL (``learner.checkpoint_url``), by fsspec: put there whole, found again, and verified.

    <URL>/<run id>/step-000050-v000051/…        the files, as the learner writes them (``learner.checkpoints``)
    <URL>/<run id>/step-000050-v000051.json     which files there are, their sizes and digests; written last
    <URL>/<run id>/model/…, model.json          the trained policy, at the end of the run

A folder without its list of files is no checkpoint: it is being written, or what a killed learner has left.  What is
removed loses its list first.  Credentials are the store's own business (its environment variables, fsspec's
configuration files): none is in the configuration.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from atpo_async.core.errors import SetupError
from atpo_async.wire.digests import file_digests

FORMAT = 1
_NAME = re.compile(r"step-(\d+)-v(\d+)")
_PROBE = "atpo-writes-here"
_ASIDE = ".writing-"
"""Begins the name of a list of files until all of it is there."""


class StoreFault(Exception):
    """The store does not do what it is asked; the message says what it said."""

    def __init__(self, text: str, *, refuses: bool = False) -> None:
        super().__init__(text)
        self.refuses = refuses
        """No further attempt would help: there is no access, or no such place."""


class _File(msgspec.Struct):
    size: int
    digest: str


class _Listed(msgspec.Struct):
    """``<name>.json``."""

    format: int
    files: dict[str, _File]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A complete checkpoint at the URL."""

    name: str
    step: int
    version: int

    def key(self) -> tuple[int, int]:
        """Rises from older ones to newer ones."""
        return self.step, self.version


def parsed(name: str) -> Stored | None:
    """The checkpoint of a name, at a URL or here; None where it is none."""
    found = _NAME.fullmatch(name)
    return None if found is None else Stored(name=name, step=int(found[1]), version=int(found[2]))


class CheckpointStore:
    """The checkpoints of one run at a URL.  Blocks; one thread at a time.

    Args:
        url: of the configuration.
        run_id: of the run.

    Raises:
        SetupError: fsspec lacks what the URL needs.
    """

    def __init__(self, url: str, *, run_id: str) -> None:
        self.url = f"{url.rstrip('/')}/{run_id}"
        self._fs, root = _opened(url)
        self._root = f"{root.rstrip('/')}/{run_id}"

    def shown(self, name: str = "") -> str:
        """For people: the URL of something here, without what may be secret in it."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{f'/{name}' if name else ''}"

    def try_it(self) -> None:
        """Write a file and remove it again.  Raises StoreFault."""
        with _mapped(f"{self.shown()} cannot be written"):
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{_PROBE}", b"")
            self._fs.rm_file(f"{self._root}/{_PROBE}")

    def stored(self) -> list[Stored]:
        """All complete checkpoints, oldest first.  Raises StoreFault."""
        with _mapped(f"{self.shown()} cannot be read"):
            names = [name.removesuffix(".json") for name in self._names() if name.endswith(".json")]
            return sorted((found for name in names if (found := parsed(name))), key=Stored.key)

    def put(self, folder: Path, *, name: str = "", may_stop: Callable[[], None] = lambda: None) -> int:
        """Put a folder of files there, in place of one of that name; it counts once it is complete.  Returns its bytes.

        Args:
            folder: nothing in it changes meanwhile.
            name: there; the folder's own where empty.
            may_stop: is called between two files, and may raise.

        Raises:
            StoreFault: it refuses.
            OSError: the folder cannot be read.
        """
        name, total = name or folder.name, 0
        listed = f"{self._root}/{name}.json"
        with _mapped(f"{self.shown(f'{name}.json')} cannot be removed"):
            if self._fs.exists(listed):
                self._fs.rm_file(listed)
        files: dict[str, _File] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            may_stop()
            file = path.relative_to(folder).as_posix()
            size, digest = _measured(path)
            where = f"{self._root}/{name}/{file}"
            with _mapped(f"{self.shown(f'{name}/{file}')} cannot be written"):
                self._fs.makedirs(where.rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(path), where)
                self._fs.invalidate_cache()
                there = int(self._fs.info(where)["size"])
            if there != size:
                raise StoreFault(f"{self.shown(f'{name}/{file}')} has {there} bytes after {size} were written")
            files[file], total = _File(size, digest), total + size
        with _mapped(f"{self.shown(f'{name}.json')} cannot be written"):
            # Last: from here on it is complete.  A file system, unlike a store of objects, shows half a file.
            aside = f"{self._root}/{_ASIDE}{name}.json"
            self._fs.pipe_file(aside, msgspec.json.encode(_Listed(FORMAT, files)))
            self._fs.mv(aside, listed)
        return total

    def fetch(self, name: str, target: Path) -> None:
        """Fetch a complete checkpoint into ``target``, a new folder, and verify each file.

        Raises:
            SetupError: it is damaged: it holds other bytes than were put there.
            StoreFault: the store cannot be read.
            OSError: the disk refuses.
        """
        listed = self._listed(name)
        for file, said in listed.files.items():
            if file.startswith("/") or ".." in Path(file).parts:
                raise SetupError(f"{self.shown(f'{name}.json')} names a file {file!r:.80} outside its folder")
            local = target / file
            local.parent.mkdir(parents=True, exist_ok=True)
            with _mapped(f"{self.shown(f'{name}/{file}')} cannot be read"):
                self._fs.get_file(f"{self._root}/{name}/{file}", str(local))
            if _measured(local) != (said.size, said.digest):
                raise SetupError(
                    f"{self.shown(f'{name}/{file}')} is damaged: it holds other bytes than were put there; remove "
                    f"{self.shown(f'{name}.json')} to go on from the checkpoint before it"
                )

    def keep_newest(self, count: int) -> None:
        """Remove all checkpoints but the newest ``count``, and what is older and incomplete.  Raises StoreFault."""
        complete = self.stored()
        if len(complete) < count:
            return
        with _mapped(f"an old checkpoint in {self.shown()} cannot be removed"):
            for each in complete[:-count]:
                self._fs.rm_file(f"{self._root}/{each.name}.json")
            oldest = complete[-count].key()
            for name in self._names():
                if name.startswith(_ASIDE):
                    self._fs.rm_file(f"{self._root}/{name}")
                elif (found := parsed(name)) is not None and found.key() < oldest:
                    self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _names(self) -> Iterator[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return
        for path in sorted(found):
            yield str(path).rstrip("/").rpartition("/")[2]

    def _listed(self, name: str) -> _Listed:
        with _mapped(f"{self.shown(f'{name}.json')} cannot be read"):
            data = self._fs.cat_file(f"{self._root}/{name}.json")
        try:
            listed = msgspec.json.decode(data, type=_Listed)
        except msgspec.MsgspecError as exc:
            raise SetupError(f"{self.shown(f'{name}.json')} is damaged: {exc}; remove it") from exc
        if listed.format != FORMAT:
            raise SetupError(f"{self.shown(name)} has format {listed.format}, this program reads {FORMAT}")
        return listed


class _mapped:
    """Turns whatever a store raises into a StoreFault that begins with ``what``."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, Exception) and not isinstance(exc, StoreFault):
            said = " ".join(str(exc).split())[:300]
            refuses = isinstance(exc, PermissionError | FileNotFoundError) or "Credential" in type(exc).__name__
            raise StoreFault(
                f"{self._what}: {type(exc).__name__}{f': {said}' if said else ''}", refuses=refuses
            ) from exc


def _opened(url: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.registry import known_implementations

    scheme = url.partition("://")[0]
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as exc:
        named: Mapping[str, str] = known_implementations.get(scheme, {})
        package = named.get("class", "").partition(".")[0]
        way_out = f"pip install {package}" if package not in ("", "fsspec") else f"{exc}"
        raise SetupError(f"learner.checkpoint_url = {scheme}://… needs a package that is missing: {way_out}") from None
    except ValueError as exc:
        raise SetupError(f"learner.checkpoint_url = {scheme}://…: {exc}") from None
    # Whatever a store asks for when it is opened: its own settings.
    except Exception as exc:
        raise SetupError(
            f"learner.checkpoint_url = {scheme}://… cannot be opened: {type(exc).__name__}: {exc}"
        ) from exc
    return fs, root


def _measured(path: Path) -> tuple[int, str]:
    """Bytes and digest of a local file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return size, file_digests(file.fileno(), [(0, size)])[0]
