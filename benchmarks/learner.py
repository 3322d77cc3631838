"""What a training step costs: trees packed against flat rows, and against the loop one would write with transformers.

Every figure is a ratio of two sides that take turns in one process: each round runs every side once, in an order that
changes from round to round, after a round that warms them up.  Shown are the median over the rounds and the range.

  packing   the learner's own step (``Trainer.train``) with ``learner.packing = "tree"`` and ``"flat"`` on the same
            batch: same model, same loss, one optimizer step.  Beside it the speed-up that counting operations predicts.
  bare      the packed step against a loop without a learner: as many tokens in plain causal rows as long as a leaf's
            path, forward, cross entropy, backward, clip, AdamW.
  attention each way in which the device can compute attention over packed trees, against its first choice.
  memory    peak memory of each side and by ``learner.pack_tokens``, each in a process of its own.
  gpu       the step on one GPU, each model and each combination of ``--vary`` in a process of its own: tokens/s,
            model-FLOP utilisation, activation memory, every step's seconds, compilations, packed against flat and
            against the bare loop, and the time by kind of kernel.  Rows are printed as they come; ``--json FILE`` holds
            whatever is known at any moment, ``--limit-s`` ends it in time.

On CUDA every part runs in bfloat16, unless ``--learner.mixed_precision no`` says otherwise.

Trees are made up, by the growth rule of the real ones: M chains, then L rounds of K siblings at random turns that are
no leaves; lengths vary by a quarter.  Every token is random, and its behaviour log-prob is the policy's own.

    .venv/bin/python benchmarks/learner.py [--part packing bare] [--shape m10 m2-long] [--markdown]
    .venv/bin/python benchmarks/learner.py --part gpu --model 0.6b --vary learner.gradient_checkpointing=false,true

Dotted options are those of the configuration (``--learner.micro_batch_tokens 4096``).  While others load the machine,
ratios of processor time say more than those of the clock: ``--cpu-time --threads 1``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

# A script's own folder comes first on the path, and there this file would be taken for the package `learner`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from atpo_async.config import Config, load, split_options
from atpo_async.core.errors import AtpoError, ConfigError
from benchmarks.learner_parts.comparisons import attention, bare, packing
from benchmarks.learner_parts.gpu import gpu, peak_tflops, rows_of, tell
from benchmarks.learner_parts.gpu_side import stages
from benchmarks.learner_parts.memory import child, memory
from benchmarks.learner_parts.plan import Plan
from benchmarks.learner_parts.sides import SIZES, clock
from benchmarks.learner_parts.tables import Table, machine, say
from benchmarks.learner_parts.trees import SHAPES

PARTS = ("packing", "bare", "attention", "memory", "gpu")
QWEN3 = ("0.6b", "1.7b", "4b")
"""What the part ``gpu`` measures; other parts take the first."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: all that this machine can do")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="default: m10 and m2-long; for gpu m8")
    parser.add_argument(
        "--model", nargs="+", choices=list(SIZES), help="default: small on a CPU, 0.6b on a GPU; for gpu every Qwen3"
    )
    parser.add_argument("--scale", type=float, help="all lengths times this; default: 1/6 on a CPU, 1 on a GPU")
    parser.add_argument(
        "--trees", type=int, help="of one step (packing has 64 small ones besides); default: 1, for gpu 16"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in bfloat16, where its name does not tell")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="FIELD=A,B", help="gpu: rows for each value; may be repeated"
    )
    parser.add_argument("--limit-s", type=float, help="gpu: seconds after which it ends with the rows that it has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="gpu: all that was measured, rewritten as it comes")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processors, not of the clock")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/benchmarks.md")
    parser.add_argument("--child", choices=("tree", "flat", "bare", "gpu"), help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Plan]:
    """Raises ConfigError, or ends with argparse's status 2, for what cannot be run."""
    rest, options = split_options(argv)
    parser = _parser()
    args = parser.parse_args(rest)
    _check_numbers(parser, args)
    config, cuda = _config(options)
    if args.cpu_time and cuda:
        parser.error("--cpu-time does not see what a GPU does: leave it out, or add --learner.device cpu")
    if "gpu" in (args.part or ()) and not cuda and options.get("learner.device") != "cpu":
        parser.error(
            "--part gpu needs a CUDA device, and torch sees none that it may use: leave it out (--learner.device cpu "
            "tries it on the CPU)"
        )
    try:
        rows_of((), args.vary)
    except ValueError as exc:
        parser.error(str(exc))
    args.part = args.part or [part for part in PARTS if cuda or part != "gpu"]
    args.scale = args.scale or (1.0 if cuda else 1 / 6)
    args.models = args.model or (QWEN3 if cuda else ("small",))
    plan = Plan(
        config=config,
        options=tuple(word for key, value in options.items() for word in (f"--{key}", value)),
        device="cuda" if cuda else "cpu",
        model=args.models[0],
        shapes={name: SHAPES[name].scaled(args.scale) for name in args.shape or ("m10", "m2-long")},
        trees=args.trees or 1,
        rounds=args.rounds,
        threads=args.threads,
        seed=args.seed,
        cpu_time=args.cpu_time,
    )
    return args, plan


def _check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("trees", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be >= 1, got {value}")
    for name in ("scale", "peak_tflops", "limit_s"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    if args.seed < 0:
        parser.error(f"--seed must be >= 0, got {args.seed}")


def _config(options: Mapping[str, str]) -> tuple[Config, bool]:
    """The configuration, and whether it is for CUDA."""
    # Tiny steps: the weights stay where the behaviour log-probs came from, whatever the number of rounds.
    # No engine is on the device: nothing is set aside for one.
    fixed = {"learner.lr": "1e-9", "staleness.max_lag": "0", "actor.count": "0"}
    config = load((), fixed | dict(options))
    cuda = torch.cuda.is_available() and config.learner.device != "cpu"
    return (load((), fixed | {"learner.mixed_precision": "bf16"} | dict(options)) if cuda else config), cuda


def on_gpu(args: argparse.Namespace, plan: Plan) -> list[Table]:
    """The part ``gpu`` with its own shape and number of trees."""
    shapes = {name: SHAPES[name].scaled(args.scale) for name in args.shape or ("m8",)}
    return gpu(
        replace(plan, shapes=shapes, trees=args.trees or 16),
        models=args.models, vary=args.vary, limit_s=args.limit_s, peak=peak_tflops(args.peak_tflops), into=args.json,
        scale=args.scale,
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    try:
        args, plan = parse(argv)
        torch.set_num_threads(plan.threads)
        if args.cpu_time:
            clock.now = time.process_time
        if args.child == "gpu":
            tell(stages(plan))
            return 0
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
            "gpu": lambda: on_gpu(args, plan),
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
