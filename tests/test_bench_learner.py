"""The learner's benchmark: its made-up trees, its cost model, who takes turns with whom, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from atpo_async.config import Config, load
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.tree import TurnTree
from atpo_async.wire.messages import BatchTree
from benchmarks.learner import main, parse
from benchmarks.learner_parts.cost import QWEN3_4B, Flops, expected, flat_work, tree_work
from benchmarks.learner_parts.plan import compare, made_for
from benchmarks.learner_parts.sides import Bare, Size, Times, make_trainer
from benchmarks.learner_parts.tables import interleave
from benchmarks.learner_parts.trees import SHAPES, Shape, grow, grow_batch, sampled_by
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.rows import Row, leaf_rows, micro_batches
from learner.packing.tree import attention_pairs, tree_micro_batches
from learner.policy.model import Policy

ROOT = Path(__file__).resolve().parent.parent
VECTORS = json.loads((ROOT / "tests" / "vectors" / "at2po_vectors.json").read_text())
SMALL = Shape(rollouts=3, rounds=2, branches=3, turns=3, prompt=6, observation=4, action=5)
TINY = Size(vocab=31, width=16, inner=24, layers=2, heads=2, kv_heads=1, head_dim=8)
EXAMPLES = {
    "default_M10_LK12": ("m10", 10, 12),
    "M2_LK20": ("m2", 2, 20),
    "long_prompt_4k": ("m10-long", 10, 12),
    "M2_LK20_long_prompt_4k": ("m2-long", 2, 20),
}


def whole(tree: BatchTree) -> TurnTree:
    return TurnTree(tree.tree_id, tree.task_index, tree.prompt, tuple(tree.turns))


def rows_of(tree: BatchTree) -> list[Row]:
    credited = [CreditedTree.of(tree, credit_rule(Config().credit))]
    return leaf_rows(
        credited, version=0, max_lag=0, aggregation="token-mean", normaliser=Normaliser.of(credited), keep_idle=True
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_cost_model_gives_the_reference_values(name: str) -> None:
    shape_name, chains, branches = EXAMPLES[name]
    shape, given = SHAPES[shape_name], VECTORS["packing"]["cost_model_example"][name]
    assert (shape.rollouts, shape.rounds * shape.branches, shape.path) == (chains, branches, given["seq"])
    flat, tree = expected(shape.prompt, shape.path - shape.prompt, chains=chains, branches=branches)
    assert (flat.tokens, tree.tokens) == (given["flat_tokens"], given["tree_tokens"])
    assert flat.tokens / tree.tokens == pytest.approx(given["token_speedup"], rel=1e-9)
    assert QWEN3_4B(flat) / QWEN3_4B(tree) == pytest.approx(given["flops_speedup"], rel=1e-9)


def test_operations_are_counted_from_the_matrices_of_the_model() -> None:
    flops = Flops.of(TINY.make())
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24  # query, key and value, output, the three of the MLP
    assert flops == Flops(token=2 * 2 * layer, pair=4 * 2 * 16, scored=2 * 31 * 16)


def test_a_grown_tree_has_its_leaves_and_every_branch_is_a_sibling_of_a_turn_that_is_no_leaf() -> None:
    tree = whole(grow(SMALL, tree_id="t", vocab_size=31, rng=np.random.default_rng(0)))
    assert len(tree.leaves()) == SMALL.leaves == 9
    assert {len(tree.path(leaf.turn_id)) for leaf in tree.leaves()} == {SMALL.turns}
    first = 1 + SMALL.rollouts * SMALL.turns  # the first turn that a round of branches has grown
    grown = [turn for turn in tree if turn.turn_id >= first and turn.parent_id < turn.turn_id - 1]
    assert {turn.expansion_round for turn in tree if turn.turn_id >= first} == {1, 2}
    for turn in grown:
        older = [tree[other] for other in tree.siblings(turn.turn_id) if other < turn.turn_id]
        assert any(not sibling.is_leaf and np.array_equal(sibling.observation, turn.observation) for sibling in older)


def test_the_same_seed_grows_the_same_tree_and_its_leaves_earn_different_rewards() -> None:
    def made(seed: int) -> BatchTree:
        return grow(SMALL, tree_id="t", vocab_size=31, rng=np.random.default_rng(seed))

    actions = [np.concatenate([turn.action for turn in made(seed).turns]).tolist() for seed in (5, 5, 6)]
    assert actions[0] == actions[1] != actions[2]
    for seed in range(20):
        assert {turn.reward for turn in made(seed).turns if turn.is_leaf} == {0.0, 1.0}


def test_chains_of_one_turn_branch_at_the_prompt() -> None:
    shape = Shape(rollouts=2, rounds=1, branches=3, turns=1, prompt=4, observation=2, action=3)
    tree = whole(grow(shape, tree_id="t", vocab_size=31, rng=np.random.default_rng(0)))
    assert len(tree.children(0)) == len(tree) == 5


@pytest.mark.parametrize("seed", range(4))
def test_the_counted_work_is_what_the_layouts_hold(seed: int) -> None:
    tree = grow(SMALL, tree_id="t", vocab_size=31, rng=np.random.default_rng(seed))
    (packed,) = tree_micro_batches(rows_of(tree), max_tokens=4096, pack_tokens=None, version=0)
    assert packed.layout is not None
    counted = tree_work(tree)
    assert (counted.tokens, counted.scored) == (packed.tokens.size, packed.num_targets)
    assert counted.pairs == attention_pairs(packed.layout.position_ids)

    rows = rows_of(tree)
    flat = flat_work(tree)
    lengths = np.array([len(row.tokens) - 1 for row in rows])
    assert (flat.tokens, flat.pairs) == (lengths.sum(), (lengths * (lengths + 1) // 2).sum())
    assert flat.scored == sum(b.num_targets for b in micro_batches(rows, max_tokens=4096, version=0))


def test_behaviour_logprobs_are_the_policys_own() -> None:
    policy, config = Policy(TINY.make()), Config()
    batch = grow_batch(SMALL, num_trees=2, vocab_size=31, seed=0, config=config)
    sampled = sampled_by(policy, batch, config, torch.device("cpu"))
    tree = whole(sampled.trees[1])
    path = tree.path(tree.leaves()[-1].turn_id)
    tokens = torch.from_numpy(np.concatenate([tree.prompt, *(t for n in path for t in (n.observation, n.action))]))
    with torch.no_grad():
        logs = policy.hf(input_ids=tokens[None].long()).logits[0].log_softmax(-1)
    at = len(tree.prompt)
    for turn in path:
        at += len(turn.observation)
        places = torch.arange(at, at + len(turn.action))
        own = logs[places - 1, tokens[places].long()].numpy()
        np.testing.assert_allclose(turn.logprobs, own, atol=1e-5)
        at += len(turn.action)


def test_both_layouts_do_the_same_work_and_the_prediction_is_above_one() -> None:
    _, plan = parse(["--learner.device", "cpu"])
    trainer = make_trainer(TINY, plan.config)
    found = compare(trainer, made_for(trainer, plan, SMALL, 2), 1)
    assert found.predicted > 1
    assert found.tokens["tree"] < found.tokens["flat"]
    for layout in ("tree", "flat"):
        (times,) = found.taken[layout]
        assert times["step"] > times["passes"] > 0


def test_layouts_that_disagree_give_no_figures() -> None:
    _, plan = parse(["--learner.device", "cpu"])
    trainer = make_trainer(TINY, plan.config)
    batch = made_for(trainer, plan, SMALL, 1)
    real = trainer.policy.hf.get_output_embeddings().forward

    def other(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = real(hidden)
        return logits * (1.1 if trainer.layout == "flat" else 1.0)

    trainer.policy.hf.get_output_embeddings().forward = other
    with pytest.raises(SetupError, match=r"the two layouts disagree: gradient norm .* packed, .* flat"):
        compare(trainer, batch, 1)


def bare(*, scored: int) -> Bare:
    config = load((), {"learner.lr": "0.1", "learner.device": "cpu", "learner.micro_batch_tokens": "64"})
    return Bare(TINY, config, tokens=61, row=20, scored=scored)


def test_the_bare_loop_predicts_every_token_or_as_many_as_are_scored() -> None:
    most, some = bare(scored=57), bare(scored=30)
    assert (some.num_tokens, [rows.shape for rows in some.passes], len(some.keep)) == (60, [(3, 20)], 10)
    assert (some.work.tokens, some.work.pairs, some.work.scored) == (60, 3 * 210, 30)
    (rows,) = most.passes
    with torch.no_grad():
        every = float(most.loss(rows, every=True))
        assert float(most.loss(rows, every=False)) == pytest.approx(every, rel=1e-6)
        assert abs(float(some.loss(rows, every=False)) - every) > 1e-4


@pytest.mark.parametrize("every", [True, False])
def test_the_bare_loop_trains(every: bool) -> None:
    loop = bare(scored=30)
    with torch.no_grad():
        before = float(loop.loss(loop.passes[0], every=every))
    for _ in range(3):
        loop.timed(every=every)
    with torch.no_grad():
        assert float(loop.loss(loop.passes[0], every=every)) < before


def test_sides_take_turns_in_another_order_each_round_and_the_first_round_is_thrown_away() -> None:
    ran: list[str] = []

    def side(name: str) -> Times:
        ran.append(name)
        return {"step": float(len(ran))}

    taken = interleave({name: lambda name=name: side(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(ran) == "abc" + "bca" + "cab" + "abc"
    assert [times["step"] for times in taken["a"]] == [6.0, 8.0, 10.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--trees", "-1"], "--trees must be >= 1, got -1"),
        (["--scale", "0"], "--scale must be above 0, got 0"),
        (["--scale", "nan"], "--scale must be above 0, got nan"),
        (["--peak-tflops", "-5"], "--peak-tflops must be above 0, got -5"),
        (["--part", "speed"], "invalid choice: 'speed'"),
        (["--shape", "m11"], "invalid choice: 'm11'"),
        (["--part", "gpu"], "--part gpu needs a CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_option_of_the_configuration_ends_with_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--learner.pack_tokens", "3"]) == 2
    assert "learner.pack_tokens must be >= 16, got 3" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--learner\.pack_token: unknown option; did you mean"):
        parse(["--learner.pack_token", "64"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollouts": 0}, "rollouts must be >= 1, got 0"),
        ({"observation": -1}, "observation must be >= 0, got -1"),
        ({"spread": 1.0}, r"spread of lengths must be in \[0, 1\), got 1"),
        ({"rollouts": 1, "rounds": 0}, "one leaf has no signal"),
    ],
)
def test_an_impossible_shape_is_refused(change: dict[str, float], message: str) -> None:
    fields = {"rollouts": 3, "rounds": 1, "branches": 1, "turns": 2, "prompt": 4, "observation": 2, "action": 3}
    with pytest.raises(ValueError, match=message):
        Shape(**(fields | change))  # type: ignore[arg-type]


def test_a_scaled_shape_keeps_every_part() -> None:
    small = SHAPES["m10"].scaled(1e-6)
    assert (small.prompt, small.observation, small.action, small.leaves) == (1, 1, 1, 22)


@pytest.mark.slow
def test_as_a_script_it_finds_the_learner_and_not_itself() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "learner.py"), "--rounds", "0"],
        capture_output=True, text=True, timeout=150, check=False, cwd=ROOT / "benchmarks",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "--rounds must be >= 1, got 0" in done.stderr
