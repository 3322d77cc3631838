"""The part ``gpu``: rows of models and settings, each in a process of its own, and the figures made from them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.learner_parts.kernels import ORDER
from benchmarks.learner_parts.memory import SCRIPT
from benchmarks.learner_parts.plan import Plan
from benchmarks.learner_parts.tables import Table, count, say

BF16_TFLOPS = {"H200": 989.0, "H100": 989.0, "GH200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0}
"""Dense bfloat16 peak by what the device's name holds (the makers' data sheets)."""
MARK = "row: "
"""In front of a child's lines of JSON."""
NOT_RUN = "not run"
NEEDS = {"4b": {"learner.optimizer": "adamw8bit", "learner.gradient_checkpointing": "auto"}}
"""Without which a model does not fit one card of 80 GB, unless other values were given."""
LEAST_S = 30.0
"""Less is not enough for a row: its process has to start, and the first step to compile."""


def peak_tflops(given: float | None) -> float | None:
    """The card's peak: what was given, else by its name; None where neither tells."""
    if given is not None or not torch.cuda.is_available():
        return given
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in BF16_TFLOPS.items() if known in name), None)


@dataclass(slots=True, kw_only=True)
class Row:
    """One model under one set of settings, and what is known of it so far."""

    model: str
    varied: Mapping[str, str]
    """Dotted field -> value, of what the rows differ in."""
    found: dict[str, Any] = field(default_factory=dict)
    ended: str = NOT_RUN
    """How: ``done``, or why not."""


def rows_of(models: Sequence[str], vary: Sequence[str]) -> list[Row]:
    """Every model with every combination of ``FIELD=value,value``.  Raises ValueError for one that is none."""
    axes = []
    for text in vary:
        name, equals, values = text.partition("=")
        if not equals or "." not in name or not all(values.split(",")):
            raise ValueError(f"--vary {text}: say FIELD=VALUE,VALUE, for instance learner.kernels=none,liger")
        axes.append([(name, value) for value in values.split(",")])
    return [Row(model=model, varied=dict(values)) for model in models for values in itertools.product(*axes)]


def measure(
    rows: Sequence[Row],
    command: Callable[[Row], Sequence[str]],
    *,
    limit_s: float | None,
    told: Callable[[Row], None],
    least_s: float = LEAST_S,
) -> None:
    """Run every row's process, one after the other; what each tells is in the row at once.

    Args:
        command: of a row's process, which prints a line of JSON after each stage.
        limit_s: of all rows together; a process that would outlast it is ended, later rows are left out.
        told: called whenever a row has something new.
        least_s: with less time left a row is not begun.
    """
    ends = None if limit_s is None else time.monotonic() + limit_s
    for row in rows:
        left = None if ends is None else ends - time.monotonic()
        if left is not None and left < least_s:
            row.ended = "not run: no time left"
        else:
            say(f"gpu: {row.model} {' '.join(f'{name}={value}' for name, value in row.varied.items())}".rstrip())
            row.ended = _run(row, command(row), left, told)
        told(row)


def _run(row: Row, words: Sequence[str], left_s: float | None, told: Callable[[Row], None]) -> str:
    """How the row's process ended.  It has a group of its own, so that what it started ends with it."""
    cut = threading.Event()
    last: list[str] = []
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        reader = threading.Thread(target=_follow, args=(process.stderr, last), name="stderr of a row")
        reader.start()

        def end() -> None:
            cut.set()
            _kill_group(process.pid)

        timer = threading.Timer(left_s or 0.0, end)
        if left_s is not None:
            timer.start()
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    row.found |= json.loads(line.removeprefix(MARK))
                    told(row)
            status = process.wait()
        finally:
            timer.cancel()
            _kill_group(process.pid)
            reader.join()
    if cut.is_set():
        return "cut short by the limit of time"
    return "done" if status == 0 else f"ended with status {status}: {last[-1] if last else 'no word'}"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _follow(stream: IO[str], last: list[str]) -> None:
    """Pass a child's words on, and keep the last line that says something."""
    for line in stream:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.strip() and not line.startswith("#"):
            last[:] = [line.strip()[:300]]


def tell(stages: Iterable[Mapping[str, Any]]) -> None:
    """A child's side: print each stage at once."""
    for stage in stages:
        print(MARK + json.dumps(stage), flush=True)


# --- figures


def figures(row: Mapping[str, Any], peak: float | None) -> dict[str, float]:
    """Numbers of a row, by name; those whose stage is not there are left out.

    ``mfu`` counts forward and backward once: what checkpointing computes again is no work of the model's.
    """
    found: dict[str, float] = {}
    steps = row.get("steps_s", ())
    if len(steps) > 2:
        later = steps[2:]
        middle = statistics.median(later)
        found |= {"step_s": middle, "tokens_s": row["tokens"] / middle, "slowest": max(later) / middle}
        found["compilations"], found["compilations_later"] = sum(row["compilations"]), sum(row["compilations"][2:])
        if peak is not None:
            found["mfu"] = row["flops"] / middle / (peak * 1e12)
        if row.get("pass_tokens"):
            found["mb_a_token"] = (row["peak_bytes"] - row["held_bytes"]) / row["pass_tokens"] / 1e6
        if row.get("flat_s"):
            found["over_flat"] = statistics.median(row["flat_s"]) / middle
            found["of_prediction"] = found["over_flat"] / row["predicted"]
        for name, key in (("over_bare", "bare_s"), ("over_bare_every", "bare_every_s")):
            if row.get(key):
                bare = row["bare_tokens"] / statistics.median(row[key])
                found[name] = found["tokens_s"] / bare
    return found


def tables(rows: Sequence[Row], *, card: str, about: str, peak: float | None) -> list[Table]:
    """The figures of all rows, their steps one by one, and the time of a step by kind of kernel."""
    return [
        Table(
            f"On {card}",
            f"{about} MFU: model FLOP of one forward and backward pass over the median step after the second, of "
            f"{'an unknown peak: give --peak-tflops' if peak is None else f'{peak:g} TFLOPS'}. Memory: the peak above "
            "weights and their copy in half precision, gradients and the optimizer's states, over the tokens of the "
            "largest pass.",
            (
                *("model", "settings", "step, s", "tokens/s", "MFU (>= 40 %)", "to bare (>= 2.0)"),
                *("to bare, all predicted", "MB a token (<= 0.8 at 0.6b)", "packed over flat / FLOP model (>= 0.9)"),
                "ended",
            ),
            [_figures_row(row, figures(row.found, peak)) for row in rows],
        ),
        Table(
            "Steps one by one",
            "Seconds of every step from the first on; graphs compiled in each. A step after the second should be no "
            "slower than the rest.",
            ("model", "settings", "seconds", "slowest step after the second / median", "compilations", "bare loop"),
            [_steps_row(row, figures(row.found, peak)) for row in rows],
        ),
        Table(
            "A step's time by kind of kernel",
            "Milliseconds of one step under torch's profiler, kernels of all streams added; in brackets their share.",
            ("model", "settings", *ORDER),
            [_kinds_row(row) for row in rows if row.found.get("kinds_s")],
        ),
    ]


def _number(found: Mapping[str, float], name: str, form: str, *, scale: float = 1.0) -> str:
    return "" if name not in found else format(found[name] * scale, form)


def _said(row: Row) -> str:
    """What the rows differ in; where nothing varies, the settings that decide speed."""
    if row.varied:
        return ", ".join(f"{name.removeprefix('learner.')} {value}" for name, value in row.varied.items())
    return ", ".join(f"{name} {value}" for name, value in row.found.get("settings", {}).items())


def _figures_row(row: Row, found: Mapping[str, float]) -> tuple[str, ...]:
    flat = ""
    if "over_flat" in found:
        flat = f"{found['over_flat']:.2f} / {row.found['predicted']:.2f} = {found['of_prediction']:.2f}"
    return (
        row.model,
        _said(row),
        _number(found, "step_s", ".3f"),
        "" if "tokens_s" not in found else count(found["tokens_s"]),
        _number(found, "mfu", ".1f", scale=100) + (" %" if "mfu" in found else ""),
        _number(found, "over_bare", ".2f"),
        _number(found, "over_bare_every", ".2f"),
        _number(found, "mb_a_token", ".2f"),
        flat,
        row.ended,
    )


def _steps_row(row: Row, found: Mapping[str, float]) -> tuple[str, ...]:
    graphs = row.found.get("compilations", ())
    return (
        row.model,
        _said(row),
        " ".join(f"{seconds:.3f}" for seconds in row.found.get("steps_s", ())),
        _number(found, "slowest", ".2f"),
        f"{sum(graphs)}: {' '.join(map(str, graphs))}" if graphs else "",
        str(row.found.get("bare_how", "")),
    )


def _kinds_row(row: Row) -> tuple[str, ...]:
    kinds: Mapping[str, float] = row.found["kinds_s"]
    whole = sum(kinds.values())
    cells = (f"{1000 * kinds[kind]:.0f} ({100 * kinds[kind] / whole:.0f} %)" if kind in kinds else "" for kind in ORDER)
    return (row.model, _said(row), *cells)


# --- the part


def gpu(
    plan: Plan,
    *,
    models: Sequence[str],
    vary: Sequence[str],
    limit_s: float | None,
    peak: float | None,
    into: Path | None,
    scale: float,
) -> list[Table]:
    """Measure every row: print it when it ends, and write ``into`` whenever something is known; returns the tables."""
    rows = rows_of(models, vary)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    head = {"card": card, "torch": torch.__version__, "peak_tflops": peak, "argv": sys.argv}
    head |= {"date": time.strftime("%Y-%m-%d %H:%M %Z")}

    def told(row: Row) -> None:
        if row.ended != NOT_RUN:
            print("  ".join(cell for cell in _figures_row(row, figures(row.found, peak)) if cell), flush=True)
        if into is not None:
            aside = into.with_name(f"{into.name}.part")
            aside.write_text(json.dumps(head | {"rows": [as_json(row, peak) for row in rows]}, indent=1), "utf-8")
            aside.replace(into)

    measure(rows, lambda row: command_of(plan, row, scale), limit_s=limit_s, told=told)
    about = f"{plan.trees} trees of {next(iter(plan.shapes.values())).leaves} leaves a step, torch {torch.__version__}."
    return tables(rows, card=card, about=about, peak=peak)


def as_json(row: Row, peak: float | None) -> dict[str, Any]:
    """All that is known of a row, and the figures made from it."""
    told = {"model": row.model, "varied": dict(row.varied), "ended": row.ended}
    return row.found | told | {"figures": figures(row.found, peak)}


def command_of(plan: Plan, row: Row, scale: float) -> list[str]:
    """The command line of a row's process."""
    words = [sys.executable, str(SCRIPT), "--child", "gpu", "--shape", next(iter(plan.shapes)), "--model", row.model]
    numbers = {"scale": scale, "trees": plan.trees, "rounds": plan.rounds, "threads": plan.threads, "seed": plan.seed}
    for name, number in numbers.items():
        words += [f"--{name}", str(number)]
    given = {name for name in plan.options if name.startswith("--")} | {f"--{name}" for name in row.varied}
    needed = {f"--{name}": value for name, value in NEEDS.get(row.model, {}).items()}
    for name, value in needed.items():
        words += [] if name in given else [name, value]
    words += plan.options
    return words + [word for name, value in row.varied.items() for word in (f"--{name}", value)]
