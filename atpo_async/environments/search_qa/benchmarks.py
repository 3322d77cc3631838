"""The seven published test sets by name: which group each is of, and where it lies in a folder of data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_value

Group = Literal["multi-hop", "single-hop"]

GROUPS: tuple[Group, ...] = ("multi-hop", "single-hop")
ENDINGS = (".jsonl", ".parquet")
SPLITS = ("test", "dev")
"""Of a set in FlashRAG's layout, the first that there is, as both published scripts choose: HotpotQA, 2Wiki and MuSiQue
have a dev split, the others a test split."""
MERGED = ("test.parquet", "multihop/test.parquet", "singlehop/test.parquet", "nq_hotpotqa_train/test.parquet")
"""Files that AT2PO's and Search-R1's scripts write, with several sets told apart by ``data_source``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSet:
    """One published test set."""

    name: str
    group: Group
    questions: int
    """As published."""
    folder: str = ""
    """Its name in FlashRAG's data, where that is another."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.folder, self.name) if self.folder else (self.name,)


PUBLISHED_SETS: tuple[PublishedSet, ...] = (
    PublishedSet(name="hotpotqa", group="multi-hop", questions=7405),
    PublishedSet(name="2wiki", group="multi-hop", questions=12576, folder="2wikimultihopqa"),
    PublishedSet(name="musique", group="multi-hop", questions=2417),
    PublishedSet(name="bamboogle", group="multi-hop", questions=125),
    PublishedSet(name="nq", group="single-hop", questions=3610),
    PublishedSet(name="triviaqa", group="single-hop", questions=11313),
    PublishedSet(name="popqa", group="single-hop", questions=14267),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A test set and its file."""

    name: str
    file: str
    source: str = ""
    """Its ``data_source`` in a file of several sets; empty where the file holds it alone."""


def sets_named(names: str) -> tuple[PublishedSet, ...]:
    """The sets that ``hotpotqa,2wiki``, ``multi-hop``, ``single-hop`` or ``all`` name, in the order of the published
    tables.  Raises ConfigError for a name that is none."""
    asked: set[str] = set()
    for name in filter(None, (part.strip().lower() for part in names.split(","))):
        found = [each.name for each in PUBLISHED_SETS if name in (*each.names, each.group, "all")]
        if not found:
            known = ", ".join(each.name for each in PUBLISHED_SETS)
            raise ConfigError(f"--benchmarks: there is no {name!r}; known: {known}, {', '.join(GROUPS)}, all")
        asked |= set(found)
    if not asked:
        raise ConfigError(f"--benchmarks is {of_value(names)}; name some, such as hotpotqa,2wiki, or multi-hop, or all")
    return tuple(each for each in PUBLISHED_SETS if each.name in asked)


def locate(folder: Path, wanted: Sequence[PublishedSet]) -> list[Benchmark]:
    """Where each set lies in ``folder``.  Raises SetupError for those that are missing: what was looked for, and how
    to get it."""
    if not folder.is_dir():
        raise SetupError(f"--data {folder}: there is no such folder; {_how_to_get(wanted)}")
    merged = {path: sources_in(path) for name in MERGED if (path := folder / name).is_file()}
    found, missing = [], []
    for each in wanted:
        benchmark = _alone(folder, each) or _among(merged, each)
        if benchmark is None:
            missing.append(each)
        else:
            found.append(benchmark)
    if missing:
        looked = ", ".join(f"{missing[0].names[0]}/{split}{end}" for split in SPLITS for end in ENDINGS)
        raise SetupError(
            f"--data {folder} has no {', '.join(each.name for each in missing)}; looked for {looked}, "
            f"{missing[0].names[0]}.jsonl and the like, and for that data_source in {', '.join(MERGED)}; "
            f"{_how_to_get(missing)}"
        )
    return found


def _alone(folder: Path, wanted: PublishedSet) -> Benchmark | None:
    for file in _candidates(folder, wanted.names):
        if file.is_file():
            return Benchmark(name=wanted.name, file=str(file))
    return None


def _candidates(folder: Path, names: Iterable[str]) -> Iterable[Path]:
    for name in names:
        for split in SPLITS:
            for ending in ENDINGS:
                yield folder / name / f"{split}{ending}"
                yield folder / f"{name}_{split}{ending}"
        for ending in ENDINGS:
            yield folder / f"{name}{ending}"


def _among(merged: dict[Path, frozenset[str]], wanted: PublishedSet) -> Benchmark | None:
    for file, sources in merged.items():
        for name in wanted.names:
            if name in sources:
                return Benchmark(name=wanted.name, file=str(file), source=name)
    return None


def sources_in(file: Path) -> frozenset[str]:
    """The values of ``data_source`` in a parquet file.  Raises SetupError where it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(file, columns=["data_source"]).column(0)
    except (OSError, ValueError, pyarrow.ArrowException) as exc:
        raise SetupError(f"{file} cannot be read as a parquet file with data_source: {exc}") from exc
    return frozenset(str(value) for value in column.unique().to_pylist())


def _how_to_get(wanted: Sequence[PublishedSet]) -> str:
    names = ", ".join(each.names[0] for each in wanted)
    return (
        f"they are part of FlashRAG's data sets (Hugging Face Hub: RUC-NLPIR/FlashRAG_datasets; {names}, a folder "
        "each with test.jsonl or dev.jsonl): copy those folders there, or the test.parquet that AT2PO's or Search-R1's "
        "scripts make of them"
    )
