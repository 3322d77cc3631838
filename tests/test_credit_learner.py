"""Credit that the whole batch decides, or that reads the reference, through the real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import Moments, TreeArrays, leaf_tokens
from atpo_async.core.credit.advantage_modes import optimal_value, preference
from atpo_async.wire.messages import Batch
from learner.packing.credited import CreditedTree, whole_tree
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.batch_credit import VARIANCE_FLOOR
from learner.training.report import StepReport
from learner.training.trainer import Trainer
from tests.learner_support import batch_of, flat_gradient, in_double, make_batch, make_config, make_model

Sections = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


FREE: Sections = {
    "correction": {"action": "none", "accept_bias": True},
    "objective": {"surrogate": "policy-gradient"},
    "learner": {"max_grad_norm": 1e9, "packing": "flat", "lr": 1e-2},
}


def configured(folder: Path, given: Sections, **learner: object) -> Config:
    sections = {name: dict(fields) for name, fields in FREE.items()}
    for name, fields in {**given, "learner": {**given.get("learner", {}), **learner}}.items():
        sections[name] = {**sections.get(name, {}), **fields}
    return make_config(folder, **sections)


def moved_on(config: Config) -> Trainer:
    """A trainer whose policy is not where its reference is any more."""
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return trainer


def step_of(config: Config, batch: Batch | None = None) -> tuple[StepReport, torch.Tensor, Trainer]:
    """Report of one float64 step, and the gradient it saw."""
    trainer = moved_on(config)
    seen: list[torch.Tensor] = []
    real: Any = trainer.optimizer.step

    def step() -> None:
        seen.append(flat_gradient(trainer.policy))
        real()

    trainer.optimizer.step = step
    report = trainer.train(make_batch() if batch is None else batch, version=3)
    return report, seen[0], trainer


def turn_sums(policy: Any, tree: Any) -> list[torch.Tensor]:
    """The log-prob of each turn's action, with its gradient."""
    found = []
    for turn in tree:
        tokens = torch.from_numpy(tree.context(turn.turn_id).astype(np.int64))
        logps = policy.hf(input_ids=tokens[None]).logits[0].log_softmax(-1)
        places = torch.arange(len(tokens) - len(turn.action), len(tokens))
        found.append(logps[places - 1, tokens[places]].sum())
    return found


def distances(trainer: Trainer, batch: Batch) -> list[tuple[TreeArrays, torch.Tensor]]:
    """Of each tree its arrays, and log pi - log reference of each turn, under the weights that the step began with."""
    policy, reference = trainer.policy, in_double(load_policy(trainer.config))
    found = []
    for sampled in batch.trees:
        tree = whole_tree(sampled)
        with torch.no_grad():
            fixed = torch.stack(turn_sums(reference, tree))
        found.append((TreeArrays.of(tree), torch.stack(turn_sums(policy, tree)) - fixed))
    return found


PREFERENCE: Sections = {
    "credit": {
        "advantage_mode": "preference",
        "advantage_options": {"label_noise": "visits"},
        "value_mode": "leaf_mean",
    },
    "objective": {"aggregation": "unique-token-mean"},
}
OPTIMAL: Sections = {
    "credit": {"advantage_mode": "optimal_value", "normalise_leaves": False, "advantage_options": {"beta2": 0.1}},
    "objective": {"aggregation": "seq-mean-token-sum"},
}


def unweighted(batch: Batch) -> Batch:
    """Every tree counts the same."""
    trees = tuple(msgspec.structs.replace(tree, weight=1.0) for tree in batch.trees)
    return batch_of(trees, trees)


def test_the_gradient_of_step_preferences_is_that_of_the_published_loss(folder: Path) -> None:
    batch = unweighted(make_batch())
    report, gradient, _ = step_of(configured(folder, PREFERENCE), batch)
    fresh = moved_on(configured(folder, PREFERENCE))
    losses = []
    for arrays, moved in distances(fresh, batch):
        values = credit_rule(fresh.config.credit).credit(arrays).values
        winners, losers = preference.pairs(arrays, values)
        visits = [sum(_is_below(arrays, leaf, turn) for leaf in _leaves(arrays)) for turn in range(len(arrays))]
        for won, lost in zip(winners.tolist(), losers.tolist(), strict=True):
            x = 0.1 * (moved[won] - moved[lost])
            noise = 1 / (visits[won] / visits[lost] + 1)
            losses.append(-(1 - noise) * torch.nn.functional.logsigmoid(x) - noise * torch.nn.functional.logsigmoid(-x))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert len(losses) >= 4
    assert report.metrics["credit/preference_loss"] == pytest.approx(loss.item(), rel=1e-9)
    # The mean is over the batch's tokens here, over its pairs there.
    torch.testing.assert_close(
        gradient * batch.num_turn_tokens / len(losses), flat_gradient(fresh.policy), atol=1e-12, rtol=1e-8
    )


def _leaves(arrays: TreeArrays) -> list[int]:
    found: list[int] = np.flatnonzero(arrays.is_leaf).tolist()
    return found


def _is_below(arrays: TreeArrays, turn: int, above: int) -> bool:
    while turn != above and turn >= 0:
        turn = int(arrays.parent[turn])
    return turn == above


def test_the_gradient_of_the_regression_is_that_of_the_published_loss(folder: Path) -> None:
    batch = unweighted(make_batch())
    report, gradient, _ = step_of(configured(folder, OPTIMAL), batch)
    fresh = moved_on(configured(folder, OPTIMAL))
    losses = []
    for arrays, moved in distances(fresh, batch):
        rewards = arrays.reward[arrays.is_leaf]
        best = optimal_value.optimal_value(rewards, 0.5)
        for leaf in _leaves(arrays):
            path = [n for n in range(len(arrays)) if _is_below(arrays, leaf, n)]
            losses.append((0.1 * moved[path].sum() + best - float(arrays.reward[leaf])) ** 2)
    loss = torch.stack(losses).mean()
    loss.backward()
    assert report.metrics["credit/optimal_value_loss"] == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(gradient, flat_gradient(fresh.policy), atol=1e-12, rtol=1e-8)


TREEPO: Sections = {
    "credit": {"advantage_mode": "ancestors", "normalise_leaves": False, "whiten_advantages": True},
    "objective": {"aggregation": "token-mean"},
}
LITE: Sections = {"credit": {"normalise_leaves": "batch", "advantage_scale": "sqrt-leaves"}}
TRACED: Sections = {"credit": {"value_mode": "tree_trace", "whiten_advantages": True}}


@pytest.mark.parametrize(
    "sections", [PREFERENCE, OPTIMAL, TREEPO, LITE, TRACED], ids=["preference", "optimal", "treepo", "lite", "traced"]
)
def test_a_tree_in_one_pass_and_in_rows_have_the_same_gradient_whatever_the_micro_batches(
    folder: Path, sections: Sections
) -> None:
    flat, gradient, _ = step_of(configured(folder, sections))
    packed, same, _ = step_of(configured(folder, sections, packing="tree", pack_tokens=64, micro_batch_tokens=128))
    torch.testing.assert_close(same, gradient, atol=1e-12, rtol=1e-9)
    credit = {name: value for name, value in flat.metrics.items() if name.startswith("credit/")}
    assert credit
    assert {name: packed.metrics[name] for name in credit} == pytest.approx(credit, rel=1e-9)


def test_whitened_advantages_have_no_mean_and_deviation_one_over_the_tokens_of_the_rows(folder: Path) -> None:
    _, _, trainer = step_of(configured(folder, TREEPO))
    batch = make_batch()
    plain = [CreditedTree.of(tree, credit_rule(trainer.config.credit)) for tree in batch.trees]
    tokens = [leaf_tokens(TreeArrays.of(tree.tree)).astype(float) for tree in plain]
    weights, before = np.concatenate(tokens), np.concatenate([tree.advantages for tree in plain])
    found = trainer._credited.of(batch)
    after = np.concatenate([tree.advantages for tree in found])
    mean = (weights @ before) / weights.sum()
    std = np.sqrt((weights @ (before - mean) ** 2) / (weights.sum() - 1) + 1e-8)
    np.testing.assert_allclose(after, (before - mean) / std, atol=1e-9)
    assert weights @ after == pytest.approx(0.0, abs=1e-6)


def test_the_tokens_of_the_rows_decide_by_how_much_advantages_are_whitened() -> None:
    """The numeric example: leaves of 5, 7, 5 and 5 tokens."""
    leaf = np.array([0.625, -0.375, -0.25, -0.25])
    moments = Moments.of(leaf, np.array([5.0, 7, 5, 5]))
    variance = moments.std**2 * moments.count / (moments.count - 1)
    assert (moments.mean, variance**0.5) == pytest.approx((-0.0909091, 0.4012292), abs=6e-8)
    found = (leaf - moments.mean) / np.sqrt(variance + VARIANCE_FLOOR)
    assert found.tolist() == pytest.approx([1.7842897, -0.7080515, -0.3965088, -0.3965088], abs=6e-8)


def test_trees_left_out_for_lack_of_a_signal_count_in_the_batchs_deviation(folder: Path) -> None:
    batch = make_batch()
    rewards = [turn.reward or 0.0 for tree in batch.trees for turn in whole_tree(tree).leaves()]
    report, _, _ = step_of(configured(folder, LITE), batch)
    assert report.metrics["credit/reward_std"] == pytest.approx(float(np.std(rewards)))
    more = msgspec.structs.replace(batch, left_out_leaves=12.0, left_out_rewards=12.0, left_out_squares=12.0)
    with_them, _, _ = step_of(configured(folder, LITE), more)
    assert with_them.metrics["credit/reward_std"] == pytest.approx(float(np.std([*rewards, *[1.0] * 12])))
    assert with_them.priorities != report.priorities


def test_adapters_have_the_model_without_them_as_their_reference(folder: Path) -> None:
    sure: Sections = {**PREFERENCE, "credit": {"advantage_mode": "preference", "value_mode": "leaf_mean"}}
    lora = configured(folder, sure, lora={"rank": 3})
    trainer = Trainer(lora, accelerator=make_accelerator(lora), policy=in_double(load_policy(lora)))
    report = trainer.train(make_batch(), version=3)
    assert report.metrics["credit/preference_margin"] == pytest.approx(0.0, abs=1e-9)
    again = trainer.train(make_batch(step=1), version=3)
    assert again.metrics["credit/preference_margin"] > 0
    assert again.metrics["credit/preference_loss"] < report.metrics["credit/preference_loss"]
