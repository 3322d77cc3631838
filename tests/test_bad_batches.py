"""Bad batches at the trainer: no weight ever becomes a bad one, and the good trees are trained on as if alone."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from atpo_async.core.errors import BadMessage
from atpo_async.links.server import Server
from atpo_async.ops.role import RoleContext
from atpo_async.run.accelerate_environment import ONE_MACHINE
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.wire import codec
from atpo_async.wire.messages import Batch, BatchTree, BufferToLearner, LearnerToBuffer, SampleRequest, Trained
from learner.batches.intake import REASONS
from learner.batches.recording import MAX_WARNINGS
from learner.batches.skipped import load_batch, save_batch
from learner.loss.guards import GradNorms, SkipCount
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.role import learn
from learner.training.report import StepReport
from learner.training.trainer import Trainer
from tests.bad_batch_support import BAD, MAX_LAG, TREES, VERSION, good_batch, item, span, turn_with, with_tree
from tests.learner_support import batch_of, make_batch, make_config, make_model

ROOT = Path(__file__).parent.parent
Weights = dict[str, torch.Tensor]

SETTINGS: dict[str, dict[str, dict[str, object]]] = {
    "as configured by default": {},
    "each leaf its own row": {"learner": {"packing": "flat"}},
    "several updates a batch": {"learner": {"minibatches": 2, "epochs": 2}},
    "with a reference and an entropy bonus": {"objective": {"kl_coef": 0.1, "entropy_coef": 0.01}},
    "tree traces": {"credit": {"value_mode": "tree_trace"}},
    "an exponent of the batch": {"correction": {"exponent": "ess"}},
    "m2po": {"correction": {"action": "m2po", "level": "token"}},
    "branch probabilities": {"objective": {"aggregation": "branch-prob"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def make_trainer(folder: Path, **sections: dict[str, object]) -> Trainer:
    sections = {"staleness": {"max_lag": MAX_LAG}, **sections}
    config = make_config(folder, **sections)
    return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


def weights(trainer: Trainer) -> Weights:
    return {name: tensor.clone() for name, tensor in trainer.whole.tensors().items()}


def optimizer_state(trainer: Trainer) -> Weights:
    found = trainer.optimizer.state_dict()["state"]
    return {f"{index}.{name}": value.clone() for index, entry in found.items() for name, value in entry.items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def finite(found: Weights) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in found.values())


def without(batch: Batch, *indices: int) -> Batch:
    """The same batch, its normalisers too, without these trees."""
    trees = tuple(tree for i, tree in enumerate(batch.trees) if i not in indices)
    return msgspec.structs.replace(batch, trees=trees)


INTAKE = {f"dropped/{reason}" for reason in REASONS}


def dropped(report: StepReport) -> dict[str, float]:
    """Trees that the intake has left out."""
    return {name: value for name, value in report.metrics.items() if name in INTAKE}


def all_else(report: StepReport) -> dict[str, float]:
    return {name: value for name, value in report.metrics.items() if name not in INTAKE}


def finite_numbers(report: StepReport) -> bool:
    return all(math.isfinite(value) for value in (*report.metrics.values(), *report.priorities.values()))


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[StepReport, Weights]:
    """What a batch without its tree 1 does to new weights."""
    trainer = make_trainer(folder)
    report = trainer.train(without(good_batch(), 1), version=VERSION)
    return report, weights(trainer)


@pytest.mark.parametrize("name", BAD)
def test_the_good_trees_of_a_batch_are_trained_on_as_if_the_bad_one_were_not_there(
    name: str, folder: Path, alone: tuple[StepReport, Weights]
) -> None:
    change, reason, says = BAD[name]
    trainer, (expected, expected_weights) = make_trainer(folder), alone
    before = weights(trainer)
    report = trainer.train(with_tree(good_batch(), 1, change), version=VERSION)

    assert report.fault is None
    assert (trainer.history.updates, trainer.history.skips) == (1, SkipCount())
    assert finite(weights(trainer))
    assert not same(weights(trainer), before)
    assert same(weights(trainer), expected_weights)
    assert dropped(report) == {f"dropped/{reason}": 1.0}
    assert all_else(report) == expected.metrics
    assert report.priorities == {**expected.priorities, "tree-1": 0.0}  # a tree that is drawn again comes last
    (warning,) = report.warnings
    assert "tree-1" in warning
    assert says in warning


@pytest.fixture(scope="module")
def trained_once(folder: Path) -> Trainer:
    trainer = make_trainer(folder)
    trainer.train(good_batch(), version=VERSION)
    return trainer


@pytest.mark.parametrize("name", BAD)
def test_a_batch_of_nothing_else_changes_no_bit_and_counts_as_skipped_unless_it_is_only_old(
    name: str, trained_once: Trainer
) -> None:
    change, reason, _ = BAD[name]
    trainer = trained_once
    before, moments, norms = weights(trainer), optimizer_state(trainer), trainer.history.grad_norms
    batch = good_batch()
    for index in range(TREES):
        batch = with_tree(batch, index, change)
    report = trainer.train(batch, version=VERSION)

    skips, trainer.history.skips = trainer.history.skips, SkipCount()
    unfit = f"trees were all unfit to train on, {TREES} of them; the log names each"
    assert (report.fault, skips) == ((None, SkipCount()) if reason == "all_stale" else (unfit, SkipCount(1, 1)))
    assert same(weights(trainer), before)
    assert moments
    assert same(optimizer_state(trainer), moments)
    assert (trainer.history.updates, trainer.history.grad_norms) == (1, norms)
    assert dropped(report) == {f"dropped/{reason}": float(TREES)}
    assert finite_numbers(report)
    assert set(report.priorities.values()) == {0.0}
    assert report.trained == frozenset()
    assert len(report.warnings) == TREES


def test_after_batches_of_nothing_but_bad_trees_training_goes_on_as_if_they_had_not_been(folder: Path) -> None:
    trainer, spared = make_trainer(folder), make_trainer(folder)
    for change, _, _ in BAD.values():
        trainer.train(with_tree(without(good_batch(), 1, 2), 0, change), version=VERSION)
    for one in (trainer, spared):
        assert one.train(good_batch(), version=VERSION).fault is None
    assert same(weights(trainer), weights(spared))


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_batch_with_every_fault_there_is_trains_its_good_trees_under_any_settings(
    setting: str, folder: Path
) -> None:
    good = good_batch()
    bad = [
        msgspec.structs.replace(change(good.trees[i % TREES]), tree_id=f"bad-{i}")
        for i, (change, _, _) in enumerate(BAD.values())
    ]
    mixed = msgspec.structs.replace(good, trees=(*bad[:20], good.trees[0], *bad[20:], *good.trees[1:]))
    trainer, alone = make_trainer(folder, **SETTINGS[setting]), make_trainer(folder, **SETTINGS[setting])
    for _ in range(2):
        report = trainer.train(mixed, version=VERSION)
        expected = alone.train(good, version=VERSION)
        assert report.fault is None
        assert sum(dropped(report).values()) == len(bad)
        assert all_else(report) == expected.metrics
        assert finite_numbers(report)
    assert trainer.history.updates == alone.history.updates == 2 * trainer.updates_per_batch
    assert finite(weights(trainer))
    assert same(weights(trainer), weights(alone))


def test_a_batch_that_counts_fewer_leaves_than_it_has_changes_no_weight(folder: Path) -> None:
    trainer = make_trainer(folder)
    before = weights(trainer)
    for name in ("num_trees", "num_leaves", "num_action_tokens", "num_turn_tokens"):
        report = trainer.train(msgspec.structs.replace(good_batch(), **{name: 0}), version=VERSION)
        assert dropped(report) == {"dropped/bad_counts": float(TREES)}
        assert same(weights(trainer), before)


def test_every_reason_is_a_number_of_the_step_only_where_it_happened(folder: Path) -> None:
    trainer = make_trainer(folder)
    assert dropped(trainer.train(good_batch(), version=VERSION)) == {}
    batch = good_batch()
    for index, name in enumerate(("a reward of nan", "no leaves", "a reward of inf")):
        batch = with_tree(batch, index, BAD[name].change)
    report = trainer.train(batch, version=VERSION)
    assert dropped(report) == {"dropped/bad_reward": 2.0, "dropped/no_leaf": 1.0}


def test_a_kept_batch_that_a_later_learner_loads_is_sifted_by_that_learners_version(
    folder: Path, tmp_path: Path
) -> None:
    """The wire's checks have passed it once and do so again; only the learner knows that it is from the future."""
    save_batch(tmp_path / "batch", good_batch())
    again = load_batch(tmp_path / "batch")
    trainer = make_trainer(folder)
    before = weights(trainer)
    report = trainer.train(again, version=VERSION - 3)
    assert dropped(report) == {"dropped/future_version": float(TREES)}
    assert same(weights(trainer), before)
    assert trainer.train(again, version=VERSION).fault is None
    assert not same(weights(trainer), before)


# --- numbers that are no fault of a tree, and yet too much for an update -------------------------------------------


def steady(norm: float) -> GradNorms:
    return GradNorms.of([norm] * 20)


def test_a_gradient_spike_is_skipped_named_and_remembered(folder: Path) -> None:
    trainer = make_trainer(folder)
    first = trainer.train(good_batch(), version=VERSION).metrics["grad_norm"]
    before = weights(trainer)
    trainer.history.grad_norms = steady(first / 1000)
    report = trainer.train(good_batch(), version=VERSION)
    assert report.fault is not None
    assert "times the median" in report.fault
    assert "learner.max_grad_spike = 30" in report.fault
    assert same(weights(trainer), before)
    assert (trainer.history.updates, trainer.history.skips) == (1, SkipCount(1, 1))
    assert trainer.history.grad_norms.norms[-1] == report.metrics["grad_norm"]
    # The same gradient is applied where such norms are usual.
    trainer.history.grad_norms = steady(first)
    assert trainer.train(good_batch(), version=VERSION).fault is None
    assert trainer.history.skips == SkipCount(0, 1)
    assert not same(weights(trainer), before)


def test_the_spike_guard_can_be_switched_off(folder: Path) -> None:
    trainer = make_trainer(folder, learner={"max_grad_spike": None})
    trainer.history.grad_norms = steady(1e-12)
    assert trainer.train(good_batch(), version=VERSION).fault is None
    assert trainer.history.updates == 1


def test_a_trainer_remembers_the_norm_of_each_update_and_none_of_an_empty_batch(folder: Path) -> None:
    trainer = make_trainer(folder, learner={"minibatches": 2})
    report = trainer.train(good_batch(), version=VERSION)
    assert len(trainer.history.grad_norms.norms) == 2
    assert sum(trainer.history.grad_norms.norms) / 2 == pytest.approx(report.metrics["grad_norm"])
    trainer.train(without(good_batch(), 0, 1, 2), version=VERSION)
    assert len(trainer.history.grad_norms.norms) == 2


def test_log_probs_far_below_what_the_policy_would_say_leave_every_weight_finite(folder: Path) -> None:
    """A valid number, however unlikely: the importance weight is truncated, the update goes ahead or is skipped."""
    for value in (-1e4, -1e30, -3e38):
        trainer = make_trainer(folder)
        batch = good_batch()
        for turn_id in range(1, 7):
            batch = with_tree(batch, 0, turn_with(turn_id, logprobs=item("logprobs", value)))
        trainer.train(batch, version=VERSION)
        assert finite(weights(trainer))


def test_rewards_as_large_as_may_pass_leave_every_weight_finite(folder: Path) -> None:
    for normalise in (True, False):
        trainer = make_trainer(folder, credit={"normalise_leaves": normalise})
        batch = with_tree(good_batch(), 0, turn_with(3, reward=3e38))
        report = trainer.train(batch, version=VERSION)
        assert finite(weights(trainer))
        assert dropped(report) == {}
        assert (report.fault is None) == normalise  # as they are, they are too much for float32's gradient


def test_a_version_of_exactly_the_limit_is_trained_on_and_one_more_is_masked(folder: Path) -> None:
    def all_turns(version: int) -> Batch:
        batch = good_batch()
        for index in range(TREES):
            for turn_id in range(1, 9):
                batch = with_tree(batch, index, turn_with(turn_id, spans=span(version)))
        return batch

    trainer = make_trainer(folder)
    before = weights(trainer)
    report = trainer.train(all_turns(VERSION - MAX_LAG - 1), version=VERSION)
    assert dropped(report) == {"dropped/all_stale": float(TREES)}
    assert same(weights(trainer), before)
    assert trainer.train(all_turns(VERSION - MAX_LAG), version=VERSION).fault is None
    assert not same(weights(trainer), before)


# --- on several ranks ----------------------------------------------------------------------------------------------


def train_shares(model: Path, rank: int, num_ranks: int, accelerator: Accelerator | None = None) -> dict[str, object]:
    """Four batches, each with a fault that only one share of it has; what this rank holds afterwards."""
    config = make_config(
        model, staleness={"max_lag": MAX_LAG}, credit={"normalise_leaves": False}, learner={"packing": "flat"}
    )
    trainer = Trainer(config, accelerator=accelerator or make_accelerator(config), policy=load_policy(config))
    faults: list[str | None] = []

    def train(batch: Batch) -> dict[str, float]:
        share = msgspec.structs.replace(batch, trees=batch.trees[rank::num_ranks])
        report = trainer.train(share, version=VERSION)
        faults.append(report.fault)
        return dropped(report)

    good = good_batch()
    counts = [train(with_tree(good, 1, BAD["a reward of nan"].change))]  # all that the second of two ranks has
    counts.append(train(with_tree(good, 0, BAD["an unknown parent"].change)))
    usual, trainer.history.grad_norms = trainer.history.grad_norms, steady(1e-9)
    counts.append(train(good))
    trainer.history.grad_norms = usual
    counts.append(train(with_tree(good, 0, turn_with(3, reward=3e38))))
    return {
        "counts": counts,
        "updates": trainer.history.updates,
        "skips": [trainer.history.skips.in_a_row, trainer.history.skips.total],
        "norms": list(trainer.history.grad_norms.norms),
        "faults": [fault and fault.split(" is ")[0] for fault in faults],
        "weights": {name: tensor.reshape(-1).tolist() for name, tensor in trainer.whole.tensors().items()},
    }


@pytest.mark.slow
def test_ranks_agree_on_what_to_skip_when_only_one_of_them_has_the_fault(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "--num_machines",
        "1", "--dynamo_backend", "no", "--mixed_precision", "no", "--main_process_port", "0", str(Path(__file__)),
        str(folder), str(tmp_path),
    ]  # fmt: skip
    env = {**os.environ, **ONE_MACHINE, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second  # bit for bit
    assert first["counts"] == [{"dropped/bad_reward": 1.0}, {"dropped/bad_structure": 1.0}, {}, {}]
    assert (first["updates"], first["skips"]) == (2, [2, 2])
    assert first["faults"][:3] == [None, None, "gradient norm"]
    assert first["faults"][3] is not None

    one = train_shares(folder, 0, 1)
    for name in ("counts", "updates", "skips", "faults"):
        assert first[name] == one[name]
    assert first["norms"] == pytest.approx(one["norms"], rel=1e-4)


def main(model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    accelerator = make_accelerator(make_config(model))
    rank = accelerator.process_index
    (out / f"rank-{rank}.json").write_text(json.dumps(train_shares(model, rank, 2, accelerator)))
    # A rank that leaves while the other still uses the group's threads aborts in their destructors.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


# --- through the socket, to the end of a run -----------------------------------------------------------------------


def passes_the_wire(batch: Batch) -> bool:
    try:
        codec.decode(codec.encode(batch), BufferToLearner)
    except BadMessage:
        return False
    return True


def richest(tree: BatchTree) -> BatchTree:
    """The tree with more turns than any good one has, so that the run's samples of trees would take it."""
    if not tree.turns:
        return tree
    last = max(turn.turn_id for turn in tree.turns)
    more = [msgspec.structs.replace(tree.turns[0], turn_id=last + 1 + i) for i in range(20)]
    return msgspec.structs.replace(tree, turns=(*tree.turns, *more))


async def test_a_run_that_is_served_bad_trees_says_so_and_goes_on_to_its_end(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 1: bad trees only.  Step 2: some among good ones.  Step 3: good ones."""
    trained: list[Trained] = []

    def bad_trees(version: int) -> list[BatchTree]:
        good = make_batch(version=version + VERSION, num_trees=1).trees[0]
        changed = [(name, with_tree(batch_of((good,), (good,)), 0, bad.change)) for name, bad in BAD.items()]
        return [
            msgspec.structs.replace(batch.trees[0], tree_id=f"bad {name}")
            for name, batch in changed
            if passes_the_wire(batch)
        ]

    async def buffer(peer: str, message: object) -> Batch | None:
        if isinstance(message, Trained):
            trained.append(message)
        if not isinstance(message, SampleRequest):
            return None
        good = make_batch(seed=message.step, step=message.step, version=message.version)
        bad = [richest(tree) for tree in bad_trees(message.version)]
        trees = [bad, [*bad, *good.trees], list(good.trees)][message.step]
        return msgspec.structs.replace(good, trees=tuple(trees), num_trees=len(trees))

    config = make_config(
        folder,
        run={"dir": str(tmp_path), "name": "demo", "steps": 3},
        eval={"at_start": False, "at_end": False, "every_steps": 0},
    )
    rundir = RunDir.create(config)
    settings = config.links
    async with Server(
        "tcp://127.0.0.1:0", name="buffer", receives=LearnerToBuffer, handler=buffer, settings=settings
    ) as server:
        context = RoleContext(
            config=config, run_id=rundir.run_id, rundir=rundir, name="learner", index=0, stopping=asyncio.Event(),
            endpoints=Endpoints(learner=server.endpoint, weights="tcp://127.0.0.1:0", announce="tcp://127.0.0.1:0"),
            log=logging.getLogger("learner"),
        )  # fmt: skip
        await asyncio.wait_for(learn(context), 60)

    count = len(bad_trees(0))
    steps = [r.metrics for r in read_metrics(rundir.metrics_path) if "tokens/trained" in r.metrics]
    assert [sum(m.get(name, 0.0) for name in INTAKE) for m in steps] == [count, count, 0]
    assert [m["train/updates"] for m in steps] == [0, 1, 2]
    assert [m["guard/skipped_updates"] for m in steps] == [1, 1, 1]
    good_ids = {f"tree-{i}" for i in range(4)}
    believed = [{tree_id for tree_id, p in message.priorities.items() if p > 0} for message in trained]
    assert believed == [set(), good_ids, good_ids]
    assert len(list((rundir.path / "skipped").iterdir())) == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in said if "is left out" in line]) == 2 * MAX_WARNINGS
    assert len([line for line in said if f"and {count - MAX_WARNINGS} more trees left out" in line]) == 2
    exported = load_file(rundir.path / "model" / "model.safetensors")
    assert finite(exported)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
