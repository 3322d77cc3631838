"""A discrete-event model of a run: checked against real runs here, then asked about fleets of GPUs.

Simulated are actors (slots, chains and branches, one request and one tool call a turn), engines whose requests share
their rate, a tool of log-normal latency, the buffer (service time of a turn, commits, the real rule of admission, the
real order of expiry), the learner (step, publication) and the links (a version's way to each host).  The answers stand
in docs/scaling.md.

    .venv/bin/python benchmarks/fleet_model.py check            # four real runs, 8 minutes, then the model beside them
    .venv/bin/python benchmarks/fleet_model.py check --from DIR # runs that `check --dir DIR` made before
    .venv/bin/python benchmarks/fleet_model.py fleets --figure docs/scaling.png   # 8, 64 and 512 GPUs; 5 to 10 minutes

``check`` calibrates the model by one real run (max_lag 3), simulates max_lag 0, 2 and 4 with it, and compares steps an
hour and mean lag with three other real runs; exit code 1 if one is off by more than ``--within``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# A script's own folder comes first on the path, and there `buffer.py` would be taken for the package `buffer`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from atpo_async.api.policy import ensure_policy
from atpo_async.config import load
from benchmarks.model_parts import calibration, figure, questions, validation
from benchmarks.model_parts.gpus import BATCHES
from benchmarks.model_parts.parameters import table_of
from benchmarks.script import machine, say, scratch, table


def check(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        folder: Path = args.read or args.dir or stack.enter_context(scratch(None))
        if args.read is None:
            policy = ensure_policy(load(args.config), Console(stderr=True)).model.path
            validation.make_runs(
                folder, config=Path(args.config), policy=str(Path(policy).resolve()), latency_s=args.latency,
                sigma=args.sigma, steps=args.steps, synchronous_steps=args.synchronous_steps,
            )  # fmt: skip
        fleet = validation.calibrated(folder)
        found = [validation.checked(folder, fleet, max_lag=lag) for lag in validation.LAGS]
    known = calibration.told(fleet, f"the run with max_lag {validation.CALIBRATION_LAG}")
    for each in found:
        say({**asdict(each), "throughput_error": each.throughput_error, "lag_error": each.lag_error})
    good = all(each.within(args.within) for each in found)
    say({"within": args.within, "reached": good})
    if args.markdown:
        print(
            table(questions.PARAMETERS_HEADER, table_of(known)),
            table(validation.HEADER, validation.rows(found)),
            sep="\n\n",
        )
    return 0 if good else 1


def fleets(args: argparse.Namespace) -> int:
    began = time.monotonic()
    answers = questions.ask(args.gpus, jobs=args.jobs)
    for each in answers.sweep:
        say({"plan": asdict(each.plan), "outcome": asdict(each.outcome)})
    if args.figure is not None:
        figure.draw(answers, args.gpus, args.figure)
    if args.markdown:
        tables = (
            (questions.PARAMETERS_HEADER, questions.parameters()),
            (questions.SPLIT_HEADER, questions.split_rows(answers, args.gpus)),
            (questions.BUFFER_HEADER, questions.buffer_rows(answers, args.gpus)),
            (questions.WEIGHTS_HEADER, questions.weights_rows(answers)),
        )
        print(*(table(header, rows) for header, rows in tables), sep="\n\n")
    say({"simulated": len(answers.sweep), "seconds": round(time.monotonic() - began)})
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="tables at the end")
    commands = parser.add_subparsers(dest="command", required=True)
    real = commands.add_parser("check", help="the model against real runs")
    real.add_argument("config", nargs="?", default="configs/demo.toml", help="whose policy and settings are taken")
    real.add_argument("--from", dest="read", type=Path, default=None, help="folder of runs that are there")
    real.add_argument("--dir", type=Path, default=None, help="where the runs go; they are kept there")
    real.add_argument("--latency", type=float, default=0.3, help="mean seconds of a look-up")
    real.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of the latency")
    real.add_argument("--steps", type=int, default=40, help="that are counted of each run")
    real.add_argument("--synchronous-steps", type=int, default=24, help="the same with max_lag 0")
    real.add_argument("--within", type=float, default=0.15, help="of the real figures")
    gpus = commands.add_parser("fleets", help="what the model says of GPUs")
    gpus.add_argument("--gpus", type=int, nargs="+", default=list(BATCHES), choices=list(BATCHES))
    gpus.add_argument("--figure", type=Path, default=None, help="PNG or SVG to write")
    gpus.add_argument("--jobs", type=int, default=2, help="simulations at once")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    say({"machine": machine()})
    return check(args) if args.command == "check" else fleets(args)


if __name__ == "__main__":
    sys.exit(main())
