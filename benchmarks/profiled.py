"""Runs a module as ``python -m`` would, and samples what its main thread computes.

    python benchmarks/profiled.py OUT.txt buffer RUN_DIR

Every few milliseconds of processor time that the process uses, a signal notes where the main thread is.  OUT.txt says
in which functions and lines it was (``own``, ``lines``) and through which it went (``all``), as shares of the samples:
time in a C function counts for the line that called it, waiting does not count at all.  A thread that samples would
see the main one only where that lets go of the interpreter, and blame those places; cProfile slows small functions.

SIGUSR2 ends a part: what was seen so far goes to OUT.txt.1, OUT.txt.2, … and it begins anew.
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
EVERY_S = 0.002
SHOWN = 60


class Sampler:
    """Counts where the main thread is.

    Args:
        into: file that gets the result.
    """

    def __init__(self, into: Path) -> None:
        self._into = into
        self._parts = 0
        self._begin()

    def _begin(self) -> None:
        self.samples = 0
        self._own: Counter[str] = Counter()
        self._lines: Counter[str] = Counter()
        self._all: Counter[str] = Counter()

    def start(self) -> None:
        signal.signal(signal.SIGUSR2, self._next_part)
        signal.signal(signal.SIGPROF, self._note)
        signal.siginterrupt(signal.SIGPROF, False)
        signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._into.write_text(self.text(), encoding="utf-8")

    def _next_part(self, signum: int, frame: FrameType | None) -> None:
        self._parts += 1
        self._into.with_name(f"{self._into.name}.{self._parts}").write_text(self.text(), encoding="utf-8")
        self._begin()

    def text(self) -> str:
        lines = [f"{self.samples} samples, one every {1e3 * EVERY_S:g} ms of processor time"]
        for title, counter in (("own", self._own), ("lines", self._lines), ("all", self._all)):
            lines.append(f"== {title}")
            lines += [f"{100 * n / max(self.samples, 1):6.1f} %  {name}" for name, n in counter.most_common(SHOWN)]
        return "\n".join(lines) + "\n"

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if frame is None:
            return
        self.samples += 1
        self._own[_name(frame)] += 1
        self._lines[f"{_name(frame)}:{frame.f_lineno}"] += 1
        through = set()
        at: FrameType | None = frame
        while at is not None:
            through.add(_name(at))
            at = at.f_back
        self._all.update(through)


def _name(frame: FrameType) -> str:
    code = frame.f_code
    path = Path(code.co_filename)
    place = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
    return f"{place} {code.co_qualname}"


def main() -> None:
    out, module, *rest = sys.argv[1:]
    sys.path[0] = str(ROOT)
    sys.argv = [module, *rest]
    sampler = Sampler(Path(out))
    sampler.start()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sampler.stop()


if __name__ == "__main__":
    main()
