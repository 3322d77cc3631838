"""Rows of files and data sets become tasks: read, split, ordered; what is wrong with them is said with its place."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from atpo_async.environments.data import splits, task_data
from atpo_async.environments.data.faults import RowRefused
from atpo_async.environments.data.task_data import TaskData, TaskRow

ROWS: list[dict[str, Any]] = [{"question": f"Who leads team {i}?", "answer": f"Ada {i}", "level": i} for i in range(40)]

VERL = {
    "data_source": "searchR1_nq",
    "prompt": [{"role": "user", "content": "Answer: who is the boss of Ada?", "name": None}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Bob", "Robert"]}},
    "extra_info": {"split": "train", "index": 0},
}
FLASHRAG = {"id": "dev_0", "question": "Who?", "golden_answers": ["Bob"], "metadata": {"type": "bridge"}}


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return str(path)


def zipped(path: Path, rows: list[Any]) -> str:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(path)


def listed(path: Path, rows: list[Any]) -> str:
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


def saved(path: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


FORMS: dict[str, Callable[[Path, list[dict[str, Any]]], str]] = {
    "rows.jsonl": lines, "rows.parquet": table, "rows.jsonl.gz": zipped, "rows.json": listed, "rows": saved,
}  # fmt: skip


def every(data: TaskData, split: str = "train") -> list[TaskRow]:
    return [data.task(split, i) for i in range(data.num_tasks(split))]  # type: ignore[arg-type]


def said(load: Callable[[], object], kind: type[AtpoError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        load()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 900
    return text


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_each_row_once_in_one_and_the_same_order(form: str, tmp_path: Path) -> None:
    data = TaskData.load(FORMS[form](tmp_path / form, ROWS), seed=3)
    tasks = every(data)
    assert sorted(task.row["level"] for task in tasks) == list(range(40))
    assert all(task.row == ROWS[task.row["level"]] for task in tasks)
    assert all(task.messages == [{"role": "user", "content": task.row["question"]}] for task in tasks)
    assert all(task.answer == f"Ada {task.row['level']}" for task in tasks)
    in_memory = [task.row["level"] for task in every(TaskData.load(ROWS, seed=3))]
    assert [task.row["level"] for task in tasks] == in_memory != list(range(40))
    level = tasks[0].row["level"]
    place = f"line {level + 1}" if "jsonl" in form else f"row {level}"
    assert tasks[0].where == f"{tmp_path / form}, {place}"


@pytest.mark.parametrize("form", ["rows.jsonl", "rows.parquet", "rows"])
def test_verls_rows_and_flashrags_need_no_code(form: str, tmp_path: Path) -> None:
    [task] = every(TaskData.load(FORMS[form](tmp_path / form, [VERL])))
    # Tables have a value for every field of every message: None is no field.
    assert task.messages == [{"role": "user", "content": "Answer: who is the boss of Ada?"}]
    assert task.answer == ["Bob", "Robert"]
    assert task.row["extra_info"] == {"split": "train", "index": 0}
    assert task.row["data_source"] == "searchR1_nq"
    [other] = every(TaskData.load([FLASHRAG]))
    assert (other.messages[0]["content"], other.answer, other.row["id"]) == ("Who?", ["Bob"], "dev_0")
    gsm8k = VERL | {"reward_model": {"style": "rule", "ground_truth": "72"}}
    assert TaskData.load([gsm8k]).task("train", 0).answer == "72"


def test_messages_keep_their_system_message_and_their_turns() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "who?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "Ada", "tool_call_id": "1"},
    ]
    found = TaskData.load([{"messages": messages, "prompt": "not this", "question": "nor this"}]).task("train", 0)
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "tool"]
    assert found.messages[1]["content"] == "Hi, who?"
    assert found.messages[2]["tool_calls"] == messages[2]["tool_calls"]
    assert found.answer is None


def test_a_question_may_be_the_system_message_alone_as_in_at2pos_data() -> None:
    alone = [{"role": "system", "content": "Search.\nuser\nWho?"}]
    assert TaskData.load([VERL | {"prompt": alone}]).task("train", 0).messages == alone


def test_a_row_nested_beyond_reading_is_named_and_a_pipe_is_no_file(tmp_path: Path) -> None:
    deep = tmp_path / "deep.jsonl"
    deep.write_text('{"question": "a"}\n{"question": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(ConfigError, match=r"deep\.jsonl, line 2: .*recursion"):
        TaskData.load(str(deep))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigError, match=r"pipe\.jsonl.* is no regular file"):
        TaskData.load(str(tmp_path / "pipe.jsonl"))


def test_columns_may_be_the_text_of_a_toml_table_as_options_hold_no_tables() -> None:
    task = TaskData.load([{"q": "why?", "a": "so"}], columns="{question = 'q', answer = 'a'}").task("train", 0)
    assert (task.messages, task.answer) == ([{"role": "user", "content": "why?"}], "so")
    with pytest.raises(ConfigError, match=r"columns is 'q'.*expected a mapping.*--environment\.options\.columns"):
        TaskData.load([{"q": "why?"}], columns="q")


def test_columns_of_other_names_are_mapped_also_inside_a_mapping() -> None:
    row = {"q": "Who?", "question": "another text", "extra_info": {"solution": {"boxed": "Bob"}}}
    task = TaskData.load([row], columns={"question": "q", "answer": "extra_info.solution.boxed"}).task("train", 0)
    assert (task.messages[0]["content"], task.answer) == ("Who?", "Bob")


def test_rows_are_plain_python_whatever_arrays_they_came_as() -> None:
    row = {"question": "q", "n": np.int64(3), "x": np.array([1.5, 2.5]), "deep": [{"y": pyarrow.scalar([1, 2])}]}
    found = TaskData.load([row]).task("train", 0).row
    assert found == {"question": "q", "n": 3, "x": [1.5, 2.5], "deep": [{"y": [1, 2]}]}
    assert type(found["n"]) is int
    assert type(found["x"]) is list


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_are_no_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "one"}\r\n\r\n   \n{"question": "two"}')
    found = {task.messages[0]["content"]: task.where for task in every(TaskData.load(str(path)))}
    assert found == {"one": f"{path}, line 1", "two": f"{path}, line 4"}


def test_several_files_and_patterns_are_one_set_and_rows_keep_their_own_files_place(tmp_path: Path) -> None:
    lines(tmp_path / "part-0.jsonl", ROWS[:3])
    table(tmp_path / "part-1.parquet", ROWS[3:5])
    for data in ([str(tmp_path / "part-0.jsonl"), tmp_path / "part-1.parquet"], str(tmp_path / "part-*")):
        places = {task.row["level"]: task.where.rpartition("/")[2] for task in every(TaskData.load(data))}
        assert places == {
            0: "part-0.jsonl, line 1", 1: "part-0.jsonl, line 2", 2: "part-0.jsonl, line 3",
            3: "part-1.parquet, row 0", 4: "part-1.parquet, row 1",
        }  # fmt: skip


def test_a_saved_set_of_several_splits_is_read_by_split(tmp_path: Path) -> None:
    each = {name: datasets.Dataset.from_list(ROWS[a:b]) for name, a, b in (("train", 0, 5), ("test", 5, 7))}
    datasets.DatasetDict(each).save_to_disk(str(tmp_path / "set"))
    data = TaskData.load(str(tmp_path / "set"), eval_data=str(tmp_path / "set") + "/")
    assert (data.num_tasks("train"), data.num_tasks("eval")) == (5, 2)
    assert TaskData.load(str(tmp_path / "set"), split="test").num_tasks("train") == 2
    text = said(lambda: TaskData.load(str(tmp_path / "set"), split="tset"))
    assert "no split 'tset'" in text
    assert "train, test" in text
    assert "did you mean 'test'" in text


# --- order and held-out part ---------------------------------------------------------------------------------------


def test_the_order_depends_on_the_seed_alone_and_repeats_past_the_end() -> None:
    first, again, other = (TaskData.load(ROWS, seed=seed) for seed in (1, 1, 2))
    order = [task.row["level"] for task in every(first)]
    assert [task.row["level"] for task in every(again)] == order != [task.row["level"] for task in every(other)]
    assert [first.task("train", i).row["level"] for i in range(40, 80)] == order


def test_the_order_is_that_of_these_numbers_on_every_machine() -> None:
    assert splits.order(np.arange(10), 7).tolist() == [7, 3, 8, 5, 0, 2, 9, 4, 1, 6]


def test_a_share_is_held_out_by_question_whatever_the_seed_and_the_other_rows() -> None:
    rows = [{"question": f"q{i}", "n": i} for i in range(2000)]
    data = TaskData.load(rows, eval_share=0.1, seed=1)
    held, trained = ({t.row["n"] for t in every(data, split)} for split in ("eval", "train"))
    assert not held & trained
    assert len(held | trained) == 2000
    assert 150 < len(held) < 250
    other = TaskData.load(rows, eval_share=0.1, seed=2)
    assert [t.row["n"] for t in every(other, "eval")] == [t.row["n"] for t in every(data, "eval")]
    more = TaskData.load([{"question": f"new {i}", "n": -i} for i in range(1, 500)] + rows, eval_share=0.1)
    assert {t.row["n"] for t in every(more, "eval") if t.row["n"] >= 0} == held


def test_rows_with_one_question_or_of_one_group_are_never_on_both_sides() -> None:
    rows = [{"question": f"Is {i % 50} even?" if i % 2 else f" is  {i % 50} EVEN?", "world": i % 7} for i in range(400)]
    data = TaskData.load(rows, eval_share=0.3)
    asked = [{" ".join(t.messages[0]["content"].casefold().split()) for t in every(data, s)} for s in ("train", "eval")]
    assert not asked[0] & asked[1]
    assert all(asked)
    data = TaskData.load(rows, eval_share=0.3, columns={"group": "world"})
    worlds = [{t.row["world"] for t in every(data, split)} for split in ("train", "eval")]
    assert not worlds[0] & worlds[1]
    assert worlds[0] | worlds[1] == set(range(7))


def test_even_a_small_file_keeps_one_row_out() -> None:
    assert TaskData.load(ROWS[:3], eval_share=0.001).num_tasks("eval") == 1


def test_training_rows_that_ask_a_held_out_question_are_left_out(tmp_path: Path) -> None:
    held = lines(tmp_path / "dev.jsonl", [{"question": "WHO leads team 3?"}, {"question": "Another?"}])
    data = TaskData.load(lines(tmp_path / "train.jsonl", ROWS), eval_data=held)
    assert {t.row["level"] for t in every(data)} == set(range(40)) - {3}
    assert data.num_tasks("eval") == 2


# --- faults of settings and files ------------------------------------------------------------------------------------


def test_without_a_held_out_part_an_evaluation_is_refused_with_the_ways_out() -> None:
    text = said(lambda: TaskData.load(ROWS).num_tasks("eval"))
    assert "no held-out tasks" in text
    assert "eval_data" in text
    assert "eval_share" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"eval_share": 1.0}, ["eval_share is 1.0 (float)", "between 0 and 1"]),
        ({"eval_share": "0.1"}, ["eval_share is '0.1' (str)"]),
        ({"eval_share": 0.1, "eval_data": ROWS}, ["eval_data", "eval_share", "leave one out"]),
        ({"eval_data": ROWS}, ["asks every question of data", "group"]),
        ({"seed": 1.5}, ["seed is 1.5 (float)"]),
        ({"columns": {"question": "qestion"}}, ["'qestion'", "question, answer, level", "did you mean 'question'"]),
        ({"columns": {"answr": "a"}}, ["columns.answr", "did you mean 'answer'"]),
        ({"columns": {"question": "question", "prompt": "answer"}}, ["both name the question"]),
        ({"columns": ["question"]}, ["columns is ['question'] (list)", "a mapping"]),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_value_and_the_way_out(
    given: dict[str, Any], words: list[str]
) -> None:
    text = said(lambda: TaskData.load(ROWS, **given))
    assert all(word in text for word in words), text


def test_a_share_that_leaves_no_row_says_how_many_questions_there_are() -> None:
    text = said(lambda: TaskData.load([{"question": "Solve it."}] * 5, eval_share=0.2))
    assert "5 rows ask 1 question" in text
    assert "columns = {group" in text


def test_missing_files_are_named_with_the_folder_and_the_nearest_name(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", ROWS)
    text = said(lambda: TaskData.load(str(tmp_path / "trian.jsonl")), SetupError)
    assert str(tmp_path) in text
    assert "did you mean 'train.jsonl'" in text
    assert "no folder" in said(lambda: TaskData.load(str(tmp_path / "no" / "a.jsonl")), SetupError)
    assert "no file matches" in said(lambda: TaskData.load(str(tmp_path / "*.parquet")), SetupError)
    assert "*.jsonl" in said(lambda: TaskData.load(str(tmp_path)))
    (tmp_path / "a.csv").write_text("question\n")
    assert ".parquet" in said(lambda: TaskData.load(str(tmp_path / "a.csv")))
    text = said(lambda: TaskData.load(ROWS, eval_data=str(tmp_path / "dve.jsonl")), SetupError)
    assert text.startswith("eval_data = ")
    assert "expected a file" in said(lambda: TaskData.load(7))  # type: ignore[arg-type]


def test_empty_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b"\n\n"), ("b.jsonl", b""), ("c.json", b"[]")):
        (tmp_path / name).write_bytes(content)
        assert f"{name}' holds no rows" in said(lambda: TaskData.load(str(tmp_path / name)))  # noqa: B023
    good = Path(table(tmp_path / "whole.parquet", ROWS)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(good[: len(good) // 2])
    text = said(lambda: TaskData.load(str(tmp_path / "cut.parquet")), SetupError)
    assert "cut.parquet" in text
    assert "fetch it again" in text
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "?"}' * 99)[:40])
    assert "cut.jsonl.gz" in said(lambda: TaskData.load(str(tmp_path / "cut.jsonl.gz")), SetupError)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.json").write_text("{}")
    assert "save it again" in said(lambda: TaskData.load(str(tmp_path / "state")), SetupError)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "x", "answer": }', ["line 3", "no JSON", "byte", "answer"]),
        ('{"question": "cut off', ["line 3", "no JSON"]),
        ('["question", "x"]', ["line 3", "['question', 'x'] (list)", "expected an object"]),
        ('"just a text"', ["line 3", "(str)"]),
        ("question,answer", ["line 3", "no JSON", "'question,answer'"]),
    ],
)
@pytest.mark.parametrize("at", [2, 150])
def test_a_line_that_is_no_json_object_is_refused_when_the_file_is_opened(
    line: str, words: list[str], at: int, tmp_path: Path
) -> None:
    texts = [json.dumps({"question": f"q{i}"}) for i in range(200)]
    texts[at] = line
    (tmp_path / "train.jsonl").write_text("\n".join(texts))
    text = said(lambda: TaskData.load(str(tmp_path / "train.jsonl")))
    assert all(word.replace("line 3", f"line {at + 1}") in text for word in words), text
    assert "mend or remove it" in text


def test_a_json_file_that_holds_one_object_over_several_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps({"data": [1, 2]}, indent=1))
    assert "squad.json, line 1" in said(lambda: TaskData.load(str(tmp_path / "squad.json")))
    (tmp_path / "cut.json").write_text('[{"question": "a"},\n {"question": ')
    assert "expected a JSON list of objects" in said(lambda: TaskData.load(str(tmp_path / "cut.json")))


def test_data_without_a_question_names_its_columns_and_what_to_write() -> None:
    text = said(lambda: TaskData.load([{"problem": "1 + 1", "solution": "2"}]))
    assert "problem, solution" in text
    assert "columns = {question = 'problem'}" in text
    assert "data[1] is 'no row' (str)" in said(lambda: TaskData.load([{"question": "x"}, "no row"]))


def test_a_name_of_the_hub_without_network_is_answered_at_once_with_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = datasets.config.HF_HUB_OFFLINE
    text = said(lambda: TaskData.load("hotpotqa/hotpot_qa:distractor"), SetupError)
    assert "'hotpotqa/hotpot_qa'" in text
    assert "cannot be reached" in text
    assert "save_to_disk" in text
    assert datasets.config.HF_HUB_OFFLINE is before
    # A path whose folder is here is a slip in a file's name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert "no such file" in said(lambda: TaskData.load("data/train"), SetupError)


def test_a_name_of_the_hub_is_loaded_by_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS[:5] if split == "train" else ROWS[5:])

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["distractor", "fullwiki"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation"])
    data = TaskData.load("hotpotqa/hotpot_qa:distractor", eval_data="hotpotqa/hotpot_qa:fullwiki")
    assert (data.num_tasks("train"), data.num_tasks("eval")) == (5, 35)
    TaskData.load("hotpotqa/hotpot_qa:distractor:train[:50%]")
    assert [entry[1:] for entry in asked] == [
        ("distractor", "train"), ("fullwiki", "validation"), ("distractor", "train[:50%]"),
    ]  # fmt: skip
    text = said(lambda: TaskData.load("hotpotqa/hotpot_qa:distractor:test"))
    assert "no split 'test'" in text
    assert "train, validation" in text
    text = said(lambda: TaskData.load("hotpotqa/hotpot_qa"))
    assert "several configurations: distractor, fullwiki" in text
    assert "'hotpotqa/hotpot_qa:distractor'" in text


# --- faults of single rows -------------------------------------------------------------------------------------------

BAD_ROWS: list[tuple[dict[str, Any], list[str]]] = [
    ({"answer": "x"}, ["no column 'question'", "it has: answer"]),
    ({"qestion": "x"}, ["no column 'question'", "did you mean 'qestion'"]),
    ({"question": None}, ["column 'question' is None (NoneType)"]),
    ({"question": "  "}, ["column 'question' is ' ' (str)", "not empty"]),
    ({"question": 7}, ["column 'question' is 7 (int)", "a list of messages"]),
    ({"question": []}, ["column 'question' is [] (list)"]),
    ({"question": ["hello"]}, ["column 'question[0]' is 'hello' (str)", "{role, content}"]),
    ({"question": [{"role": "human", "content": "x"}]}, ["'question[0].role' is 'human'", "user"]),
    ({"question": [{"role": "user"}]}, ["'question[0].content' is None"]),
    ({"question": [{"role": "user", "content": [{"type": "image"}]}]}, ["'question[0].content'", "a text"]),
    (
        {"question": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        ["'question[1].role' is 'assistant'", "answers to the last message"],
    ),
]


@pytest.mark.parametrize(("bad", "words"), BAD_ROWS)
def test_a_row_with_a_bad_value_costs_the_branches_that_ask_for_it_and_no_others(
    bad: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    path = lines(tmp_path / "train.jsonl", [*ROWS, bad])
    data = TaskData.load(path, eval_share=0.9)
    refused = []
    for index in range(data.num_tasks("train")):
        try:
            data.task("train", index)
        except RowRefused as exc:
            refused.append(exc)
    assert len(refused) == 1, "it is never held out"
    text = str(refused[0])
    assert text.startswith(f"{path}, line 41: ")
    assert all(word in text for word in words), text
    assert refused[0].field.startswith("column 'question")


def test_data_of_which_no_row_can_be_used_are_refused_with_the_first_fault(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", [{"question": "", "n": i} for i in range(3)])
    text = said(lambda: TaskData.load(path))
    assert "none of its 3 rows can be used" in text
    assert "row 0: column 'question' is ''" in text


def test_a_file_that_was_cut_short_meanwhile_costs_branches_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    data = TaskData.load(lines(path, ROWS))
    path.write_text("")
    with pytest.raises(RowRefused, match="written to after it was opened"):
        data.task("train", 0)


def test_files_too_large_to_look_through_are_read_when_a_row_is_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(task_data, "LOOKED_THROUGH_BYTES", 100)
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*(json.dumps(row) for row in ROWS * 4), "no json"]))
    data = TaskData.load(str(path))
    refused = []
    for index in range(data.num_tasks("train")):
        try:
            data.task("train", index)
        except RowRefused as exc:
            refused.append(str(exc).partition(":")[0])
    assert refused == [f"{path}, line 161"]
    assert "line 161" in said(lambda: TaskData.load(str(path), eval_share=0.5)), "a split needs every question"


def test_importing_the_data_loads_neither_pyarrow_nor_datasets() -> None:
    code = (
        "import sys, atpo_async.environments.data.task_data\n"
        "print({'pyarrow', 'datasets', 'huggingface_hub', 'torch', 'transformers', 'zmq'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "set()", run.stderr
