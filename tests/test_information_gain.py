"""IGPO: a turn is paid by what it adds to the policy's probability of the right answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines.base import OnRunning, Scored, Tokens, ignore
from actors.expansion.expansion import Expansion
from actors.hosting.host import HostedEnvironment
from actors.search.tree_search import TreeSearch
from atpo_async.config import Config, build
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import TreeArrays
from atpo_async.core.errors import ConfigError, EngineDead, GenerationFailed
from atpo_async.core.tree import ROOT, TurnTree
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.messages.task import MessageTask
from atpo_async.environments.reference import AnswerTemplate, Reference, answer_text
from atpo_async.environments.values import Limits, ValueRefused
from tests.actor_support import STOP, CountingEnvironment, ScriptedEngine, ints, lease, turn
from tests.search_qa_support import environment as search_qa
from tests.search_qa_support import flashrag, policy_folder
from tests.tool_task_support import tokenizer_folder, tool_task

PREFIX, ANSWER = ints(90, 91), ints(80, 81, 82)


class Knowing(CountingEnvironment):
    """Its right answer is ``ANSWER``, unless another is given."""

    answer: Any = Reference(ANSWER, PREFIX)
    asked = 0

    def reference(self, split: str, task_index: int) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Scoring(ScriptedEngine):
    """The answer's log-probs after a context are ``logprobs(context)``; each score may be followed by other weights."""

    def __init__(self, logprobs: Callable[[np.ndarray], Any], *, ages: bool = False) -> None:
        super().__init__()
        self.logprobs, self.ages = logprobs, ages
        self.scored: list[list[int]] = []

    async def score_continuation(
        self, context: Tokens, continuation: Tokens, *, request_id: str, on_running: OnRunning = ignore
    ) -> Scored:
        on_running()
        assert list(continuation) == ANSWER.tolist()
        assert list(context)[-2:] == PREFIX.tolist()
        self.scored.append([int(i) for i in context][:-2])
        found = self.logprobs(np.asarray(context)[:-2])
        if isinstance(found, Exception):
            raise found
        version, self.version = self.version, self.version + self.ages
        return Scored(logprobs=np.full(3, found, dtype=np.float32), version=version)


def by_length(context: np.ndarray) -> float:
    """Longer contexts make the answer likelier."""
    return -5.0 + 0.2 * len(context)


def config_of(**search: object) -> Config:
    chosen = {"turn_reward": "information-gain", "initial_rollouts": 2, "rounds": 1, "branches": 1, **search}
    return build({"search": {"max_action_tokens": 8, **chosen}, "model": {"max_context_tokens": 64}})


def search_of(
    engine: ScriptedEngine, environment: CountingEnvironment, *, most: int = 64, of: Any = None, **search: object
) -> TreeSearch:
    async def drop(message: object) -> None: ...

    config = config_of(**search)
    return TreeSearch(
        run="r", lease=lease() if of is None else of, engine=engine, environment=environment, search=config.search,
        expansion=Expansion.of(config.search), max_context_tokens=most, emit=drop,
    )  # fmt: skip


def p_after(tree: TurnTree, turn_id: int, observation: np.ndarray) -> float:
    return math.exp(by_length(np.concatenate([tree.context(turn_id), observation])))


async def test_a_turns_reward_is_the_rise_of_the_answers_probability_and_each_place_is_scored_once() -> None:
    engine, environment = Scoring(by_length), Knowing(turns=3)
    search = search_of(engine, environment)
    tree = await search.grow()
    seen = {depth: ints(20 + depth) for depth in (1, 2)}
    assert len(tree.leaves()) == 3
    for each in tree:
        if each.is_leaf:
            assert (each.turn_reward, each.reward) == (0.0, 1.0)
            continue
        depth = len(tree.path(each.turn_id))
        before = p_after(tree, each.parent_id, seen[depth - 1] if depth > 1 else ints())
        after = p_after(tree, each.turn_id, seen[depth])
        assert each.turn_reward == pytest.approx(after - before, abs=1e-6)
    inner = [each for each in tree if not each.is_leaf]
    # The prompt once, and every inner turn once.
    assert len(engine.scored) == 1 + len(inner) == len({tuple(context) for context in engine.scored})
    assert environment.asked == 1
    counts = search.gains.counts  # type: ignore[union-attr]
    assert (counts.turns, counts.unscored, counts.mixed, counts.scores) == (len(inner), 0, 0, len(inner) + 1)
    # The gains of a chain add up to the whole rise.
    for leaf in tree.leaves():
        rise = p_after(tree, leaf.parent_id, seen[2]) - p_after(tree, ROOT, ints())
        assert sum(each.turn_reward for each in tree.path(leaf.turn_id)) == pytest.approx(rise, abs=1e-6)


async def test_what_an_actor_counts_of_its_gains_gets_into_the_metrics_file(tmp_path: Path) -> None:
    from actors.environments import Environments
    from actors.faults.faults import Faults
    from actors.search.growing import TreeGrower
    from atpo_async.run.metrics import Aggregator
    from buffer.metrics_file import MetricsFile

    config, metrics = config_of(), Aggregator()
    environments = Environments.of(config, Knowing(turns=2))

    async def drop(message: object) -> None: ...

    grower = TreeGrower(
        run="r", config=config, engine=Scoring(by_length), environments=environments, emit=drop, metrics=metrics,
        faults=Faults(environments.labels, at_once=1), leaving=lambda: False, clock=lambda: 0.0,
    )  # fmt: skip
    await grower.grow(lease())
    found = metrics.flush()
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.report("actor-0", 0, 0, found)
    file.close()
    assert file.num_refused == 0
    assert {name for name in found if name.startswith("igpo/")} == {
        f"igpo/{name}" for name in ("gain", "mixed_version_share", "unscored_share", "without_answer_share", "scores")
    }
    assert found["igpo/scores"] == 4
    assert found["time/actor_score_s"] == 0.0


async def test_gains_may_be_differences_of_log_probs() -> None:
    tree = await search_of(Scoring(by_length), Knowing(turns=2), information_gain="log-prob").grow()
    for each in tree:
        # An action of two tokens and an observation of one.
        assert each.turn_reward == pytest.approx(0.0 if each.is_leaf else 0.2 * 3, abs=1e-6)


async def test_p_is_the_geometric_mean_of_the_answers_tokens() -> None:
    class Three(Scoring):
        async def score_continuation(self, *args: Any, **options: Any) -> Scored:
            made = await super().score_continuation(*args, **options)
            first = len(self.scored) == 1
            return Scored(logprobs=np.full(3, -100.0) if first else np.array([-1.2, -0.9, -1.5]), version=made.version)

    tree = await search_of(Three(by_length), Knowing(turns=2), initial_rollouts=2, rounds=0).grow()
    gains = [each.turn_reward for each in tree if not each.is_leaf]
    assert gains == pytest.approx([0.3011942, 0.3011942], abs=5e-8)


async def test_what_the_environment_pays_a_turn_is_added() -> None:
    class Paying(Knowing):
        async def start(self, split: Any, task_index: int) -> Any:
            episode = await super().start(split, task_index)
            plain = episode.step

            async def step(action: np.ndarray) -> Any:
                from dataclasses import replace

                return replace(await plain(action), turn_reward=0.5)

            episode.step = step  # type: ignore[method-assign]
            return episode

    tree = await search_of(Scoring(by_length), Paying(turns=2), information_gain="log-prob").grow()
    assert sorted({round(each.turn_reward, 5) for each in tree}) == [0.5, 1.1]


async def test_evaluation_trees_are_not_scored() -> None:
    engine = Scoring(by_length)
    tree = await search_of(engine, Knowing(turns=3), of=lease(kind="eval")).grow()
    assert len(tree) == 3
    assert engine.scored == []


@pytest.mark.parametrize("environment", [CountingEnvironment(turns=2), type("Silent", (Knowing,), {"answer": None})()])
async def test_a_task_without_an_answer_leaves_its_turns_unpaid(environment: CountingEnvironment) -> None:
    engine = Scoring(by_length)
    search = search_of(engine, environment)
    tree = await search.grow()
    assert {each.turn_reward for each in tree} == {0.0}
    assert engine.scored == []
    assert ("igpo/without_answer_share", 1.0, 1.0) in search.gains.counts.means()  # type: ignore[union-attr]


async def test_a_tree_taken_over_scores_the_turns_it_did_not_grow() -> None:
    done = [turn(1, ROOT), turn(2, ROOT, turn_reward=0.25)]
    engine = Scoring(by_length)
    tree = await search_of(engine, Knowing(turns=3), of=lease(committed=tuple(done)), rounds=0).grow()
    # What follows turns 1 and 2 is scored for the gains of those below; the prompt's p is not needed any more.
    first = [10, 11, 12, 7, STOP, 21]
    assert engine.scored.count(first) == 2
    assert len(engine.scored) == 4
    expected = math.exp(by_length(np.zeros(len(first) + 3))) - math.exp(by_length(np.zeros(len(first))))
    for parent in (1, 2):
        (child,) = tree.children(parent)
        assert tree[child].turn_reward == pytest.approx(expected, abs=1e-6)
    assert (tree[1].turn_reward, tree[2].turn_reward) == (0.0, 0.25)


async def test_gains_between_two_versions_are_counted_or_taken_again() -> None:
    ageing = Scoring(by_length, ages=True)
    search = search_of(ageing, Knowing(turns=2), rounds=0)
    await search.grow()
    counts = search.gains.counts  # type: ignore[union-attr]
    assert (counts.turns, counts.mixed) == (2, 2)

    class OnceOlder(Scoring):
        """Other weights are taken up after the first score."""

        async def score_continuation(self, *args: Any, **options: Any) -> Scored:
            made = await super().score_continuation(*args, **options)
            self.version = 1
            return made

    again = OnceOlder(by_length)
    search = search_of(again, Knowing(turns=2), rounds=0, one_version_gains=True)
    await search.grow()
    counts = search.gains.counts  # type: ignore[union-attr]
    assert counts.mixed == 0
    assert again.scored.count([10, 11, 12]) == 2
    assert counts.scores == 4


async def test_a_context_without_space_for_the_answer_is_not_paid_nor_what_is_below() -> None:
    engine = Scoring(by_length)
    # Prompt 3, then 3 tokens a turn; prefix and answer 5: two places fit into 15.
    search = search_of(engine, Knowing(turns=4), most=15, rounds=0)
    tree = await search.grow()
    for leaf in tree.leaves():
        assert [each.turn_reward != 0 for each in tree.path(leaf.turn_id)] == [True, True, False, False]
    counts = search.gains.counts  # type: ignore[union-attr]
    assert (counts.turns, counts.unscored) == (6, 2)
    assert max(len(context) for context in engine.scored) + 5 <= 14


@pytest.mark.parametrize(
    ("fault", "reason"), [(GenerationFailed("no memory"), "score_failed"), (TimeoutError("late"), None)]
)
async def test_a_score_that_fails_costs_its_branch(fault: Exception, reason: str | None) -> None:
    search = search_of(Scoring(lambda context: fault if len(context) > 3 else -1.0), Knowing(turns=2), rounds=0)
    tree = await search.grow()
    assert tree.turns == ()
    assert dict(search.growth.failures) == {reason or "score_timeout": 2}


async def test_a_dead_engine_ends_the_tree() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        await search_of(Scoring(lambda context: EngineDead("gone")), Knowing(turns=2)).grow()
    assert raised.group_contains(EngineDead)


async def test_an_environment_that_fails_at_its_reference_costs_branches_by_name() -> None:
    environment = Knowing(turns=2)
    environment.answer = KeyError("answer")
    search = search_of(Scoring(by_length), environment, rounds=0)
    await search.grow()
    assert dict(search.growth.failures) == {"environment_failed": 2}
    assert "task 0 (train), reference: KeyError" in search.growth.last_detail


# --- the answers of environments -----------------------------------------------------------------------------------


def checked(environment: Any) -> CheckedEnvironment:
    return CheckedEnvironment(environment, name="own", limits=Limits(vocab_size=100, max_context_tokens=8))


async def test_a_reference_is_checked_at_the_border() -> None:
    environment = Knowing()
    environment.answer = ([5, 6], [])
    found = await checked(environment).reference("train", 0)
    assert found is not None
    assert (found.answer.tolist(), found.prefix.tolist()) == ([5, 6], [])
    assert found.answer.dtype == np.int32

    class Later(CountingEnvironment):
        async def reference(self, split: str, task_index: int) -> Reference:
            return Reference(ints(task_index))

    later = await checked(Later()).reference("train", 7)
    assert later is not None
    assert later.answer.tolist() == [7]
    assert not checked(CountingEnvironment()).has_references
    assert await checked(CountingEnvironment()).reference("train", 0) is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([5, 6], r"what reference\(\) returned is \[5, 6\] \(list\); expected a Reference"),
        (([5, 100], []), r"reference\(\).answer.*100"),
        (([], [5]), r"reference\(\).answer is empty; return None"),
        (([5], ["x"]), r"reference\(\).prefix"),
        (([5] * 9, []), r"reference\(\).answer has 9 tokens"),
    ],
)
async def test_what_is_no_reference_is_refused_by_name(answer: Any, said: str) -> None:
    environment = Knowing()
    environment.answer = answer
    with pytest.raises(ValueRefused, match=f"environment 'own', task 3 .train.: {said}"):
        await checked(environment).reference("train", 3)


async def test_a_reference_with_another_signature_is_refused_by_name() -> None:
    class Odd(CountingEnvironment):
        def reference(self, task: int) -> Reference:
            return Reference(ints(task))

    with pytest.raises(ValueRefused, match=r"reference\(task: .* is called as reference\(split, task_index\)"):
        await checked(Odd()).reference("train", 3)


async def test_a_hosted_environment_tells_its_answers_from_its_own_loop() -> None:
    async with HostedEnvironment(lambda: checked(Knowing()), name="own", step_timeout_s=5.0) as hosted:
        found = await hosted.reference("train", 0)
    assert found is not None
    assert found.answer.tolist() == ANSWER.tolist()


@pytest.mark.parametrize(
    ("template", "answer", "prefix", "found"),
    [
        ("{answer}", "Bob", "", "Bob"),
        ("<a>{answer}</a>", "Bob", "<a>", "Bob"),
        (r"\boxed{{answer}}", "4", r"\boxed{", "4"),
    ],
)
def test_a_template_puts_the_answer_behind_its_prefix(template: str, answer: str, prefix: str, found: str) -> None:
    made = AnswerTemplate(template, field="reference").reference(answer, lambda text: [ord(c) for c in text])
    assert made is not None
    assert ("".join(map(chr, made.prefix)), "".join(map(chr, made.answer))) == (prefix, found)


def test_an_answer_is_encoded_alone_where_it_would_merge_with_its_prefix() -> None:
    ids = {"ab": [3], "a": [1], "b": [2]}
    made = AnswerTemplate("a{answer}", field="reference").reference("b", ids.__getitem__)
    assert made is not None
    assert (made.prefix.tolist(), made.answer.tolist()) == ([1], [2])


@pytest.mark.parametrize("template", ["", "answer", "{answer}{answer}", 3, None])
def test_what_is_no_template_is_refused_by_name(template: object) -> None:
    with pytest.raises(ConfigError, match=r"reference is .*expected a text with {answer} in it once"):
        AnswerTemplate(template, field="reference")


@pytest.mark.parametrize(
    ("value", "text"),
    [("Bob ", "Bob"), (42, "42"), (["a", "b"], "a"), ([], None), (None, None), (True, None), ("", None), ({}, None)],
)
def test_a_rows_answer_as_text(value: object, text: str | None) -> None:
    assert answer_text(value) == text


# --- credit --------------------------------------------------------------------------------------------------------


def tree_of_six(**changes: object) -> TreeArrays:
    """The tree of the numeric example: turns 1 (leaves 2 and 3), 4 (leaf 5) and the leaf 6."""
    fields: dict[str, Any] = {
        "parent": np.array([-1, 0, 0, -1, 3, -1]),
        "is_leaf": np.array([False, True, True, False, True, True]),
        "reward": np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
        "entropy": np.ones(6),
        "num_action_tokens": np.array([3, 2, 4, 2, 3, 5]),
        "turn_reward": np.array([0.2, 0.0, 0.0, -0.05, 0.0, 0.0]),
    }
    return TreeArrays(**(fields | changes))


def advantages(tree: TreeArrays, **credit: object) -> list[float]:
    config = build({"credit": {"turn_rewards": "normalised", **credit}})
    found: list[float] = credit_rule(config.credit).credit(tree).advantages.tolist()
    return found


SEPARATE = [1.577341, 1.732047, -0.577349, -1.577341, -0.577349, -0.577349]


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        ({}, SEPARATE),
        ({"discount": 0.9}, [1.519606, 1.732047, -0.577349, -1.519606, -0.577349, -0.577349]),
        ({"turn_reward_moments": "joint"}, [0.855498, 2.183771, -0.517801, -1.170681, -0.517801, -0.517801]),
    ],
)
def test_igpos_numeric_example(credit: dict[str, object], expected: list[float]) -> None:
    assert advantages(tree_of_six(), **credit) == pytest.approx(expected, abs=6e-7)


def test_the_moments_are_those_of_the_example() -> None:
    from atpo_async.core.credit.rewards import normalised_turns

    made = normalised_turns(tree_of_six())
    assert made.turn_reward[[0, 3]] == pytest.approx([0.9999920, -0.9999920], abs=5e-8)
    assert made.reward[[1, 2]] == pytest.approx([1.7320468, -0.5773489], abs=5e-8)


def test_what_a_leafs_own_turn_earned_is_part_of_its_outcome() -> None:
    paid = tree_of_six(
        reward=np.zeros(6), turn_reward=np.array([0.2, 1.0, 0.0, -0.05, 0.0, 0.0])
    )  # fmt: skip
    assert advantages(paid) == pytest.approx(SEPARATE, abs=6e-7)


def test_without_gains_the_outcomes_alone_decide() -> None:
    none = tree_of_six(turn_reward=np.zeros(6))
    plain = credit_rule(build({}).credit).credit(none).advantages
    for moments in ("separate", "joint"):
        assert advantages(none, turn_reward_moments=moments) == plain.tolist()


def test_a_tree_of_equal_outcomes_has_a_signal_by_its_gains() -> None:
    rule = credit_rule(build({"credit": {"turn_rewards": "normalised"}}).credit)
    made = rule.credit(tree_of_six(reward=np.zeros(6)))
    assert made.has_signal
    assert made.advantages[0] > 0 > made.advantages[3]


def test_leaf_weights_weigh_outcomes_and_every_inner_turn_counts_once() -> None:
    found = advantages(tree_of_six(), leaf_weights="branch-prob")
    # Branch probabilities 1/6, 1/6, 1/3, 1/3: mean 1/6, deviation sqrt(5)/6.
    high, low = 5 / math.sqrt(5), -1 / math.sqrt(5)
    assert found == pytest.approx([1 + (high + low) / 2, high, low, -1 + low, low, low], abs=2e-5)


@pytest.mark.parametrize(
    ("credit", "said"),
    [
        ({"normalise_leaves": False}, "credit.normalise_leaves = false would add"),
        (
            {"normalise_leaves": False, "normalise_returns": True},
            "credit.normalise_returns = true would normalise twice",
        ),
        ({"turn_reward_moments": "joint", "leaf_weights": "branch-prob"}, "credit.leaf_weights = 'branch-prob' weighs"),
    ],
)
def test_settings_that_contradict_it_are_refused(credit: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=f"credit.turn_rewards = 'normalised'.*{said}"):
        build({"credit": {"turn_rewards": "normalised", **credit}})


# --- the run -------------------------------------------------------------------------------------------------------


def test_an_environment_without_answers_is_refused_before_the_run(tmp_path: Path) -> None:
    from atpo_async.environments.making import make_environment

    config = build(
        {
            "environment": {"name": "tests.test_information_gain:CountingFactory"},
            "search": {"turn_reward": "information-gain"},
        }
    )
    with pytest.raises(
        ConfigError, match=r"search.turn_reward = 'information-gain'.*'tests.test_information_gain:Coun"
    ):
        make_environment(config, tmp_path)


def CountingFactory(tokenizer: Path) -> CountingEnvironment:
    return CountingEnvironment()


async def test_the_tasks_that_come_with_the_project_tell_their_answers(tmp_path: Path) -> None:
    from atpo_async.environments.hopqa.environment import HopQA
    from atpo_async.environments.hopqa.world import World, save_tokenizer

    save_tokenizer(World(), tmp_path)
    hops = HopQA(tmp_path, seed=5)
    for split in ("train", "eval"):
        found = await CheckedEnvironment(hops, name="hopqa", limits=Limits()).reference(split, 3)
        assert found is not None
        assert hops.decode(np.concatenate([found.prefix, found.answer])) == ("answer", hops.world.task(split, 3).answer)
        assert len(found.answer) == 1


@pytest.mark.parametrize(
    ("options", "prefix", "answer"), [({}, "", "city 3"), ({"reference": "Answer: {answer}."}, "Answer: ", "city 3")]
)
def test_a_tool_task_writes_a_rows_answer_by_its_template(options: dict[str, Any], prefix: str, answer: str) -> None:
    task = tool_task(**options)
    rows = [task.reference("train", index) for index in range(5)]
    texts = {(task.decode(found.prefix), task.decode(found.answer)) for found in rows if found is not None}
    assert (prefix, answer) in texts
    assert len(texts) == 5
    assert checked(task).has_references


def test_a_tool_task_without_an_answer_in_a_row_has_no_reference_and_a_bad_template_is_refused() -> None:
    def right(answer: str) -> float:
        return 1.0

    assert tool_task(data=[{"question": "Why?"}], rewards=[right]).reference("train", 0) is None
    several = tool_task(data=[{"question": "Who?", "golden_answers": ["Bob", "Robert"]}], rewards=[right])
    found = several.reference("train", 0)
    assert found is not None
    assert several.decode(found.answer) == "Bob"
    with pytest.raises(ConfigError, match=r"reference is 'no place' .*expected a text with {answer} in it once"):
        tool_task(reference="no place")


def test_a_message_task_has_references_where_it_has_right_answers() -> None:
    class Plain(MessageTask):
        def num_tasks(self, split: Any) -> int:
            return 2

        async def begin(self, split: Any, index: int) -> Any: ...

    class Told(Plain):
        reference_template = "It is {answer}"

        def right_answer(self, split: Any, index: int) -> str | None:
            return "Rome" if index else None

    assert not checked(Plain(tokenizer_folder())).has_references
    told = Told(tokenizer_folder())
    assert checked(told).has_references
    assert told.reference("train", 0) is None
    found = told.reference("train", 1)
    assert found is not None
    assert (told.decode(found.prefix), told.decode(found.answer)) == ("It is ", "Rome")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"<answer>\boxed{Paris"),
        ({"dialect": "search_r1"}, "<answer>Paris"),
        ({"reference": "</think> {answer}"}, "</think> Paris"),
    ],
)
def test_search_qa_writes_the_first_golden_answer_as_its_dialect_does(
    tmp_path: Path, options: dict[str, str], text: str
) -> None:
    task = search_qa(policy_folder(tmp_path), rows=flashrag(count=1), **options)
    found = task.reference("train", 0)
    assert found is not None
    assert task.decode(found.answer) == "Paris"
    assert task.decode(np.concatenate([found.prefix, found.answer])) == text


def test_trees_and_flat_rows_have_the_same_gradient_with_normalised_gains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msgspec
    import torch

    from learner.policy.accelerator import make_accelerator
    from learner.policy.model import load_policy
    from learner.training.trainer import Trainer
    from tests.learner_support import flat_gradient, in_double, make_batch, make_config, make_model

    batch, rng = make_batch(num_trees=2), np.random.default_rng(3)
    trees = tuple(
        msgspec.structs.replace(
            tree,
            turns=tuple(
                msgspec.structs.replace(each, turn_reward=float(rng.normal()) if each.reward is None else 0.0)
                for each in tree.turns
            ),
        )
        for tree in batch.trees
    )
    batch, model = msgspec.structs.replace(batch, trees=trees), make_model(tmp_path / "model")
    found: dict[str, Any] = {}
    for rewards, packing in (("normalised", "flat"), ("normalised", "tree"), ("plain", "flat")):
        config = make_config(
            model, credit={"turn_rewards": rewards}, learner={"packing": packing, "max_grad_norm": 1e9}
        )  # fmt: skip
        policy = in_double(load_policy(config))
        trainer = Trainer(config, accelerator=make_accelerator(config), policy=policy)
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(
            trainer.optimizer, "step", lambda seen=seen, policy=policy: seen.append(flat_gradient(policy))
        )
        report = trainer.train(batch, version=3)
        found[f"{rewards}, {packing}"] = (seen[0], report.priorities)
    torch.testing.assert_close(found["normalised, tree"][0], found["normalised, flat"][0], atol=1e-13, rtol=1e-9)
    assert found["normalised, tree"][1] == pytest.approx(found["normalised, flat"][1])
    assert not torch.allclose(found["plain, flat"][0], found["normalised, flat"][0], rtol=1e-3)
