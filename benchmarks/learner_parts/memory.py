"""The part ``memory``: peak memory of each side, each in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from atpo_async.core.errors import SetupError
from benchmarks.learner_parts.cost import tree_work, work_of
from benchmarks.learner_parts.plan import Plan
from benchmarks.learner_parts.sides import Bare, Times, make_trainer
from benchmarks.learner_parts.tables import Table, count, say
from benchmarks.learner_parts.trees import grow_batch

SCRIPT = Path(__file__).resolve().parent.parent / "learner.py"
CHILD_TIMEOUT_S = 600.0


def resident_mb(name: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in MB; elsewhere than on Linux the peak for both."""
    status = Path("/proc/self/status")
    if not status.is_file():
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def peak_of(run: Callable[[], object], device: str) -> float:
    """Peak memory while ``run`` runs, above what is held before it, in MB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    held = resident_mb("VmRSS")
    run()
    return resident_mb("VmHWM") - held


def child(plan: Plan, side: str) -> None:
    """Print the peak of two steps of one side, and how many tokens its passes held, as one line of JSON."""
    shape = next(iter(plan.shapes.values()))
    # The behaviour log-probs are made up here: a pass to find the real ones would leave its memory behind.  Without
    # the guard they change what the loss is, not what it takes.
    correction = plan.config.correction.model_copy(update={"ess_floor": 0.0})
    config = plan.config.model_copy(update={"correction": correction})
    batch = grow_batch(shape, num_trees=plan.trees, vocab_size=plan.size.vocab, seed=plan.seed, config=config)
    work = work_of(batch, tree_work)
    sizes: list[tuple[int, ...]] = []
    run: Callable[[], Times]
    if side == "bare":
        loop = Bare(
            plan.size, config, tokens=int(work.tokens), row=shape.path - 1, scored=int(work.scored), seed=plan.seed
        )
        sizes += [tuple(rows.shape) for rows in loop.passes]
        run = partial(loop.timed, every=False)
    else:
        trainer = make_trainer(plan.size, config)
        trainer.model.register_forward_pre_hook(
            lambda _module, _args, inputs: sizes.append(tuple(inputs["tokens"].shape)), with_kwargs=True
        )
        run = partial(trainer.timed, batch, "tree" if side == "tree" else "flat")
    peak_mb = peak_of(lambda: (run(), run()), plan.device)
    found = {
        "peak_mb": peak_mb,
        "widest": max(width for _, width in sizes),
        "most": max(rows * width for rows, width in sizes),
        "tokens": sum(rows * width for rows, width in sizes) / (1 if side == "bare" else 2),
        "step_s": run()["step"],
    }
    print(json.dumps(found))


def in_child(plan: Plan, shape: str, side: str, scale: float, **settings: object) -> dict[str, float]:
    """``child`` in a fresh process.  Raises SetupError with its last words."""
    words = [sys.executable, str(SCRIPT), "--child", side, "--shape", shape, "--model", plan.model]
    numbers = {"scale": scale, "trees": plan.trees, "threads": plan.threads, "seed": plan.seed}
    for name, number in numbers.items():
        words += [f"--{name}", str(number)]
    words += ["--cpu-time"] if plan.cpu_time else []
    words += list(plan.options)
    for key, value in settings.items():
        words += [f"--learner.{key}", str(value)]
    words += ["--learner.device", plan.device]
    # Freed blocks then go back at once, and the peak is of what is held at one time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"the {side} side did not end within {CHILD_TIMEOUT_S:g} s; take fewer --trees") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise SetupError(f"the {side} side ended with status {done.returncode}: {last}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(plan: Plan, scale: float) -> list[Table]:
    sides, lengths = [], []
    for name in plan.shapes:
        say(f"memory: {name}")
        found = {side: in_child(plan, name, side, scale) for side in ("tree", "flat", "bare")}
        sides.append(
            (
                name,
                *(f"{found[side]['peak_mb']:.0f} ({count(found[side]['most'])})" for side in found),
                f"{found['tree']['peak_mb'] / found['flat']['peak_mb']:.2f}",
                f"{found['tree']['peak_mb'] / found['bare']['peak_mb']:.2f}",
            )
        )
    name, shape = next(iter(plan.shapes.items()))
    several = replace(plan, trees=max(plan.trees, 3))  # more than one tree fits in the longer packs
    batch = grow_batch(shape, num_trees=several.trees, vocab_size=plan.size.vocab, seed=plan.seed, config=plan.config)
    largest = max(tree_work(tree).tokens for tree in batch.trees)
    for pack_tokens in (*(max(16, int(largest * share)) for share in (0.5, 1.0, 2.0)), None):
        say(f"memory: {pack_tokens} tokens a pack")
        one = in_child(several, name, "tree", scale, pack_tokens=pack_tokens)
        lengths.append(
            (
                "none" if pack_tokens is None else count(pack_tokens),
                count(one["widest"]),
                count(one["tokens"]),
                f"{one['peak_mb']:.0f}",
                f"{one['step_s']:.2f}",
            )
        )
    return [
        Table(
            "Peak memory of a step",
            "MB above what is held before the first step, two steps, each side in a process of its own; in brackets "
            "the padded tokens of its largest pass (learner.micro_batch_tokens = "
            f"{plan.config.learner.micro_batch_tokens}). Gradients and AdamW's moments are in all of them.",
            ("trees", "packed", "flat", "bare loop", "packed / flat", "packed / bare"),
            sides,
        ),
        Table(
            "Peak memory by pack length",
            f"{name}, {several.trees} trees of up to {count(largest)} tokens; shorter packs split trees and repeat "
            "their prefixes.",
            ("learner.pack_tokens", "widest row", "padded tokens a step", "peak, MB", "step, s"),
            lengths,
        ),
    ]
