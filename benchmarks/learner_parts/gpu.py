"""The part ``gpu``: tokens/s and model-FLOP utilisation."""

from __future__ import annotations

import torch

from benchmarks.learner_parts.cost import Flops, tree_work, work_of
from benchmarks.learner_parts.plan import Plan, compare, made_for
from benchmarks.learner_parts.sides import make_trainer
from benchmarks.learner_parts.tables import Table, count, median, say

BF16_TFLOPS = {"H200": 989.0, "H100": 989.0, "GH200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0}
"""Dense bfloat16 peak by what the device's name holds (the makers' data sheets)."""


def peak_tflops(given: float | None) -> float | None:
    name = torch.cuda.get_device_name()
    return given or next((peak for known, peak in BF16_TFLOPS.items() if known in name), None)


def gpu(plan: Plan, given_peak: float | None) -> list[Table]:
    """Not measured so far: no GPU was there."""
    peak = peak_tflops(given_peak)
    rows = []
    for name, shape in plan.shapes.items():
        say(f"gpu: {name}")
        trainer = make_trainer(plan.size, plan.config)
        batch = made_for(trainer, plan, shape, plan.trees)
        found = compare(trainer, batch, plan.rounds)
        work, flops = work_of(batch, tree_work), Flops.of(trainer.policy.hf)
        seconds = median(found.taken["tree"], "step")
        # Forward and backward once; what gradient checkpointing computes again is no work of the model's.
        utilisation = "" if peak is None else f"{100 * 3 * flops(work) / seconds / (peak * 1e12):.0f} %"
        rows.append((plan.model, name, count(work.tokens / seconds), utilisation, str(found.speed_up("step"))))
    return [
        Table(
            f"On a GPU, learner.mixed_precision = {plan.config.learner.mixed_precision}",
            f"Peak taken as {peak} TFLOPS." if peak else "No peak known for this device: give --peak-tflops.",
            ("model", "trees", "tokens/s packed", "model-FLOP utilisation", "packed over flat"),
            rows,
        )
    ]
