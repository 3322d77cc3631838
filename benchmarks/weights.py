"""What a version of the weights costs the learner and the actors of its host, against copies of the same bytes.

Sides take turns in one process: each round runs every side once, in an order that changes from round to round, after a
round that warms them up.  Shown are medians over the rounds, GB/s of the published bytes, and ratios to the copy.

  publish   ``copy``: the bytes into memory that is used again; ``copy to file``: into a new mapped file in shared
            memory; ``publish``: what holds the torch thread up, and what is done aside (written, hashed, offered);
            ``write + sha256``: one thread that casts, writes and hashes tensor after tensor.
  fetch     an actor that links the file and verifies it, three of them, and three that each hash it.
  load      the mapped file into parameters in host memory, stacks as vLLM has them, with its spot check; and the way of
            a copy of every tensor and a comparison of all.
  step      the learner's own step (``benchmarks/learner.py``'s trainer) with a version published after each, written
            and hashed beside the next: seconds that the torch thread is held up, as a share of a step.
  delta     the differences between versions of a policy that the learner's trainer has trained with AdamW at 1e-6, 1
            and 8 optimizer steps apart, in bfloat16 and float32: bytes, and GB/s of a whole version made and put on.
  link      versions over a link of --rate-mbit between two network namespaces, whole and as differences.
  engine    real vLLM at this size: fetch, verification, reading ahead, load, probe and pause of each swap with requests
            in flight.  On a GPU only, unless asked for.

    .venv/bin/python benchmarks/weights.py                          # 0.6b: 1.2 GB
    .venv/bin/python benchmarks/weights.py --part delta link --versions /tmp/atpo-versions      # 11 GB there; kept
    .venv/bin/python benchmarks/weights.py --part step engine --model 0.6b 4b --json weights.json --limit-s 540
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate.utils.memory import clear_device_cache

from atpo_async.core.errors import AtpoError
from benchmarks.learner_parts.sides import SIZES, Times
from benchmarks.learner_parts.tables import Table, machine, say
from benchmarks.weights_parts.memory import Host, Sides

MEMORY = {"publish": Host.publishing, "fetch": Host.fetching, "load": Host.loading}
MODEL = ("step", "engine")
TRAINED = ("delta", "link")
PARTS = (*MEMORY, *MODEL, *TRAINED)
COPY = "copy"


class Limit:
    """Seconds that the whole of it may take."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return self._end is not None and time.monotonic() > self._end


def rotate(sides: Sides, rounds: int, limit: Limit) -> dict[str, list[Times]]:
    """Every side once a round, the order shifted by one each round; a first round is thrown away."""
    names = list(sides)
    taken: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(rounds + 1):
        if number > 1 and limit.is_over:
            say(f"{number - 1} of {rounds} rounds: --limit-s is over")
            break
        shift = number % len(names)
        found = {name: sides[name]() for name in names[shift:] + names[:shift]}
        if number:
            for name, times in found.items():
                taken[name].append(times)
    return taken


def medians(taken: dict[str, list[Times]]) -> dict[str, Times]:
    return {
        name: {key: statistics.median(each[key] for each in times) for key in times[0]}
        for name, times in taken.items()
        if times
    }


def table(part: str, found: dict[str, Times], taken: dict[str, list[Times]], total_bytes: int) -> Table:
    """Seconds, GB/s and the ratio to the copy, round by round."""
    rows = []
    for name, times in found.items():
        for key, seconds in times.items():
            if key in ("bytes", "hashed"):
                continue
            ratios = [mine[key] / copy["s"] for mine, copy in zip(taken[name], taken[COPY], strict=True)]
            label = name if key == "s" else f"{name}: {key}"
            rows.append(
                (label, f"{seconds:.3f}", f"{total_bytes / seconds / 1e9:.1f}",
                 f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            )  # fmt: skip
    about = f"{total_bytes / 1e9:.2f} GB in bfloat16, {len(taken[COPY])} rounds"
    return Table(part, about, ("side", "s", "GB/s", "of a copy"), rows)


def in_memory(args: argparse.Namespace, model: str, limit: Limit) -> tuple[list[Table], dict[str, Any]]:
    """The parts that need no model: publish, fetch, load."""
    tables, found = [], dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="atpo-bench-") as folder:
        host = Host(SIZES[model], getattr(torch, args.source), Path(folder))
        try:
            for part, sides in MEMORY.items():
                if part in args.part and not limit.is_over:
                    say(f"{model}: {part}")
                    taken = rotate(sides(host), args.rounds, limit)
                    found[part] = medians(taken)
                    tables.append(table(f"{part}, {model}", found[part], taken, host.total_bytes))
        finally:
            host.close()
    return tables, found


def with_model(args: argparse.Namespace, model: str, limit: Limit) -> tuple[list[Table], dict[str, Any]]:
    """The parts around a real policy: step, engine."""
    from benchmarks.weights_parts.model import engine, step

    tables, found = [], dict[str, Any]()
    ways: dict[str, Callable[[], tuple[Table, Any]]] = {
        "step": lambda: step(model, rounds=args.rounds, trees=args.trees, over=lambda: limit.is_over),
        "engine": lambda: engine(model, rounds=args.rounds, requests=args.requests, over=lambda: limit.is_over),
    }
    for part, way in ways.items():
        if part in args.part and not limit.is_over:
            say(f"{model}: {part}")
            shown, found[part] = way()
            tables.append(shown)
            clear_device_cache(garbage_collection=True)  # the next one, and its engine, need the card
    return tables, found


def with_versions(args: argparse.Namespace, model: str, limit: Limit) -> tuple[list[Table], dict[str, Any]]:
    """The parts on versions of a policy that was trained for real steps: delta, link."""
    from benchmarks.weights_parts.deltas import cases
    from benchmarks.weights_parts.trained import Versions

    tables, found = [], dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="atpo-bench-") as folder:
        versions = Versions(args.versions or Path(folder), model)
        if "delta" in args.part:
            versions.need(trees=args.trees, over=lambda: limit.is_over)
            for label, opened in cases(versions):
                if limit.is_over:
                    break
                say(f"{model}: delta, {label}")
                with opened as pair:
                    taken = rotate(pair.sides, args.rounds, limit)
                    found[label] = {
                        "bytes": pair.bytes, "total_bytes": pair.total_bytes, "ratio": pair.bytes / pair.total_bytes,
                        **medians(taken),
                    }  # fmt: skip
                    shown = table(f"delta, {model}, {label}", medians(taken), taken, pair.total_bytes)
                    tables.append(Table(shown.title, f"{pair.about}, {args.rounds} rounds", shown.head, shown.rows))
            found = {"delta": found}
        if "link" in args.part:
            from benchmarks.weights_parts.link import link

            say(f"{model}: link")
            shown, found["link"] = link(
                versions, rate_mbit=args.rate_mbit, trees=args.trees, over=lambda: limit.is_over, folder=Path(folder)
            )
            tables.append(shown)
    return tables, found


def _parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=(*MEMORY, *MODEL) if cuda else tuple(MEMORY))
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=["0.6b"])
    parser.add_argument(
        "--source", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights in training"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trees", type=int, default=16 if cuda else 1, help="step: of one batch")
    parser.add_argument("--requests", type=int, default=64, help="engine: in flight")
    parser.add_argument("--versions", type=Path, metavar="FOLDER", help="delta, link: trained versions, kept there")
    parser.add_argument("--rate-mbit", type=float, default=100.0, help="link: 10^6 bits a second")
    parser.add_argument("--limit-s", type=float, help="seconds after which it ends with the rounds that it has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was measured, rewritten as it comes")
    parser.add_argument("--markdown", action="store_true")
    return parser


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    limit, all_found = Limit(args.limit_s), dict[str, Any]()
    where = machine("cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads())
    print(where)
    try:
        for model in args.model:
            for measure, parts in ((in_memory, MEMORY), (with_model, MODEL), (with_versions, TRAINED)):
                if not set(parts) & set(args.part):
                    continue
                tables, found = measure(args, model, limit)
                all_found.setdefault(model, {}).update(found)
                for each in tables:
                    print(f"\n{each.markdown() if args.markdown else each.text()}", flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps({"machine": where, "models": all_found}, indent=1))
    except AtpoError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
