"""Folders of policies that a recipe makes: made once, aside, and renamed when whole; and the commands that make them.

What a recipe is, and how a policy is made of it, is an environment's own (``hopqa/warm_start.py``,
``passage_qa/warm_start.py``).  Imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.run import processes, scratch

RECORD = "warm_start.json"

_ASIDE = re.compile(r"\.[a-z_]+-[0-9a-f]{8}\.([0-9]+)\.tmp")
"""Folder in which a policy is made before it is renamed; the number is the process that makes it."""

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, mean loss of late)."""


class Making(TypedDict, total=False):
    """How a policy is made, whatever it becomes."""

    device: Literal["auto", "cpu", "cuda"]
    """Where to train; ``auto``, unless it is given: Accelerate's choice."""
    num_threads: int | None
    """torch threads while training; None for the environment's own choice."""
    progress: Progress | None
    """Called every ten steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartReport:
    """What was made, or was there already."""

    path: Path
    reused: bool
    """Whether the folder was there already, made by the same recipe."""
    loss: float
    """Nats per action token, mean of the last tenth of the steps."""
    num_parameters: int
    duration_s: float
    """Seconds that making it took; as recorded then if the folder was reused."""


def fingerprint_of(recipe: Any, version: int) -> str:
    """Of a recipe and the version of what is done by it."""
    text = json.dumps({"version": version, **asdict(recipe)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def make_once(path: Path, recipe: Any, version: int, make: Callable[[Path], dict[str, Any]]) -> WarmStartReport:
    """Make the policy at ``path`` unless the same recipe has made it already.

    Args:
        path: the model folder.
        recipe: a frozen dataclass with a ``fingerprint``.
        version: of what ``make`` does.
        make: fills a folder; returns what its record says beyond the recipe: ``loss``, ``num_parameters`` and what else
            is worth keeping; how long it took is added.

    Raises:
        SetupError: ``path`` holds something else, or cannot be written.
    """
    scratch.sweep_unheld(path.parent, _is_left_behind)
    if (there := _already_made(path, recipe, version)) is not None:
        return there
    lock: int | None = None
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        with contextlib.suppress(OSError):  # a file system without locks: its maker's number tells
            lock = scratch.hold(aside)
        began = time.monotonic()
        record = {
            "fingerprint": recipe.fingerprint,
            "recipe_version": version,
            "recipe": asdict(recipe),
            **make(aside),
            "duration_s": round(time.monotonic() - began, 3),
        }
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        try:
            aside.rename(path)
        except OSError:
            # Another process was quicker with the same recipe: its model is as good as ours.
            if (there := _already_made(path, recipe, version)) is not None:
                return there
            raise
    except OSError as exc:
        raise SetupError(f"model folder {path} cannot be written: {exc}; set model.path to a folder that can") from exc
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return _report(path, record, reused=False)


def _is_left_behind(folder: Path) -> bool:
    """Whether the process that made the folder is gone from this machine; one on another machine holds its lock."""
    found = _ASIDE.fullmatch(folder.name)
    return found is not None and processes.started(int(found[1])) is None


def _already_made(path: Path, recipe: Any, version: int) -> WarmStartReport | None:
    if not path.exists():
        return None
    way_out = "remove it, or name another folder"
    if not path.is_dir():
        raise SetupError(f"model folder {path} is a file; {way_out}")
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        made_by = record["fingerprint"]
    except FileNotFoundError:
        if not any(path.iterdir()):
            path.rmdir()
            return None
        raise SetupError(f"model folder {path} was not made by the warm start (no {RECORD}); {way_out}") from None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise SetupError(f"model folder {path} has an unreadable {RECORD} ({exc}); {way_out}") from exc
    if made_by != recipe.fingerprint:
        was = record.get("recipe", {})
        other = ", ".join(
            f"{f.name} {was.get(f.name)!r} not {getattr(recipe, f.name)!r}"
            for f in fields(recipe)
            if was.get(f.name) != getattr(recipe, f.name)
        )
        other = other or f"recipe version {record.get('recipe_version')!r} not {version}"
        raise SetupError(f"model folder {path} was warm-started with other settings ({other}); {way_out}")
    return _report(path, record, reused=True)


def _report(path: Path, record: Mapping[str, Any], *, reused: bool) -> WarmStartReport:
    return WarmStartReport(
        path=path,
        reused=reused,
        loss=float(record["loss"]),
        num_parameters=int(record["num_parameters"]),
        duration_s=float(record["duration_s"]),
    )


def lr_factor(step: int, steps: int) -> float:
    """Share of the learning rate: twenty steps up, then a half cosine down to a tenth."""
    return min(1.0, (step + 1) / 20) * (0.1 + 0.45 * (1.0 + math.cos(math.pi * step / steps)))


class _Ended(BaseException):
    """SIGTERM or SIGINT."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextlib.contextmanager
def _tidied_before_the_end() -> Iterator[None]:
    """Lets the block clean up when SIGTERM or SIGINT comes; the process then ends by that signal."""

    def end(signum: int, frame: object) -> None:
        raise _Ended(signum)

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except _Ended as ended:
        signal.signal(ended.signum, signal.SIG_DFL)
        os.kill(os.getpid(), ended.signum)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def command(
    module: str,
    kind: type[Any],
    make: Callable[..., WarmStartReport],
    folder: Callable[[Path, Any], Path],
    argv: Sequence[str] | None,
) -> int:
    """Make a policy by hand; prints its folder.  Exit code 2 with one line for what the user can mend.

    Args:
        module: that is run.
        kind: class of the recipe, whose fields are the options.
        make: called with (path, recipe, device=…, num_threads=…, progress=…).
        folder: where a recipe's policy belongs, of the models' folder and the recipe.
        argv: arguments; None for the process's own.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="Make a policy; prints its folder.")
    parser.add_argument("--root", type=Path, default=Path("models"), help="folder of the models")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num-threads", type=int, default=None)
    defaults = kind()
    for field in fields(kind):
        value = getattr(defaults, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, dest=field.name, type=type(value), default=value, help=f"default {value}")
    given = vars(parser.parse_args(argv))
    root, device, num_threads = given.pop("root"), given.pop("device"), given.pop("num_threads")

    def tell(done: int, total: int, loss: float) -> None:
        print(f"warm start: step {done} of {total}, loss {loss:.3f}", file=sys.stderr, flush=True)

    try:
        recipe = kind(**given)
        with _tidied_before_the_end():
            report = make(folder(root, recipe), recipe, device=device, num_threads=num_threads, progress=tell)
    except AtpoError as exc:
        print(f"warm start: {exc}", file=sys.stderr)
        return 2
    print(report.path)
    return 0
