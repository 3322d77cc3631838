"""passage_qa: the corpus answers every question by real searches, and the policy's chat format is Qwen3's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from atpo_async.core.errors import ConfigError
from atpo_async.environments.base import StepResult
from atpo_async.environments.passage_qa.demonstrator import CAREFUL, END, Demonstrator, Habits, call
from atpo_async.environments.passage_qa.environment import PassageQA, corpus_of, make, search_tool
from atpo_async.environments.passage_qa.hosted import HostedRetriever
from atpo_async.environments.passage_qa.rehearsal import Rehearsal, make_tokenizer
from atpo_async.environments.passage_qa.tokenizer import MARKS
from atpo_async.environments.passage_qa.world import Question, Towns, query
from atpo_async.environments.retrieval import PassageIndex, RetrievalClient
from atpo_async.environments.retrieval.local import LocalRetriever

SMALL = Towns(seed=3, num_towns=2, num_names=16, num_relations=6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the policy's tokenizer, made in the small world."""
    folder = tmp_path_factory.mktemp("policy")
    make_tokenizer(folder, SMALL, scratch=tmp_path_factory.mktemp("scratch"))
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PassageIndex]:
    opened = PassageIndex.open(corpus_of(tmp_path_factory.mktemp("corpus"), Towns(seed=1)))
    yield opened
    opened.close()


def test_the_corpus_has_every_fact_of_every_town_once() -> None:
    passages = list(SMALL.passages())
    assert len(passages) == 2 * 16 * 6
    assert len({(p.title, p.text) for p in passages}) == len(passages)


def test_a_search_for_a_fact_finds_it_first_among_thousands_of_passages(index: PassageIndex) -> None:
    towns = Towns(seed=1)
    assert len(index) == 8 * 64 * 10
    for number in range(150):
        question = towns.question("eval", number)
        start = question.start
        for relation, name, asked in zip(question.relations, question.names, question.queries, strict=True):
            ((found,),) = index.passages([asked], 1)
            assert (found.title, found.text) == (f"{start} of {question.town}", f"The {relation} of {start} is {name}.")
            start = name
        assert start == question.answer


def test_a_query_without_its_town_mostly_finds_another_towns_fact(index: PassageIndex) -> None:
    towns = Towns(seed=1)
    asked = [query("boss", name, town) for town in towns.towns for name in towns.world.names[:8]]
    whole = index.passages(asked, 1)
    cut = index.passages([text.rpartition(" in ")[0] for text in asked], 1)
    same = sum(a[0].title == b[0].title for a, b in zip(whole, cut, strict=True))
    assert same <= len(asked) / 4


def test_held_out_questions_are_asked_nowhere_else_and_the_warm_start_has_other_facts() -> None:
    held_out = {SMALL.question("eval", number).text for number in range(200)}
    others = {SMALL.question(stream, number).text for stream in ("train", "demo") for number in range(400)}
    assert not held_out & others
    practised = Towns(seed=3, num_towns=2, num_names=16, num_relations=6, rehearsal=True)
    same = set(SMALL.passages()) & set(practised.passages())
    assert len(same) < 0.2 * 2 * 16 * 6
    assert SMALL.question("train", 7) == SMALL.question("train", 7)


def test_worlds_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_towns must be 1 to 16, got 17"):
        Towns(num_towns=17)
    with pytest.raises(ConfigError, match="hops must satisfy"):
        Towns(min_hops=4)


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Answer with a name alone. Search one fact at a time."},
    {"role": "user", "content": "In Ambleton, who is the boss of Ada?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"type": "function", "function": {"name": "search", "arguments": {"query": "boss of Ada in Ambleton"}}}
        ],
    },
    {"role": "tool", "content": "Ada of Ambleton: The boss of Ada is Bob."},
]


def test_the_renderer_of_qwen3_and_the_folders_own_template_write_the_same_ids(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    from atpo_async.environments.messages.chat_format import ChatFormat

    schema = search_tool(None).schema
    chat = ChatFormat.load(tokenizer, renderer="qwen3", tools=[schema])
    plain = AutoTokenizer.from_pretrained(tokenizer)
    for length in (2, 4):
        ids = chat.render(CONVERSATION[:length]).tolist()
        own = plain.apply_chat_template(
            CONVERSATION[:length], tools=[chat._shown[0] if chat._shown else schema], add_generation_prompt=True
        )["input_ids"]
        assert ids == own
        assert chat.decode(np.array(ids, np.int32)) == plain.decode(own)


def test_a_call_that_was_sampled_is_parsed_and_extended_to_what_the_renderer_writes(tokenizer: Path) -> None:
    from atpo_async.environments.messages.chat_format import ChatFormat

    chat = ChatFormat.load(tokenizer, renderer="qwen3", tools=[search_tool(None).schema])
    prompt = chat.render(CONVERSATION[:2])
    action = chat.encode(call("boss of Ada in Ambleton"))
    (said,) = chat.parse(prompt, action).tool_calls
    assert (said.name, said.arguments, said.fault) == ("search", {"query": "boss of Ada in Ambleton"}, "")
    message = {**CONVERSATION[2], "content": ""}
    extended = [*prompt, *action, *chat.extend(prompt, action, CONVERSATION[3:])]
    assert extended == chat.render([*CONVERSATION[:2], message, CONVERSATION[3]]).tolist()
    assert chat.parse(prompt, chat.encode(f"Bob{END}")).content == "Bob"


def test_a_name_is_one_token_wherever_it_stands_and_a_call_is_short(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tokenizer)
    for text in ("Ada of Brackley: The boss of Ada is Bob.", "Bob", 'query": "boss of Ada in Ambleton"'):
        pieces = plain.convert_ids_to_tokens(plain.encode(text, add_special_tokens=False))
        assert {"Ada", "Bob", "Ambleton", "Brackley"} >= {p for p in pieces if p[0] in "AB"}, pieces
        assert not any("Ġ" in piece and piece.strip("Ġ")[:1].isupper() for piece in pieces)
    assert len(plain.encode(call("boss of Ada in Ambleton"), add_special_tokens=False)) <= 20
    assert plain.decode(plain.encode("Grüße, 漢字\n\t!", add_special_tokens=False)) == "Grüße, 漢字\n\t!"
    assert all(len(plain.encode(mark, add_special_tokens=False)) == 1 for mark in MARKS)


def played(task: PassageQA, *actions: str, split: str = "train") -> tuple[str, list[StepResult]]:
    async def play() -> tuple[str, list[StepResult]]:
        episode = await task.start(split, 0)  # type: ignore[arg-type]
        results = [await episode.step(task.format.encode(action)) for action in actions]
        await episode.close()
        return task.decode(episode.prompt), results

    return asyncio.run(play())


@pytest.fixture
def task(tokenizer: Path) -> PassageQA:
    question = SMALL.question("train", 0)
    return PassageQA(tokenizer, LocalRetriever(corpus_of(tokenizer, SMALL), topk=1), [question], max_turns=4)


def test_a_question_answered_by_its_searches_is_correct(task: PassageQA) -> None:
    question = SMALL.question("train", 0)
    prompt, results = played(task, *map(call, question.queries), question.answer + END)
    assert question.text in prompt
    assert [result.done for result in results] == [*(False for _ in question.queries), True]
    assert (results[-1].reward, results[-1].success, results[-1].rewards) == (1.0, True, {"correct": 1.0})
    assert all(name in task.decode(r.observation) for name, r in zip(question.names, results, strict=False))


@pytest.mark.parametrize("answer", ["It is {}.", "Nobody", "{} "])
def test_only_the_name_alone_is_correct(task: PassageQA, answer: str) -> None:
    question = SMALL.question("train", 0)
    _, (result,) = played(task, answer.format(question.answer) + END)
    assert result.success is (answer == "{} "), "blanks around an answer are stripped"


def test_a_call_cut_short_is_answered_with_its_fault(task: PassageQA) -> None:
    _, (result,) = played(task, call("boss of Ada in Ambleton").replace('"}}\n', "\n"))
    assert not result.done
    assert "Error" in task.decode(result.observation)


def test_the_environment_asks_a_server_of_its_own_over_http(tokenizer: Path) -> None:
    retriever = HostedRetriever(corpus_of(tokenizer, SMALL), topk=1)
    question = SMALL.question("eval", 0)

    async def ask() -> tuple[str, str]:
        assert retriever.url == ""
        first, again = await asyncio.gather(retriever.search(question.queries[:1]), retriever.search(["boss"], 3))
        assert len(again[0]) == 3
        other = RetrievalClient(retriever.url)
        found = await other.search(question.queries[:1], 1)
        await other.close()
        await retriever.close()
        return first[0][0].text, found[0][0].text

    said, over_http = asyncio.run(ask())
    assert said == over_http
    assert said.endswith(f" is {question.names[0]}.")


def test_the_factory_takes_its_options_and_refuses_others(tokenizer: Path) -> None:
    made = make(tokenizer, seed=3, num_towns=2, num_names=16, num_relations=6, train_tasks=20, eval_tasks=5)
    assert (made.num_tasks("train"), made.num_tasks("eval")) == (20, 5)
    question = made.data.task("eval", 0)
    assert question.row["question"].startswith("In ")
    for options, says in (
        ({"hopps": 3}, "passage_qa has no such option"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"num_names": 2.5}, "must be a whole number"),
        ({"retriever": 3}, "expected a URL"),
        ({"retriever": "ftp://x"}, "expected the URL of a retrieval server"),
    ):
        with pytest.raises(ConfigError, match=says):
            make(tokenizer, **options)


def demonstrated(question: Question, habits: Habits, seed: int) -> list[str]:
    """Actions over perfect retrieval."""
    speaker = Demonstrator(question, SMALL.world.relations, habits, Random(seed))
    said: list[str] = []
    seen = ""
    while len(said) < 6:
        said.append(speaker.next(seen))
        if "<tool_call>" not in said[-1]:
            break
        try:
            asked = json.loads(said[-1].split("\n")[1])["arguments"]["query"].split()
        except ValueError:
            seen = "Error: it is no JSON"
            continue
        passage = SMALL.passage(question.town, asked[0], asked[2])
        seen = f"{passage.title}: {passage.text}"
    return said


def test_a_careful_demonstrator_answers_and_one_with_habits_mostly_does_not() -> None:
    questions = [SMALL.question("demo", number) for number in range(200)]
    right = {
        habits: sum(demonstrated(q, habits, n)[-1] == q.answer + END for n, q in enumerate(questions))
        for habits in (CAREFUL, Habits())
    }
    assert right[CAREFUL] >= 170
    assert right[Habits()] <= 70
    question = questions[0]
    perfect = Habits(noise=0.0, mixed_up=0)
    assert demonstrated(question, perfect, 0) == [*map(call, question.queries), question.answer + END]


def test_conversations_are_the_tasks_own_ids_with_what_the_demonstrator_said_marked(
    tokenizer: Path, tmp_path: Path
) -> None:
    questions = [SMALL.question("demo", number) for number in range(8)]
    rehearsal = Rehearsal(tokenizer, SMALL, questions, folder=tmp_path)
    conversations = rehearsal.play(range(8), Random(0), CAREFUL)
    again = rehearsal.play(range(8), Random(0), CAREFUL)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(conversations, again, strict=True))
    for each in conversations:
        text = rehearsal.text(each)
        assert text.endswith(END)
        said = rehearsal._task.decode(each.ids[each.is_action])
        assert said.count(END) == text.count("<|im_start|>assistant")
        assert "<tool_response>" not in said
        assert text.startswith("<|im_start|>system")
