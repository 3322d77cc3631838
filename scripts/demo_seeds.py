"""The demo on this machine by engine, precision and seed, and whether each learned what it learns on a CPU.

    python3 scripts/demo_seeds.py --device cuda                              # 2 engines x 2 precisions x seeds 1 to 3
    python3 scripts/demo_seeds.py --device cuda --engines vllm --dtypes float32 --seeds 1 --learner.lr 3e-4

A run is ``atpo demo`` in a process of its own, in the folder ``--root``.  Shown: greedy success on the held-out tasks
at its start and at its end, sampled success over the last tenth of the steps, the largest reading of the probe, and
seconds with the engine's start.  The exit status is 1 if a run fails or ends below ``--least``.  Words with a dot are
options of every run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A script's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from atpo_async.config import split_options
from atpo_async.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", "bfloat16")
ENGINES = ("vllm", "transformers")
LIMIT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run came to."""

    greedy: list[float]
    """Of each evaluation, in order."""
    sampled: float
    """Over the last tenth of the steps."""
    probe: float
    """Nats: the largest of the actors' readings."""
    seconds: float


def run_demo(
    root: Path,
    *,
    device: str,
    engine: str,
    dtype: str,
    seed: int,
    options: Sequence[str] = (),
    limit_s: float = LIMIT_S,
) -> Outcome:
    """Run the demo in the folder ``root``; what it says goes to the terminal.

    Raises:
        RuntimeError: it failed, or took longer than ``limit_s``.
    """
    before = set((root / "runs").glob("demo*"))
    words = [
        sys.executable, "-m", "atpo_async", "demo", str(ROOT / "configs" / "demo.toml"), "--run.seed", str(seed),
        "--model.dtype", dtype, "--actor.engine", engine, "--actor.device", device, "--learner.device", device,
        *options,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    began = time.monotonic()
    with subprocess.Popen(
        words, cwd=root, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            code = process.wait(timeout=limit_s)
        except BaseException as exc:
            os.killpg(process.pid, signal.SIGINT)  # the supervisor ends its roles
            if not isinstance(exc, subprocess.TimeoutExpired):
                raise
            raise RuntimeError(f"the demo took longer than {limit_s:g} s: {' '.join(words)}") from exc
    seconds = time.monotonic() - began
    made = [path for path in set((root / "runs").glob("demo*")) - before if (path / "metrics.jsonl").is_file()]
    if code or len(made) != 1:
        raise RuntimeError(f"the demo ended with status {code}: {' '.join(words)}")
    return outcome_of(made[0], seconds=seconds)


def outcome_of(run: Path, *, seconds: float) -> Outcome:
    """From a finished run's metrics."""
    records = list(read_metrics(run / "metrics.jsonl"))
    sampled = [r.metrics["train/success"] for r in records if "train/success" in r.metrics]
    last = sampled[-max(1, len(sampled) // 10) :]
    return Outcome(
        greedy=[r.metrics["eval/success"] for r in records if "eval/success" in r.metrics],
        sampled=sum(last) / len(last),
        probe=max((r.metrics["engine/probe_error"] for r in records if "engine/probe_error" in r.metrics), default=0.0),
        seconds=seconds,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--root", type=Path, default=Path(), help="where runs/ and models/ are")
    parser.add_argument("--least", type=float, default=0.97, help="greedy success at the end")
    plain, given = split_options(sys.argv[1:])
    args, words = parser.parse_args(plain), [f"--{name}={value}" for name, value in given.items()]
    rows, failed = ["engine        dtype     seed  greedy          sampled  probe    seconds"], 0
    for engine, dtype, seed in itertools.product(args.engines, args.dtypes, args.seeds):
        what = f"{engine:<12}  {dtype:<8}  {seed:>4}"
        try:
            found = run_demo(
                args.root.resolve(), device=args.device, engine=engine, dtype=dtype, seed=seed, options=words
            )
        except RuntimeError as exc:
            print(f"error: {exc}", file=sys.stderr)
            failed += 1
            rows.append(f"{what}  failed")
            continue
        failed += found.greedy[-1] < args.least
        rows.append(
            f"{what}  {found.greedy[0]:.3f} to {found.greedy[-1]:.3f}  {found.sampled:7.3f}  {found.probe:7.2g}  "
            f"{found.seconds:7.0f}"
        )
    print("\n".join(rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
