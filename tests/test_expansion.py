from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actors.expansion import candidates, score, select, sibling_parent, take
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
    settings: dict[str, object] = {"strategy": "entropy", "sibling_penalty": 0.05, "include_root": True}
    return select(tree, count=count, rng=np.random.default_rng(0), **(settings | changes))  # type: ignore[arg-type]


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
