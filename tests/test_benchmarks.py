"""Published test sets: found by name in a folder, answered, written down, gone on with, and shown as a table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from actors.benchmarks import Benchmarks, fingerprint
from atpo_async.cli import benchmarks as command
from atpo_async.cli.main import main
from atpo_async.config import Config, build
from atpo_async.core.errors import ConfigError, EnvironmentBroken, GenerationFailed, SetupError
from atpo_async.environments.search_qa import results
from atpo_async.environments.search_qa.benchmarks import PUBLISHED_SETS, Benchmark, locate, sets_named
from atpo_async.environments.search_qa.held_out import HeldOut
from atpo_async.environments.search_qa.results import Answered, ResultFile, line_of
from tests.actor_support import ScriptedEngine
from tests.search_qa_support import CITIES, corpus, flashrag, policy_folder, published, write_lines

# --- names and places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("hotpotqa,2wiki", ["hotpotqa", "2wiki"]),
        ("2wikimultihopqa", ["2wiki"]),
        ("NQ , popqa", ["nq", "popqa"]),
        ("multi-hop", ["hotpotqa", "2wiki", "musique", "bamboogle"]),
        ("single-hop", ["nq", "triviaqa", "popqa"]),
        ("nq,multi-hop", ["hotpotqa", "2wiki", "musique", "bamboogle", "nq"]),
        ("all", [each.name for each in PUBLISHED_SETS]),
    ],
)
def test_sets_are_named_alone_and_by_group(names: str, found: list[str]) -> None:
    assert [each.name for each in sets_named(names)] == found


def test_the_seven_sets_have_the_published_number_of_questions() -> None:
    assert sum(each.questions for each in PUBLISHED_SETS) == 51_713


@pytest.mark.parametrize(("names", "said"), [("hotpot", "there is no 'hotpot'; known: hotpotqa, 2wiki"), (",", "name")])
def test_a_name_that_is_none_is_refused(names: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--benchmarks.*{said}"):
        sets_named(names)


@pytest.mark.parametrize(
    "place",
    ["2wikimultihopqa/dev.jsonl", "2wiki/test.jsonl", "2wikimultihopqa_test.jsonl", "2wiki.jsonl", "2wiki.parquet"],
)
def test_a_set_is_found_in_flashrags_layout_and_as_one_file(tmp_path: Path, place: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert locate(tmp_path, sets_named("2wiki")) == [Benchmark(name="2wiki", file=str(file))]


def test_the_test_split_comes_before_the_dev_split(tmp_path: Path) -> None:
    for split in ("dev", "train", "test"):
        write_lines(tmp_path / f"nq_{split}.jsonl", flashrag(count=1))
    assert locate(tmp_path, sets_named("nq"))[0].file.endswith("nq_test.jsonl")


def merged(folder: Path) -> Path:
    """A test.parquet as both published scripts write it: two sets, told apart by ``data_source``."""
    rows = published("system", source="musique", count=2) + published("system", source="2wikimultihopqa", count=3)
    (folder / "multihop").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "multihop" / "test.parquet")
    return folder


def test_sets_are_found_inside_the_published_parquet_file(tmp_path: Path) -> None:
    found = locate(merged(tmp_path), sets_named("2wiki,musique"))
    assert [(each.name, each.source) for each in found] == [("2wiki", "2wikimultihopqa"), ("musique", "musique")]
    rows = HeldOut(found[0].file, source=found[0].source)
    assert rows.num_tasks("eval") == 3
    assert rows.task("eval", 2).row["reward_model"]["ground_truth"]["target"] == ["Lima", "Lima city"]
    assert "test.parquet" in rows.task("eval", 0).where
    with pytest.raises(ConfigError, match="no rows with data_source = 'nq'"):
        HeldOut(found[0].file, source="nq")


def test_what_is_missing_is_named_with_what_was_looked_for_and_how_to_get_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "nq.jsonl", flashrag(count=1))
    with pytest.raises(SetupError) as caught:
        locate(tmp_path, sets_named("nq,2wiki,popqa"))
    said = str(caught.value)
    assert f"{tmp_path} has no 2wiki, popqa; looked for 2wikimultihopqa/test.jsonl" in said
    assert "that data_source in test.parquet, multihop/test.parquet" in said
    assert "RUC-NLPIR/FlashRAG_datasets; 2wikimultihopqa, popqa" in said
    with pytest.raises(SetupError, match="nowhere: there is no such folder; they are part of FlashRAG's data sets"):
        locate(tmp_path / "nowhere", sets_named("nq"))
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(SetupError, match=r"test\.parquet cannot be read as a parquet file"):
        locate(tmp_path, sets_named("popqa"))


# --- the table -------------------------------------------------------------------------------------------------------


def answers(*ems: float, turns: int = 2) -> list[Answered]:
    return [
        Answered(index=n, em=em, f1=max(em, 0.5), reward=em, turns=turns, searches=turns - 1, end="done")
        for n, em in enumerate(ems)
    ]


FAILED = Answered(index=9, em=0.0, f1=0.0, reward=0.0, turns=0, searches=0, end="failed", failure="no answer in 50 s")


def test_a_failed_chain_counts_as_a_wrong_answer_and_not_in_the_turns() -> None:
    line = line_of("bamboogle", [*answers(1.0, 0.0, turns=3), FAILED, FAILED])
    assert (line.questions, line.published, line.failed) == (4, 125, 2)
    assert (line.em, line.f1) == (0.25, 0.375)
    assert (line.turns, line.searches) == (3.0, 2.0)
    assert line_of("nq", [FAILED]).turns == 0.0


LINES = [
    line_of("hotpotqa", answers(1.0, 0.0)),
    line_of("2wiki", answers(1.0, turns=4)),
    line_of("nq", [*answers(0.0, 0.0, 0.0, 1.0), FAILED]),
]


def test_the_table_has_each_benchmark_and_the_mean_of_each_group() -> None:
    text = results.printed(LINES)
    assert text.splitlines() == [
        "benchmark                questions      EM      F1  turns  searches  failed",
        "hotpotqa                2 of 7,405   50.00   75.00   2.00      1.00       0",
        "2wiki                  1 of 12,576  100.00  100.00   4.00      3.00       0",
        "multi-hop, mean of 2                 75.00   87.50   3.00      2.00",
        "nq                      5 of 3,610   20.00   50.00   2.00      1.00       1",
        "single-hop, mean of 1                20.00   50.00   2.00      1.00",
    ]
    page = results.markdown("step-20", LINES)
    assert "# Benchmarks of step-20" in page
    assert "| multi-hop, mean of 2 |  | 75.00 | 87.50 | 3.00 | 2.00 |  |" in page
    numbers = results.as_json("step-20", LINES)
    assert numbers["averages"]["multi-hop"]["em"] == 0.75
    assert numbers["benchmarks"]["nq"]["failed"] == 1


def test_a_result_file_is_gone_on_with_only_by_what_made_it_and_without_a_line_that_was_cut(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "out" / "nq.jsonl", "policy a")
    assert file.read() == {}
    first, second = answers(1.0, 0.0)
    file.begin({0: first})
    file.append(second)
    with file.path.open("a") as stream:
        stream.write('{"index": 2, "em": 1.')
    assert file.read() == {0: first, 1: second}
    assert ResultFile(file.path, "policy b").read() == {}
    assert results.every_answer(file.path) == {0: first, 1: second}
    file.begin(file.read())
    assert file.read() == {0: first, 1: second}


# --- answering -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_lines(tmp_path / "data_corpus.jsonl", corpus())
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "nq.jsonl", flashrag(count=4))
    write_lines(folder / "hotpotqa.jsonl", flashrag(first=4, count=3))
    return folder


def config_of(data: Path, **options: Any) -> Config:
    given = {"data": "elsewhere.jsonl", "retriever": f"local:{data.parent / 'data_corpus.jsonl'}", **options}
    return build(
        {
            "environment": {"name": "search_qa", "options": given},
            "model": {"max_context_tokens": 1024},
            "search": {"max_action_tokens": 64},
            "actor": {"max_num_seqs": 4, "engine": "transformers"},
        }
    )


class Clever(ScriptedEngine):
    """Searches once, then answers with the city of the first page, but for one question."""

    def __init__(self, work: Benchmarks, *, wrong_about: str = "Italy") -> None:
        super().__init__(self.say)
        self._tokenizer, self._wrong_about = work._tokenizer, wrong_about

    def say(self, context: np.ndarray, number: int) -> np.ndarray | Exception:
        text = self._tokenizer.decode(context.tolist())
        if "Page 1: " not in text:
            country = text.rpartition("capital of ")[2].partition("?")[0]
            said = f"<think> I ask </think> <search> capital of {country} </search>"
        else:
            city = text.partition("Page 1: ")[2].partition(" is ")[2].partition(".")[0]
            city = "nowhere" if self._wrong_about in text.partition("Page 1: ")[2][:20] else city
            said = f" <think> so </think> <answer> \\boxed{{{city}}} </answer>"
        return np.array(self._tokenizer.encode(said, add_special_tokens=False), dtype=np.int32)


async def answered(data: Path, model: Path, names: str, *, engine: Any = None, limit: int = 0, **options: Any) -> Any:
    work = Benchmarks(config_of(data, **options), model, data.parent / "out", limit=limit)
    work._engine = engine = engine(work) if engine is not None else Clever(work)
    await work.run(locate(data, sets_named(names)))
    return engine


def line(data: Path, name: str, limit: int = 0) -> results.Line:
    asked = command.Asked(benchmarks=name, data=data, out=data.parent / "out", limit=limit)
    return command.line(asked, Benchmark(name=name, file=""))


async def test_every_question_is_answered_once_greedily_and_counted(data: Path, model: Path) -> None:
    engine = await answered(data, model, "nq,hotpotqa")
    nq, hotpotqa = line(data, "nq"), line(data, "hotpotqa")
    assert (nq.questions, nq.em, nq.turns, nq.searches, nq.failed) == (4, 0.75, 2.0, 1.0, 0)
    assert (hotpotqa.questions, hotpotqa.em) == (3, 1.0)
    assert {sampling.temperature for sampling in engine.samplings} == {0.0}
    assert {sampling.stop_strings for sampling in engine.samplings} == {("</search>",)}
    assert CITIES[0] not in results.printed([nq])


async def test_an_evaluation_that_was_stopped_goes_on_where_it_was(data: Path, model: Path) -> None:
    with pytest.raises(BaseExceptionGroup):
        await answered(data, model, "nq", engine=Stopping)
    assert len(results.every_answer(data.parent / "out" / "nq.jsonl")) == 2
    engine = await answered(data, model, "nq")
    assert len(engine.contexts) == 4
    assert line(data, "nq").em == 0.75
    engine = await answered(data, model, "nq")
    assert not engine.contexts


class Stopping(Clever):
    """Its process ends after four searches and two answers."""

    def __init__(self, work: Benchmarks) -> None:
        super().__init__(work)
        self.file = work._out / "nq.jsonl"

    async def generate(self, prompt: Any, sampling: Any, **options: Any) -> Any:
        if len(self.contexts) == 6:
            while len(results.every_answer(self.file)) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)  # the two answers are written down meanwhile
            raise EngineGone("the process ends")
        return await super().generate(prompt, sampling, **options)


class EngineGone(BaseException):
    """As a signal that ends the process."""


async def test_other_settings_begin_anew_and_a_limit_takes_the_first_questions(data: Path, model: Path) -> None:
    first = await answered(data, model, "nq", limit=2)
    assert len(first.contexts) == 4
    assert line(data, "nq", limit=2).em == 0.5
    more = await answered(data, model, "nq")
    assert len(more.contexts) == 4
    other = await answered(data, model, "nq", topk=1)
    assert len(other.contexts) == 8


async def test_a_set_whose_every_chain_fails_stops_with_the_reason(data: Path, model: Path) -> None:
    class Broken(Clever):
        def say(self, context: np.ndarray, number: int) -> np.ndarray | Exception:
            return GenerationFailed("no memory")

    with pytest.raises(EnvironmentBroken, match=r"nq: all 4 chains failed; the latest: generate_failed: no memory"):
        await answered(data, model, "nq", engine=Broken)


def test_the_fingerprint_of_a_policy_follows_its_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100_000))
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(bytes(99_999) + b"x")
    assert fingerprint(tmp_path) != before


# --- the command -----------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_the_command_says_what_is_missing_before_anything_starts(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.json"
    file.write_text(config_of(data).model_dump_json())
    target = ["eval", str(model), str(file)]
    assert "error: --limit goes with --benchmarks" in refused(capsys, [*target, "--limit", "5"])
    assert "there is no 'nqq'" in refused(capsys, [*target, "--benchmarks", "nqq", "--data", str(data)])
    assert "has no popqa; looked for" in refused(capsys, [*target, "--benchmarks", "popqa", "--data", str(data)])
    assert "--limit must be >= 0" in refused(
        capsys, [*target, "--benchmarks", "nq", "--limit", "-1", "--data", str(data)]
    )  # fmt: skip
    hopqa = [*target, "--benchmarks", "nq", "--data", str(data), "--environment.name", "hopqa"]
    assert "for the environment 'search_qa', and the configuration's is hopqa; give one with it" in refused(
        capsys, hopqa
    )


def test_a_search_engine_that_is_down_is_said_before_anything_starts(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.json"
    file.write_text(config_of(data, retriever="http://127.0.0.1:9").model_dump_json())
    said = refused(capsys, ["eval", str(model), str(file), "--benchmarks", "nq", "--data", str(data)])
    assert said.count("the retrieval server http://127.0.0.1:9/retrieve (environment.options.retriever)") == 1


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_it(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.json"
    file.write_text(config_of(data).model_dump_json())
    words = ["eval", str(model), str(file), "--benchmarks", "all", "--data", "data", "--limit", "1"]
    for each in PUBLISHED_SETS:
        write_lines(data / f"{each.name}.jsonl", flashrag(count=1))
    assert main([*words, "--search.max_action_tokens", "8"]) == 0
    said = capsys.readouterr()
    out = tmp_path / "benchmarks" / model.name
    assert "popqa                  1 of 14,267  0.00" in said.out
    assert "single-hop, mean of 3" in said.out
    assert "| nq | 1 of 3,610 | 0.00 |" in (out / "table.md").read_text()
    assert json.loads((out / "results.json").read_text())["averages"]["multi-hop"]["em"] == 0.0
    assert "hotpotqa: 1 of 1 questions, EM 0.000 so far" in said.err
    assert "Loading weights" not in said.err
