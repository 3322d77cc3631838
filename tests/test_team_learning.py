"""Credit and loss of groups of trees: by role, the same however trees are packed and cut, and late rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch

from atpo_async.config import CreditConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import ROLES, TreeArrays, turn_weights
from atpo_async.core.credit.roles import PROPOSER, SYNTHESIZER
from atpo_async.core.vocabulary import Aggregation
from atpo_async.wire.messages import BatchTree
from learner.batches.intake import sift
from learner.packing.credited import CreditedTree, Normaliser
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.learner_support import VOCAB, batch_of, flat_gradient, in_double, make_config, make_model
from tests.team_support import groups

RULE = credit_rule(CreditConfig())


def one_turn_each(roles: list[int], rewards: list[float], **more: Any) -> TreeArrays:
    count = len(roles)
    return TreeArrays(
        parent=np.full(count, -1), is_leaf=np.ones(count, dtype=bool), reward=np.array(rewards),
        entropy=np.ones(count), num_action_tokens=np.arange(1, count + 1), role=np.array(roles), **more,
    )  # fmt: skip


def test_the_published_example_of_advantages_normalised_by_role() -> None:
    group = one_turn_each([PROPOSER] * 4 + [SYNTHESIZER] * 2, [1.0, 0.5, 0.0, 0.0, 1.0, 0.0])
    found = RULE.credit(group)
    proposers = group.reward[:4]
    assert (proposers.mean(), proposers.std()) == pytest.approx((0.375, 0.4145781), abs=5e-8)
    np.testing.assert_allclose(
        found.advantages, [1.5075531, 0.3015106, -0.9045319, -0.9045319, 0.9999980, -0.9999980], atol=5e-8
    )
    assert found.has_signal


def test_a_role_whose_members_earned_the_same_has_advantage_zero_beside_one_that_has_a_signal() -> None:
    group = one_turn_each([PROPOSER, SYNTHESIZER, PROPOSER, SYNTHESIZER], [0.3, 1.0, 0.3, 0.0])
    for rule in (RULE, credit_rule(CreditConfig(normalise_leaves=False))):
        found = rule.credit(group)
        assert found.has_signal
        assert found.advantages[[0, 2]].tolist() == [0.0, 0.0]
        assert found.advantages[1] > 0
    assert not RULE.credit(one_turn_each([PROPOSER, SYNTHESIZER], [1.0, 0.0])).has_signal


@pytest.mark.parametrize("modes", [
    {"advantage_mode": "diff_global"}, {"advantage_mode": "diff_localglobal"}, {"value_mode": "leaf_mean"},
    {"value_mode": "tree_trace"}, {"normalise_leaves": False, "normalise_returns": True, "discount": 0.9},
    {"leaf_weights": "branch-prob"},
])  # fmt: skip
def test_each_role_is_credited_as_a_tree_of_its_own(modes: dict[str, Any]) -> None:
    rule = credit_rule(CreditConfig(**modes))
    (tree,) = groups(1)
    credited = CreditedTree.of(tree, rule)
    ratio = np.linspace(0.5, 1.5, len(credited.tree))
    found = rule.credit(credited.tree, ratio=ratio)
    for role in ("proposer", "synthesizer"):
        at = np.array([turn.role == role for turn in credited.tree])
        own = msgspec.structs.replace(
            tree, turns=tuple(msgspec.structs.replace(t, role="") for t in tree.turns if t.role == role)
        )
        np.testing.assert_array_equal(credited.advantages[at], CreditedTree.of(own, rule).advantages)
        alone = rule.credit(CreditedTree.of(own, rule).tree, ratio=ratio[at])
        np.testing.assert_array_equal(found.advantages[at], alone.advantages)
        np.testing.assert_array_equal(found.values[at], alone.values)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_each_role_weighs_its_share_of_the_group_under_every_aggregation(
    aggregation: Aggregation, share: float
) -> None:
    shares = {PROPOSER: share, SYNTHESIZER: 1.0 - share}
    credited = [CreditedTree.of(tree, RULE) for tree in groups(3)]
    normaliser = Normaliser.of(credited)
    plain = [
        CreditedTree.of(
            msgspec.structs.replace(t, turns=tuple(msgspec.structs.replace(n, role="") for n in t.turns)), RULE
        )
        for t in groups(3)
    ]
    for item, without in zip(credited, plain, strict=True):
        own = Normaliser(
            num_trees=normaliser.num_trees, num_leaves=normaliser.num_leaves,
            num_action_tokens=normaliser.num_action_tokens, num_turn_tokens=normaliser.num_turn_tokens,
            role_shares=shares,
        )  # fmt: skip
        mass, base = _mass(item, own, aggregation), _mass(without, own, aggregation)
        assert mass["proposer"] == pytest.approx(share * sum(mass.values()))
        assert sum(mass.values()) == pytest.approx(base[""]), "the group weighs in the batch what it did"
        weights = turn_weights(
            TreeArrays.of(item.tree), aggregation=aggregation, num_leaves=own.num_leaves,
            num_action_tokens=own.num_action_tokens, num_turn_tokens=own.num_turn_tokens, num_trees=own.num_trees,
            role_shares=shares,
        )  # fmt: skip
        by_turn = dict.fromkeys((turn.turn_id for turn in item.tree), 0.0)
        for row in own.row_weights(item.tree, aggregation).values():
            for turn_id, weight in row.items():
                by_turn[turn_id] += weight
        np.testing.assert_allclose(list(by_turn.values()), weights, rtol=1e-12)


def _mass(item: CreditedTree, normaliser: Normaliser, aggregation: Aggregation) -> dict[str, float]:
    """By role: what its tokens weigh together; of rows that are sums over tokens, what its rows do."""
    found: dict[str, float] = {}
    for row in normaliser.row_weights(item.tree, aggregation).values():
        path = [item.tree[turn_id] for turn_id in row]
        length = sum(len(turn.action) for turn in path)
        for turn in path:
            tokens = len(turn.action) / (length if aggregation.endswith("token-sum") else 1)
            found[turn.role] = found.get(turn.role, 0.0) + row[turn.turn_id] * tokens
    return found


def test_a_group_without_one_of_its_roles_weighs_what_it_did() -> None:
    only = one_turn_each([SYNTHESIZER, SYNTHESIZER], [1.0, 0.0])
    assert turn_weights(only).tolist() == turn_weights(one_turn_each([0, 0], [1.0, 0.0])).tolist()


def test_rewards_known_at_the_closing_take_the_place_of_those_on_the_turns() -> None:
    (tree,) = groups(1)
    given = {each.turn_id: each.reward for each in tree.leaf_rewards}
    found = {turn.turn_id: turn.reward for turn in CreditedTree.of(tree, RULE).tree.leaves()}
    own = {turn.turn_id: turn.reward for turn in tree.turns if turn.is_leaf}
    assert found == own | given
    assert found != own


def test_a_group_needs_no_prompt_of_its_own_and_a_tree_does() -> None:
    fit = groups(1)
    batch = batch_of(fit, fit)
    assert not sift(batch, version=3, vocab_size=VOCAB, max_lag=8).dropped
    bare = msgspec.structs.replace(
        fit[0], turns=tuple(msgspec.structs.replace(t, observation=t.observation[:0]) for t in fit[0].turns)
    )
    assert sift(batch_of((bare,), (bare,)), version=3, vocab_size=VOCAB, max_lag=8).dropped == {
        "empty_prompt": (bare.tree_id,)
    }


# --- through the trainer -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def step_of(
    folder: Path, trees: tuple[BatchTree, ...], **learner: object
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss and gradient of one float64 step on these groups, and their new priorities."""
    config = make_config(
        folder, learner={"max_grad_norm": 1e9, **learner},
        team={"proposers": 2, "teams": 2, "proposer_weight": 0.3, "cue_tokens": 9},
    )  # fmt: skip
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))
    seen: list[torch.Tensor] = []
    trainer.optimizer.step = lambda *_: seen.append(flat_gradient(trainer.policy))
    report = trainer.train(batch_of(trees, trees), version=3)
    return report.metrics["train/loss"], seen[0], report.priorities


@pytest.mark.parametrize(
    "other",
    [{"packing": "tree", "micro_batch_tokens": 64}, {"packing": "tree", "pack_tokens": 48}, {"packing": "flat"}],
    ids=["tree, small passes", "tree, small rows", "flat"],
)
def test_loss_and_gradient_of_groups_are_the_same_however_they_are_laid_out_and_cut(
    folder: Path, other: dict[str, object]
) -> None:
    loss, gradient, priorities = step_of(folder, groups(3, version=3), packing="tree")
    again, same, also = step_of(folder, groups(3, version=3), **other)
    assert again == pytest.approx(loss, abs=1e-13)
    torch.testing.assert_close(same, gradient, atol=1e-13, rtol=1e-9)
    assert also == pytest.approx(priorities)
    assert float(gradient.abs().max()) > 1e-4


def test_the_loss_is_that_of_each_role_apart_times_its_share(folder: Path) -> None:
    trees = groups(2, version=3)
    loss, gradient, _ = step_of(folder, trees)
    parts = []
    for role, share in (("proposer", 0.3), ("synthesizer", 0.7)):
        # The mean over a role's own rows, of groups of that role alone; all groups are of one shape.
        own = tuple(
            msgspec.structs.replace(
                tree, turns=tuple(msgspec.structs.replace(t, role="") for t in tree.turns if t.role == role)
            )
            for tree in trees
        )
        found, slope, _ = step_of(folder, own)
        parts.append((share * found, share * slope))
    assert loss == pytest.approx(sum(part for part, _ in parts), abs=1e-12)
    torch.testing.assert_close(gradient, parts[0][1] + parts[1][1], atol=1e-12, rtol=1e-9)


def test_roles_have_fixed_places_in_the_journal() -> None:
    assert ROLES == ("", "proposer", "synthesizer"), "their index is in the flags of recorded turns"
