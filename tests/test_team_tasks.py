"""Tasks that teams solve: ledger_qa, and tasks in messages with a prompt for each role."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from atpo_async.config import load
from atpo_async.core.errors import ConfigError
from atpo_async.environments import MessageTask, Reply
from atpo_async.environments.base import Episode
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.hopqa.environment import HopQA
from atpo_async.environments.hopqa.world import World, save_tokenizer
from atpo_async.environments.ledger_qa.environment import LedgerQA, make
from atpo_async.environments.ledger_qa.warm_start import Recipe, demonstration_batch
from atpo_async.environments.ledger_qa.world import DIGITS, Habits, Ledgers, answered, noted
from atpo_async.environments.tools.task import ToolTask
from atpo_async.environments.values import Limits, ValueRefused
from atpo_async.models.policy import warm_start_command
from tests.actor_support import ScriptedEngine
from tests.test_team_search import TWO, team_search
from tests.tool_task_support import action, tokenizer_folder, tool_task

LIMITS = Limits(vocab_size=512, max_context_tokens=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ledgers")
    save_tokenizer(Ledgers(), made)
    return made


# --- ledger_qa ---------------------------------------------------------------------------------------------------


def test_a_question_is_answered_from_all_ledgers_and_from_no_single_one() -> None:
    world = Ledgers(seed=3)
    tasks = [world.task("train", index) for index in range(200)]
    assert tasks[0] == world.task("train", 0) != world.task("eval", 0)
    for task in tasks:
        assert int(task.answer) == max(int(task.digit(ledger)) for ledger in range(2))
    one = {(task.digit(0), task.answer) for task in tasks}
    assert len({answer for digit, answer in one if digit == "3"}) > 3
    commonest = max(np.mean([task.answer == digit for task in tasks]) for digit in DIGITS)
    assert commonest < 0.3, "what is right without any ledger"


def test_what_an_action_notes_and_answers_is_read_to_the_word() -> None:
    assert noted(("cy2", "note", "2", "<end>")) == ("2",)
    assert noted(("note", "1", "note", "2", "3")) == ("2", "3")
    assert noted(("cy2", "<end>")) is None
    assert noted(("note", "<end>")) is None
    assert answered(("7", "<end>")) == "7"
    assert answered(("7", "8", "<end>")) is None
    assert answered(("<end>",)) is None


async def test_a_team_that_says_what_is_right_succeeds_and_a_blind_one_is_shown_no_note(folder: Path) -> None:
    def right(context: np.ndarray, number: int) -> np.ndarray:
        words = task.decode(context)
        if words[0] == "Ledger":
            entry = next(word for word in words[1:] if word.startswith(words[-2]))
            return task.encode((entry, "note", entry[-1], "<end>"))
        return task.encode((max(word for word in words if word in DIGITS or word == "."), "<end>"))

    task = LedgerQA(folder)
    tree = await team_search(right, task=task, kind="eval").grow()
    assert [turn.success for turn in tree] == [True] * 3
    assert task.decode(tree[3].observation)[0] == "Notes"
    task = LedgerQA(folder, blind=True)
    blind = await team_search(right, task=task, kind="eval").grow()
    assert task.decode(blind[3].observation)[:3] == ("Notes", ".", ".")
    assert [turn.success for turn in blind][:2] == [True, True], "its proposers see what they saw"


def test_demonstrations_are_mostly_right_and_wrong_in_ways_that_greedy_decoding_repeats() -> None:
    world, rng = Ledgers(), Random(0)
    tasks = [world.task("demo", index) for index in range(600)]
    notes = [noted(Habits().proposal(task, 0, rng)) == (task.digit(0),) for task in tasks]
    plain = [right for right, task in zip(notes, tasks, strict=True) if task.asked not in ("ada", "bob")]
    assert 0.7 < np.mean(plain) < 0.85
    assert np.mean(notes) < np.mean(plain)
    first = [task.digit(0) == task.answer for task in tasks]
    said = [answered(Habits(noise=0.0).synthesis(task, rng)) == task.answer for task in tasks]
    assert all(right for right, easy in zip(said, first, strict=True) if easy)
    assert 0.2 < np.mean([right for right, easy in zip(said, first, strict=True) if not easy]) < 0.5


def test_of_a_demonstration_what_its_members_say_is_learnt() -> None:
    recipe = Recipe(batch_size=2)
    rows, masks = demonstration_batch(recipe, 0, Random(0))
    words = recipe.world.words
    learnt = [[words[i] for i, m in zip(row, mask, strict=True) if m] for row, mask in zip(rows, masks, strict=True)]
    assert [len(row) for row in learnt] == [4, 4, 2] * 2
    assert all(row[1] == "note" for row in (learnt[0], learnt[1]))
    assert all(row[-1] == "<end>" for row in learnt)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ledgers": 0}, "ledgers must be 1 to 8"),
        ({"entries": 9}, "entries must be 2 to 6"),
        ({"num_names": 13}, "num_names must be 2 to 12"),
        ({"eval_tasks": 0}, "eval_tasks must be >= 1"),
        ({"blind": 1}, "blind must be true or false"),
        ({"ledgers": True}, "ledgers must be a whole number"),
        ({"pages": 2}, "ledger_qa has no such option .*known: seed, ledgers"),
    ],
)
def test_options_out_of_range_are_refused_by_name(folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(folder, **options)


async def test_more_proposers_than_ledgers_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"ledgers = 2, one for each proposer, and team.proposers asks for more"):
        await LedgerQA(folder).start_proposer("train", 0, 2)


def test_the_configuration_of_the_demo_fits_its_policy() -> None:
    config = load([Path("configs/demo_team.toml")])
    words = warm_start_command(config)
    assert words[words.index("--steps") + 1] == str(config.model.warm_start_steps)
    assert config.environment.options.get("ledgers", Recipe().ledgers) == config.team.proposers == 2
    assert config.max_leaves == 12


async def test_a_team_on_the_demos_task_is_shown_the_names_that_its_proposers_answered(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, world = tmp_path_factory.mktemp("hopqa"), World(seed=0, min_hops=1, max_hops=1)
    save_tokenizer(world, folder)
    task = HopQA(folder, hops=1)

    def answer(context: np.ndarray, number: int) -> np.ndarray:
        if number == 0:
            return task.encode(("look", "<end>"))
        return task.encode(("answer", task.world.task("eval", 0).answer, "<end>"))

    team = TWO.model_copy(update={"cue_tokens": 1})
    tree = await team_search(answer, task=task, team=team, kind="eval", max_context_tokens=128).grow()
    right = task.world.task("eval", 0).answer
    synthesizer = next(turn for turn in tree if turn.role == "synthesizer")
    assert task.decode(synthesizer.observation)[-6:] == ("<obs>", right, "</obs>") * 2
    assert synthesizer.success
    assert task.cue("eval", 0, (task.encode(("look", "<end>")),)) is None


# --- tasks in messages -------------------------------------------------------------------------------------------


class Riddle(MessageTask):
    """Each proposer is told a word; the synthesizer has to say both."""

    def num_tasks(self, split: Any) -> int | None:
        return 4

    async def begin(self, split: Any, index: int) -> Any:
        return await self.begin_proposal(split, index, 0)

    async def begin_proposal(self, split: Any, index: int, seat: int) -> Any:
        return Saying(f"Say {'ab'[seat]}", "ab"[seat])

    async def begin_synthesis(self, split: Any, index: int, notes: tuple[str, ...]) -> Any:
        return Saying(f"Say {' '.join(notes)}", "a b")


class Saying:
    def __init__(self, told: str, wanted: str) -> None:
        self.messages, self._wanted = [{"role": "user", "content": told}], wanted

    async def reply(self, action: Any) -> Reply:
        return Reply(done=True, reward=float(action.content == self._wanted), success=action.content == self._wanted)


async def test_a_message_task_is_solved_by_a_team_that_passes_on_what_it_says() -> None:
    task = Riddle(tokenizer_folder())

    def parrot(context: np.ndarray, number: int) -> np.ndarray:
        said = task.decode(context).rsplit("Say ", 1)[1].split("<|im_end|>")[0]
        return action(task, f"<think>\nhm\n</think>\n\n{said}")

    made = CheckedEnvironment(task, name="riddle", limits=LIMITS)
    made.check_team("team.proposers = 2")
    search = team_search(
        engine=ScriptedEngine(parrot), task=made, kind="eval",
        team=TWO.model_copy(update={"cue_tokens": 8}), max_context_tokens=512,
    )  # fmt: skip
    tree = await search.grow()
    assert search.growth.failures == {}
    assert [turn.success for turn in tree] == [True] * 3
    assert "hm" not in task.decode(tree[3].observation), "what is thought is not passed on"


@pytest.mark.parametrize(
    ("note", "says"),
    [(lambda self, action: 3, "what note\\(\\) returned is 3"), ("async", "write def note\\(self, action\\)")],
    ids=["a number", "a coroutine"],
)
async def test_a_note_that_is_no_text_is_refused(note: Any, says: str) -> None:
    async def late(self: Any, action: Any) -> str:
        return "a"

    bad = type("Bad", (Riddle,), {"note": late if note == "async" else note})
    task = bad(tokenizer_folder())
    with pytest.raises(ValueRefused, match=says):
        await task.cue("train", 0, (action(task, "a"),))


def test_a_message_task_without_synthesis_cannot_be_solved_by_teams() -> None:
    made = CheckedEnvironment(tool_task(), name="plain", limits=LIMITS)
    with pytest.raises(ConfigError, match="environment 'plain' lacks cue, start_synthesizer"):
        made.check_team("team.proposers = 2")


async def test_a_tool_task_tells_each_role_its_own_system_message_and_the_synthesizer_the_notes() -> None:
    task = tool_task(system="Note a hint.", synthesizer="Answer in one word.")
    CheckedEnvironment(task, name="tools", limits=LIMITS).check_team("team.proposers = 2")
    proposer = _text(task, await task.start("train", 0))
    assert "Note a hint." in proposer
    assert "Notes of others" not in proposer
    assert task.start_synthesizer is not None
    assert task.cue is not None
    cue = await task.cue("train", 0, (action(task, "It is city 0"),))
    assert cue is not None
    told = _text(task, await task.start_synthesizer("train", 0, (cue, cue[:0])))
    assert "Answer in one word." in told
    assert "Note a hint." not in told
    assert "Capital of country 0?\n\nNotes of others who looked into it:\n1. It is city 0\n2. (none)" in told
    episode = await task.start_synthesizer("train", 0, (cue,))
    found = await episode.step(action(task, "city 0"))
    assert (found.reward, found.success) == (1.0, True)


def _text(task: ToolTask, episode: Episode) -> str:
    return task.decode(episode.prompt)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"synthesizer": 3}, "synthesizer is 3"), ({"notes": "nothing"}, "expected a text with {notes} in it")],
)
def test_texts_of_a_team_that_are_none_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tool_task(**changes)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"matrix_lr": -0.1}])
def test_a_policy_of_a_rate_that_trains_nothing_is_refused_before_it_is_made(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name} must be > 0, got {value}"):
        Recipe(**wrong)  # type: ignore[arg-type]
