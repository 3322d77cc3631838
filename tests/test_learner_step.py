"""One training step: equal under any micro-batching, right against a plain computation, safe from bad numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.errors import SetupError
from atpo_async.core.schedule import learning_rate
from learner.loss import guards
from learner.packing.credited import CreditedTree
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.report import Abandoned, StepReport
from learner.training.trainer import Trainer
from tests.learner_support import VOCAB, batch_of, flat_gradient, in_double, make_batch, make_config, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def make_trainer(config: Config, *, double: bool = False) -> Trainer:
    policy = load_policy(config)
    if double:
        policy = in_double(policy)
    return Trainer(config, accelerator=make_accelerator(config), policy=policy)


def gradient_step(
    config: Config, monkeypatch: pytest.MonkeyPatch, *, num_trees: int = 4
) -> tuple[StepReport, torch.Tensor]:
    """Report of one float64 step and the gradient it saw (as clipped)."""
    trainer = make_trainer(config, double=True)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda: seen.append(flat_gradient(trainer.policy)),
    )
    report = trainer.train(make_batch(num_trees=num_trees), version=3)
    return report, seen[0]


def test_micro_batches_of_any_size_give_the_same_loss_and_gradient(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [
        gradient_step(make_config(folder, learner={"micro_batch_tokens": size, "max_grad_norm": 1e9}), monkeypatch)
        for size in (64, 100, 16384)
    ]
    for report, gradient in results[1:]:
        assert report.metrics["train/loss"] == pytest.approx(results[0][0].metrics["train/loss"], abs=1e-13)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-13, rtol=1e-10)
        for name, value in results[0][0].metrics.items():
            if name not in ("tokens/forward", "pack/token_ratio", "pack/micro_batch_tokens"):
                assert report.metrics[name] == pytest.approx(value, abs=1e-9), name


def test_loss_and_gradient_are_those_of_a_plain_mean_over_leaves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(folder, learner={"max_grad_norm": 1e9})
    report, gradient = gradient_step(config, monkeypatch)
    batch = make_batch()
    policy = in_double(load_policy(config))
    loss = torch.zeros((), dtype=torch.float64)
    for tree in batch.trees:
        credited = CreditedTree.of(tree, credit_rule(config.credit))
        worth = dict(zip([t.turn_id for t in credited.tree], credited.advantages, strict=True))
        for leaf in credited.tree.leaves():
            tokens = torch.from_numpy(credited.tree.context(leaf.turn_id).astype(np.int64))
            logps = policy.hf(input_ids=tokens[None]).logits[0].log_softmax(-1)
            at, total, count = len(tree.prompt), torch.zeros((), dtype=torch.float64), 0
            for turn in credited.tree.path(leaf.turn_id):
                at += len(turn.observation)
                places = torch.arange(at, at + len(turn.action))
                logp = logps[places - 1, tokens[places]]
                at, count = at + len(turn.action), count + len(turn.action)
                ratio = (logp.detach() - torch.from_numpy(turn.logprobs.astype(np.float64))).sum().exp()
                # At the first update prox is the policy itself: s = 1, and its gradient that of the log-prob.
                surrogate = (logp - logp.detach()).exp() * float(worth[turn.turn_id]) * min(float(ratio), 2.0)
                total = total - surrogate.sum()
            loss = loss + tree.weight * total / count / batch.num_leaves
    loss.backward()
    assert report.metrics["train/loss"] == pytest.approx(loss.item(), abs=1e-12)
    plain = flat_gradient(policy)
    torch.testing.assert_close(gradient, plain, atol=1e-12, rtol=1e-9)


def test_log_probs_are_those_of_the_whole_model_in_chunks_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(make_config(folder, search={"temperature": 0.7}))
    tokens = torch.randint(0, VOCAB, (3, 9))
    whole = (policy.hf(input_ids=tokens).logits / 0.7).log_softmax(-1)[:, :-1]
    expected = whole.gather(-1, tokens[:, 1:, None])[..., 0].reshape(-1)
    predictor = (torch.arange(3)[:, None] * 9 + torch.arange(8)[None]).reshape(-1)

    def gradient(logp: torch.Tensor) -> torch.Tensor:
        policy.zero_grad()
        logp.sum().backward()
        return flat_gradient(policy)

    once = policy(tokens, predictor, tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(once, expected)
    monkeypatch.setattr("learner.policy.head.MAX_LOGITS", VOCAB * 5)
    chunked = policy(tokens, predictor, tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(chunked, once)
    torch.testing.assert_close(gradient(chunked), gradient(once))


def test_training_raises_the_probability_of_what_was_good(folder: Path) -> None:
    config = make_config(folder, learner={"lr": 3e-3})
    trainer = make_trainer(config)
    batch = make_batch()
    before = trainer.train(batch, version=3)
    for _ in range(5):
        after = trainer.train(batch, version=3)
    assert after.metrics["train/updates"] == 6
    assert math.isfinite(after.metrics["grad_norm"])
    # Per sampled token the surrogate is the same; what moved is prox against mu, by more than rounding.
    assert after.metrics["kl/mu_prox_k1"] != pytest.approx(before.metrics["kl/mu_prox_k1"], abs=1e-3)


def test_a_step_reports_staleness_weights_and_new_priorities(folder: Path) -> None:
    report = make_trainer(make_config(folder)).train(make_batch(), version=4)
    expected = {
        "train/loss", "grad_norm", "lr", "clip_share", "lag/mean", "lag/p95", "lag/max", "turns/multi_version_share",
        "turns/zero_advantage_share", "is/ess_frac", "is/truncated_share", "is/truncated_share_pos",
        "is/truncated_share_neg", "kl/mu_prox_k1", "kl/mu_prox_k3", "is/chi2_turn", "is/ess_frac_token",
        "is/ess_frac_sequence", "tokens/trained",
    }  # fmt: skip
    assert expected <= report.metrics.keys()
    assert 1 <= report.metrics["lag/mean"] <= 3
    assert report.priorities.keys() == {f"tree-{i}" for i in range(4)}
    assert all(p > 0 for p in report.priorities.values())
    assert "mismatch/kl_k3" not in report.metrics


def test_the_lag_of_what_was_served_counts_masked_turns_too(folder: Path) -> None:
    batch = make_batch(version=3)
    oldest = min(turn.oldest_version for tree in batch.trees for turn in tree.turns)
    assert oldest == 1
    report = make_trainer(make_config(folder, staleness={"max_lag": 1})).train(batch, version=3)
    assert (report.metrics["lag/max"], report.metrics["lag/served_max"]) == (1, 2)
    assert report.metrics["turns/stale_share"] > 0
    fresh = make_trainer(make_config(folder)).train(batch, version=3)
    assert (fresh.metrics["lag/max"], fresh.metrics["lag/served_max"]) == (2, 2)


def test_minibatches_take_one_optimizer_step_each_against_the_weights_at_the_start(folder: Path) -> None:
    config = make_config(folder, learner={"minibatches": 2, "lr": 3e-2})
    trainer = make_trainer(config)
    report = trainer.train(make_batch(), version=3)
    assert report.metrics["train/updates"] == 2
    # The second step's ratios left 1: its proximal policy is the one before the first step.
    assert report.metrics["clip_share"] > 0


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_batch_without_trees_changes_nothing(folder: Path, minibatches: int) -> None:
    trainer = make_trainer(make_config(folder, learner={"minibatches": minibatches}))
    before = {k: v.clone() for k, v in trainer.whole.tensors().items()}
    report = trainer.train(batch_of((), ()), version=0)
    assert trainer.history.updates == 0
    assert "train/loss" not in report.metrics
    assert all(torch.equal(v, before[k]) for k, v in trainer.whole.tensors().items())


def test_a_batch_that_is_stale_throughout_changes_nothing(folder: Path) -> None:
    trainer = make_trainer(make_config(folder, staleness={"max_lag": 1}))
    report = trainer.train(make_batch(), version=50)
    assert trainer.history.updates == 0
    assert report.metrics["dropped/all_stale"] == 4
    assert len(report.warnings) == 4


def test_a_non_finite_update_is_skipped_and_leaves_weights_and_optimizer_alone(folder: Path) -> None:
    trainer = make_trainer(make_config(folder))
    trainer.train(make_batch(), version=3)
    state = {k: v.clone() for k, v in trainer.whole.tensors().items()}
    with torch.no_grad():
        next(iter(trainer.policy.parameters()))[0, 0] = float("nan")
    state = {k: v.clone() for k, v in trainer.whole.tensors().items()}
    report = trainer.train(make_batch(), version=3)
    assert report.fault == "loss is nan"
    assert (trainer.history.updates, trainer.history.skips) == (1, guards.SkipCount(1, 1))
    assert all(torch.equal(v.nan_to_num(7), state[k].nan_to_num(7)) for k, v in trainer.whole.tensors().items())


def test_a_step_given_up_half_way_changes_no_weight(folder: Path) -> None:
    trainer = make_trainer(make_config(folder, learner={"micro_batch_tokens": 64, "packing": "flat"}))
    before = {k: v.clone() for k, v in trainer.whole.tensors().items()}
    answers = iter([False, False, True])
    with pytest.raises(Abandoned):
        trainer.train(make_batch(), version=3, should_stop=lambda: next(answers))
    assert all(torch.equal(v, before[k]) for k, v in trainer.whole.tensors().items())
    assert all(p.grad is None for p in trainer.policy.parameters())


def test_gradient_checkpointing_changes_no_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, gradient = gradient_step(make_config(folder), monkeypatch)
    saved, same = gradient_step(make_config(folder, learner={"gradient_checkpointing": True}), monkeypatch)
    assert saved.metrics["train/loss"] == pytest.approx(plain.metrics["train/loss"], abs=1e-12)
    torch.testing.assert_close(same, gradient, atol=1e-12, rtol=1e-9)


def test_the_learning_rate_is_a_function_of_the_update_count() -> None:
    def rates(schedule: str) -> list[float]:
        return [
            learning_rate(i, peak=1.0, warmup=2, total=6, schedule=schedule)  # type: ignore[arg-type]
            for i in (0, 1, 2, 4, 6, 9)
        ]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.5, 0, 0]
    assert rates("cosine") == pytest.approx([0.5, 1, 1, 0.5, 0, 0])


def test_a_missing_model_folder_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"nowhere.*no config.json"):
        load_policy(make_config(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SetupError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_policy(make_config(tmp_path))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SetupError, match="no causal language model"):
        load_policy(make_config(tmp_path))


def test_a_gpu_that_is_not_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SetupError, match="no CUDA device"):
        make_accelerator(make_config(folder, learner={"device": "cuda"}))
