"""Every variant through the real trainer: packed equals flat, what is lazy equals what is measured first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.tree import Turn
from atpo_async.wire.messages import Batch, BatchTree
from learner.packing.credited import CreditedTree
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.report import StepReport
from learner.training.trainer import Trainer
from tests.learner_support import batch_of, in_double, make_batch, make_config, make_model

Sections = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def configured(folder: Path, *given: Sections, **learner: object) -> Config:
    sections: Sections = {"learner": {"max_grad_norm": 1e9, "packing": "flat", "lr": 1e-2, **learner}}
    for each in given:
        for name, fields in each.items():
            sections[name] = {**sections.get(name, {}), **fields}
    return make_config(folder, **sections)


def trainer_of(config: Config) -> Trainer:
    return Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))


def trained(config: Config, batch: Batch | None = None, *, version: int = 3) -> tuple[StepReport, torch.Tensor]:
    """Report of one float64 batch, and the weights after it."""
    trainer = trainer_of(config)
    report = trainer.train(make_batch() if batch is None else batch, version=version)
    return report, torch.cat([p.detach().reshape(-1) for p in trainer.policy.parameters()])


VARIANTS: dict[str, Sections] = {
    "AT2PO": {},
    "GRPO": {"objective": {"ratio_level": "token", "kl_coef": 0.04}},
    "DAPO": {"objective": {"ratio_level": "token", "clip_high": 0.28, "aggregation": "token-mean"}},
    "GSPO": {"objective": {"ratio_level": "sequence"}, "correction": {"level": "sequence"}},
    "CISPO": {
        "objective": {"surrogate": "cispo", "ratio_level": "token", "clip_low": 1.0, "clip_high": 5.0},
        "correction": {"level": "token"},
    },
    "AEPO's clip": {"objective": {"surrogate": "clip-keep", "clip_high": 0.01}},
    "TOPR": {
        "objective": {"surrogate": "policy-gradient"},
        "correction": {"action": "topr", "level": "sequence", "cap": 1.0, "numerator": "policy"},
    },
    "DPPO": {"objective": {"surrogate": "tv"}},
    "IcePop": {"correction": {"action": "icepop", "level": "token", "floor": 0.5, "cap": 5.0}},
    "M2PO": {"correction": {"action": "m2po", "level": "token", "m2_limit": 0.3}},
    "ESS": {"correction": {"exponent": "ess", "ess_target": 0.95}},
    "geometric mask": {"correction": {"exponent": "geometric", "action": "mask", "floor": 0.5}},
    "prefix, gate": {"correction": {"level": "prefix", "gate": 1.0}},
    "interpolated": {"correction": {"prox": "interpolate"}},
    "tree trace": {"credit": {"value_mode": "tree_trace", "trace_cap": 2.0}},
    "self-normalised": {"credit": {"value_mode": "tree_trace_selfnorm"}},
    "branch-prob": {"objective": {"aggregation": "branch-prob"}, "credit": {"leaf_weights": "branch-prob"}},
    "branch-prob sum": {"objective": {"aggregation": "branch-prob-token-sum"}},
    "unique tokens": {"objective": {"aggregation": "unique-token-mean"}},
    "entropy": {"objective": {"entropy_coef": 0.1}},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("steps", [{}, {"minibatches": 2, "epochs": 2}], ids=["one step", "four steps"])
def test_a_variant_learns_the_same_from_trees_as_from_rows(folder: Path, name: str, steps: dict[str, object]) -> None:
    flat, weights = trained(configured(folder, VARIANTS[name], **steps))
    packed, same = trained(
        configured(folder, VARIANTS[name], **steps, packing="tree", pack_tokens=64, micro_batch_tokens=128)
    )
    assert flat.fault is None
    assert flat.metrics["train/updates"] == (4 if steps else 1)
    torch.testing.assert_close(same, weights, atol=1e-10, rtol=1e-9)
    assert flat.priorities == pytest.approx(packed.priorities)
    assert packed.metrics["tokens/forward"] != flat.metrics["tokens/forward"]
    for metric, value in flat.metrics.items():
        if metric not in ("tokens/forward", "pack/token_ratio", "pack/micro_batch_tokens"):
            assert packed.metrics[metric] == pytest.approx(value, rel=1e-9, abs=1e-9), metric


def test_no_two_variants_are_the_same(folder: Path) -> None:
    found = {
        name: trained(configured(folder, sections, minibatches=2, epochs=2))[1] for name, sections in VARIANTS.items()
    }
    for name, weights in found.items():
        for other, others in found.items():
            if name < other:
                assert not torch.allclose(weights, others, atol=1e-9), (name, other)


def off_policy(tree: BatchTree, *, shift: float) -> BatchTree:
    """The same tree with every second turn recorded as less likely by ``shift`` nats a token."""

    def moved(turn: Turn) -> Turn:
        logprobs = turn.logprobs - (shift if turn.turn_id % 2 else 0.0)
        fields = {name: getattr(turn, name) for name in turn.__struct_fields__}
        return Turn(**{**fields, "logprobs": logprobs.astype(np.float32)})

    fields = {name: getattr(tree, name) for name in tree.__struct_fields__}
    return BatchTree(**{**fields, "turns": tuple(moved(turn) for turn in tree.turns)})


def stale_batch() -> Batch:
    trees = tuple(off_policy(tree, shift=3.0) for tree in make_batch().trees)
    return batch_of(trees, trees)


GUARDED: Sections = {"correction": {"ess_floor": 0.6, "cap": 1e6}}


def test_the_guard_lowers_the_exponent_until_the_effective_sample_size_is_at_its_floor(folder: Path) -> None:
    plain, _ = trained(configured(folder, {"correction": {"ess_floor": 0.0, "cap": 1e6}}), stale_batch())
    assert plain.metrics["is/ess_frac"] < 0.6
    assert plain.metrics["guard/tempered"] == 0
    report, weights = trained(configured(folder, GUARDED), stale_batch())
    assert report.metrics["guard/tempered"] == 1
    assert report.metrics["is/ess_frac"] == pytest.approx(0.6, abs=1e-6)
    scale = report.metrics["is/exponent_scale"]
    _, by_hand = trained(
        configured(folder, {"correction": {"ess_floor": 0.0, "cap": 1e6, "exponent_value": scale}}), stale_batch()
    )
    torch.testing.assert_close(weights, by_hand, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("size", [64, 16384])
def test_the_guard_does_the_same_whether_the_batch_was_measured_before_or_not(folder: Path, size: int) -> None:
    lazy, weights = trained(configured(folder, GUARDED, micro_batch_tokens=size), stale_batch())
    first, same = trained(
        configured(folder, GUARDED, {"correction": {"prox": "recompute"}}, micro_batch_tokens=size), stale_batch()
    )
    assert first.metrics["is/exponent_scale"] == pytest.approx(lazy.metrics["is/exponent_scale"], rel=1e-9)
    torch.testing.assert_close(same, weights, atol=1e-12, rtol=1e-10)


def test_ess_tempering_does_nothing_to_fresh_data(folder: Path) -> None:
    trainer = trainer_of(configured(folder, {"correction": {"exponent": "ess", "ess_target": 0.9}}))
    batch = on_policy_batch(trainer)
    assert trainer.train(batch, version=3).metrics["is/exponent_scale"] == 1


def on_policy_batch(trainer: Trainer) -> Batch:
    """A batch whose recorded log-probs are the trainer's own."""

    def scored(tree: BatchTree) -> BatchTree:
        whole = CreditedTree.of(tree, credit_rule(trainer.config.credit)).tree
        turns = []
        for turn in whole:
            tokens = torch.from_numpy(whole.context(turn.turn_id).astype(np.int64))
            with torch.no_grad():
                logps = trainer.policy.hf(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
            places = torch.arange(len(tokens) - len(turn.action), len(tokens))
            own = logps[places - 1, tokens[places]].numpy().astype(np.float32)
            turns.append(Turn(**{**{n: getattr(turn, n) for n in turn.__struct_fields__}, "logprobs": own}))
        fields = {name: getattr(tree, name) for name in tree.__struct_fields__}
        return BatchTree(**{**fields, "turns": tuple(turns)})

    trees = tuple(scored(tree) for tree in make_batch().trees)
    return batch_of(trees, trees)


def test_the_tree_trace_of_fresh_data_is_the_child_mean(folder: Path) -> None:
    plain = trainer_of(configured(folder))
    batch = on_policy_batch(plain)
    results = [
        trained(configured(folder, {"credit": {"value_mode": mode, "trace_cap": 4.0}}), batch)
        for mode in ("child_mean", "tree_trace", "tree_trace_selfnorm")
    ]
    for report, weights in results[1:]:
        torch.testing.assert_close(weights, results[0][1], atol=1e-6, rtol=1e-4)  # mu is recorded in float32
        assert report.priorities == pytest.approx(results[0][0].priorities, rel=1e-4)


def test_the_tree_trace_credits_by_the_ratio_of_each_turn(folder: Path) -> None:
    config = configured(folder, {"credit": {"value_mode": "tree_trace", "trace_cap": 2.0}})
    batch = make_batch()
    report, _ = trained(config, batch)
    policy = in_double(load_policy(config))
    for tree in batch.trees:
        credited = CreditedTree.of(tree, credit_rule(config.credit))
        ratios = []
        for turn in credited.tree:
            tokens = torch.from_numpy(credited.tree.context(turn.turn_id).astype(np.int64))
            with torch.no_grad():
                logps = policy.hf(input_ids=tokens[None]).logits[0].log_softmax(-1)
            places = torch.arange(len(tokens) - len(turn.action), len(tokens))
            own = logps[places - 1, tokens[places]].numpy()
            ratios.append(float(np.exp(np.sum(own - turn.logprobs.astype(np.float64)))))
        worth = np.abs(credited.recredited(np.array(ratios), credit_rule(config.credit)).advantages)
        expected = 0.9 * worth.max() + 0.1 * worth.mean()
        assert report.priorities[tree.tree_id] == pytest.approx(expected, rel=1e-9)


def test_the_reference_is_the_policy_as_it_was_loaded_and_pulls_it_back(folder: Path) -> None:
    free = trainer_of(configured(folder, {"objective": {"kl_coef": 1e-9}}))
    held = trainer_of(configured(folder, {"objective": {"kl_coef": 30.0}}))
    first = [trainer.train(make_batch(), version=3).metrics["loss/kl_reference"] for trainer in (free, held)]
    assert first == pytest.approx([0.0, 0.0], abs=1e-12)
    for _ in range(6):
        loose = free.train(make_batch(), version=3).metrics["loss/kl_reference"]
        tight = held.train(make_batch(), version=3).metrics["loss/kl_reference"]
    assert 0 < tight < loose


def test_the_entropy_bonus_raises_the_entropy(folder: Path) -> None:
    plain = trainer_of(configured(folder, {"objective": {"entropy_coef": 1e-9}}))
    eager = trainer_of(configured(folder, {"objective": {"entropy_coef": 5.0}}))
    for _ in range(5):
        low = plain.train(make_batch(), version=3).metrics["loss/entropy"]
        high = eager.train(make_batch(), version=3).metrics["loss/entropy"]
    assert high > low


def test_the_first_step_is_its_own_proximal_policy_and_later_epochs_keep_it(folder: Path) -> None:
    config = configured(folder, {"correction": {"prox": "first-step"}}, epochs=3)
    recomputed = configured(folder, {"correction": {"prox": "recompute"}}, epochs=3)
    (report, weights), (_, same) = trained(config), trained(recomputed)
    assert report.metrics["clip_share"] > 0
    torch.testing.assert_close(same, weights, atol=1e-12, rtol=1e-10)


def test_a_gradient_spike_is_skipped_and_named(folder: Path) -> None:
    trainer = trainer_of(configured(folder, max_grad_spike=3.0, lr=1e-9))
    for _ in range(12):
        assert trainer.train(make_batch(), version=3).fault is None
    before = {name: tensor.clone() for name, tensor in trainer.whole.tensors().items()}
    heavy = tuple(
        BatchTree(**{**{n: getattr(t, n) for n in t.__struct_fields__}, "weight": 100.0}) for t in make_batch().trees
    )
    report = trainer.train(batch_of(heavy, heavy), version=3)
    assert report.fault is not None
    assert "median" in report.fault
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.whole.tensors().items())
    assert trainer.train(make_batch(), version=3).fault is None


def test_tokens_of_the_forward_passes_are_counted_against_those_of_the_rows(folder: Path) -> None:
    flat, _ = trained(configured(folder))
    tree, _ = trained(configured(folder, packing="tree"))
    assert flat.metrics["pack/token_ratio"] >= 1
    assert tree.metrics["pack/token_ratio"] < 1
