"""Cells of a study an hour: each cell in one process, beside each as a run of several, on the same machine in one go.

    python benchmarks/in_process.py                     two cells at once, `atpo study staleness` as it is
    python benchmarks/in_process.py --steps 10 --jobs 1

Wall-clock seconds of each side's cells count, the start of its processes too.  The machine should be idle.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one side did."""

    name: str
    cells: int
    wall_s: float
    cpu_s: float
    greedy: float
    """Mean greedy success at the ends."""

    @property
    def cells_per_hour(self) -> float:
        return 3600 * self.cells / self.wall_s

    def line(self) -> str:
        return (
            f"{self.name:<22} {self.cells} cells in {self.wall_s:.1f} s, {self.cpu_s / self.cells:.1f} s of processor "
            f"time a cell, {self.cells_per_hour:6.0f} cells an hour, greedy success {self.greedy:.3f}"
        )


def run(name: str, *, out: Path, seeds: int, lags: str, jobs: int, steps: int | None, more: list[str]) -> Side:
    """Run a study's cells; raises RuntimeError where one fails."""
    command = [
        sys.executable, "-m", "atpo_async.cli", "study", "staleness", "--out", str(out / name.replace(" ", "-")),
        "--lags", lags, "--corrections", "turn", "--seeds", str(seeds), "--jobs", str(jobs), *more,
        *([] if steps is None else ["--run.steps", str(steps)]),
    ]  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    wall_s, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    results = [json.loads(file.read_text()) for file in sorted((out / name.replace(" ", "-") / "cells").glob("*.json"))]
    failed = [result["reason"] for result in results if result["status"] != "done"]
    if ran.returncode or failed or not results:
        raise RuntimeError(f"{name}: {failed or (ran.stdout + ran.stderr)[-2000:]}")
    return Side(
        name=name,
        cells=len(results),
        wall_s=wall_s,
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        greedy=sum(result["figures"].get("greedy", 0.0) for result in results) / len(results),
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, on both sides")
    parser.add_argument("--lags", default="0,8")
    parser.add_argument("--seeds", type=int, default=1, help="of the runs of several processes")
    parser.add_argument("--times", type=int, default=8, help="so many times as many seeds in one process")
    parser.add_argument("--steps", type=int, default=None, help="run.steps; as in the study where left out")
    args = parser.parse_args(argv)
    given = {"lags": args.lags, "jobs": args.jobs, "steps": args.steps}
    with tempfile.TemporaryDirectory(prefix="atpo-in-process-") as folder:
        out = Path(folder)
        one = run("in one process", out=out, seeds=args.times * args.seeds, more=["--in-process"], **given)
        print(one.line(), flush=True)
        several = run("in several processes", out=out, seeds=args.seeds, more=[], **given)
        print(several.line(), flush=True)
    print(f"in one process: {one.cells_per_hour / several.cells_per_hour:.1f} times as many cells an hour")
    print(f"of processor time a cell: 1/{(several.cpu_s / several.cells) / (one.cpu_s / one.cells):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
