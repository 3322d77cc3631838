"""Branches that begin while a tree grows: the same choices whichever actor makes them, within the budget."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.engines.base import Generation, OnRunning, Sampling, Tokens, ignore
from actors.expansion.expansion import Expansion
from actors.expansion.facts import Facts
from actors.expansion.growing_tree import GrowingTree
from actors.expansion.rise import copies, copies_after
from atpo_async.config import SearchConfig
from atpo_async.core.errors import ConfigError, GenerationFailed
from atpo_async.core.tree import ROOT, Turn, TurnTree
from tests.actor_support import CountingEnvironment, ints, leaf, turn
from tests.expansion_support import VOCAB, ByContext, Uneven, content, search_of, settings
from tests.test_search import Sink


def online(**fields: object) -> SearchConfig:
    return settings(
        **{"strategy": "entropy-rise", "expand": "online", "initial_rollouts": 3, "rounds": 2, "branches": 4, **fields}
    )


LOOSE = online(initial_rollouts=4, rounds=4, branches=5, branch_prob=0.35, entropy_weight=0.1)
"""The budget does not bind: what is left of it are fresh chains, whose number depends on the turns alone."""


def granted(tree: TurnTree, config: SearchConfig, seed: int = 3) -> Counter[int]:
    """Turn -> branches that the rule has begin after it, by a plain reading of the whole tree."""
    facts, found = Facts(seed=seed, policy_tokens=VOCAB), Counter[int]()
    for each in tree:
        if config.rise_of == "turn":
            found[each.parent_id] += copies(tree, each.turn_id, config, facts)
        elif not each.is_leaf:
            found[each.turn_id] += copies_after(tree, each.turn_id, config, facts)
    return +found


def begun(tree: TurnTree) -> Counter[int]:
    """Turn -> branches after it."""
    rounds = {ROOT: 0} | {t.turn_id: t.expansion_round for t in tree}
    return Counter(t.parent_id for t in tree if t.expansion_round != rounds[t.parent_id])


def without(tree: TurnTree, gone: set[int]) -> TurnTree:
    return TurnTree("t0", 0, tree.prompt, tuple(t for t in tree if t.turn_id not in gone))


async def loose_tree(config: SearchConfig) -> tuple[int, TurnTree]:
    """The first seed under which the rule branches in several places and leaves some of the budget, and its tree."""
    for seed in range(40):
        tree = await search_of(config, seed=seed).grow()
        found = begun(tree)
        if found[ROOT] >= 2 and found.total() - found[ROOT] >= 3:
            return seed, tree
    raise AssertionError("no seed has such a tree")


# --- what begins, and when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rise_of", ["turn", "parent"])
@pytest.mark.parametrize("penalty", [0.0, 0.05])
async def test_branches_begin_where_the_rule_says_and_nowhere_else(rise_of: str, penalty: float) -> None:
    config = LOOSE.model_copy(update={"rise_of": rise_of, "branch_penalty": penalty})
    seed, tree = await loose_tree(config)
    # In the fresh chains, which are what is left of the budget, nothing is decided.
    fresh = {t.turn_id for t in tree if tree.path(t.turn_id)[0].expansion_round > 0}
    wanted, found = granted(without(tree, fresh), config, seed), begun(without(tree, fresh))
    assert found == wanted
    assert begun(tree) == wanted + Counter({ROOT: config.max_leaves - 4 - wanted.total()})
    assert len(tree.leaves()) == config.max_leaves


async def test_a_branch_is_one_round_deeper_than_its_parent() -> None:
    tree = await search_of(LOOSE).grow()
    assert {t.expansion_round for t in tree} >= {0, 1, 2}
    for each in tree:
        parent = 0 if each.parent_id == ROOT else tree[each.parent_id].expansion_round
        assert each.expansion_round in (parent, parent + 1)
    for parent in {t.parent_id for t in tree} - {ROOT}:
        same = [t for t in tree if t.parent_id == parent and t.expansion_round == tree[parent].expansion_round]
        assert len(same) <= 1, "one child goes on its parent's chain"


@pytest.mark.parametrize("copies", [1, 3])
async def test_a_tree_has_never_more_leaves_than_the_settings_allow(copies: int) -> None:
    config = online(branch_prob=1.0, entropy_weight=0.0, max_copies=copies)
    tree = await search_of(config).grow()
    assert len(tree.leaves()) == config.max_leaves == 11
    assert begun(tree)[ROOT] == 0, "the rule has used up the budget"


class OneSlowChain(ByContext):
    """The first chain does not come to its second turn before all others have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.others_ended = asyncio.Event()
        self.first: np.ndarray | None = None

    async def generate(
        self, prompt: Tokens, sampling: Sampling, *, request_id: str, on_running: OnRunning = ignore
    ) -> Generation:
        if self.first is not None and len(prompt) > 3 and np.array_equal(prompt[3:6], self.first):
            await self.others_ended.wait()
        made = await super().generate(prompt, sampling, request_id=request_id, on_running=on_running)
        if self.first is None and len(prompt) == 3:
            self.first = made.token_ids
        return made


async def test_branches_begin_at_once_and_not_after_the_slowest_chain() -> None:
    engine, sink = OneSlowChain(), Sink()
    search = search_of(online(branch_prob=1.0, entropy_weight=0.0), engine=engine, sink=sink)
    growing = asyncio.create_task(search.grow())
    while not any(t.expansion_round > 0 and t.is_leaf for t in sink.turns):
        await asyncio.sleep(0)
        assert not growing.done(), "no branch ended before the slow chain"
    engine.others_ended.set()
    await growing
    assert sink.closed.num_turns == len(sink.turns)


# --- another actor goes on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rise_of", ["turn", "parent"])
@pytest.mark.parametrize(("probe", "prob"), [(0.0, 0.35), (1.0, 0.1)])
async def test_where_the_budget_does_not_bind_a_tree_taken_over_at_any_turn_is_the_same_tree(
    rise_of: str, probe: float, prob: float
) -> None:
    changes = {"rise_of": rise_of, "branch_penalty": 0.05, "probe_budget": probe, "branch_prob": prob}
    config = LOOSE.model_copy(update=changes)
    seed, whole = await loose_tree(config)
    for number in range(1, len(whole) + 1):
        resumed = await search_of(config, committed=whole.turns[:number], seed=seed).grow()
        assert content(resumed) == content(whole), number


@pytest.mark.parametrize("seed", [0, 1])
async def test_where_it_binds_the_turns_that_exist_are_decided_on_as_before(seed: int) -> None:
    config = online(branch_prob=0.7, entropy_weight=0.1)
    whole = await search_of(config, seed=seed).grow()
    first: dict[int, Counter[int]] = {}
    for number in range(len(whole) + 1):
        asked: list[tuple[int, tuple[int, ...]]] = []
        expansion = recording(config, asked)
        resumed = await search_of(config, committed=whole.turns[:number], seed=seed, expansion=expansion).grow()
        assert len(resumed.leaves()) == config.max_leaves
        chosen = dict(asked)
        for turn_id in range(1, number + 1):
            first.setdefault(turn_id, Counter(chosen.get(turn_id, ())))
            assert Counter(chosen.get(turn_id, ())) == first[turn_id], (number, turn_id)
        # What had begun goes on, and nothing begins twice.
        before = TurnTree("t0", 0, whole.prompt, whole.turns[:number])
        assert not begun(before) - begun(resumed)


def recording(config: SearchConfig, asked: list[tuple[int, tuple[int, ...]]]) -> Expansion:
    plain = Expansion.of(config, policy_tokens=VOCAB)

    def rule(
        tree: GrowingTree, turn_id: int, count: int, rng: np.random.Generator, settings: SearchConfig, *, facts: Facts
    ) -> Sequence[int]:
        assert turn_id == tree.next_id - 1, "a rule sees no turn that ended later"
        found = tuple(plain.strategy(tree, turn_id, count, rng, settings, facts=facts))
        asked.append((turn_id, found))
        return found

    return Expansion(rule, config, VOCAB)


async def test_the_rest_of_the_budget_is_not_given_twice_to_a_tree_taken_over() -> None:
    """Fresh chains had begun; the rule would branch in them, were they not what was left."""
    config = online(branch_prob=0.0, entropy_weight=0.0)
    whole = await search_of(config).grow()
    always = online(branch_prob=0.0, entropy_weight=0.0)
    for number in range(len(whole) + 1):
        resumed = await search_of(always, committed=whole.turns[:number]).grow()
        assert len(resumed.leaves()) == config.max_leaves
        assert begun(resumed) == Counter({ROOT: 8})


async def test_an_actor_that_is_asked_to_end_begins_no_branch_and_leaves_the_tree_to_another() -> None:
    config, sink = online(branch_prob=1.0, entropy_weight=0.0), Sink()
    whole = await search_of(config).grow()
    for number in range(1, len(whole) + 1, 3):
        sink = Sink()
        search = search_of(config, sink=sink, leaving=lambda sink=sink, number=number: len(sink.turns) >= number)  # type: ignore[misc]
        left = await search.grow()
        assert search.unfinished is (len(left.leaves()) < config.max_leaves)
        assert all(m is not None for m in sink)
        if search.unfinished:
            assert not [m for m in sink if type(m).__name__ == "TreeClosed"]
            assert len((await search_of(config, committed=left.turns).grow()).leaves()) == config.max_leaves


# --- failures -------------------------------------------------------------------------------------------------------


async def test_a_branch_that_fails_is_counted_and_is_not_made_up_for() -> None:
    class FailsOnce(ByContext):
        async def generate(
            self, prompt: Tokens, sampling: Sampling, *, request_id: str, on_running: OnRunning = ignore
        ) -> Generation:
            if len(self.contexts) == 7:
                self.contexts.append(np.asarray(prompt))
                raise GenerationFailed("no")
            return await super().generate(prompt, sampling, request_id=request_id, on_running=on_running)

    sink = Sink()
    tree = await search_of(online(branch_prob=1.0), engine=FailsOnce(), sink=sink).grow()
    assert sink.closed.failures == {"generate_failed": 1}
    assert len(tree.leaves()) == 10


RULES = """
def after_errors(tree, turn_id, count, rng, settings, *, copies=1):
    if tree[turn_id].end == "continue" and tree[turn_id].fingerprint == (1,):
        return [turn_id] * min(copies, count)
    return []

def fresh(tree, turn_id, count, rng, settings):
    return [0] * min(count, len(tree) % 2)

def after_a_leaf(tree, turn_id, count, rng, settings):
    return [turn_id] if tree[turn_id].is_leaf else []

def too_many(tree, turn_id, count, rng, settings):
    return [0] * (count + 1)

def fails(tree, turn_id, count, rng, settings):
    raise LookupError("no")

def later(tree, turn_id, count, rng):
    return []
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SearchConfig]:
    (tmp_path / "rules_of_mine.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rules_of_mine", raising=False)
    return lambda name, **options: online(strategy=f"rules_of_mine:{name}", strategy_options=options)


async def test_a_rule_of_ones_own_begins_chains_after_any_turn_that_went_on(mine: Callable[..., SearchConfig]) -> None:
    config = mine("after_errors", copies=2)
    tree = await search_of(config).grow()
    after = begun(tree)
    after.pop(ROOT, None)
    assert after
    assert all(tree[turn_id].fingerprint == (1,) for turn_id in after)
    assert len(tree.leaves()) == config.max_leaves
    fresh = await search_of(mine("fresh")).grow()
    assert begun(fresh) == Counter({ROOT: 8})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("after_a_leaf", "it began a chain after turn"),
        ("too_many", "it chose 9 turns of tree t0 of 1 turns; expected at most 8, as it was asked for"),
        ("fails", "it failed on tree t0 of 1 turns: LookupError: no"),
    ],
)
async def test_a_rule_that_fails_costs_its_tree_what_is_left_of_the_branches(
    mine: Callable[..., SearchConfig], name: str, said: str
) -> None:
    sink = Sink()
    search = search_of(mine(name), sink=sink)
    tree = await search.grow()
    assert sink.closed.failures == {"expansion_failed": 8}
    assert said in search.growth.last_detail
    assert len(tree.leaves()) == 3


def test_a_rule_that_cannot_be_called_as_one_is_refused_when_it_is_loaded(mine: Callable[..., SearchConfig]) -> None:
    said = (
        r"an online expansion rule is called as \(tree, turn_id, count, rng, settings, \*\*options\).*Online expansion"
    )
    with pytest.raises(ConfigError, match=said):
        Expansion.of(mine("later"))


# --- large trees ----------------------------------------------------------------------------------------------------


def test_a_growing_tree_answers_as_the_tree_that_it_has_become() -> None:
    turns = [
        turn(1, ROOT),
        turn(2, 1),
        leaf(3, 2),
        leaf(4, 1),
        turn(6, ROOT, action=ints(4, 5, 6), logprobs=np.zeros(3)),
    ]
    growing, whole = GrowingTree("t0", 0), TurnTree("t0", 0, ints(9), tuple(turns))
    growing.prompt = whole.prompt
    for each in turns:
        growing.add(each)
    assert growing.turns == whole.turns
    assert growing.frozen().turns == whole.turns
    assert (len(growing), growing.next_id, growing.action_tokens) == (5, 7, 11)
    assert growing.leaves() == whole.leaves()
    for turn_id in (ROOT, 1, 2, 3, 4, 6):
        assert growing.children(turn_id) == whole.children(turn_id)
        assert growing.path(turn_id) == whole.path(turn_id)
        assert growing.context(turn_id).tolist() == whole.context(turn_id).tolist()
        if turn_id:
            assert growing.siblings(turn_id) == whole.siblings(turn_id)
    assert 5 not in growing


async def test_the_work_of_a_tree_grows_with_its_turns_and_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted as readings of a turn's parent, of which every walk over a tree makes at least one a turn."""
    looked = Counter[str]()
    plain = GrowingTree.__getitem__

    def counted(self: GrowingTree, turn_id: int) -> Turn:
        looked["turns"] += 1
        return plain(self, turn_id)

    monkeypatch.setattr(GrowingTree, "__getitem__", counted)
    costs = {}
    for rounds in (10, 40):
        config = online(rounds=rounds, branches=10, branch_prob=0.5, entropy_weight=0.0, branch_penalty=0.05)
        looked.clear()
        tree = await search_of(config, environment=Uneven(turns=4)).grow()
        costs[len(tree)] = looked["turns"]
    (few, cheap), (many, dear) = sorted(costs.items())
    assert many > 3 * few
    assert dear / cheap < 2 * many / few


async def test_chains_that_end_at_their_first_turn_leave_the_rule_nothing() -> None:
    tree = await search_of(online(branch_prob=1.0), environment=CountingEnvironment(turns=1)).grow()
    assert begun(tree) == Counter({ROOT: 8})
    assert len(tree) == 11


async def test_an_evaluation_is_one_chain() -> None:
    assert len((await search_of(online(branch_prob=1.0), kind="eval").grow()).leaves()) == 1
