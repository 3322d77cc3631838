"""The parts ``packing``, ``bare`` and ``attention``: ratios of two sides in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from benchmarks.learner_parts.cost import QWEN3_4B, Flops, expected, tree_work, work_of
from benchmarks.learner_parts.plan import Plan, compare, made_for
from benchmarks.learner_parts.sides import TOY, Bare, Times, make_trainer
from benchmarks.learner_parts.tables import Ratio, Table, column, count, interleave, median, say
from benchmarks.learner_parts.trees import SHAPES
from learner.packing.attention import Way, ways
from learner.policy.precision import computed_in


def packing(plan: Plan) -> list[Table]:
    rows, shares = [], []
    cases = [(name, plan.size, shape, plan.trees) for name, shape in plan.shapes.items()]
    for name, size, shape, trees in [*cases, TOY]:
        say(f"packing: {name}")
        trainer = make_trainer(size, plan.config)
        found = compare(trainer, made_for(trainer, plan, shape, trees), plan.rounds)
        whole = found.speed_up("step")
        rows.append(
            (
                name,
                f"{count(found.tokens['flat'])} / {count(found.tokens['tree'])}",
                f"{found.token_ratio:.2f}",
                f"{found.predicted:.2f}",
                str(found.speed_up("passes")),
                str(whole),
                str(whole.times(1 / found.predicted)),
                f"{full_length(name):.2f}" if name in SHAPES else "",
            )
        )
        shares.append(share_row(f"{name}, {trees} of {shape.leaves} leaves", found.taken))
    first = next(iter(plan.shapes.values()))
    return [
        Table(
            "Packed against flat",
            f"Model {plan.model}, {plan.trees} trees a step, 22 leaves (m10: M=10, L=2, K=6; m2: M=2, L=4, K=5), paths "
            f"of {count(first.path)} tokens in {next(iter(plan.shapes))}. Speed-up: seconds flat over seconds packed.",
            (
                "trees",
                "padded tokens, flat / packed",
                "token ratio",
                "predicted",
                "forward + backward",
                "whole step",
                "of the prediction (>= 0.85)",
                "predicted for 4B, full length",
            ),
            rows,
        ),
        Table(
            "What packing takes of the step it feeds",
            "Of the packed step: its rows, which flat training needs too, and their layout. Target for 64 trees: below "
            "5 %.",
            ("trees", "layout, ms", "rows and layout, ms", "step, ms", "share of the layout", "share of both"),
            shares,
        ),
    ]


def full_length(name: str) -> float:
    """Speed-up that the cost model gives the shape at its full length on Qwen3-4B."""
    shape = SHAPES[name]
    suffix = shape.path - shape.prompt
    flat, tree = expected(shape.prompt, suffix, chains=shape.rollouts, branches=shape.rounds * shape.branches)
    return QWEN3_4B(flat) / QWEN3_4B(tree)


def share_row(name: str, taken: Mapping[str, Sequence[Times]]) -> tuple[str, ...]:
    steps, both, alone = column(taken["tree"], "step"), column(taken["tree"], "plan"), column(taken["layout"], "step")
    return (
        name,
        *(f"{1000 * statistics.median(values):.1f}" for values in (alone, both)),
        count(1000 * statistics.median(steps)),
        Ratio.of(alone, steps).percent(),
        Ratio.of(both, steps).percent(),
    )


def bare(plan: Plan) -> list[Table]:
    rows = []
    cases = [(name, plan.size, shape, plan.trees) for name, shape in plan.shapes.items()]
    for name, size, shape, trees in [*cases, TOY]:
        say(f"bare: {name}")
        learner = make_trainer(size, plan.config)
        batch = made_for(learner, plan, shape, trees)
        work = work_of(batch, tree_work)
        loop = Bare(
            size, plan.config, tokens=int(work.tokens), row=shape.path - 1, scored=int(work.scored), seed=plan.seed
        )
        sides: dict[str, Callable[[], Times]] = {
            "learner": partial(learner.timed, batch, "tree"),
            "every": partial(loop.timed, every=True),
            "some": partial(loop.timed, every=False),
        }
        taken = interleave(sides, plan.rounds)
        # Tokens/s on each side: the rows do not come out at exactly as many tokens.
        seconds = {
            side: Ratio.of(column(taken[side], "step"), column(taken["learner"], "step")) for side in ("every", "some")
        }
        rate = work.tokens / loop.num_tokens
        flops = Flops.of(loop.hf)
        rows.append(
            (
                name,
                f"{count(work.tokens)} ({count(work.scored)} scored)",
                count(work.tokens / median(taken["learner"], "step")),
                str(seconds["every"].times(rate)),
                str(seconds["some"].times(rate)),
                str(seconds["some"].times(flops(work) / flops(loop.work))),
            )
        )
    return [
        Table(
            "The packed learner against a bare loop",
            "Tokens/s of the packed step over tokens/s of a loop that has as many tokens in plain causal rows as long "
            "as a leaf's path (`model(input_ids, labels=…)`, backward, clip, AdamW; same precision, same tokens a "
            "pass). The learner's side is the whole step: checks, credit, packing, ratios, correction, turn loss, "
            "diagnostics, clip, AdamW; a token counts once, however many leaves share it. It computes logits for "
            "action tokens only, so the second ratio has the bare loop predict only as many. A token of a tree is "
            "deeper than one of such rows on average and sees more: the third ratio is of operations/s.",
            (
                "trees",
                "tokens a step",
                "learner, tokens/s",
                "to bare, all predicted (>= 0.95)",
                "as many predicted",
                "the same, operations/s",
            ),
            rows,
        )
    ]


def attention(plan: Plan) -> list[Table]:
    device = torch.device(plan.device)
    possible = ways(device, computed_in(plan.config.learner.mixed_precision))
    first = possible[0]
    every: list[Way] = [*possible, "dense"]  # the last can be had everywhere
    others = [way for way in dict.fromkeys(every) if way != first]
    rows = []
    for name, shape in plan.shapes.items():
        say(f"attention: {name}")
        trainer = make_trainer(plan.size, plan.config)
        batch = made_for(trainer, plan, shape, plan.trees)
        taken = interleave({way: partial(trainer.timed, batch, "tree", way) for way in (first, *others)}, plan.rounds)
        rows += [
            (name, way, str(Ratio.of(column(taken[way], "passes"), column(taken[first], "passes")))) for way in others
        ]
    return [
        Table(
            "Ways to compute attention over packed trees",
            f"Model {plan.model}: seconds forward and backward over those of {first!r}, the choice on this device.",
            ("trees", "way", f"to {first!r}"),
            rows,
        )
    ]
