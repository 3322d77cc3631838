"""Rows that are imitated, in the learner: what their loss is, whatever holds them, and what becomes of bad ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from atpo_async.wire import codec
from atpo_async.wire.messages import Batch, BatchRow, BufferToLearner
from learner.batches.lineage import write_lineage
from learner.imitation.intake import sift_rows
from learner.imitation.rows import imitated, imitated_rows, normaliser_of
from learner.packing.credited import Normaliser
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.passes import take_measured
from learner.training.trainer import Trainer
from tests.imitation_support import make_rows, num_tokens, with_rows
from tests.learner_support import VOCAB, in_double, make_batch, make_config, make_model

VERSION = 3
ROWS = make_rows(4, version=VERSION)
ON: dict[str, object] = {"rows": 9, "max_lag": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def trainer_of(folder: Path, **sections: dict[str, object]) -> Trainer:
    learner = {"max_grad_norm": 1e9, "lr": 1e-2, "packing": "flat", **sections.pop("learner", {})}
    config = make_config(folder, learner=learner, **{"imitation": ON, **sections})
    return Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))


def gradient(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """Of the batch's first optimizer step, which is not taken."""
    found: list[torch.Tensor] = []
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    original = trainer.optimizer.step

    def step(*args: Any) -> None:
        found.append(torch.cat([p.grad.reshape(-1).clone() for p in trainer.policy.parameters() if p.grad is not None]))

    trainer.optimizer.step = step
    trainer.train(batch, version=VERSION)
    trainer.optimizer.step = original
    for name, parameter in trainer.policy.named_parameters():
        assert torch.equal(parameter, before[name])
    return found[0]


def by_hand(trainer: Trainer, rows: Sequence[BatchRow], *, cap: float = 2.0) -> torch.Tensor:
    """The gradient of the mean over rows of the mean over their tokens of -w A log pi, w = min(exp(S), cap) by turn."""
    policy = trainer.policy
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        tokens, at, mu = list(row.prompt), list[list[int]](), list[np.ndarray]()
        for turn in row.turns:
            tokens += [*turn.observation, *turn.action]
            at.append(list(range(len(tokens) - len(turn.action), len(tokens))))
            mu.append(turn.logprobs)
        ids = torch.tensor(tokens, dtype=torch.int64)[None]
        logits = policy.hf(input_ids=ids).logits[0].log_softmax(-1)
        length = sum(map(len, at))
        for where, own in zip(at, mu, strict=True):
            logp = torch.stack([logits[i - 1, tokens[i]] for i in where])
            drift = float((logp.detach() - torch.from_numpy(own).double()).sum())
            loss = loss - min(math.exp(drift), cap) * row.advantage * logp.sum() / (length * len(rows))
    parameters = list(policy.parameters())
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])


def test_the_loss_is_the_batchs_mean_and_coef_times_the_rows_own_mean(folder: Path) -> None:
    batch = make_batch()
    alone = gradient(trainer_of(folder), batch)
    for coef in (1.0, 0.25):
        trainer = trainer_of(folder, imitation={**ON, "coef": coef})
        both = gradient(trainer, with_rows(batch, ROWS, ROWS))
        torch.testing.assert_close(both - alone, coef * by_hand(trainer, ROWS), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "learner",
    [
        {"packing": "tree"},
        {"packing": "tree", "pack_tokens": 64, "micro_batch_tokens": 64},
        {"micro_batch_tokens": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean", "branch-prob-token-sum"])
def test_layout_and_micro_batches_change_nothing(folder: Path, learner: dict[str, object], aggregation: str) -> None:
    sections: dict[str, Any] = {"objective": {"aggregation": aggregation}}
    batch = with_rows(make_batch(), ROWS, ROWS)
    flat = gradient(trainer_of(folder, **sections), batch)
    torch.testing.assert_close(
        gradient(trainer_of(folder, learner=learner, **sections), batch), flat, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    "aggregation", ["seq-mean-token-mean", "seq-mean-token-sum", "token-mean", "unique-token-mean"]
)
def test_a_rows_tokens_weigh_coef_times_what_they_would_in_a_batch_of_rows(aggregation: Any) -> None:
    batch = with_rows(make_batch(), ROWS, ROWS)
    chains = [imitated(row, coef=0.5) for row in ROWS]
    normaliser = normaliser_of(batch)
    assert normaliser == Normaliser.of(chains)
    rows = imitated_rows(
        chains, after=(), version=VERSION, max_lag=20, aggregation=aggregation, normaliser=normaliser, keep_idle=False
    )
    total = sum(float(row.weight.sum()) for row in rows)
    expected = {"seq-mean-token-sum": num_tokens(ROWS) / len(ROWS)}.get(aggregation, 1.0)
    assert total == pytest.approx(0.5 * expected)
    assert [row.advantage.tolist() for row in rows] == [
        [row.advantage] * num_tokens([row]) for row in ROWS
    ]  # the leaf's, on all of its turns


def test_trees_and_rows_are_tempered_apart(folder: Path) -> None:
    """Old rows lower their own exponent, and not that of fresh turns."""
    ess: dict[str, dict[str, object]] = {"correction": {"exponent": "ess", "ess_target": 0.9, "cap": 1e6}}
    batch = make_batch()
    far = tuple(
        msgspec.structs.replace(
            row, turns=tuple(msgspec.structs.replace(t, logprobs=t.logprobs - 3 * i) for t in row.turns)
        )
        for i, row in enumerate(ROWS)
    )
    without = trainer_of(folder, **ess).train(batch, version=VERSION).metrics
    found = trainer_of(folder, **ess).train(with_rows(batch, far, far), version=VERSION).metrics
    assert found["is/exponent_scale"] == without["is/exponent_scale"]
    assert found["imitation/exponent_scale"] < 0.5 * found["is/exponent_scale"]
    assert found["imitation/ess_frac"] >= 0.9 - 1e-9
    for name in ("is/ess_frac", "kl/mu_prox_k3", "clip_share", "lag/mean", "tokens/trained"):
        assert found[name] == without[name]  # the batch's own numbers stay its own


def test_of_the_objective_rows_have_the_surrogate_alone(folder: Path) -> None:
    batch, both = make_batch(), with_rows(make_batch(), ROWS, ROWS)
    plain, more = trainer_of(folder), trainer_of(folder, objective={"entropy_coef": 0.3, "kl_coef": 0.2})
    by_rows = gradient(plain, both) - gradient(plain, batch)
    torch.testing.assert_close(gradient(more, both) - gradient(more, batch), by_rows, rtol=1e-9, atol=1e-12)


def test_what_was_imitated_is_told(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, imitation={**ON, "coef": 0.5})
    batch = with_rows(make_batch(), ROWS, ROWS)
    report = trainer.train(batch, version=VERSION)
    found = {name: value for name, value in report.metrics.items() if name.startswith("imitation/")}
    assert (found["imitation/rows"], found["imitation/lag_mean"]) == (4, 2)
    assert found["imitation/advantage_mean"] == pytest.approx(np.mean([row.advantage for row in ROWS]))
    assert 0 < found["imitation/ess_frac"] <= 1
    assert 0 < found["imitation/loss_share"] < 1
    assert found["imitation/clip_share"] == 0  # one optimizer step: the ratio to prox is 1
    assert "imitation/dropped" not in found
    assert set(report.priorities) == {tree.tree_id for tree in batch.trees}  # priorities are the trees' alone
    sent = codec.decode(codec.encode(batch), BufferToLearner)
    write_lineage(tmp_path / "lineage.jsonl", sent, version=VERSION, rank=0)
    (line,) = map(json.loads, (tmp_path / "lineage.jsonl").read_text().splitlines())
    assert [(row["tree_id"], row["leaf"], row["uses"]) for row in line["rows"]] == [
        (row.tree_id, row.leaf, 1) for row in ROWS
    ]


def test_rows_older_than_any_turn_of_a_batch_are_trained_on_within_their_own_limit(folder: Path) -> None:
    old = make_rows(4, version=40, lag=12)
    trainer = trainer_of(folder, staleness={"max_lag": 1}, imitation={**ON, "max_lag": 12})
    batch = make_batch(version=40)
    assert trainer.train(with_rows(batch, old, old), version=40).metrics["imitation/lag_mean"] == 12
    tight = trainer_of(folder, staleness={"max_lag": 1}, imitation={**ON, "max_lag": 11})
    report = tight.train(with_rows(batch, old, old), version=40)
    assert report.metrics["imitation/dropped"] == 4
    assert "its oldest turn is 12 versions old, over imitation.max_lag = 11" in report.warnings[0]


def test_clip_cov_is_the_rows_own_and_draws_the_same_tokens_in_any_layout(folder: Path) -> None:
    """Half of the tokens are drawn, whatever their covariance: what is left has the gradient of its tokens alone."""
    wide: dict[str, object] = {**ON, "clip_cov": 0.5, "clip_cov_low": -1e9, "clip_cov_high": 1e9}
    batch, both = make_batch(), with_rows(make_batch(), ROWS, ROWS)
    alone = gradient(trainer_of(folder), batch)
    torch.testing.assert_close(gradient(trainer_of(folder, imitation=wide), batch), alone, rtol=1e-9, atol=1e-12)
    flat = gradient(trainer_of(folder, imitation=wide), both)
    learner: dict[str, object] = {"packing": "tree", "micro_batch_tokens": 64}
    packed = gradient(trainer_of(folder, imitation=wide, learner=learner), both)
    torch.testing.assert_close(packed, flat, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(flat, gradient(trainer_of(folder), both))
    metrics = trainer_of(folder, imitation=wide).train(both, version=VERSION).metrics
    assert metrics["imitation/clip_cov_share"] == int(0.5 * num_tokens(ROWS)) / num_tokens(ROWS)
    assert "clip-cov/kept_share" not in metrics  # of the batch's own tokens none was drawn


def test_a_row_that_is_worth_nothing_now_is_part_of_the_covariances(folder: Path) -> None:
    """Without Clip-Cov it has no pass."""
    idle = [msgspec.structs.replace(ROWS[0], advantage=0.0)]
    for clip_cov, passes in ((0.0, 0), (0.5, 1)):
        planner = trainer_of(folder, imitation={**ON, "clip_cov": clip_cov}).planner
        part = planner.plan((), [imitated(row, coef=1.0) for row in idle], with_rows(make_batch(), idle, idle), VERSION)
        assert len(part.passes) == passes


def test_parts_of_a_batch_have_parts_of_its_rows(folder: Path) -> None:
    batch = with_rows(make_batch(), ROWS, ROWS)
    metrics = trainer_of(folder, learner={"minibatches": 2, "epochs": 2}).train(batch, version=VERSION).metrics
    assert metrics["imitation/rows"] == 4
    assert metrics["train/updates"] == 4


def test_passes_planned_again_keep_the_rows_and_their_proximal_log_probs(folder: Path) -> None:
    trainer = trainer_of(folder, learner={"epochs": 2})
    batch = with_rows(make_batch(), ROWS, ROWS)
    chains = [imitated(row, coef=1.0) for row in ROWS]
    part = trainer.planner.plan((), chains, batch, VERSION)
    assert [item.imitated for item in part.passes] == [True]
    trainer._loss.measure_start(part.passes)
    before = part.passes
    trainer.planner.micro_batch_tokens = 64
    trainer.planner.plan_again(part, batch, VERSION)
    assert len(part.passes) > 1
    assert all(item.imitated and item.prox is not None for item in part.passes)
    again = [p.clone() for item in part.passes if (p := item.prox) is not None]
    take_measured(before, part.passes)
    assert all(torch.equal(a, item.prox) for a, item in zip(again, part.passes, strict=True) if item.prox is not None)


def broken(**changes: Any) -> BatchRow:
    return msgspec.structs.replace(ROWS[1], **changes)


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        (broken(advantage=math.nan), "its advantage is nan"),
        (broken(advantage=-0.5), "its advantage is -0.5, expected finite and at least 0"),
        (broken(leaf=9), "are no chain from the prompt to turn 9"),
        (broken(turns=ROWS[1].turns[1:]), "which is not in the tree"),
        (broken(turns=()), "none of its 0 turns ends a chain"),
        (broken(prompt=np.zeros(0, np.int32)), "its prompt has no tokens"),
        (broken(prompt=np.array([VOCAB], np.int32)), f"the vocabulary has ids 0 to {VOCAB - 1}"),
        (
            broken(turns=tuple(make_rows(2, version=VERSION + 9)[1].turns)),
            f"the learner is at {VERSION}",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_bad_row_costs_that_row_and_is_named(row: BatchRow, fact: str) -> None:
    batch = with_rows(make_batch(), (ROWS[0], row), (ROWS[0], row))
    sifted = sift_rows(batch, version=VERSION, vocab_size=VOCAB, max_lag=20)
    assert [each.tree_id for each in sifted.rows] == [ROWS[0].tree_id]
    assert sifted.num_dropped == 1
    (message,) = sifted.messages
    assert message.startswith(f"turn {row.leaf} of tree earlier-1, to be imitated, is left out")
    assert fact in message


def test_a_batch_that_counts_fewer_rows_than_it_holds_is_not_divided_by_them() -> None:
    batch = msgspec.structs.replace(with_rows(make_batch(), ROWS, ROWS), num_rows=2)
    sifted = sift_rows(batch, version=VERSION, vocab_size=VOCAB, max_lag=20)
    assert sifted.rows == ()
    assert "num_rows = 2" in sifted.messages[0]
