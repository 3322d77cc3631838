"""What a training step costs: trees packed against flat rows, and against the loop one would write with transformers.

Every figure is a ratio of two sides that take turns in one process: each round runs every side once, in an order that
changes from round to round, after a round that warms them up.  Shown are the median over the rounds and the range.

  packing   the learner's own step (``Trainer.train``) with ``learner.packing = "tree"`` and ``"flat"`` on the same
            batch: same model, same loss, one optimizer step.  Beside it the speed-up that counting operations predicts.
  bare      the packed step against a loop without a learner: as many tokens in plain causal rows as long as a leaf's
            path, forward, cross entropy, backward, clip, AdamW.
  attention each way in which the device can compute attention over packed trees, against its first choice.
  memory    peak memory of each side and by ``learner.pack_tokens``, each in a process of its own.
  gpu       tokens/s and model-FLOP utilisation; needs CUDA.

On CUDA every part runs in bfloat16, unless ``--learner.mixed_precision no`` says otherwise.

Trees are made up, by the growth rule of the real ones: M chains, then L rounds of K siblings at random turns that are
no leaves; lengths vary by a quarter.  Every token is random, and its behaviour log-prob is the policy's own.

    .venv/bin/python benchmarks/learner.py [--part packing bare] [--shape m10 m2-long] [--markdown]
    .venv/bin/python benchmarks/learner.py --part gpu --model 4b --learner.gradient_checkpointing true

Dotted options are those of the configuration (``--learner.micro_batch_tokens 4096``).  While others load the machine,
ratios of processor time say more than those of the clock: ``--cpu-time --threads 1``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# A script's own folder comes first on the path, and there this file would be taken for the package `learner`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from atpo_async.config import load, split_options
from atpo_async.core.errors import AtpoError, ConfigError
from benchmarks.learner_parts.comparisons import attention, bare, packing
from benchmarks.learner_parts.gpu import gpu
from benchmarks.learner_parts.memory import child, memory
from benchmarks.learner_parts.plan import Plan
from benchmarks.learner_parts.sides import SIZES, clock
from benchmarks.learner_parts.tables import Table, machine, say
from benchmarks.learner_parts.trees import SHAPES

PARTS = ("packing", "bare", "attention", "memory", "gpu")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Plan]:
    """Raises ConfigError, or ends with argparse's status 2, for what cannot be run."""
    rest, options = split_options(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: all that this machine can do")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="default: m10 and m2-long")
    parser.add_argument("--model", choices=list(SIZES), help="default: small on a CPU, 0.6b on a GPU")
    parser.add_argument("--scale", type=float, help="all lengths times this; default: 1/6 on a CPU, 1 on a GPU")
    parser.add_argument("--trees", type=int, default=1, help="of one step (packing's 64 small ones stay 64)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in bfloat16, where its name does not tell")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processors, not of the clock")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/benchmarks.md")
    parser.add_argument("--child", choices=("tree", "flat", "bare"), help=argparse.SUPPRESS)
    args = parser.parse_args(rest)
    for name in ("trees", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    for name in ("scale", "peak_tflops"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    if args.seed < 0:
        parser.error(f"--seed must be >= 0, got {args.seed}")
    # Tiny steps: the weights stay where the behaviour log-probs came from, whatever the number of rounds.
    fixed = {"learner.lr": "1e-9", "staleness.max_lag": "0"}
    config = load((), fixed | options)
    cuda = torch.cuda.is_available() and config.learner.device != "cpu"
    if cuda:
        config = load((), fixed | {"learner.mixed_precision": "bf16"} | options)
    if args.cpu_time and cuda:
        parser.error("--cpu-time does not see what a GPU does: leave it out, or add --learner.device cpu")
    if "gpu" in (args.part or ()) and not cuda:
        parser.error("--part gpu needs a CUDA device, and torch sees none that it may use: leave it out")
    args.part = args.part or [part for part in PARTS if cuda or part != "gpu"]
    args.scale = args.scale or (1.0 if cuda else 1 / 6)
    plan = Plan(
        config=config,
        options=tuple(word for key, value in options.items() for word in (f"--{key}", value)),
        device="cuda" if cuda else "cpu",
        model=args.model or ("0.6b" if cuda else "small"),
        shapes={name: SHAPES[name].scaled(args.scale) for name in args.shape or ("m10", "m2-long")},
        trees=args.trees,
        rounds=args.rounds,
        threads=args.threads,
        seed=args.seed,
        cpu_time=args.cpu_time,
    )
    return args, plan


def main(argv: Sequence[str]) -> int:
    try:
        args, plan = parse(argv)
        torch.set_num_threads(plan.threads)
        if args.cpu_time:
            clock.now = time.process_time
        if args.child:
            child(plan, args.child)
            return 0
        began = time.perf_counter()
        seconds = "processor time" if args.cpu_time else "wall clock"
        where = machine(plan.device, plan.threads)
        print(f"Machine: {where}; {plan.rounds} rounds, {seconds}, lengths x {args.scale:.3g}.\n")
        run: dict[str, Callable[[], list[Table]]] = {
            "packing": lambda: packing(plan),
            "bare": lambda: bare(plan),
            "attention": lambda: attention(plan),
            "memory": lambda: memory(plan, args.scale),
            "gpu": lambda: gpu(plan, args.peak_tflops),
        }
        for part in args.part:
            for table in run[part]():
                print((table.markdown() if args.markdown else table.text()) + "\n", flush=True)
        say(f"{time.perf_counter() - began:.0f} s")
    except ConfigError as exc:
        print(f"learner.py: {exc}", file=sys.stderr)
        return 2
    except AtpoError as exc:
        print(f"learner.py: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
