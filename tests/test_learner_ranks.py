"""Several ranks give the loss and gradient of one.  Run as a program, this file is one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atpo_async.run.accelerate_environment import ONE_MACHINE

ROOT = Path(__file__).parent.parent


VARIANTS: list[dict[str, dict[str, object]]] = [
    {"learner": {"packing": "flat"}},
    {"learner": {"packing": "tree", "pack_tokens": 64}},
    # What the whole batch decides must come out the same whoever holds which part of it.
    {"correction": {"exponent": "ess", "ess_target": 0.97, "cap": 1e6}},
    {"correction": {"ess_floor": 0.97, "cap": 1e6}},
    {"correction": {"action": "m2po", "level": "token", "m2_limit": 0.3}, "objective": {"kl_coef": 0.1}},
    {"credit": {"value_mode": "tree_trace"}, "objective": {"aggregation": "branch-prob", "entropy_coef": 0.1}},
    {"objective": {"ratio_level": "sequence", "aggregation": "unique-token-mean"}, "learner": {"epochs": 2}},
    # Credit that the whole batch decides, or that reads the reference, from which the policy has moved.
    {
        "credit": {"advantage_mode": "ancestors", "normalise_leaves": "batch", "whiten_advantages": True},
        "objective": {"aggregation": "token-mean"},
    },
    {"credit": {"advantage_mode": "preference"}, "objective": {"aggregation": "unique-token-mean"}},
    # Adapters alone are trained, and the reference is the same model without them.
    {"learner": {"lora": {"rank": 3}, "epochs": 2}, "objective": {"kl_coef": 0.1}},
    # Groups of trees with roles, in place of trees.
    {"team": {"proposers": 2, "teams": 2, "cue_tokens": 9, "proposer_weight": 0.3}},
    # A second model learns from all ranks' pairs, and what it says of each turn is added to the turn's advantage.
    {"implicit_reward": {"enabled": True, "lr": 1e-2}, "learner": {"minibatches": 2}},
    # Terms and token weights: quantiles, deviations, draws and a running mean of the whole batch.
    {
        "objective": {
            "terms": ["lp-reg", "epo"],
            "term_options": {"lp-reg": {"noise": 0.01, "share": 0.8}},
            "token_weights": ["top-entropy", "entropy-advantage"],
            "entropy_coef": 0.1,
        },
        "learner": {"epochs": 2},
    },
    {
        "objective": {
            "terms": ["kl-cov"],
            "term_options": {"kl-cov": {"share": 0.2}},
            "token_weights": ["clip-cov"],
            "token_weight_options": {"clip-cov": {"share": 0.1, "low": 0.1}},
        },
        "learner": {"epochs": 2, "packing": "tree"},
    },
    # Old rows that are imitated, tempered by themselves; they are shared out as trees are.
    {
        "imitation": {"rows": 9, "max_lag": 20, "coef": 0.7, "clip_cov": 0.1, "clip_cov_low": -9.0},
        "correction": {"exponent": "ess", "ess_target": 0.9},
    },
    # Of a user's own, with a measure of the whole batch and a metric.
    {"objective": {"surrogate": "tests.loss_examples:sapo"}, "correction": {"action": "tests.loss_examples:trimmed"}},
]
IN_HALF: dict[str, dict[str, object]] = {"learner": {"mixed_precision": "bf16"}}
"""Its passes differ with the split, and so do the roundings in them."""


def train_share(model: Path, shares: list[list[int]], variant: dict[str, dict[str, object]]) -> dict[str, Any]:
    """Take this rank's share of one batch, a step in float64 unless the variant says otherwise; what came of it."""
    from accelerate.state import AcceleratorState

    from learner.policy.accelerator import make_accelerator
    from learner.policy.model import load_policy
    from learner.training.trainer import Trainer
    from tests.imitation_support import make_rows, with_rows
    from tests.learner_support import batch_of, in_double, make_batch, make_config
    from tests.team_support import groups

    sections: dict[str, dict[str, object]] = {"learner": {"micro_batch_tokens": 100, "max_grad_norm": 1e9, "lr": 1e-2}}
    for name, fields in variant.items():
        sections[name] = {**sections.get(name, {}), **fields}
    config = make_config(model, **sections)
    AcceleratorState._reset_state()  # which holds a process to one precision
    accelerator = make_accelerator(config)
    policy = load_policy(config)
    if config.learner.mixed_precision == "no":
        policy = in_double(policy)
    trainer = Trainer(config, accelerator=accelerator, policy=policy)
    if config.credit.advantage_mode == "preference":
        with torch.no_grad():
            for parameter in trainer.policy.parameters():
                parameter.mul_(1.05)
    whole = groups(5, version=3) if config.team.on else make_batch(num_trees=5).trees
    share = tuple(whole[i] for i in shares[accelerator.process_index])
    batch = batch_of(share, whole)
    if config.imitation.rows:
        rows = make_rows(5, version=3)
        batch = with_rows(batch, tuple(rows[i] for i in shares[accelerator.process_index]), rows)
    gradients: list[float] = []
    original = trainer.optimizer.step

    def step(*args: Any) -> None:
        for parameter in (p for p in trainer.policy.parameters() if p.requires_grad):
            assert parameter.grad is not None
            gradients.append(float(parameter.grad.norm()))
        original(*args)

    trainer.optimizer.step = step
    report = trainer.train(batch, version=3)
    assert trainer.reductions.same_everywhere([accelerator.process_index + 5.0]) == [5.0]
    assert trainer.reductions.least(float(accelerator.process_index)) == 0.0
    names = (
        "train/loss", "grad_norm", "lag/mean", "is/ess_frac", "is/chi2_turn", "kl/mu_prox_k3", "tokens/trained",
        "is/exponent_scale",
    )  # fmt: skip
    of_some = (
        *("surrogate/gate", "is/edge", "is/m2po_max_abs", "implicit/loss", "implicit/reward_std", "implicit/pairs"),
        *("imitation/loss", "imitation/ess_frac", "imitation/rows"),
    )
    own = [n for n in report.metrics if n in of_some or n[:7] == "credit/"]
    return {
        "ranks": accelerator.num_processes,
        "metrics": {name: report.metrics[name] for name in (*names, *own)},
        "gradients": gradients,
        "weights": {k: v.reshape(-1).tolist() for k, v in trainer.whole.tensors().items()},
    }


def launch(model: Path, out: Path, work: list[Any]) -> list[dict[str, Any]]:
    """One launch of two gloo ranks that trains every (split of the batch, variant) in turn."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "--num_machines",
        "1", "--dynamo_backend", "no", "--mixed_precision", "no", "--main_process_port", "0", str(Path(__file__)),
        str(model), str(out), json.dumps(work),
    ]  # fmt: skip
    env = {**os.environ, **ONE_MACHINE, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    from tests.learner_support import make_model

    model = make_model(tmp_path / "model")
    # Unequal shares: the ranks hold different numbers of micro-batches.  One without rows takes part all the same.
    splits = [[[0, 2, 3, 4], [1]], [[0, 1, 2, 3, 4], []]]
    work = [(split, variant) for variant in (*VARIANTS, IN_HALF) for split in splits]
    both = launch(model, tmp_path / "both.json", work)
    alone = {json.dumps(v): train_share(model, [[0, 1, 2, 3, 4]], v) for v in (IN_HALF, *VARIANTS)}
    for other, (_, variant) in zip(both, work, strict=True):
        one = alone[json.dumps(variant)]
        assert (one["ranks"], other["ranks"]) == (1, 2)
        if variant == IN_HALF:
            assert other["metrics"] == pytest.approx(one["metrics"], rel=0.05), variant
            np.testing.assert_allclose(other["gradients"], one["gradients"], rtol=0.05)
            continue
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-9), variant
        np.testing.assert_allclose(other["gradients"], one["gradients"], rtol=1e-9, atol=1e-13)
        for name, values in one["weights"].items():
            np.testing.assert_allclose(other["weights"][name], values, rtol=1e-8, atol=1e-8)


def main(model: Path, out: Path, work: list[Any]) -> None:
    torch.set_num_threads(1)
    found = [train_share(model, shares, variant) for shares, variant in work]
    if os.environ.get("RANK") == "0":
        out.write_text(json.dumps(found))
    # A rank that leaves while the other still uses the group's threads aborts in their destructors.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
