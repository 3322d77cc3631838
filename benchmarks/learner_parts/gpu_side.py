"""One row of the part ``gpu``: the learner's step and the bare loop on one model under one set of settings.

It runs in a process of its own, and tells each stage when it has it, so that a row that is cut short has told the rest.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.learner_parts.cost import Flops, flat_work, tree_work, work_of
from benchmarks.learner_parts.kernels import by_kind
from benchmarks.learner_parts.plan import Plan, check_layouts, made_for
from benchmarks.learner_parts.profile import seconds_by_kernel
from benchmarks.learner_parts.sides import Bare, TimedTrainer, Times, make_trainer
from benchmarks.learner_parts.tables import say
from learner.training.trainer import Trainer

SETTINGS = ("kernels", "compile", "gradient_checkpointing", "optimizer", "mixed_precision", "micro_batch_tokens")
"""Of the learner, as a row tells them."""
Stage = dict[str, Any]


def stages(plan: Plan, *, profiled: bool = True) -> Iterator[Stage]:
    """What one row has measured, stage by stage: settings and work, steps, kinds of kernels, flat layout, bare loop."""
    (name, shape), *_ = plan.shapes.items()
    trainer = make_trainer(plan.size, plan.config)
    trainer.warm_up()  # as a learner does: what is left to it, it decides here
    batch = made_for(trainer, plan, shape, plan.trees)
    work, flops = work_of(batch, tree_work), Flops.of(trainer.policy.hf)
    flat = work_of(batch, flat_work)
    yield {
        "model": plan.model,
        "shape": name,
        "settings": settings_of(trainer),
        "tokens": work.tokens,
        "scored": work.scored,
        "flops": work_factor(trainer) * flops(work),
        "predicted": flops(flat) / flops(work),
    }
    yield packed_steps(trainer, partial(trainer.timed, batch, "tree"), plan)
    if profiled:
        # Where it went; the profiler takes a share of its own, which is why this step is in no other figure.
        seconds = seconds_by_kernel(partial(trainer.timed, batch, "tree"), plan.device)
        largest = sorted(seconds.items(), key=lambda item: -item[1])[:40]
        yield {"kinds_s": by_kind(seconds), "largest_s": dict(largest)}
    yield {"flat_s": [trainer.timed(batch, "flat")["step"] for _ in range(3)][1:]}
    check_layouts(trainer)
    del trainer, batch
    _give_back()
    yield bare_steps(plan, tokens=int(work.tokens), row=shape.path - 1, scored=int(work.scored))


def work_factor(trainer: Trainer) -> int:
    """Forward passes that one forward and backward is worth: frozen matrices have no gradient of their own."""
    return 2 if any(not p.requires_grad for p in trainer.policy.parameters()) else 3


def settings_of(trainer: Trainer) -> dict[str, str]:
    """The settings of the learner that decide speed and memory, as text; with what ``auto`` has become where that is
    known."""
    found = {name: str(getattr(trainer.config.learner, name)) for name in SETTINGS if _has(trainer, name)}
    found |= {"kernels chosen": trainer.kernels.name, "layers compiled": trainer.compiled}
    found["layers computed twice"] = str(trainer.fitting.checkpointed_layers)
    found["attention"] = str(getattr(trainer.policy, "attention_way", None) or "the device's own")
    rank = getattr(getattr(trainer.config.learner, "lora", None), "rank", 0)
    return found | ({"lora.rank": str(rank)} if rank else {})


def _has(trainer: Trainer, name: str) -> bool:
    return name in type(trainer.config.learner).model_fields


def packed_steps(trainer: TimedTrainer, step: Callable[[], Times], plan: Plan) -> Stage:
    """Steps one by one: seconds of each, graphs compiled in each, and the peak of memory from the second on."""
    seconds, plans, passes, compiled = [], [], [], []
    for number in range(plan.rounds + 2):
        before = compilations()
        if number == 1 and plan.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = step()
        seconds.append(times["step"])
        plans.append(times["plan"])
        passes.append(times["passes"])
        compiled.append(compilations() - before)
        say(f"step {number + 1}: {times['step']:.3f} s")
    found: Stage = {"steps_s": seconds, "plan_s": plans, "passes_s": passes, "compilations": compiled}
    if plan.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["held_bytes"] = held_bytes(trainer)
        found["pass_tokens"] = trainer.largest_pass
    return found


def compilations() -> int:
    """Graphs that torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # seconds to import, and nothing is compiled without it
    return 0 if dynamo is None else int(dynamo.counters["stats"].get("unique_graphs", 0))


def held_bytes(trainer: TimedTrainer) -> int:
    """Weights, their copy in half precision, gradients and the optimizer's states on the device, as they lie there at
    the end of a backward pass."""
    device = trainer.accelerator.device.type
    own = list(trainer.policy.parameters())
    parameters = list({id(p): p for p in [*own, *trainer.trained.parameters()]}.values())
    states = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    gradients = sum(p.numel() * p.element_size() for p in own if p.requires_grad)
    there = [tensor for tensor in [*parameters, *states] if tensor.device.type == device]
    return gradients + sum(num_bytes(tensor) for tensor in there)


def num_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, and of the parts that a quantised one is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    names, _ = flatten()
    return sum(num_bytes(getattr(tensor, name)) for name in names)


def bare_steps(plan: Plan, *, tokens: int, row: int, scored: int) -> Stage:
    """Steps of the loop without a learner; where it runs out of memory with checkpointing, and with shorter passes.

    With the learner's own optimizer and precision, as many tokens predicted as in the trees; then all of them.
    """
    settings = plan.config.learner
    asked = bool(settings.gradient_checkpointing is True)
    tries = [(asked, 1), (True, 1), (True, 2), (True, 4)]
    for checkpointing, divisor in dict.fromkeys(tries):
        fewer = settings.model_copy(
            update={"micro_batch_tokens": max(row, settings.micro_batch_tokens // divisor),
                    "gradient_checkpointing": checkpointing}
        )  # fmt: skip
        config = plan.config.model_copy(update={"learner": fewer})
        try:
            loop = Bare(plan.size, config, tokens=tokens, row=row, scored=scored, seed=plan.seed)
            found: Stage = {
                "bare_tokens": loop.num_tokens,
                "bare_flops": 3 * Flops.of(loop.hf)(loop.work),
                "bare_how": f"{'with' if checkpointing else 'without'} gradient checkpointing, "
                f"{fewer.micro_batch_tokens:,} tokens a pass",
                "bare_s": [loop.timed(every=False)["step"] for _ in range(4)][1:],
            }
        except torch.OutOfMemoryError:
            found = {}
        if found:
            return found | _all_predicted(loop)
        loop = None  # type: ignore[assignment]
        _give_back()
    return {"bare_how": "out of memory, however short its passes"}


def _all_predicted(loop: Bare) -> Stage:
    _give_back()
    try:
        return {"bare_every_s": [loop.timed(every=True)["step"] for _ in range(3)][1:]}
    except torch.OutOfMemoryError:
        return {}


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
