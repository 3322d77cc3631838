"""What ``data`` names: files, a pattern of files, rows in memory, a saved data set, one of the Hugging Face Hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.data.faults import missing_file
from atpo_async.environments.data.json_rows import open_json
from atpo_async.environments.data.rows import JoinedRows, ListedRows, Rows
from atpo_async.environments.data.tables import is_saved, open_hub, open_parquet, open_saved

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
_HUB = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.\-+]*))?(:(?P<split>[\w.\-+\[\]:%]+))?", re.ASCII
)

WHAT = (
    "a file (.jsonl, .json, .parquet, .jsonl.gz), a pattern of files, a folder that save_to_disk wrote, or a Hugging "
    "Face data set as 'owner/name', 'owner/name:config' or 'owner/name:config:split'"
)


def open_rows(data: Any, split: str | None, *, field: str, held_out: bool = False) -> Rows:
    """The rows that ``data`` names.

    Args:
        data: a path or name (``WHAT``), a list of them, or a list of dicts.
        split: of a Hugging Face data set; a name's own split is taken before it.
        field: ``data`` or ``eval_data``, for messages.
        held_out: whether a data set's held-out split is meant where none is named.

    Raises ConfigError or SetupError, in one line.
    """
    if isinstance(data, str | Path):
        rows = _named(str(data), split, field=field, held_out=held_out)
    elif isinstance(data, Sequence) and data and not isinstance(data, bytes):
        if any(isinstance(each, Mapping) for each in data):
            rows = ListedRows(data, field)
        else:
            rows = JoinedRows([open_rows(each, split, field=field, held_out=held_out) for each in data])
    else:
        raise ConfigError(f"{field} is {of_value(data)} ({of_type(data)}); expected {WHAT}; or a list of rows (dicts)")
    if not len(rows):
        raise ConfigError(f"{field} = {rows.name!r} holds no rows: the file is empty")
    return rows


def _named(given: str, split: str | None, *, field: str, held_out: bool) -> Rows:
    path = Path(given)
    if path.is_dir():
        if not is_saved(path):
            raise ConfigError(
                f"{field} = {given!r} is a folder that holds no data set of save_to_disk; name its files, "
                f"{str(path / '*.jsonl')!r} or {str(path / '*.parquet')!r}"
            )
        return open_saved(given, split, held_out=held_out)
    if path.exists():
        if not path.is_file():
            raise ConfigError(f"{field} = {given!r} is no regular file; name a file that can be read again and again")
        _refuse_split(given, split, field)
        return _file(given, field)
    if glob.has_magic(given) and not _is_hub_name(given):
        found = sorted(glob.glob(given))
        if not found:
            raise SetupError(f"{field} = {given!r}: no file matches that, looked for from {str(Path.cwd())!r}")
        _refuse_split(given, split, field)
        return JoinedRows([_file(each, field) for each in found])
    if _is_hub_name(given) and (hub := _HUB.fullmatch(given)) is not None:
        return open_hub(hub["name"], hub["config"] or None, hub["split"] or split, held_out=held_out)
    why = missing_file(given)
    raise SetupError(f"{field} = {given!r}: {why}" + ("" if "did you mean" in why else f"; expected {WHAT}"))


def _is_hub_name(given: str) -> bool:
    """``owner/name…``; not where it ends as a file does, or its first part is a folder here: then a slip."""
    return (
        _HUB.fullmatch(given) is not None
        and not given.lower().endswith(SUFFIXES)
        and not Path(given.partition("/")[0]).is_dir()
    )


def _refuse_split(given: str, split: str | None, field: str) -> None:
    if split is not None:
        raise ConfigError(
            f"split = {split!r} chooses a split of a Hugging Face data set; {field} = {given!r} is a file: leave it "
            "out, or name the split's own file"
        )


def _file(name: str, field: str) -> Rows:
    suffixes = name.lower()
    if suffixes.endswith(".parquet"):
        return open_parquet(name)
    if suffixes.endswith(JSON_SUFFIXES):
        return open_json(name)
    raise ConfigError(f"{field} = {name!r} has none of the endings that are read: {', '.join(SUFFIXES)}")
