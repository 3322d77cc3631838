"""The BM25 index of a corpus: made once into a folder, memory-mapped ever after, made again when the corpus changes.

The folder holds one finished index, named after what it was made of, so that a server that still has an older one
mapped is not disturbed; a lock lets one process make it while others wait.  The library is bm25s (Lucene's BM25;
lower-case words of two characters and more without English stop words).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.core.errors import SetupError
from atpo_async.environments.retrieval.corpus import Corpus, FileState, Scan, digest_of, state_of
from atpo_async.environments.retrieval.protocol import Passage
from atpo_async.run import files, locks
from atpo_async.run.installed import version_of

SUFFIX = ".bm25"
FORMAT = 1
"""Of the folder; another number means another index."""

_FACTS, _PLACES, _LOCK, _UNFINISHED = "facts.json", "places.npy", "lock", ".unfinished"


class PassageIndex:
    """An index that is open, with its corpus.  Searching is safe from several threads."""

    def __init__(self, corpus_path: Path, folder: Path) -> None:
        bm25s = library()
        self.folder = folder
        self.corpus = Corpus(corpus_path, np.asarray(np.load(folder / _PLACES, mmap_mode="r")))
        self._bm25 = bm25s.BM25.load(folder, mmap=True, backend="numpy", show_progress=False)
        # Slices of numpy's own subclass for mapped files take six times as long; the memory stays mapped.
        self._bm25.scores = {
            name: np.asarray(value) if isinstance(value, np.ndarray) else value
            for name, value in self._bm25.scores.items()
        }
        # The one that made the index, as it was then: words that are not in its vocabulary are left out.
        self._tokenizer = bm25s.tokenization.Tokenizer()
        self._tokenizer.word_to_id = self._bm25.vocab_dict

    @classmethod
    def open(
        cls, corpus: str | Path, folder: str | Path | None = None, *, say: Callable[[str], None] = lambda line: None
    ) -> PassageIndex:
        """The index of a corpus, made first where there is none of what the corpus holds now.

        Args:
            corpus: a JSONL file (``corpus.py``).
            folder: of the index; beside the corpus, with ``.bm25`` at the end of its name, where it is None.
            say: takes a line about what is done that takes long.

        Raises:
            SetupError: the corpus cannot be read, has a line that is no passage, or is empty; the folder cannot be
                written.
        """
        path = Path(corpus)
        return cls(path, made(path, Path(folder) if folder is not None else folder_beside(path), say=say))

    def __len__(self) -> int:
        return len(self.corpus)

    @property
    def mapped_bytes(self) -> int:
        """Of the index's files; what of them is in memory is the system's cache."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def search(self, query: str, topk: int) -> list[tuple[int, float]]:
        """(passage number, score) of the best ``topk`` passages that share a word with ``query``, the best first.

        Passages of one score are in the corpus's order, so the same query always finds the same.
        """
        (known,) = self._tokenizer.streaming_tokenize([query], update_vocab=False, allow_empty=False)
        return best(self._bm25.get_scores_from_ids(known), topk) if known else []

    def passages(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """For every query the passages that ``search`` finds.  Raises SetupError if the corpus was changed."""
        return [[self.corpus.passage(number, score) for number, score in self.search(q, topk)] for q in queries]

    def close(self) -> None:
        """Close the corpus; what is mapped goes with the object."""
        self.corpus.close()


def library() -> Any:
    """bm25s, which logs each step as it is made to by its import."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def best(scores: np.ndarray, topk: int) -> list[tuple[int, float]]:
    """(index, score) of the highest ``topk`` scores above zero, the best first, the lower index first among equals.

    bm25s's own selection partitions all scores, nearly all of which are zero: numpy takes 20 times as long over that
    as over finding those that matter.
    """
    highest = scores.max()
    for share in (0.5, 0.25, 0.0):
        found = np.flatnonzero(scores > share * highest)
        if len(found) >= topk:
            break
    if len(found) > topk:
        values = scores[found]
        found = found[values >= np.partition(values, len(found) - topk)[len(found) - topk]]
    order = found[np.argsort(-scores[found], kind="stable")][:topk]
    return list(zip(order.tolist(), scores[order].tolist(), strict=True))


def folder_beside(corpus: Path) -> Path:
    """Where the index of a corpus lies unless another folder is named."""
    return corpus.with_name(corpus.name + SUFFIX)


def made(corpus: Path, folder: Path, *, say: Callable[[str], None]) -> Path:
    """The folder of a finished index of what ``corpus`` holds now.  Raises SetupError.

    Waits for: another process that makes it.
    """
    now = state_of(corpus)
    if (found := _finished(folder, now)) is not None:
        return found
    with _alone(folder, say=say):
        # Another process may have made it meanwhile, or the file may be the same with another time.
        if (found := _finished(folder, now) or _renewed(folder, corpus, now)) is not None:
            return found
        say(f"making the index of {corpus} in {folder}")
        _clear_unfinished(folder)
        with _named_errors(folder):
            done = _build(corpus, folder, now, say=say)
            _remove_others(folder, done)
        return done


def _facts(folder: Path) -> dict[str, Any]:
    """Of the finished index in ``folder``; empty where there is none of this library, or one that lacks a file."""
    try:
        facts = json.loads((folder / _FACTS).read_bytes())
        fits = (facts["format"], facts["bm25s"]) == (FORMAT, version_of("bm25s"))
        whole = facts["files"] == _sizes(folder / facts["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return facts if fits and whole else {}


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def _finished(folder: Path, now: FileState) -> Path | None:
    facts = _facts(folder)
    if facts and (facts["size"], facts["mtime_ns"]) == (now.size, now.mtime_ns):
        return folder / str(facts["name"])
    return None


def _renewed(folder: Path, corpus: Path, now: FileState) -> Path | None:
    """A copy of the corpus has another time of change and the same bytes: its index is kept."""
    facts = _facts(folder)
    if not facts or facts["size"] != now.size or facts["sha256"] != digest_of(corpus):
        return None
    with _named_errors(folder):
        files.write_atomic(folder / _FACTS, json.dumps({**facts, **dataclasses.asdict(now)}))
    return folder / str(facts["name"])


def _build(corpus: Path, folder: Path, now: FileState, *, say: Callable[[str], None]) -> Path:
    bm25s = library()
    scan = Scan(corpus, say=say)
    # Not `bm25s.tokenize`: it takes a list of all texts, this one reads the corpus as it goes.
    tokenizer = bm25s.tokenization.Tokenizer()
    words = list(tokenizer.streaming_tokenize(scan.contents(), update_vocab=True))
    if state_of(corpus) != now:
        raise SetupError(f"{corpus} was changed while its index was made of it; start again once it is whole")
    say(f"{len(words):,} passages read; computing their scores")
    bm25 = bm25s.BM25()
    bm25.index(bm25s.tokenization.Tokenized(ids=words, vocab=tokenizer.word_to_id), show_progress=False)
    aside = folder / f"{_UNFINISHED}-{os.getpid()}-{threading.get_ident()}"
    done = folder / scan.digest[:16]
    try:
        aside.mkdir()
        bm25.save(aside, show_progress=False)
        np.save(aside / _PLACES, np.array(scan.places, np.int64))
        for file in aside.iterdir():
            files.sync(file)
        if done.exists():  # of another version of the library
            shutil.rmtree(done)
        aside.rename(done)
        facts: dict[str, Any] = {
            "format": FORMAT,
            "bm25s": version_of("bm25s"),
            "name": done.name,
            "sha256": scan.digest,
        }
        facts |= {"files": _sizes(done), **dataclasses.asdict(now)}
        files.write_atomic(folder / _FACTS, json.dumps(facts))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return done


@contextlib.contextmanager
def _alone(folder: Path, *, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock inside the block; the folder is made where it is missing."""
    with _named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        mine = locks.take(folder / _LOCK, f"{os.getpid()}\n")
    if mine is None:
        say(f"process {locks.words_in(folder / _LOCK) or '?'} makes the index in {folder}; waiting for it")
        with locks.alone(folder / _LOCK):
            yield
        return
    try:
        yield
    finally:
        mine.release()


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        said = f"the index cannot be written to {folder}: {exc.strerror or exc}"
        raise SetupError(f"{said}; name another folder with --index") from exc


def _clear_unfinished(folder: Path) -> None:
    """Of processes that ended while they made one: whichever makes one holds the lock."""
    for left in folder.glob(f"{_UNFINISHED}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _remove_others(folder: Path, done: Path) -> None:
    """Of the corpus as it was.  A process that has one mapped keeps it until it lets go."""
    for other in folder.iterdir():
        if other.is_dir() and other != done and (other / _PLACES).exists():
            shutil.rmtree(other, ignore_errors=True)
