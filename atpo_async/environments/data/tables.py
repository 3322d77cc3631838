"""Parquet files and Hugging Face data sets: rows of an Arrow table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_error, shortened
from atpo_async.environments.data.faults import meant
from atpo_async.environments.data.rows import Row, plain, unreadable

BATCH = 4096
HELD_OUT = ("validation", "dev", "test")
"""Splits that evaluations take where none is named, the first that there is."""

PROBE_S = 10.0
"""Seconds in which the Hub has to answer, before only what is stored here is looked for."""


class TableRows:
    """Rows of an Arrow table, which holds them far more densely than Python objects, or maps them from disk."""

    def __init__(self, table: Any, name: str) -> None:
        self.name = name
        self.num_bytes = int(table.nbytes)
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def columns(self) -> tuple[str, ...]:
        return tuple(self._table.column_names)

    def row(self, at: int) -> Row:
        try:
            found = self._table.slice(at, 1).to_pylist()[0]
        except Exception as exc:  # text that is no UTF-8, a date that Python cannot hold
            raise unreadable(self.where(at), f"it cannot be read: {of_error(exc)}") from exc
        return {key: plain(value) for key, value in found.items()}

    def where(self, at: int) -> str:
        return f"{self.name}, row {at}"

    def parts(self, names: Sequence[str]) -> Iterator[Row]:
        wanted = self._table.select([name for name in names if name in self._table.column_names])
        at = 0
        for batch in wanted.to_batches(max_chunksize=BATCH):
            try:
                rows = batch.to_pylist()
            except Exception:
                rows = [self.row(at + inner) for inner in range(batch.num_rows)]
            yield from rows
            at += batch.num_rows


def open_parquet(name: str) -> TableRows:
    """Raises SetupError where it cannot be read, or is no parquet."""
    import pyarrow
    from pyarrow import parquet

    try:
        # By batches, in this thread: read as a whole it takes twice the memory, and keeps it.
        file = parquet.ParquetFile(name, memory_map=True, pre_buffer=False)
        batches = file.iter_batches(batch_size=BATCH, use_threads=False)
        table = pyarrow.Table.from_batches(batches, schema=file.schema_arrow)
        pyarrow.default_memory_pool().release_unused()
        return TableRows(table, name)
    except (OSError, pyarrow.ArrowException) as exc:
        raise SetupError(
            f"data {name!r} is no parquet file that can be read: {of_error(exc)}; write or fetch it again"
        ) from exc


# --- Hugging Face ------------------------------------------------------------------------------------------------


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the library ``datasets`` wrote this folder."""
    return any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json"))


def open_saved(folder: str, split: str | None, *, held_out: bool) -> TableRows:
    """Of a folder that ``save_to_disk`` wrote.  Raises ConfigError for an unknown split, SetupError for damage."""
    import datasets

    try:
        found = datasets.load_from_disk(folder)
    except Exception as exc:
        raise SetupError(f"data {folder!r}: its data set cannot be read: {of_error(exc)}; save it again") from exc
    if not isinstance(found, datasets.DatasetDict):
        if split is not None:
            raise ConfigError(
                f"data {folder!r} holds one split, so that split = {split!r} cannot be chosen: leave it out"
            )
        return _rows(found, folder)
    chosen = choose_split(split, list(found), folder, held_out=held_out)
    return _rows(found[chosen], f"{folder}:{chosen}")


def open_hub(name: str, config: str | None, split: str | None, *, held_out: bool) -> TableRows:
    """A data set of the Hugging Face Hub, or of its local cache where the Hub does not answer within ``PROBE_S``.

    Raises:
        ConfigError: there is no such data set, configuration or split.
        SetupError: it is not stored here, and cannot be fetched.
    """
    import datasets

    reason = _hub_fault(name)
    label = f"data {name!r}"
    with contextlib.ExitStack() as stack:
        if reason:
            stack.enter_context(_offline())
        try:
            splits: list[str] = []  # of a data set that is stored here they are not asked for
            if not reason:
                config = config or _one_config(datasets, name)
                splits = [str(each) for each in datasets.get_dataset_split_names(name, config)]
            chosen = choose_split(split, splits, name, held_out=held_out)
            return _rows(datasets.load_dataset(name, config, split=chosen), f"{name}:{config or ''}:{chosen}")
        except ConfigError:
            raise
        except Exception as exc:
            if reason:
                raise SetupError(
                    f"{label} is not stored here, and the Hugging Face Hub cannot be reached ({reason}); give a "
                    "file, or a folder that save_to_disk wrote on a machine with network"
                ) from exc
            raise SetupError(f"{label} could not be loaded: {of_error(exc)}") from exc


def choose_split(wanted: str | None, known: Sequence[str], name: str, *, held_out: bool) -> str:
    """The split to take; ``wanted`` may be a slice, ``train[:1000]``.  Raises ConfigError where there is none."""
    if wanted is not None:
        if known and not any(part.partition("[")[0] in known for part in wanted.split("+")):
            raise ConfigError(
                f"data {name!r} has no split {wanted!r}; it has: {', '.join(known)}{meant(wanted, known)}"
            )
        return wanted
    defaults = HELD_OUT if held_out else ("train",)
    found = next((each for each in defaults if not known or each in known), None)
    if found is None:
        raise ConfigError(
            f"data {name!r} has no split {' or '.join(defaults)}; it has: {', '.join(known)}: name one, "
            f"{name + '::' + known[0]!r}"
        )
    return found


def _one_config(datasets: Any, name: str) -> str | None:
    """Of a data set of which none was named: None, for its only one.  Raises ConfigError where there are more."""
    known = [str(each) for each in datasets.get_dataset_config_names(name)]
    if len(known) > 1 and "default" not in known:
        raise ConfigError(
            f"data {name!r} has several configurations: {', '.join(known)}; name one, {name + ':' + known[0]!r}"
        )
    return None


def _rows(found: Any, name: str) -> TableRows:
    return TableRows(found.with_format("arrow")[:], name)


def _hub_fault(name: str) -> str:
    """Why the Hub cannot be asked; empty where it answers.  Raises ConfigError where it knows no such data set."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=PROBE_S)
    except (RepositoryNotFoundError, HFValidationError) as exc:
        raise ConfigError(
            f"data {name!r} is no file here, and the Hugging Face Hub has no data set of that name that this machine "
            "may read; for one that needs an account run `hf auth login`"
        ) from exc
    except Exception as exc:  # no network, a proxy, a token that has expired
        return shortened(of_error(exc), 120)
    return ""


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Without it the library tries for 20 s and more to reach a Hub that has just not answered."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
