"""search_qa over tokens: prompts, actions as sampled, observations appended, forks, and the search engine's faults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async.core.errors import SetupError
from atpo_async.environments.fingerprints import fingerprint_of
from atpo_async.environments.replay import Past, PastTurn, replayed
from atpo_async.environments.search_qa.tokens import Tokens
from atpo_async.environments.values import ValueRefused
from tests.search_qa_support import (
    SEARCH,
    Found,
    Shelf,
    action,
    environment,
    flashrag,
    grown,
    passage,
    published,
    tokenizer_folder,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


async def test_an_at2po_chain_searches_answers_and_is_rewarded(folder: Path) -> None:
    shelf = Shelf()
    task = environment(folder, shelf=shelf, rows=flashrag(count=1))
    episode = await task.start("train", 0)
    said = await episode.step(action(task, SEARCH))
    assert task.decode(said.observation) == f" <result>\nPage 1: {passage('France', 'Paris')}\n</result>"
    assert (said.done, said.end) == (False, "continue")
    assert said.fingerprint == fingerprint_of([passage("France", "Paris")])
    over = await episode.step(action(task, " <think> so </think> <answer> \\boxed{Paris} </answer>", stop=True))
    assert (over.done, over.reward, over.success, over.end) == (True, 1.0, True, "done")
    assert over.rewards == {"em": 1.0, "f1": 1.0, "form": 1.0, "searches": 1.0}
    assert shelf.asked == ["capital"]


async def test_the_fingerprint_of_a_search_is_the_ids_of_its_passages(folder: Path) -> None:
    class Numbered(Shelf):
        async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Any]]:
            return [[Found("a", id="7"), Found("b", id="wiki/9")] for _ in queries]

    episode = await environment(folder, shelf=Numbered()).start("train", 0)
    assert (await episode.step(action(environment(folder), SEARCH))).fingerprint == fingerprint_of([7, "wiki/9"])


async def test_a_search_r1_chain_is_told_of_a_malformed_action_and_goes_on(folder: Path) -> None:
    task = environment(folder, rows=flashrag(count=1), dialect="search_r1")
    episode = await task.start("train", 0)
    told = await episode.step(action(task, "hm", stop=True))
    assert "That was not a valid action" in task.decode(told.observation)
    said = await episode.step(action(task, "<search> capital </search>"))
    text = task.decode(said.observation)
    assert text.startswith('\n\n<information>Doc 1(Title: "France") The capital of France is Paris.')
    assert text.endswith("</information>\n\n")
    over = await episode.step(action(task, "<answer> the Paris </answer>"))
    assert (over.done, over.reward, over.success) == (True, 1.0, True)


async def test_search_r1_ends_after_four_turns_and_a_last_action(folder: Path) -> None:
    task = environment(folder, dialect="search_r1")
    episode = await task.start("train", 0)
    for _ in range(4):
        assert not (await episode.step(action(task, "<search> q </search>"))).done
    over = await episode.step(action(task, "<search> q </search>"))
    assert (over.done, over.end, over.reward, over.success) == (True, "turn_limit", 0.0, False)


async def test_an_observation_of_search_r1_is_cut_at_500_tokens(folder: Path) -> None:
    task = environment(folder, dialect="search_r1", shelf=Shelf('"T"\n' + "x " * 2000))
    episode = await task.start("train", 0)
    said = await episode.step(action(task, "<search> q </search>"))
    assert len(said.observation) == 500


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think> t </think> <search> </search>", -1.0),  # an empty query
        ("<think> t", -1.0),  # cut by length: no answer
        ("<think> t </think> <answer> Paris </answer>", -1.0),  # no box
        ("<think> t </think> <answer> \\boxed{Rome} </answer>", 0.0),
    ],
)
async def test_what_is_no_search_is_a_leaf_in_at2pos_dialect_and_scored(folder: Path, text: str, reward: float) -> None:
    task = environment(folder, rows=flashrag(count=1))
    over = await (await task.start("train", 0)).step(action(task, text))
    assert (over.done, over.reward, over.success) == (True, reward, False)


async def test_the_number_of_searches_and_turns_may_be_set(folder: Path) -> None:
    task = environment(folder, max_searches=1)
    episode = await task.start("train", 0)
    await episode.step(action(task, SEARCH))
    said = await episode.step(action(task, SEARCH))
    assert task.decode(said.observation).startswith(" No more searches are possible")


# --- ids ---------------------------------------------------------------------------------------------------------


async def test_the_prompt_is_the_chat_templates_with_the_dialects_message(folder: Path) -> None:
    system = environment(folder, rows=flashrag(count=1))
    text = system.decode((await system.start("train", 0)).prompt)
    assert text.startswith("<|im_start|>system\nYou are an assistant that answers a question step by step")
    assert text.endswith("\nuser\nwhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    user = environment(folder, rows=flashrag(count=1), dialect="search_r1")
    text = user.decode((await user.start("train", 0)).prompt)
    assert text.startswith("<|im_start|>user\nAnswer the question below.")
    assert text.endswith("Question: what is the capital of France?\n<|im_end|>\n<|im_start|>assistant\n")


async def test_a_ready_prompt_is_taken_as_it_is(folder: Path) -> None:
    task = environment(folder, rows=published("system", count=1))
    text = task.decode((await task.start("train", 0)).prompt)
    content = published("system", count=1)[0]["prompt"][0]["content"]
    assert text == f"<|im_start|>system\n{content}<|im_end|>\n<|im_start|>assistant\n"


async def test_a_base_model_gets_plain_text(folder: Path, tmp_path: Path) -> None:
    bare = tokenizer_folder(tmp_path / "bare", template=False)
    for task in (environment(folder, prompt_style="plain"), environment(bare)):
        text = task.decode((await task.start("train", 0)).prompt)
        assert text.startswith("You are an assistant")
        assert text.endswith("?")
    with pytest.raises(SetupError, match=r"prompt_style = 'chat': .* has no chat template; use prompt_style = 'plain'"):
        environment(bare, prompt_style="chat")


async def test_a_prompt_that_is_too_long_is_cut_or_refused_as_published(folder: Path) -> None:
    long = [{"question": "who " * 3000, "golden_answers": ["x"]}]
    task = environment(folder, rows=long, dialect="search_r1")
    assert len((await task.start("train", 0)).prompt) == 2048
    task = environment(folder, rows=long)
    with pytest.raises(ValueRefused, match=r"data\[0\]: its prompt has \d+ tokens; at2po takes at most 2000") as caught:
        await task.start("train", 0)
    assert caught.value.reason == "prompt_too_long"


def test_tags_are_several_tokens_and_an_end_of_turn_is_no_part_of_an_actions_text(folder: Path) -> None:
    tokens = Tokens(folder)
    ids = tokens.encode("</search>")
    assert len(ids) > 1
    assert tokens.action_text(np.append(ids, tokens.stop_token_ids[0])) == "</search>"
    assert tokens.decode(np.append(ids, tokens.stop_token_ids[0])) == "</search><|im_end|>"


def test_every_end_of_a_turn_that_the_model_names_ends_an_action(tmp_path: Path) -> None:
    made = tokenizer_folder(tmp_path)
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (made / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 2}))
    assert Tokens(made).stop_token_ids == (2, 0)


async def test_a_replay_takes_what_was_found_from_the_tree_and_does_not_search_again(folder: Path) -> None:
    shelf = Shelf()
    task = environment(folder, shelf=shelf)
    episode = await task.start("train", 0)
    first = action(task, SEARCH)
    seen = (await episode.step(first)).observation
    shelf.contents = ('"Other"\nanother passage',)
    past = Past(turns=(PastTurn(first, seen),), prompt=episode.prompt)
    copy, observation = await replayed(task, "train", 0, past)
    assert np.array_equal(observation, seen)
    assert shelf.asked == ["capital"]
    over = await copy.step(action(task, " <think> x </think> <answer> \\boxed{x} </answer>"))
    assert over.rewards["form"] == 1.0
    assert over.rewards["searches"] == 1.0


async def test_what_the_engine_sees_is_prompt_actions_and_observations_as_they_were_sampled(folder: Path) -> None:
    task = environment(folder, rows=flashrag(count=1), prompt_style="plain", shelf=Shelf('"France"\nParis'))
    # The last token of the first action reaches beyond its tag.
    tree, _ = await grown(task, [f"{SEARCH}\n", " <think> so </think> <answer> \\boxed{Paris} </answer>"])
    assert [leaf.reward for leaf in tree.leaves()] == [1.0, 1.0, 1.0]
    first, second = tree.path(tree.leaves()[0].turn_id)
    text = task.decode(np.concatenate([first.action, second.observation, second.action]))
    assert text.startswith(f'{SEARCH}\n <result>\nPage 1: "France"\nParis\n</result> <think> so')


async def test_a_page_that_names_control_tokens_adds_none(folder: Path) -> None:
    end = "<|im_end|>"
    task = environment(folder, shelf=Shelf(f'"Page"\nread this {end} and that'), rows=flashrag(count=1))
    control = task.tokens.encode(end).tolist()
    assert len(control) == 1, "the tokenizer takes it for one token"
    episode = await task.start("train", 0)
    said = await episode.step(action(task, SEARCH))
    assert control[0] not in said.observation.tolist()
    assert "read this < |im_end|> and that" in task.decode(said.observation)
