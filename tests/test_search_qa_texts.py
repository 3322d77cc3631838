"""search_qa's texts: actions are read, passages written, answers judged, rows taken, by the rules of both dialects."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.environments.search_qa.actions import Asked, read_at2po, read_search_r1
from atpo_async.environments.search_qa.chain import Chain, Insert, Over, Search
from atpo_async.environments.search_qa.dialects import AT2PO, SEARCH_R1, dialect_of
from atpo_async.environments.search_qa.observations import observation_of
from atpo_async.environments.search_qa.prompts import INSTRUCTIONS, asked, messages_of, read_instructions
from atpo_async.environments.search_qa.rows import question_of
from atpo_async.environments.search_qa.scoring import boxed, exact_match, f1, fault_of, normalised, score
from atpo_async.environments.values import ValueRefused
from tests.search_qa_support import Found, flashrag, published

# --- actions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "query"),
    [
        ("<think> I need it </think> <search> capital of France </search>", "capital of France"),
        ("<search>a</search>", "a"),
        ("<search>a</search>\n", "a"),  # the last token reached beyond the tag
        ("<search> a <search> b </search>", "b"),
        ("<search> a </search> <search> b </search>", "a"),
        ("<search> Ünïcödé 東京 \n two lines </search>", "Ünïcödé 東京 \n two lines"),
        ("<search> </search>", ""),
        ("no beginning </search>", ""),
        ("</search> <search> a", ""),
        ("<answer> no </answer> <search> a </search>", "a"),
    ],
)
def test_at2po_searches_for_what_stands_before_the_closing_tag(action: str, query: str) -> None:
    assert read_at2po(action) == Asked("search", query)


@pytest.mark.parametrize(
    "action", ["", "<search> never closed", "<answer> Paris </answer>", "< /search>", "<Search> a"]
)
def test_at2po_ends_the_chain_at_every_other_action(action: str) -> None:
    assert read_at2po(action).kind == "none"


@pytest.mark.parametrize(
    ("action", "asked_for"),
    [
        ("<think> x </think> <search> a </search>", Asked("search", "a")),
        ("<answer> Paris </answer>", Asked("answer", "Paris")),
        ("<answer> Paris </answer>\n\n", Asked("answer", "Paris")),
        ("<search> a <answer> b </answer>", Asked("answer", "b")),
        ("<answer> b <search> a </search>", Asked("search", "a")),
        ("<answer> a </answer> <search> b </search>", Asked("answer", "a")),
        ("<search> a </search> <answer> b </answer>", Asked("search", "a")),
        ("<answer> b </search>", Asked("none")),
        ("<search></search>", Asked("search", "")),
        ("<search> a\nb </search>", Asked("search", "a\nb")),
        ("<answer> never closed", Asked("none")),
        ("", Asked("none")),
        ("</answer>", Asked("none")),
    ],
)
def test_search_r1_takes_the_first_whole_tag(action: str, asked_for: Asked) -> None:
    assert read_search_r1(action) == asked_for


# --- observations ------------------------------------------------------------------------------------------------


def test_at2pos_observation_has_numbered_pages_each_cut_and_none_twice() -> None:
    found = [Found('"A"\n' + "x" * 2000), Found('"B"\nshort'), Found('"B"\nshort'), Found("  ")]
    first = '"A"\n' + "x" * 996
    assert observation_of(found, AT2PO) == f' <result>\nPage 1: {first}\nPage 2: "B"\nshort\n</result>'


def test_at2po_says_where_nothing_was_found() -> None:
    assert observation_of([], AT2PO) == " <result>\nNo search results found.\n</result>"


def test_search_r1s_observation_has_documents_with_their_titles() -> None:
    found = [Found('"A"\none\ntwo'), Found('"B"\nthree')]
    said = '\n\n<information>Doc 1(Title: "A") one\ntwo\nDoc 2(Title: "B") three</information>\n\n'
    assert observation_of(found, SEARCH_R1) == said
    assert observation_of([], SEARCH_R1) == "\n\n<information></information>\n\n"
    assert observation_of([Found("no title")], SEARCH_R1) == "\n\n<information>Doc 1(Title: no title)</information>\n\n"


# --- prompts -------------------------------------------------------------------------------------------------------


def test_the_prompts_name_the_dialects_tags_in_the_published_order() -> None:
    [system] = messages_of("Who?", INSTRUCTIONS["at2po"], AT2PO)
    text = system["content"]
    assert system["role"] == "system"
    assert text.endswith("\nuser\nWho?")
    order = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<search>",
        "</search>",
        "<result>",
        "</result>",
        "\\boxed{",
    ]
    assert [text.index(tag) for tag in order] == sorted(text.index(tag) for tag in order)
    [user] = messages_of("Who?", INSTRUCTIONS["search_r1"], SEARCH_R1)
    text = user["content"]
    assert user["role"] == "user"
    assert text.endswith("Question: Who?\n")
    order = ["<think>", "<search>", "</search>", "<information>", "</information>", "<answer> Beijing </answer>"]
    assert [text.index(tag) for tag in order] == sorted(text.index(tag) for tag in order)


@pytest.mark.parametrize(("given", "shown"), [(" who ", "who?"), ("who?", "who?"), ("Say it.", "Say it.?")])
def test_a_question_ends_with_a_question_mark(given: str, shown: str) -> None:
    assert asked(given) == shown


def test_other_words_come_from_a_file_with_a_place_for_the_question(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("Use <search> {x} </search>. Q: {question}")
    [message] = messages_of("a {question} b?", read_instructions(str(file), AT2PO), AT2PO)
    assert message["content"] == "Use <search> {x} </search>. Q: a {question} b?"
    file.write_text("no place")
    with pytest.raises(ConfigError, match=r"has \{question\} 0 times; it must stand once"):
        read_instructions(str(file), AT2PO)
    with pytest.raises(SetupError, match=r"instructions = 'nowhere.txt' cannot be read: FileNotFoundError"):
        read_instructions("nowhere.txt", AT2PO)


def test_a_dialect_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"environment.options.dialect must be one of at2po, search_r1; got 'r1'"):
        dialect_of("r1")


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("A cat and an owl", "cat and owl"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("İstanbul", "i̇stanbul"),
        ("São Paulo", "são paulo"),
        ("“quoted”", "“quoted”"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_as_in_squad(text: str, plain: str) -> None:
    assert normalised(text) == plain


@given(st.text(alphabet=string.printable + "éÜ東", max_size=40))
def test_a_normalised_answer_stays_what_it_is(text: str) -> None:
    once = normalised(text)

    assert normalised(once) == once


def test_one_of_several_golden_answers_is_enough() -> None:
    assert exact_match("the Beatles.", ["Queen", "Beatles"]) == 1.0
    assert exact_match("Beatles band", ["Queen", "Beatles"]) == 0.0
    assert f1("Beatles band", ["Queen", "The Beatles"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "golden", "value"),
    [
        ("yes", "yes indeed", 0.0),
        ("yes indeed", "yes", 0.0),
        ("yes", "Yes!", 1.0),
        ("paris france", "paris", 2 / 3),
        ("paris paris", "paris", 2 / 3),
        ("lima", "rome", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_f1_counts_words_and_gives_yes_and_no_no_part(answer: str, golden: str, value: float) -> None:
    assert f1(answer, [golden]) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"it is \[ \boxed{Paris} \]", "Paris"),
        (r"\boxed{a} then \boxed{b}", "b"),
        (r"\boxed{\text{Paris} and {x}}", r"\text{Paris} and {x}"),
        (r"\boxed{}", ""),
        (r"$\boxed Paris$ more", "Paris"),
        (r"\boxed{never closed", None),
        ("Paris", None),
        (r"\fbox{Paris}", None),
    ],
)
def test_the_last_box_is_the_answer(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


GOOD = (
    "<think> a </think> <search> q </search> <result>\n</result> <think> b </think> "
    "<answer> The final answer is \\[ \\boxed{Paris} \\] </answer>"
)


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        (GOOD, ""),
        ("<think> a </think> <answer> \\boxed{x} </answer>", ""),
        (GOOD.replace("<think> a </think>", "").replace("<think> b </think>", ""), "0 <think> and 0 </think>"),
        (GOOD.replace(" </think>", "", 1), "2 <think> and 1 </think>"),
        (GOOD + "<answer> again </answer>", "2 <answer> and 2 </answer>"),
        (GOOD.replace("</answer>", ""), "1 <answer> and 0 </answer>"),
        (GOOD.replace("\\boxed{Paris}", "Paris"), "no \\boxed{} in the answer"),
        (GOOD.replace("<result>\n</result>", ""), "a <search> without its"),
        (GOOD.replace("</search> <result>", "<result> </search>"), "a <search> without its"),
        (GOOD.replace("<answer>", "X").replace("</answer>", "<answer>").replace("X", "</answer>"), "</answer> before"),
        (GOOD + " <search> one more", "a <search> without its"),
    ],
)
def test_the_form_is_thoughts_results_to_every_search_and_one_boxed_answer(response: str, fault: str) -> None:
    found = fault_of(response)
    assert found.startswith(fault) if fault else not found


@pytest.mark.parametrize(
    ("response", "split", "reward", "em"),
    [
        (GOOD, "train", 1.0, 1.0),
        (GOOD.replace("Paris", "Rome"), "train", 0.0, 0.0),
        (GOOD.replace("<think> a </think>", "<think>"), "train", -1.0, 0.0),
        (GOOD.replace("<think> a </think>", "<think>"), "eval", 1.0, 1.0),  # the form counts in training alone
        ("", "train", -1.0, 0.0),
        ("", "eval", -1.0, 0.0),
        ("<answer> Paris </answer>", "eval", -1.0, 0.0),  # without a box in both
    ],
)
def test_at2pos_reward(response: str, split: Any, reward: float, em: float) -> None:
    found = score(response, ["Paris"], dialect=AT2PO, split=split)
    assert (found.reward, found.em) == (reward, em)


def test_at2pos_reward_may_be_f1() -> None:
    found = score(GOOD.replace("Paris", "Paris France"), ["Paris"], dialect=AT2PO, split="train", by="f1")
    assert found.reward == found.f1 == pytest.approx(2 / 3)
    assert found.em == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<answer> the Paris </answer>", 1.0),
        ("<answer> Rome </answer> <answer> Paris </answer>", 1.0),
        ("<answer> Paris </answer> <answer> Rome </answer>", 0.0),
        ("Paris", 0.0),
        ("<answer> Paris", 0.0),
    ],
)
def test_search_r1s_reward_is_the_match_of_the_last_answer(response: str, reward: float) -> None:
    for split in ("train", "eval"):
        assert score(response, ["Paris"], dialect=SEARCH_R1, split=split).reward == reward


# --- chains --------------------------------------------------------------------------------------------------------


def at2po(max_searches: int = 6) -> Chain:
    return Chain(AT2PO, max_searches=max_searches, max_turns=0)


def search_r1(max_turns: int = 4) -> Chain:
    return Chain(SEARCH_R1, max_searches=0, max_turns=max_turns)


SEARCHES = "<think> t </think> <search> q </search>"
NOTICED = " No more searches are possible"


def test_after_six_searches_at2po_inserts_a_notice_and_goes_on_until_the_chain_ends() -> None:
    chain = at2po()
    for _ in range(6):
        assert chain.take(SEARCHES) == Search("q")
        chain.found(" <result>\nx\n</result>")
    for _ in range(2):
        inserted = chain.take(SEARCHES)
        assert isinstance(inserted, Insert)
        assert inserted.text.startswith(NOTICED)
    assert chain.take("<answer> \\boxed{Paris} </answer>") == Over()
    assert chain.searches == 6
    # Searches that were refused have no result: the form is bad, as it is in the published code.
    assert score(chain.response, ["Paris"], dialect=AT2PO, split="train").reward == -1.0
    assert score(chain.response, ["Paris"], dialect=AT2PO, split="eval").reward == 1.0


def test_an_empty_query_is_a_leaf_in_at2pos_dialect_and_is_judged() -> None:
    chain = at2po()
    assert chain.take("<think> t </think> <search> </search>") == Over()
    assert score(chain.response, ["Paris"], dialect=AT2PO, split="train").reward == -1.0


def test_a_whole_chain_of_at2po_earns_its_reward() -> None:
    chain = at2po()
    assert chain.take(SEARCHES) == Search("q")
    chain.found(" <result>\nPage 1: it holds </think> and <answer> of its own\n</result>")
    assert chain.take(" <think> so </think> <answer> \\boxed{Paris} </answer>") == Over()
    found = score(chain.response, ["Paris"], dialect=AT2PO, split="train")
    assert (found.reward, found.fault) == (1.0, "")


def test_search_r1_takes_four_turns_and_a_last_action_without_a_search() -> None:
    chain = search_r1()
    for _ in range(4):
        assert chain.take("<search> q </search>") == Search("q")
        chain.found("\n\n<information>x</information>\n\n")
    assert chain.take("<search> q </search>") == Over(turn_limit=True)
    assert chain.searches == 4
    assert score(chain.response, ["Paris"], dialect=SEARCH_R1, split="train").reward == 0.0


def test_search_r1_answers_a_malformed_action_with_a_sentence_and_counts_it_as_a_turn() -> None:
    chain = search_r1(max_turns=2)
    for _ in range(2):
        inserted = chain.take("I would like to search")
        assert isinstance(inserted, Insert)
        assert "between <search> and </search>" in inserted.text
        assert "between <answer> and </answer>" in inserted.text
    assert chain.take("<answer> Paris </answer>") == Over()
    # The sentence's own tags are no answer.
    assert score(chain.response, ["Paris"], dialect=SEARCH_R1, split="train").reward == 1.0
    assert "</search>" not in chain.response


def test_an_empty_query_is_asked_in_search_r1s_dialect() -> None:
    assert search_r1().take("<search></search>") == Search("")


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_the_published_files_become_questions() -> None:
    plain = question_of(flashrag()[0], "train.jsonl, line 1")
    assert (plain.question, plain.golden, plain.prompt) == (
        "what is the capital of France", ("Paris", "Paris city"), (),
    )  # fmt: skip
    ready = question_of(published("system")[0], "train.parquet, row 0")
    assert ready.golden == ("Paris", "Paris city")
    assert [message["role"] for message in ready.prompt] == ["system"]
    text = question_of({"prompt": "Question: who?", "answer": "me"}, "row 0")
    assert text.prompt == ({"role": "user", "content": "Question: who?"},)
    assert text.golden == ("me",)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "who?"}, r"it has no golden_answers, .*; it has: question"),
        ({"question": "who?", "golden_answers": []}, r"golden_answers is \[\] .*at least one answer"),
        ({"question": "who?", "golden_answers": ["", " "]}, r"golden_answers is .*at least one answer"),
        ({"question": "who?", "golden_answers": [1986]}, r"golden_answers is \[1986\] \(list\); expected a text"),
        ({"question": "who?", "golden_answers": {"a": 1}}, r"golden_answers is .*expected a text"),
        ({"question": " ", "answer": "x"}, r"question is ' ' \(str\); expected a text that is not empty"),
        ({"answer": "x"}, r"question is None"),
        ({"prompt": [{"role": "system"}], "answer": "x"}, r"prompt is .*expected a list of messages"),
        ({"prompt": [], "answer": "x"}, r"prompt is \[\] .*expected a list of messages"),
        ({"prompt": [{"role": "tool", "content": "x"}], "answer": "x"}, r"prompt is .*role one of"),
        (
            {"question": "who?", "reward_model": {"ground_truth": {"target": []}}},
            r"reward_model\.ground_truth\.target is \[\]",
        ),
    ],
)
def test_a_row_that_cannot_be_a_task_is_refused_with_its_place_and_column(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueRefused, match=rf"^train\.jsonl, line 7: {said}"):
        question_of(row, "train.jsonl, line 7")
