"""Runs a module as ``python -m`` would, and samples what its threads are doing.

    python benchmarks/profiled.py OUT.txt buffer RUN_DIR

A thread looks at every other thread's stack a few hundred times a second.  At the end OUT.txt says, for each thread,
in which functions it was (``own``) and through which it went (``all``), as shares of the samples.  A thread that waits
in the kernel is shown where it waits: ``select`` is an idle event loop.  Less precise than cProfile and, unlike it,
hardly in the way.
"""

from __future__ import annotations

import runpy
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
EVERY_S = 0.003
SHOWN = 45


class Sampler:
    """Counts where threads are."""

    def __init__(self, into: Path) -> None:
        self._into = into
        self._samples: Counter[str] = Counter()
        self._own: dict[str, Counter[str]] = {}
        self._all: dict[str, Counter[str]] = {}
        self._lines: dict[str, Counter[str]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sampler", daemon=True)

    def start(self) -> None:
        # Whoever holds the interpreter lets the sampler in sooner.
        sys.setswitchinterval(0.001)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(5)
        self._write()

    def _watch(self) -> None:
        began = time.monotonic()
        while not self._stopping.wait(EVERY_S):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != threading.get_ident():
                    self._note(names.get(ident, "unknown"), frame)
            if time.monotonic() - began > 10.0:
                began = time.monotonic()
                self._write()

    def _note(self, thread: str, frame: FrameType | None) -> None:
        assert frame is not None
        self._samples[thread] += 1
        self._own.setdefault(thread, Counter())[_name(frame)] += 1
        self._lines.setdefault(thread, Counter())[f"{_name(frame)}:{frame.f_lineno}"] += 1
        seen = set()
        while frame is not None:
            seen.add(_name(frame))
            frame = frame.f_back
        self._all.setdefault(thread, Counter()).update(seen)

    def _write(self) -> None:
        parts = []
        for thread, count in self._samples.most_common():
            parts.append(f"== {thread}: {count} samples")
            for title, counter in (("own", self._own), ("all", self._all), ("lines", self._lines)):
                parts.append(f"-- {title}")
                parts += [f"{100 * n / count:6.1f} %  {name}" for name, n in counter[thread].most_common(SHOWN)]
        self._into.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _name(frame: FrameType) -> str:
    code = frame.f_code
    path = Path(code.co_filename)
    try:
        place = str(path.relative_to(ROOT))
    except ValueError:
        place = "/".join(path.parts[-2:])
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
