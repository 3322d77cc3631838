"""What the built-in strategies choose, and what a user's own is held to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from actors.expansion.candidates import candidates, sibling_parent, take
from actors.expansion.expansion import Expansion, ExpansionFailed
from actors.expansion.strategies.entropy import score
from atpo_async.config import SearchConfig
from atpo_async.core.errors import ConfigError
from atpo_async.core.tree import ROOT, Turn, TurnTree
from tests.actor_support import leaf, turn

VECTORS = json.loads((Path(__file__).parent / "vectors" / "at2po_vectors.json").read_text())["tree"]
ENTROPY = {n["id"]: n["H"] for n in VECTORS["nodes"]}


def with_entropy(made: Turn, entropy: float) -> Turn:
    import msgspec

    return msgspec.structs.replace(made, logprobs=np.array([-entropy, -entropy]))


@pytest.fixture
def tree() -> TurnTree:
    turns = []
    for node in VECTORS["nodes"]:
        if node["id"] == ROOT:
            continue
        make = turn if node["reward"] is None else leaf
        turns.append(with_entropy(make(node["id"], node["parent"]), node["H"]))
    return TurnTree("t0", 0, np.array([1, 2, 3], dtype=np.int32), tuple(turns))


def choose(tree: TurnTree, count: int, **changes: object) -> tuple[int, ...]:
    settings = SearchConfig.model_validate({"sibling_penalty": 0.05, "include_root": True, **changes})
    return Expansion.of(settings).choose(tree, count=count, rng=np.random.default_rng(0))


def test_candidates_are_the_turns_that_are_not_leaves(tree: TurnTree) -> None:
    assert candidates(tree) == (1, 3, 5)
    assert list(candidates(tree, include_root=True)) == VECTORS["expansion"]["candidates_bfs"]


def test_scores_equal_the_published_code(tree: TurnTree) -> None:
    for turn_id, expected in VECTORS["expansion"]["score_code"].items():
        assert score(tree, int(turn_id), sibling_penalty=0.05) == pytest.approx(expected, abs=1e-9)


def test_expansion_order_equals_the_published_code(tree: TurnTree) -> None:
    for count, expected in VECTORS["expansion"]["topk_code"].items():
        assert list(choose(tree, int(count))) == expected


def test_a_branch_is_a_sibling_of_the_chosen_turn(tree: TurnTree) -> None:
    for turn_id, parent in VECTORS["expansion"]["new_child_parent"].items():
        assert sibling_parent(tree, int(turn_id)) == parent


def test_without_the_root_only_turns_are_branched_and_the_best_are_taken_again(tree: TurnTree) -> None:
    assert choose(tree, 5, include_root=False) == (3, 1, 5, 3, 1)


def test_ties_break_by_turn_id() -> None:
    level = [with_entropy(turn(i, ROOT), 0.5) for i in (1, 2, 3)]
    leaves = [leaf(i + 3, i) for i in (1, 2, 3)]
    tied = TurnTree("t0", 0, np.array([1], dtype=np.int32), tuple(reversed(level + leaves)))
    assert choose(tied, 2, include_root=False) == (1, 2)


def test_a_tree_whose_chains_all_ended_at_once_grows_from_its_root() -> None:
    flat = TurnTree("t0", 0, np.array([1], dtype=np.int32), (leaf(1, ROOT), leaf(2, ROOT)))
    assert choose(flat, 2, include_root=False) == (ROOT, ROOT)


def test_random_choice_is_fixed_by_its_generator_and_covers_every_candidate(tree: TurnTree) -> None:
    first = choose(tree, 3, strategy="random", include_root=False)
    assert first == choose(tree, 3, strategy="random", include_root=False)
    assert sorted(first) == [1, 3, 5]


def test_the_strategy_none_never_branches(tree: TurnTree) -> None:
    assert choose(tree, 4, strategy="none") == ()


def test_taking_from_nothing_gives_nothing() -> None:
    assert take((), 3) == ()


# --- a user's own ----------------------------------------------------------------------------------------------

MINE = """
def deepest(tree, count, rng, settings, *, least=1):
    inner = [turn.turn_id for turn in tree if not turn.is_leaf and len(tree.path(turn.turn_id)) >= least]
    return sorted(inner, key=lambda turn_id: (-len(tree.path(turn_id)), turn_id))[:count]

def fails(tree, count, rng, settings):
    return tree.turns[1000]

def leaves_python(tree, count, rng, settings):
    exit(3)

def unknown(tree, count, rng, settings):
    return [99]

def too_many(tree, count, rng, settings):
    return [1] * (count + 1)

def words(tree, count, rng, settings):
    return ["1"]

def nothing(tree, count, rng, settings):
    return None

async def later(tree, count, rng, settings):
    return [1]

def of_numpy(tree, count, rng, settings):
    import numpy
    return numpy.array([3, 0])

def of_two(tree, count):
    return [1]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Expansion]:
    """Strategies of a module outside the packages."""
    (tmp_path / "strategies_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strategies_of_mine", raising=False)

    def load(name: str, **options: object) -> Expansion:
        named = {"strategy": f"strategies_of_mine:{name}", "strategy_options": options}
        return Expansion.of(SearchConfig.model_validate(named))

    return load


def chosen_by(expansion: Expansion, tree: TurnTree, count: int = 2) -> tuple[int, ...]:
    return expansion.choose(tree, count=count, rng=np.random.default_rng(0))


def test_a_strategy_of_ones_own_chooses_where_trees_branch(mine: Callable[..., Expansion], tree: TurnTree) -> None:
    depth = {turn.turn_id: len(tree.path(turn.turn_id)) for turn in tree}
    assert [depth[turn_id] for turn_id in chosen_by(mine("deepest"), tree, 3)] == [2, 1, 1]
    assert [depth[turn_id] for turn_id in chosen_by(mine("deepest", least=2), tree, 3)] == [2]
    assert chosen_by(mine("of_numpy"), tree) == (3, ROOT)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "it failed on tree t0 of 9 turns: IndexError: tuple index out of range"),
        ("leaves_python", "it failed on tree t0 of 9 turns: SystemExit: 3"),
        ("unknown", "it chose turn 99, which is not in tree t0 of 9 turns"),
        ("too_many", "it chose 3 turns of tree t0 of 9 turns; expected at most 2, as it was asked for"),
        ("words", r"it returned \['1'\] for tree t0 of 9 turns; expected a sequence of turn ids"),
        ("nothing", "it returned None for tree t0"),
    ],
)
def test_what_a_strategy_returns_is_checked(
    mine: Callable[..., Expansion], tree: TurnTree, name: str, said: str
) -> None:
    with pytest.raises(ExpansionFailed, match=f"^{said}"):
        chosen_by(mine(name), tree)


def test_a_strategy_that_cannot_be_called_as_one_is_refused_when_it_is_loaded(mine: Callable[..., Expansion]) -> None:
    said = r"search.strategy = 'strategies_of_mine:of_two' .*called as \(tree, count, rng, settings, \*\*options\)"
    with pytest.raises(ConfigError, match=said):
        mine("of_two")
    with pytest.raises(ConfigError, match=r"search.strategy = 'strategies_of_mine:later' is async"):
        mine("later")
    with pytest.raises(ConfigError, match="has no 'absent'"):
        mine("absent")
