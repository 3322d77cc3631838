"""iStar: a reward model that learns, beside the policy, which of two chains was better, and pays single turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import TreeArrays
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.priorities import tree_priority
from atpo_async.wire.messages import Batch
from learner.checkpoints import checkpoint
from learner.checkpoints.checkpoint import Progress
from learner.implicit import reward_model
from learner.implicit.pairs import chain_sums, pairs_of, step_advantages
from learner.packing.credited import CreditedTree
from learner.policy.accelerator import make_accelerator
from learner.policy.model import Policy, load_policy
from learner.training.report import Abandoned, StepReport
from learner.training.trainer import Trainer
from tests.learner_support import flat_gradient, in_double, make_batch, make_config, make_model

BETA = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def config_of(folder: Path, *, reward: dict[str, object] | None = None, **sections: dict[str, object]) -> Config:
    return make_config(folder, implicit_reward={"enabled": True, "lr": 1e-2, **(reward or {})}, **sections)


def make_trainer(config: Config, *, double: bool = True) -> Trainer:
    policy = load_policy(config)
    return Trainer(config, accelerator=make_accelerator(config), policy=in_double(policy) if double else policy)


def model_of(trainer: Trainer) -> reward_model.ImplicitReward:
    assert trainer.implicit is not None
    return trainer.implicit


# --- the arithmetic ------------------------------------------------------------------------------------------------


def mean_over_pairs(score: dict[int, torch.Tensor], worth: dict[int, float]) -> torch.Tensor:
    """-log sigma(score of the better - score of the worse), over all pairs of leaves."""
    pairs = [(a, b) for a in score for b in score if worth[a] > worth[b]]
    return torch.stack([-torch.nn.functional.logsigmoid(score[a] - score[b]) for a, b in pairs]).mean()


def arrays(parent: list[int], reward: list[float]) -> TreeArrays:
    """``reward`` of the leaves, in order."""
    leaf = np.array([i not in parent for i in range(len(parent))])
    worth = np.zeros(len(parent))
    worth[leaf] = reward
    return TreeArrays(
        parent=np.array(parent), is_leaf=leaf, reward=worth, entropy=np.ones(len(parent)),
        num_action_tokens=np.full(len(parent), 2),
    )  # fmt: skip


TWO_CHAINS = ([-1, 0, -1], [1.0, 0.0])
"""A good chain of two turns beside a bad one of one turn."""
LOG_RATIOS = np.array([0.5, -0.2, 0.1])


def test_the_numeric_example() -> None:
    tree = arrays(*TWO_CHAINS)
    assert (BETA * LOG_RATIOS).tolist() == pytest.approx([0.025, -0.01, 0.005], abs=1e-15)
    # The good chain's rewards sum to .015, the bad one's to .005: -log sigma(.01), and sigma(-.01) = .4975000.
    pairs = pairs_of(tree, LOG_RATIOS, beta=BETA)
    assert (pairs.count, pairs.right) == (1, 1)
    assert pairs.loss == pytest.approx(0.6881597, abs=5e-8)
    assert pairs.gradient == pytest.approx([-0.0248750, -0.0248750, 0.0248750], abs=5e-8)
    # Mean .0066667, deviation .0143372 over the three turns.
    assert step_advantages(BETA * LOG_RATIOS, np.ones(3, dtype=bool)) == pytest.approx(
        [1.2786345, -1.1623950, -0.1162395], abs=2e-6
    )


def test_the_loss_is_a_mean_over_all_pairs_and_a_shared_turn_is_in_both_of_its_chains() -> None:
    rng = np.random.default_rng(0)
    tree = arrays([-1, 0, 0, 1, 1, 2, -1], [1.0, 0.0, 0.5, 0.0])
    found = torch.from_numpy(rng.normal(size=7)).requires_grad_()
    pairs = pairs_of(tree, found.detach().numpy(), beta=0.3)
    paths = {3: (0, 1, 3), 4: (0, 1, 4), 5: (0, 2, 5), 6: (6,)}
    worth = {3: 1.0, 4: 0.0, 5: 0.5, 6: 0.0}
    loss = mean_over_pairs({leaf: 0.3 * found[list(path)].sum() for leaf, path in paths.items()}, worth)
    loss.backward()
    assert pairs.count == 5
    assert pairs.loss == pytest.approx(loss.item(), abs=1e-14)
    np.testing.assert_allclose(pairs.gradient, found.grad.numpy(), atol=1e-15)  # type: ignore[union-attr]
    assert chain_sums(tree, np.arange(7, dtype=np.float64)).tolist() == [0, 1, 2, 4, 5, 7, 6]


def test_chains_that_earned_the_same_are_no_pair() -> None:
    pairs = pairs_of(arrays(TWO_CHAINS[0], [0.5, 0.5]), LOG_RATIOS, beta=BETA)
    assert (pairs.count, pairs.loss, pairs.gradient.tolist()) == (0, 0.0, [0.0, 0.0, 0.0])


def test_a_margin_of_any_size_is_no_overflow() -> None:
    for size in (1e6, -1e6):
        pairs = pairs_of(arrays(*TWO_CHAINS), np.array([size, 0.0, 0.0]), beta=1.0)
        assert pairs.loss == pytest.approx(max(0.0, -size))
        assert pairs.gradient[0] == pytest.approx(0.0 if size > 0 else -1.0)


def test_turns_without_a_score_are_paid_nothing_and_are_in_no_moments() -> None:
    found = step_advantages(np.array([0.2, 9.0, 0.4]), np.array([True, False, True]))
    assert found == pytest.approx([-1.0, 0.0, 1.0], abs=2e-5)
    assert step_advantages(np.ones(2), np.zeros(2, dtype=bool)).tolist() == [0.0, 0.0]


# --- in the learner ------------------------------------------------------------------------------------------------


def log_probs(policy: Policy, batch: Batch) -> list[dict[int, torch.Tensor]]:
    """Tree by tree: turn id -> log-probs of its action, each chain read as a plain sequence."""
    found = []
    for tree in batch.trees:
        own: dict[int, torch.Tensor] = {}
        turns = CreditedTree.of(tree, credit_rule(Config().credit)).tree
        for leaf in turns.leaves():
            tokens = torch.from_numpy(turns.context(leaf.turn_id).astype(np.int64))
            logps = policy.hf(input_ids=tokens[None]).logits[0].log_softmax(-1)
            at = len(tree.prompt)
            for turn in turns.path(leaf.turn_id):
                at += len(turn.observation)
                places = torch.arange(at, at + len(turn.action))
                own[turn.turn_id] = logps[places - 1, tokens[places]]
                at += len(turn.action)
        found.append(own)
    return found


def written_out(phi: Policy, old: Policy, batch: Batch, beta: float) -> torch.Tensor:
    """The loss as the paper has it: a mean over each tree's pairs of leaves, and over the trees."""
    with torch.no_grad():
        before = log_probs(old, batch)
    terms = []
    for tree, now, then in zip(batch.trees, log_probs(phi, batch), before, strict=True):
        turns = CreditedTree.of(tree, credit_rule(Config().credit)).tree
        score = {
            leaf.turn_id: torch.stack(
                [beta * (now[turn.turn_id] - then[turn.turn_id]).sum() for turn in turns.path(leaf.turn_id)]
            ).sum()
            for leaf in turns.leaves()
        }
        terms.append(mean_over_pairs(score, {leaf.turn_id: float(leaf.reward or 0.0) for leaf in turns.leaves()}))
    return torch.stack(terms).mean()


def other_weights(trainer: Trainer) -> None:
    """The reward model away from the policy, where it begins."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model_of(trainer).policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def one_batch(
    config: Config, watch: Callable[[Trainer], None] = lambda trainer: None
) -> tuple[Trainer, StepReport, torch.Tensor]:
    """A trainer after one batch, its report, and the gradient that the reward model's optimizer saw."""
    trainer = make_trainer(config)
    other_weights(trainer)
    watch(trainer)
    seen: list[torch.Tensor] = []
    own = model_of(trainer)
    step = own.optimizer.step

    def watched() -> None:
        seen.append(flat_gradient(own.policy))
        step()

    own.optimizer.step = watched
    report = trainer.train(make_batch(num_trees=3), version=3)
    return trainer, report, seen[0]


LAYOUTS: list[dict[str, object]] = [
    {"packing": "flat", "micro_batch_tokens": 64},
    {"packing": "tree", "pack_tokens": 64, "micro_batch_tokens": 100},
    {"packing": "tree", "minibatches": 3},
]


@pytest.mark.parametrize("learner", LAYOUTS)
def test_the_gradient_is_that_of_the_written_out_loss_in_any_layout_and_micro_batching(
    folder: Path, learner: dict[str, object]
) -> None:
    config = config_of(folder, reward={"max_grad_norm": 1e9, "beta": 0.7}, learner=learner)
    begun: list[torch.Tensor] = []

    def expected(trainer: Trainer) -> None:
        phi, batch = model_of(trainer).policy, make_batch(num_trees=3)
        loss = written_out(phi, trainer.policy, batch, 0.7)
        loss.backward()
        begun.extend([loss.detach(), flat_gradient(phi)])
        phi.zero_grad()

    _, report, gradient = one_batch(config, expected)
    assert report.metrics["implicit/loss"] == pytest.approx(begun[0].item(), abs=1e-12)
    torch.testing.assert_close(gradient, begun[1], atol=1e-13, rtol=1e-9)
    assert report.metrics["implicit/grad_norm"] == pytest.approx(float(begun[1].norm()), rel=1e-6)
    assert report.metrics["implicit/updates"] == 1


@pytest.mark.parametrize("learner", [*LAYOUTS, {"packing": "flat", "epochs": 2}])
def test_turns_are_paid_by_the_model_as_it_is_after_its_step(folder: Path, learner: dict[str, object]) -> None:
    config = config_of(folder, reward={"alpha": 0.5}, learner={"lr": 1e-12, **learner})
    trainer, report, _ = one_batch(config)
    batch = make_batch(num_trees=3)
    with torch.no_grad():
        now, then = log_probs(model_of(trainer).policy, batch), log_probs(trainer.policy, batch)
    rewards: list[float] = []
    for tree, own, old in zip(batch.trees, now, then, strict=True):
        credited = CreditedTree.of(tree, credit_rule(config.credit))
        steps = np.array([BETA * float((own[t.turn_id] - old[t.turn_id]).sum()) for t in credited.tree])
        rewards += steps.tolist()
        paid = credited.advantages + 0.5 * (steps - steps.mean()) / (steps.std() + 1e-6)
        share = config.buffer.priority_max_share
        assert report.priorities[tree.tree_id] == pytest.approx(tree_priority(paid, max_share=share), rel=1e-6)
    assert report.metrics["implicit/reward_mean"] == pytest.approx(np.mean(rewards), rel=1e-6)
    assert report.metrics["implicit/reward_std"] == pytest.approx(np.std(rewards), rel=1e-6)


def test_the_policys_gradient_has_the_paid_advantages_in_tree_and_flat_layout(folder: Path) -> None:
    gradients = []
    for learner in LAYOUTS[:2]:
        seen: list[torch.Tensor] = []

        def watch(trainer: Trainer, seen: list[torch.Tensor] = seen) -> None:
            trainer.optimizer.step = lambda: seen.append(flat_gradient(trainer.policy))

        one_batch(config_of(folder, learner={"max_grad_norm": 1e9, **learner}), watch)
        gradients.append(seen[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-12, rtol=1e-8)
    seen = []
    trainer = make_trainer(make_config(folder, learner={"max_grad_norm": 1e9, "packing": "flat"}))
    trainer.optimizer.step = lambda: seen.append(flat_gradient(trainer.policy))
    trainer.train(make_batch(num_trees=3), version=3)
    assert not torch.allclose(gradients[0], seen[0], rtol=1e-3)


def test_it_learns_which_chains_were_better(folder: Path) -> None:
    trainer = make_trainer(config_of(folder, reward={"lr": 1e-2, "beta": 1.0}, learner={"lr": 1e-12}), double=False)
    reports = [trainer.train(make_batch(num_trees=2), version=3) for _ in range(6)]
    first, last = reports[0].metrics, reports[-1].metrics
    # It begins as the policy: every reward is 0, and no pair is told apart.
    assert first["implicit/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["implicit/accuracy"] < 0.9
    assert last["implicit/loss"] < 0.3
    assert last["implicit/accuracy"] > 0.95
    assert last["implicit/pairs"] == first["implicit/pairs"] > 0
    assert model_of(trainer).updates == 6


def test_without_it_there_is_no_model_and_no_metric(folder: Path) -> None:
    trainer = make_trainer(make_config(folder))
    assert trainer.implicit is None
    report = trainer.train(make_batch(num_trees=2), version=3)
    assert not [name for name in report.metrics if name.startswith("implicit")]


def test_a_batch_without_a_pair_trains_no_model_and_pays_its_turns_all_the_same(folder: Path) -> None:
    import msgspec

    batch = make_batch(num_trees=2)
    same = tuple(
        msgspec.structs.replace(
            tree,
            turns=tuple(
                turn if turn.reward is None else msgspec.structs.replace(turn, reward=1.0) for turn in tree.turns
            ),
        )
        for tree in batch.trees
    )
    trainer = make_trainer(config_of(folder))
    other_weights(trainer)
    report = trainer.train(msgspec.structs.replace(batch, trees=same), version=3)
    assert report.metrics["implicit/pairs"] == 0
    assert "implicit/loss" not in report.metrics
    assert model_of(trainer).updates == 0
    assert min(report.priorities.values()) > 0


def test_a_batch_is_abandoned_before_the_model_learns_from_it_or_not_at_all(folder: Path) -> None:
    trainer = make_trainer(config_of(folder))
    with pytest.raises(Abandoned):
        trainer.train(make_batch(num_trees=2), version=3, should_stop=lambda: True)
    assert model_of(trainer).updates == 0
    asked = iter([False])
    trainer.train(make_batch(num_trees=2), version=3, should_stop=lambda: next(asked, True))
    assert (model_of(trainer).updates, trainer.history.updates) == (1, 1)


def test_turns_that_are_too_old_are_paid_nothing(folder: Path) -> None:
    config = config_of(folder, staleness={"max_lag": 1})
    trainer = make_trainer(config)
    other_weights(trainer)
    batch = make_batch(num_trees=3)
    report = trainer.train(batch, version=3)
    assert report.metrics["implicit/pairs"] > 0
    assert all(math.isfinite(value) for value in report.metrics.values())


def test_a_model_that_is_not_finite_pays_nothing_and_takes_no_step(folder: Path) -> None:
    trainer = make_trainer(config_of(folder))
    with torch.no_grad():
        next(iter(model_of(trainer).policy.parameters())).fill_(math.nan)
    report = trainer.train(make_batch(num_trees=2), version=3)
    assert report.metrics["implicit/skipped"] == 1
    assert model_of(trainer).updates == 0
    assert report.fault is None
    plain = make_trainer(make_config(folder)).train(make_batch(num_trees=2), version=3)
    assert report.priorities == pytest.approx(plain.priorities)
    assert report.metrics["train/loss"] == pytest.approx(plain.metrics["train/loss"], abs=1e-12)


def test_in_half_precision_it_has_a_copy_of_its_own(folder: Path) -> None:
    from accelerate.state import AcceleratorState

    config = config_of(folder, reward={"lr": 3e-2, "beta": 1.0}, learner={"lr": 1e-12, "mixed_precision": "bf16"})
    AcceleratorState._reset_state()
    try:
        trainer = make_trainer(config, double=False)
        assert model_of(trainer).half is not None
        losses = [trainer.train(make_batch(num_trees=1), version=3).metrics["implicit/loss"] for _ in range(3)]
    finally:
        AcceleratorState._reset_state()
    assert losses[0] == pytest.approx(math.log(2), abs=0.05)
    assert losses[-1] < 0.8 * losses[0]


# --- checkpoints ---------------------------------------------------------------------------------------------------


def state(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in (*model_of(trainer).policy.parameters(), *trainer.policy.parameters())]


def test_a_resumed_run_takes_the_very_next_step_of_both_models(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    trainer = make_trainer(config, double=False)
    for i in range(2):
        trainer.train(make_batch(seed=i, step=i), version=3)
    path = checkpoint.save(tmp_path, trainer, Progress(step=2, version=7), keep=2)
    report = trainer.train(make_batch(seed=9, step=2), version=3)
    resumed = make_trainer(config, double=False)
    checkpoint.load(path, resumed)
    assert model_of(resumed).updates == 2
    same = resumed.train(make_batch(seed=9, step=2), version=3)
    assert same.metrics == report.metrics
    assert all(map(torch.equal, state(resumed), state(trainer)))


def test_a_checkpoint_without_one_begins_with_the_policys_weights_there(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_trainer(make_config(folder), double=False)
    plain.train(make_batch(), version=3)
    path = checkpoint.save(tmp_path, plain, Progress(step=1, version=4), keep=2)
    trainer = make_trainer(config_of(folder), double=False)
    checkpoint.load(path, trainer)
    assert "has no implicit reward model: it begins with the policy's weights there" in caplog.text
    pairs = zip(model_of(trainer).policy.parameters(), plain.policy.parameters(), strict=True)
    assert all(torch.equal(own, other) for own, other in pairs)


def test_a_damaged_one_is_named(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(config_of(folder), double=False)
    path = checkpoint.save(tmp_path, trainer, Progress(step=1, version=4), keep=2)
    (path / "implicit.safetensors").write_bytes(b"nothing")
    with pytest.raises(SetupError, match=r"checkpoint .* cannot be loaded: .*"):
        checkpoint.load(path, trainer)


# --- what it does not go with --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"learner": {"lora": {"rank": 4}}}, "learner.lora.rank = 4: .*set --learner.lora.rank 0"),
        (
            {"learner": {"mixed_precision": "fp16"}},
            "learner.mixed_precision = 'fp16': .*learner.mixed_precision bf16 or no",
        ),
        ({"correction": {"prox": "interpolate"}}, "correction.prox = 'interpolate': .*set --correction.prox auto"),
    ],
)
def test_settings_that_contradict_it_are_refused(folder: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"implicit_reward.enabled = true with {said}, or --implicit_reward.enabled"):
        config_of(folder, **sections)


def test_shards_are_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, learner={"accelerate_config": "fsdp.yaml"})
    monkeypatch.setattr(reward_model, "is_sharded", lambda accelerator: True)
    with pytest.raises(SetupError, match=r"accelerate_config = 'fsdp.yaml': a second model is not sharded here"):
        make_trainer(config)
