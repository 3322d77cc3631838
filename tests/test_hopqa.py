"""The look-up world, its environment, and environments by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from atpo_async.config.doors import ENVIRONMENT
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.environments.hopqa.environment import HopQA
from atpo_async.environments.hopqa.world import (
    Answer,
    Habits,
    Look,
    World,
    build_tokenizer,
    demonstrate,
    is_held_out,
    read_action,
    save_tokenizer,
    write_action,
)

HONEST = Habits(noise=0.0, mixed_up=0, mix_up_rate=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(World(), path)
    return path


@pytest.fixture
def env(folder: Path) -> HopQA:
    return HopQA(folder, seed=5)


def test_a_task_is_the_same_whatever_was_asked_before() -> None:
    alone = World(seed=3).task("train", 7)
    world = World(seed=3)
    for index in range(7):
        world.task("train", index)
    assert world.task("train", 7) == alone
    assert alone.answer == world.task("train", 7).answer


def test_worlds_and_questions_are_the_same_on_every_machine_and_in_every_process() -> None:
    task = World(seed=1).task("train", 0)
    assert " ".join(task.question) == "Find : doctor of aunt of brother of Fritz ."
    assert task.answer == "Iris"


def test_the_answer_is_found_by_looking_up_from_right_to_left() -> None:
    task = World(seed=1).task("train", 0)
    first = task.look_up("brother", "Fritz")
    second = task.look_up("aunt", first)
    assert task.look_up("doctor", second) == task.answer


def test_other_tasks_and_other_seeds_have_other_facts() -> None:
    def facts(seed: int, index: int) -> list[str]:
        task = World(seed=seed).task("train", index)
        return [task.look_up("friend", name) for name in World().names]

    assert facts(0, 0) == facts(0, 0)
    assert facts(0, 0) != facts(0, 1)
    assert facts(0, 0) != facts(1, 0)


def test_nobody_is_his_own_friend() -> None:
    task = World(num_names=8).task("train", 0)
    assert all(task.look_up("friend", name) != name for name in task.world.names)
    assert {task.look_up(r, n) for r in task.world.relations for n in task.world.names} == set(task.world.names)


def test_no_held_out_question_is_ever_asked_in_training_or_in_demonstrations() -> None:
    seen = {
        World(seed=seed, min_hops=1, max_hops=4).task(stream, index).question
        for stream in ("train", "demo")
        for seed in (0, 1)
        for index in range(1000)
    }
    held_out = [World(seed=seed, min_hops=1, max_hops=4).task("eval", i) for seed in (0, 1) for i in range(300)]
    assert not seen & {task.question for task in held_out}
    assert all(is_held_out(task.start, task.relations) for task in held_out)


def test_no_two_splits_share_a_question_together_with_its_facts() -> None:
    world = World(seed=2, num_names=8, num_relations=3)

    def fingerprints(stream: str) -> set[tuple[object, ...]]:
        tasks = [world.task(stream, i) for i in range(200)]  # type: ignore[arg-type]
        return {(t.question, *(t.look_up(r, n) for r in world.relations for n in world.names)) for t in tasks}

    train, demo, held_out = (fingerprints(s) for s in ("train", "demo", "eval"))
    assert len(train) == len(demo) == len(held_out) == 200
    assert not train & held_out
    assert not demo & held_out
    assert not train & demo


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_a_question_of_n_hops_names_n_relations_each_once(hops: int) -> None:
    task = World(min_hops=hops, max_hops=hops).task("eval", 3)
    assert len(set(task.relations)) == hops
    assert len(task.question) == 4 + 2 * hops


def test_hops_can_be_mixed() -> None:
    world = World(min_hops=1, max_hops=4)
    assert {len(world.task("train", i).relations) for i in range(50)} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_hops": 0}, "min_hops"),
        ({"min_hops": 4, "max_hops": 3}, "4 to 3"),
        ({"max_hops": 5}, "3 to 5"),
        ({"num_names": 3}, "num_names"),
        ({"num_names": 500}, "500"),
        ({"num_relations": 2}, "num_relations"),
        ({"num_relations": 99}, "99"),
    ],
)
def test_a_world_out_of_range_is_refused_by_name(options: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        World(**options)


@pytest.mark.parametrize("action", [Look(relation="boss", name="Ada"), Answer(name="Bob")])
def test_what_is_written_is_read_back(action: Look | Answer) -> None:
    assert read_action(write_action(action)) == action


@pytest.mark.parametrize(
    "words",
    [
        "",
        "<end>",
        "look <end>",
        "look boss <end>",
        "look boss of <end>",
        "look boss of Ada",
        "look boss Ada <end>",
        "look boss of Ada Ada <end>",
        "look boss of Ada <end> <end>",
        "answer <end>",
        "answer Ada",
        "answer Ada Bob <end>",
        "Ada <end>",
        "Find : Ada <end>",
    ],
)
def test_what_is_no_call_is_malformed(words: str) -> None:
    assert read_action(words.split()) is None


def test_an_honest_demonstration_looks_up_every_hop_and_answers_right() -> None:
    for index in range(20):
        task = World(min_hops=1, max_hops=4).task("demo", index)
        turns = demonstrate(task, Random(0), HONEST)
        assert len(turns) == len(task.relations) + 1
        assert read_action(turns[-1][1]) == Answer(name=task.answer)
        assert turns[0][0] == ()


def test_a_noisy_demonstrator_slips_about_as_often_as_asked() -> None:
    rng, habits = Random(0), Habits(noise=0.25, mixed_up=0)
    first = [(t, demonstrate(t, rng, habits)[0][1]) for t in (World().task("demo", i) for i in range(800))]
    slips = [read_action(action) != Look(relation=t.relations[0], name=t.start) for t, action in first]
    assert 0.2 < float(np.mean(slips)) < 0.3


def test_a_demonstrator_takes_mixed_up_relations_for_others_and_no_more() -> None:
    world, rng = World(), Random(0)
    habits = Habits(noise=0.0, mixed_up=2, mix_up_rate=0.7)
    wrong: dict[bool, list[bool]] = {True: [], False: []}
    for task in (world.task("demo", i) for i in range(800)):
        said = read_action(demonstrate(task, rng, habits)[0][1])
        wrong[task.relations[0] in world.relations[:2]].append(
            said != Look(relation=task.relations[0], name=task.start)
        )
    assert not any(wrong[False])
    assert 0.6 < float(np.mean(wrong[True])) < 0.8


def test_the_same_generator_gives_the_same_demonstration() -> None:
    task = World().task("demo", 0)
    assert demonstrate(task, Random(4), Habits()) == demonstrate(task, Random(4), Habits())


def test_habits_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise must be in .* got 1.5"):
        Habits(noise=1.5)


def test_the_tokenizer_folder_loads_in_transformers_and_has_one_token_a_word(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = World().task("train", 0).question
    ids = tokenizer(" ".join(words))["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == list(words)
    assert tokenizer.convert_tokens_to_ids("<end>") == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("Nobody") == tokenizer.unk_token_id
    assert len(build_tokenizer(World())) == len(set(World().words)) == len(World().words)


async def test_looking_up_every_hop_and_answering_earns_the_reward(env: HopQA) -> None:
    episode = await env.start("train", 3)
    task = episode.task
    assert env.decode(episode.prompt) == task.question
    name = task.start
    for relation in task.relations:
        result = await episode.step(env.encode(write_action(Look(relation=relation, name=name))))
        name = task.look_up(relation, name)
        assert env.decode(result.observation) == ("<obs>", name, "</obs>")
        assert (result.done, result.reward, result.success, result.end) == (False, None, None, "continue")
    result = await episode.step(env.encode(write_action(Answer(name=name))))
    assert (result.done, result.reward, result.success, result.end) == (True, 1.0, True, "done")
    assert result.observation.shape == (0,)
    assert result.observation.dtype == np.int32


async def test_a_wrong_answer_earns_nothing(env: HopQA) -> None:
    episode = await env.start("train", 3)
    wrong = next(name for name in env.world.names if name != episode.task.answer)
    result = await episode.step(env.encode(write_action(Answer(name=wrong))))
    assert (result.done, result.reward, result.success, result.end) == (True, 0.0, False, "done")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("look boss <end>", "malformed"),
        ("look boss of Ada", "malformed"),
        ("look Ada of boss <end>", "unknown"),
        ("look boss of <unk> <end>", "unknown"),
    ],
)
async def test_a_call_that_cannot_be_answered_gets_an_answer_that_says_so(env: HopQA, words: str, says: str) -> None:
    episode = await env.start("train", 0)
    result = await episode.step(env.encode(tuple(words.split())))
    assert env.decode(result.observation) == ("<obs>", "error", ":", says, "</obs>")
    assert not result.done


async def test_tokens_outside_the_world_are_answered_too(env: HopQA) -> None:
    episode = await env.start("train", 0)
    result = await episode.step(np.array([10**6, -1], dtype=np.int32))
    assert env.decode(result.observation) == ("<obs>", "error", ":", "malformed", "</obs>")


async def test_a_chain_ends_without_reward_at_the_turn_limit(env: HopQA) -> None:
    episode = await env.start("train", 0)
    results = [await episode.step(env.encode(("look", "<end>"))) for _ in range(5)]
    assert [r.end for r in results] == ["continue"] * 4 + ["turn_limit"]
    assert (results[-1].done, results[-1].reward, results[-1].success) == (True, 0.0, False)
    with pytest.raises(RuntimeError, match="after its end"):
        await episode.step(env.encode(("look", "<end>")))


async def test_an_answer_in_the_last_turn_still_counts(folder: Path) -> None:
    env = HopQA(folder, turn_limit=1)
    episode = await env.start("train", 0)
    result = await episode.step(env.encode(write_action(Answer(name=episode.task.answer))))
    assert (result.end, result.reward) == ("done", 1.0)


async def test_a_replayed_episode_stands_where_the_first_one_did(env: HopQA) -> None:
    first = await env.start("eval", 9)
    actions = (
        env.encode(write_action(Look(relation=first.task.relations[0], name=first.task.start))),
        env.encode(("look", "<end>")),
    )
    for action in actions:
        await first.step(action)
    second = await env.replay("eval", 9, actions)
    more = env.encode(write_action(Look(relation="boss", name="Ada")))
    here, there = await first.step(more), await second.step(more)
    assert here.observation.tolist() == there.observation.tolist()
    assert (await first.step(more)).end == (await second.step(more)).end


async def test_the_held_out_split_has_an_end_and_training_has_none(env: HopQA) -> None:
    assert env.num_tasks("eval") == 200
    assert env.num_tasks("train") is None
    await env.start("train", 10**9)
    with pytest.raises(ConfigError, match="no task 200 in split 'eval'"):
        await env.start("eval", 200)
    with pytest.raises(ConfigError, match="no task -1"):
        await env.start("train", -1)


def test_the_stop_token_is_the_tokenizers_end(env: HopQA, folder: Path) -> None:
    from tokenizers import Tokenizer

    assert env.stop_token_ids == (Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<end>"),)


def test_a_tokenizer_without_the_needed_tokens_is_refused_naming_them(tmp_path: Path) -> None:
    save_tokenizer(World(num_names=62), tmp_path)
    with pytest.raises(SetupError, match="lacks 2 of the 88 tokens") as caught:
        HopQA(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert all(name in str(caught.value) for name in World().names[62:64])


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"has no tokenizer\.json"):
        HopQA(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"nothing": 1}))
    with pytest.raises(SetupError, match="cannot be read"):
        HopQA(tmp_path)


def test_built_in_environments_are_made_by_name(folder: Path) -> None:
    env = ENVIRONMENT.make("hopqa", folder, options={"seed": 5, "hops": 2, "eval_tasks": 10})
    assert env.num_tasks("eval") == 10


def test_an_unknown_environment_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'hotpotqa' is unknown; .*nown: hopqa, .*or 'package.module:name'"):
        ENVIRONMENT.make("hotpotqa", folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hop": 3}, r"environment\.options\.hop: hopqa has no such option \(value 3\); known: seed"),
        ({"hops": "three"}, r"environment\.options\.hops must be a whole number, got 'three'"),
        ({"hops": 9}, "got 9 to 9"),
        ({"turn_limit": -1}, "turn_limit must be >= 0"),
        ({"eval_tasks": 0}, "eval_tasks must be >= 1"),
    ],
)
def test_bad_options_are_refused_by_name(folder: Path, options: dict[str, int | str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ENVIRONMENT.make("hopqa", folder, options=options)


def test_a_users_own_environment_is_named_by_module_and_factory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_world.py").write_text(
        "from atpo_async.environments.hopqa.environment import HopQA\n"
        "def make(tokenizer, **options):\n    return HopQA(tokenizer, **options)\n"
        "def broken(tokenizer):\n    raise OSError('no such corpus')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ENVIRONMENT.make("my_world:make", folder, options={"eval_tasks": 3}).num_tasks("eval") == 3
    with pytest.raises(SetupError, match="'my_world:broken' could not be made: OSError: no such corpus"):
        ENVIRONMENT.make("my_world:broken", folder)
    with pytest.raises(ConfigError, match=r"'my_world:broken' with options .'size': 3.: .*an environment is called as"):
        ENVIRONMENT.make("my_world:broken", folder, options={"size": 3})
    with pytest.raises(ConfigError, match="has no 'absent'"):
        ENVIRONMENT.make("my_world:absent", folder)
    with pytest.raises(SetupError, match="module 'no_such_world' cannot be imported"):
        ENVIRONMENT.make("no_such_world:make", folder)


def test_the_environment_loads_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; from atpo_async.config.doors import ENVIRONMENT; "
        f"ENVIRONMENT.make('hopqa', {str(folder)!r}); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'vllm', 'zmq')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_factory_that_returns_no_environment_is_refused_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_environment.py").write_text("def make(tokenizer):\n    return 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"'odd_environment:make': int is not an environment: it lacks stop_token_ids"
    ):
        ENVIRONMENT.make("odd_environment:make", tmp_path)
