"""The BM25 index: what it finds, that it is made once and mapped, and the errors of a corpus."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async.core.errors import SetupError
from atpo_async.environments.retrieval import LocalRetriever, PassageIndex, RetrievalFailed
from atpo_async.environments.retrieval import index as index_module
from atpo_async.environments.retrieval.index import best, folder_beside, library
from atpo_async.environments.retrieval.protocol import BadRequest
from tests.retrieval_support import rows, write_corpus, write_rows


def titles(index: PassageIndex, query: str, topk: int = 3) -> list[str]:
    return [passage.title for passage in index.passages([query], topk)[0]]


class Said(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)

    @property
    def made(self) -> int:
        return sum(line.startswith("making") for line in self)


def test_a_query_finds_the_passages_that_share_its_words_and_no_others(tmp_path: Path) -> None:
    index = PassageIndex.open(write_corpus(tmp_path))
    assert set(titles(index, "Which towns are on the river Tole?")) == {"Arden", "Brill"}
    assert titles(index, "Who built the lighthouse of Dunmere?")[0] == "Dunmere"
    assert len(titles(index, "Anselm Dray", topk=1)) == 1
    assert [titles(index, query) for query in ("", "  ", "the of a", "zebra", "?!")] == [[]] * 5
    (passage,) = index.passages(["salt"], 3)[0]
    assert (passage.id, passage.title, passage.text) == ("104", "Esk", "Esk exports salt and glass.")
    assert passage.contents == rows()[4]["contents"]
    assert passage.score is not None
    assert passage.score > 0


def test_a_query_finds_what_the_librarys_own_retrieve_finds(tmp_path: Path) -> None:
    index = PassageIndex.open(write_corpus(tmp_path))
    bm25s = library()
    bm25 = bm25s.BM25.load(index.folder)
    for query in (
        "The LIGHTHOUSE of Dunmere, and glass",
        "river harbour",
        "Dray Dray salt",
        "Anselm's town: Ärger 1811",
    ):
        words = bm25s.tokenize(query, return_ids=False, show_progress=False)
        (numbers,), (scores,) = bm25.retrieve(words, k=6, show_progress=False)
        theirs = {int(number): float(score) for number, score in zip(numbers, scores, strict=True) if score > 0}
        assert dict(index.search(query, 6)) == theirs


def test_title_and_text_make_the_same_passages_as_contents(tmp_path: Path) -> None:
    split = [dict(zip(("title", "text"), row["contents"].split("\n"), strict=True)) for row in rows()]
    for row in split:
        row["title"] = row["title"].strip('"')
    written = write_rows(tmp_path / "split.jsonl", split)
    ours, plain = PassageIndex.open(written), PassageIndex.open(write_corpus(tmp_path))
    for query in ("river", "glass", "Anselm Dray"):
        assert [p.contents for p in ours.passages([query], 3)[0]] == [p.contents for p in plain.passages([query], 3)[0]]
    assert ours.passages(["salt"], 1)[0][0].id == "4"  # a row without an id is named by its number


def test_the_best_are_the_librarys_own_choice_and_ties_keep_the_corpuss_order() -> None:
    rng = np.random.default_rng(3)
    for topk in (1, 2, 3, 10, 400):
        scores = np.where(rng.random(300) < 0.2, rng.random(300), 0.0).astype(np.float32)
        scores[[7, 70, 170]] = scores.max() + 1
        order = sorted(range(300), key=lambda n: (-scores[n], n))
        assert [n for n, _ in best(scores, topk)] == [n for n in order if scores[n] > 0][:topk]
    assert best(np.zeros(5, np.float32), 3) == []


def test_the_index_is_made_once_and_mapped_from_files_ever_after(tmp_path: Path) -> None:
    corpus, said = write_corpus(tmp_path), Said()
    first = PassageIndex.open(corpus, say=said)
    second = PassageIndex.open(corpus, say=said)
    assert said.made == 1
    assert first.folder == second.folder
    assert folder_beside(corpus) == first.folder.parent
    assert titles(first, "glass") == titles(second, "glass") == ["Esk", "Brill"]
    for name in ("data", "indices", "indptr"):
        base = second._bm25.scores[name]
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)


def test_another_content_makes_the_index_again_and_a_copy_of_the_same_does_not(tmp_path: Path) -> None:
    corpus, said = write_corpus(tmp_path), Said()
    before = PassageIndex.open(corpus, say=said)
    os.utime(corpus, ns=(1, 1))
    assert PassageIndex.open(corpus, say=said).folder == before.folder
    assert said.made == 1
    write_rows(tmp_path / "new.jsonl", [*rows(), {"id": "x", "contents": '"Gorse"\nGorse sells zebras.'}]).replace(
        corpus
    )
    after = PassageIndex.open(corpus, say=said)
    assert said.made == 2
    assert titles(after, "zebras") == ["Gorse"]
    assert titles(before, "salt") == ["Esk"]  # still mapped, though its folder is gone
    assert [path for path in folder_beside(corpus).iterdir() if path.is_dir()] == [after.folder]


@pytest.mark.parametrize("damage", ["facts", "file", "version"])
def test_an_index_that_is_damaged_or_of_another_version_is_made_again(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, said = write_corpus(tmp_path), Said()
    folder = PassageIndex.open(corpus, say=said).folder
    if damage == "facts":
        (folder.parent / "facts.json").write_text("{")
    elif damage == "file":
        os.truncate(folder / "data.csc.index.npy", 20)
    else:
        monkeypatch.setattr(index_module, "version_of", lambda name: "9.9")
    assert titles(PassageIndex.open(corpus, say=said), "salt") == ["Esk"]
    assert said.made == 2


def test_two_that_open_a_new_corpus_at_once_make_one_index(tmp_path: Path) -> None:
    corpus, said = write_corpus(tmp_path), Said()
    opened: list[PassageIndex] = []
    threads = [threading.Thread(target=lambda: opened.append(PassageIndex.open(corpus, say=said))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said.made == 1
    assert [titles(index, "salt") for index in opened] == [["Esk"]] * 4


def test_what_a_maker_that_was_killed_left_is_removed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    left = folder_beside(corpus) / ".unfinished-1-1"
    left.mkdir(parents=True)
    PassageIndex.open(corpus)
    assert not left.exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": 1, "contents": "a', "no JSON"),
        ("[1, 2]", "a passage is a JSON object"),
        ('{"id": "7", "body": "x"}', 'has "contents", or "title" and "text"; this row has id, body'),
        ('{"id": "7", "contents": null}', "contents is None: it must be a text"),
        ('{"title": "x", "text": 3}', "text is 3: it must be a text"),
        ("{}", "this row has no columns"),
    ],
)
def test_a_line_that_is_no_passage_is_named(tmp_path: Path, line: str, said: str) -> None:
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text(f"{json.dumps(rows()[0])}\n\n{line}\n")
    with pytest.raises(SetupError, match=r"bad\.jsonl, line 3: ") as caught:
        PassageIndex.open(corpus)
    assert said in str(caught.value)
    assert not [path for path in folder_beside(corpus).iterdir() if path.is_dir()]


def test_a_corpus_that_is_missing_empty_packed_or_not_text_is_refused(tmp_path: Path) -> None:
    cases = {"none": (None, "is not here"), "empty": (b"", "is empty"), "blank": (b"\n \n", "only blank lines")}
    cases["packed"] = (gzip.compress(b"{}"), "gunzip it first")
    cases["latin"] = ('{"contents": "é"}'.encode("latin-1"), "line 1: it is no UTF-8 text")
    for name, (content, said) in cases.items():
        path = tmp_path / f"{name}.jsonl"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SetupError, match=f"{name}.jsonl.*{said}"):
            PassageIndex.open(path)
    with pytest.raises(SetupError, match="cannot be read"):
        PassageIndex.open(tmp_path)


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"cannot be written to .*file/x: .*; name another folder with --index"):
        PassageIndex.open(corpus, tmp_path / "file" / "x")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(SetupError, match="No space left on device; name another folder"):
        PassageIndex.open(corpus)
    assert [path.name for path in folder_beside(corpus).iterdir()] == ["lock"]


async def test_a_local_retriever_answers_as_a_client_does(tmp_path: Path) -> None:
    retriever = LocalRetriever(write_corpus(tmp_path), topk=1)
    found = await retriever.search(["Who built the lighthouse?", "", "zebra"])
    assert [[passage.title for passage in passages] for passages in found] == [["Dunmere"], [], []]
    assert len((await retriever.search(["glass"], 2))[0]) == 2
    for queries, topk, said in (
        ([3], None, r"queries\[0\] is 3 \(int\)"),
        ("salt", None, "queries is 'salt': it must be a list"),
        (["x" * 20_001], None, "20,001 characters"),
        (["salt"], 0, "topk is 0"),
        (["salt"], True, "topk is True"),
        (["salt"], 101, "from 1 to 100"),
    ):
        with pytest.raises(BadRequest, match=said):
            await retriever.search(queries, topk)  # type: ignore[arg-type]
    await retriever.close()


async def test_a_corpus_that_was_cut_short_in_its_place_is_an_error_of_the_query(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    retriever = LocalRetriever(corpus)
    shutil.copyfile(os.devnull, corpus)
    with pytest.raises(RetrievalFailed, match=r"towns\.jsonl was changed since its index was made: start again"):
        await retriever.search(["salt"])
