"""Everything that a GPU machine is to show, one command after another within a given time, into one table.

    python3 scripts/gpu_checks.py --list                                 what there is, and each one's command
    python3 scripts/gpu_checks.py --limit-s 540 --out DIR                all of it, as far as the time goes
    python3 scripts/gpu_checks.py --part learner --limit-s 540 --out DIR    only names that begin so

Each check is a process with a time of its own; one that would outlast it is interrupted, and then killed.  DIR gets
``gpu_checks.json`` and ``gpu_checks.md``, rewritten after every check: card, date, commit and command of each figure.
Nothing but this file is needed beside the project: it imports no package of it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 15.0
"""Between an interrupt and the end of a process group: a run saves a checkpoint and ends its roles."""
LEAST_S = 40.0
"""Less is not enough for a check: its process has to load torch, and to compile."""
KEPT = 6000
"""Characters of a check's output that are kept, from its end."""
VERSIONS = ("torch", "vllm", "transformers", "accelerate", "liger-kernel", "torchao", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One command, and what it is to show."""

    name: str
    target: str
    words: tuple[str, ...]
    """Of the command; ``{json}`` stands for a file that it writes, ``{limit}`` for its seconds."""
    limit_s: float
    env: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a check."""

    name: str
    target: str
    command: str
    ended: str
    seconds: float = 0.0
    said: str = ""
    """Its figures in a line."""
    result: Any = None
    """What it wrote as JSON."""
    output: str = field(default="", repr=False)


def _benchmark(name: str, *words: str) -> tuple[str, ...]:
    return ("{python}", f"benchmarks/{name}.py", *words)


def _learner(model: str) -> Check:
    least = {"0.6b": "; activations <= 0.8 MB a token"}.get(model, "")
    return Check(
        name=f"learner-{model}",
        target=f"MFU >= 40 % (goal 50 %), >= 2.0 x the bare loop{least}, no slower step after the second, packed over "
        "flat >= 0.9 of the FLOP model",
        words=_benchmark("learner", "--part", "gpu", "--model", model, "--limit-s", "{limit}", "--json", "{json}"),
        limit_s=400.0 if model == "4b" else 270.0,
    )


def _vary(name: str, *axes: str) -> Check:
    words = ["--limit-s", "{limit}", "--json", "{json}", *(word for axis in axes for word in ("--vary", axis))]
    return Check(
        name=name,
        target="which settings are fastest: what the defaults choose should be",
        words=_benchmark("learner", "--part", "gpu", "--model", "0.6b", "--rounds", "2", *words),
        limit_s=540.0,
    )


def _demo(engine: str, dtype: str, seed: int) -> Check:
    return Check(
        name=f"demo-{engine}-{dtype}-{seed}",
        target="greedy success >= 0.97, as on the CPU",
        words=(
            *("{python}", "scripts/demo_seeds.py", "--device", "cuda", "--engines", engine, "--dtypes", dtype),
            *("--seeds", str(seed)),
        ),
        limit_s=420.0,
    )


def _probe(engine: str, dtype: str) -> Check:
    return Check(
        name=f"probe-{engine}-{dtype}",
        target="no false alarm, every dropped tensor caught",
        words=_benchmark("probe", "--device", "cuda", "--engine", engine, "--dtype", dtype, "--swaps", "20"),
        limit_s=240.0,
    )


def _weights(model: str, part: str, target: str) -> Check:
    return Check(
        name=f"weights-{part}-{model}",
        target=target,
        words=_benchmark("weights", "--part", part, "--model", model, "--limit-s", "{limit}", "--json", "{json}"),
        limit_s=300.0,
    )


TESTS = {
    "learner": ("gpu", "compute", "kernels", "lora", "memory"),
    "sharded": ("sharded",),
    "weights": ("weights", "engine_start"),
    "vllm": ("vllm",),
    "demo": ("demo",),
}
"""Name of a check -> files of the tests that need a GPU; one check for all would outlast what a command may take."""


def _tests(name: str, *parts: str) -> Check:
    files = ["tests/test_gpu.py" if part == "gpu" else f"tests/test_gpu_{part}.py" for part in parts]
    return Check(
        name=f"tests-{name}",
        target="its tests marked gpu pass, and the session ends green",
        words=("{python}", "-m", "pytest", "-q", "-m", "gpu", *files),
        limit_s=540.0,
        env=(("ATPO_TEST_SESSION", "gpu-checks"),),
    )


HELD_UP = "the learner's torch thread is held up <= 3 % of a step by publishing"
SWAP = "fetch to swap on the same host <= 0.5 s, generation still <= 0.25 s"
CHECKS: tuple[Check, ...] = (
    *(_tests(name, *parts) for name, parts in TESTS.items()),
    *(_learner(model) for model in ("0.6b", "1.7b", "4b")),
    _vary("ablation-kernels", "learner.kernels=none,liger", "learner.compile=off,on"),
    _vary("ablation-memory", "learner.gradient_checkpointing=false,true", "learner.micro_batch_tokens=16384,32768"),
    _weights("0.6b", "step", HELD_UP),
    _weights("4b", "step", HELD_UP),
    _weights("0.6b", "engine", SWAP),
    Check(
        name="actors",
        target=">= 0.95 of raw AsyncLLM with 256 requests in flight",
        words=_benchmark(
            "actor_overhead", "--model", "0.6b", "--in-flight", "256", "--device", "cuda", "--limit-s", "{limit}",
            "--json", "{json}",
        ),
        limit_s=420.0,
    ),
    *(_probe(engine, dtype) for engine in ("transformers", "vllm") for dtype in ("float32", "bfloat16")),
    *(
        _demo(engine, dtype, seed)
        for seed in (1, 2, 3) for engine in ("vllm", "transformers") for dtype in ("float32", "bfloat16")
    ),
    *(
        Check(
            name=f"run-{config}",
            target="some steps of the configuration, on a made-up policy of its size",
            words=_benchmark("whole_run", f"configs/{config}.toml", "--steps", "4", "--json", "{json}"),
            limit_s=400.0,
        )
        for config in ("gpu_80gb", "gpu_24gb_lora")
    ),
)  # fmt: skip


def chosen(parts: Sequence[str]) -> list[Check]:
    """The checks whose names begin with one of ``parts``; all where there are none.  Raises ValueError for a part that
    no name begins with."""
    for part in parts:
        if not any(check.name.startswith(part) for check in CHECKS):
            raise ValueError(f"no check begins with {part!r}; there are {', '.join(check.name for check in CHECKS)}")
    return [check for check in CHECKS if not parts or check.name.startswith(tuple(parts))]


# --- one check


def run(check: Check, *, left_s: float) -> Outcome:
    """Run one check, at most ``left_s`` seconds or its own limit."""
    limit = min(check.limit_s, left_s)
    with tempfile.TemporaryDirectory(prefix="atpo-gpu-check-") as scratch:
        file = Path(scratch) / "result.json"
        # A benchmark that ends itself does so before it is ended.
        known = {"{python}": sys.executable, "{json}": str(file), "{limit}": f"{max(1.0, limit - GRACE_S):.0f}"}
        words = [known.get(word, word) for word in check.words]
        shown = ["python3" if word == "{python}" else word for word in check.words]
        outcome = Outcome(
            name=check.name, target=check.target, ended="",
            command=shlex.join(known.get(w, w) if w == "{limit}" else w.replace("{json}", "FILE.json") for w in shown),
        )  # fmt: skip
        began = time.monotonic()
        outcome.output, outcome.ended = _run(words, dict(check.env), limit, Path(scratch) / "output")
        outcome.seconds = time.monotonic() - began
        with contextlib.suppress(OSError, ValueError):
            outcome.result = json.loads(file.read_text(encoding="utf-8"))
    outcome.said = figures(outcome)
    return outcome


def _run(words: Sequence[str], env: Mapping[str, str], limit_s: float, log: Path) -> tuple[str, str]:
    """(the end of its output, how it ended).  The process leads a group of its own, which ends as a whole."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(env)
    with log.open("wb") as stream, subprocess.Popen(
        words, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=environ, start_new_session=True
    ) as process:  # fmt: skip
        try:
            status = process.wait(max(0.1, limit_s - GRACE_S))
            ended = "done" if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"cut short after {limit_s:.0f} s"
            _signal(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            _signal(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(encoding="utf-8", errors="replace")[-KEPT:], ended


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def figures(outcome: Outcome) -> str:
    """What a check has shown, in a line: its rows' figures, or the line of its output that says it."""
    rows = outcome.result.get("rows") if isinstance(outcome.result, dict) else None
    if isinstance(rows, list) and any(isinstance(row, dict) and "figures" in row for row in rows):
        return "; ".join(_row(row) for row in rows if isinstance(row, dict))
    lines = [line.strip() for line in outcome.output.splitlines() if line.strip()]
    told = [
        line for line in lines if re.search(r"greedy|\d to \d|\d+ passed|\d+ failed|false alarms?|caught|ratio", line)
    ]
    return " / ".join((told or lines)[-2:])[:400]


def _row(row: Mapping[str, Any]) -> str:
    found = row.get("figures") or {}
    forms: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("mfu", lambda v: f"MFU {100 * v:.1f} %"),
        ("tokens_s", lambda v: f"{v:,.0f} tokens/s"),
        ("over_bare", lambda v: f"{v:.2f} x bare"),
        ("mb_a_token", lambda v: f"{v:.2f} MB a token"),
        ("slowest", lambda v: f"slowest step / median {v:.2f}"),
        ("of_prediction", lambda v: f"packed {v:.2f} of the model"),
        ("compilations", lambda v: f"{v:.0f} compilations"),
    )
    said = [form(found[name]) for name, form in forms if name in found]
    varied = " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in (row.get("varied") or {}).items())
    return f"{row.get('model', '')} {varied}".strip() + ": " + (", ".join(said) or str(row.get("ended", "")))


# --- all of them


def run_all(
    checks: Sequence[Check], *, limit_s: float, least_s: float = LEAST_S, told: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run the checks in order, as far as the time goes; ``told`` gets all that is known after each."""
    ends = time.monotonic() + limit_s
    found: list[Outcome] = []
    for check in checks:
        left = ends - time.monotonic()
        if left < least_s:
            command = shlex.join("python3" if word == "{python}" else word for word in check.words)
            found.append(
                Outcome(name=check.name, target=check.target, command=command, ended="not begun: no time left")
            )
        else:
            print(f"# {check.name}: at most {min(left, check.limit_s):.0f} s", file=sys.stderr, flush=True)
            found.append(run(check, left_s=left))
            print(f"{check.name}: {found[-1].ended} ({found[-1].seconds:.0f} s)  {found[-1].said}", flush=True)
        told(found)
    return found


def head(commit: str | None) -> dict[str, str]:
    """Where and when: card, date, commit, versions."""
    found = {"card": _first(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])}
    found["date"] = time.strftime("%d %B %Y, %H:%M %Z")
    found["commit"] = commit or _first(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _first(words: Sequence[str]) -> str:
    """The first line that a command prints; ``unknown`` where it cannot be run."""
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (said.strip().splitlines() or ["unknown"])[0]


def markdown(where: Mapping[str, str], found: Sequence[Outcome]) -> str:
    """The table for docs/gpu.md."""
    versions = ", ".join(f"{name} {where[name]}" for name in VERSIONS if name in where)
    lines = [f"{where['card']}; {where['date']}; commit {where['commit']}; {versions}.", ""]
    lines += ["| what | target | measured | ended | command |", "| --- | --- | --- | --- | --- |"]
    for one in found:
        cells = (
            one.name,
            one.target,
            one.said or "not measured",
            f"{one.ended}, {one.seconds:.0f} s",
            f"`{one.command}`",
        )
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, where: Mapping[str, str], found: Sequence[Outcome]) -> None:
    """Both files, each whole at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "gpu_checks.json": json.dumps({"where": dict(where), "checks": [asdict(one) for one in found]}, indent=1),
        "gpu_checks.md": markdown(where, found),
    }
    for name, text in texts.items():
        aside = folder / f"{name}.part"
        aside.write_text(text, encoding="utf-8")
        aside.replace(folder / name)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=[], help="names of checks, or their beginnings; default: all")
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=Path("gpu_checks"), help="folder for both files")
    parser.add_argument("--commit", help="of this code, where git cannot tell")
    parser.add_argument("--list", action="store_true", help="print the checks and their commands, and run none")
    args = parser.parse_args(argv)
    try:
        checks = chosen(args.part)
    except ValueError as exc:
        parser.error(str(exc))
    if not args.limit_s > 0:
        parser.error(f"--limit-s must be above 0, got {args.limit_s:g}")
    if args.list:
        for check in checks:
            print(f"{check.name}  ({check.limit_s:.0f} s)  {check.target}\n    {' '.join(check.words)}")
        return 0
    where = head(args.commit)
    found = run_all(checks, limit_s=args.limit_s, told=lambda outcomes: write(args.out, where, outcomes))
    print(markdown(where, found))
    return 0 if all(one.ended == "done" for one in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
