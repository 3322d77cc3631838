"""The process that imports a run's own parts: ``python -m atpo_async.api.own_parts_process CONFIG``.

Its own process, so that nothing that a user's module does at its import (it prints, ends, hangs, starts threads)
touches the command.  Its last line of output says as JSON how it went.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from atpo_async.config import Config, get, load
from atpo_async.config.credit_rule import try_credit
from atpo_async.config.doors import (
    ADVANTAGE_MODE,
    CORRECTION,
    DOORS,
    ENGINE,
    ENVIRONMENT,
    STRATEGY,
    TERM,
    TOKEN_WEIGHT,
    VALUE_MODE,
    strategy_door,
)
from atpo_async.config.loss_rules import check_bias, check_correction, check_part
from atpo_async.core.doors import Door, Option
from atpo_async.core.errors import AtpoError, ConfigError
from atpo_async.core.loss_traits import CorrectionTraits, TermTraits, TokenWeightTraits, declared
from atpo_async.core.schedule import at_first

IMPORTING, STILL = "importing: ", "still importing: "
"""Begin the lines about an import that begins, and about one that takes long."""

LONG_S = 10.0
"""An import that takes longer is mentioned."""
IDLE_S = 20.0
"""An import that for so long neither computes nor imports anything hangs."""
MOST_S = 300.0
"""No import takes longer."""
TICK_S = 0.25
COMPUTES_S = 0.02
"""Of processor time in a tick, and more: it computes."""


def named(config: Config) -> list[tuple[Door[Any], str, dict[str, Option]]]:
    """The user's own parts: (door, name, options).  Without actors here, only those of the other roles."""
    found = []
    for door in DOORS:
        if door in (ENVIRONMENT, STRATEGY, ENGINE) and not config.actor.count:
            continue  # actors of other machines have it
        if door is ENVIRONMENT:
            several = config.named_environments()
            found += [(each, name, options) for each, name, options in several if name not in each.choices()]
            continue
        if door is STRATEGY:
            door = strategy_door(config.search.expand)
        value = get(config, door.field)
        for name in (value,) if isinstance(value, str) else value:
            if name not in door.choices():
                named_by = door.options_by_name
                options = get(config, named_by).get(name) if named_by else get(config, door.options)
                found.append((door, name, {key: at_first(value) for key, value in (options or {}).items()}))
    return found


def look_at(config: Config, about: Callable[[str], None]) -> None:
    """Import each part, and check what can be known of it without calling it.

    Args:
        about: called with what is imported next.

    Raises ConfigError or SetupError about the first part that does not fit.
    """
    for door, name, options in named(config):
        about(f"{door.field} = {name!r}")
        found = door.offered(name, options)
        if door is ADVANTAGE_MODE or (door is VALUE_MODE and ":" not in config.credit.advantage_mode):
            try_credit(config.credit)  # tries both, once both are there
        try:
            if door is CORRECTION:
                traits = declared(found, CorrectionTraits())
                check_correction(config.correction, traits)
                check_bias(config, traits)
            if door in (TERM, TOKEN_WEIGHT):
                check_part(config, door, name, declared(found, TermTraits() if door is TERM else TokenWeightTraits()))
        except ValueError as exc:
            raise ConfigError(str(exc)) from exc


class ImportWatch:
    """Ends this process where an import hangs, and says where.  A thread of its own."""

    def __init__(self, say: Callable[[dict[str, str]], None]) -> None:
        self._say, self._about, self._began = say, "", time.monotonic()
        self._thread_id = threading.get_ident()
        self._mentioned = False
        threading.Thread(target=self._watch, name="import watch", daemon=True).start()
        # For an import that hangs in C and lets no other thread run.
        faulthandler.dump_traceback_later(MOST_S + 10, exit=True)

    def about(self, what: str) -> None:
        """Another import begins."""
        _tell(f"{IMPORTING}{what}")
        self._about, self._began, self._mentioned = what, time.monotonic(), False

    def _watch(self) -> None:
        moved, before = time.monotonic(), (0, 0.0)
        while True:
            time.sleep(TICK_S)
            now, at = time.monotonic(), (len(sys.modules), time.process_time())
            if at[0] != before[0] or at[1] - before[1] > COMPUTES_S:
                moved = now
            before = at
            took, idle = now - self._began, now - max(moved, self._began)
            if took > LONG_S and not self._mentioned:
                self._mentioned = True
                _tell(f"{STILL}its import takes more than {LONG_S:g} s, {self._where()}")
            if idle > IDLE_S or took > MOST_S:
                how = f"waits for something, {idle:.0f} s now" if idle > IDLE_S else f"takes more than {took:.0f} s"
                self._say(
                    {
                        "error": f"{self._about}: its module, imported before the run, {how}, {self._where()}: let it "
                        "wait for nothing while it is imported",
                        "kind": "SetupError",
                    }
                )
                os._exit(0)

    def _where(self) -> str:
        """The innermost line of the user's that runs, or else the innermost."""
        innermost = frame = sys._current_frames().get(self._thread_id)
        folder = str(Path.cwd())
        while frame is not None and not frame.f_code.co_filename.startswith(folder):
            frame = frame.f_back
        return _line(frame or innermost)


def _line(frame: FrameType | None) -> str:
    return "" if frame is None else f"at {frame.f_code.co_filename}:{frame.f_lineno}"


def _tell(line: str) -> None:
    sys.__stderr__.write(f"{line}\n")  # type: ignore[union-attr]
    sys.__stderr__.flush()  # type: ignore[union-attr]


def main(file: str) -> None:
    """Import and check; the process ends at once then, whatever threads a module has started."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a user's module prints is no answer

    def answer(said: dict[str, str]) -> None:
        output.write(f"\n{json.dumps(said)}\n")
        output.flush()

    watch = ImportWatch(answer)
    try:
        look_at(load(file), watch.about)
    except AtpoError as exc:
        answer({"error": str(exc), "kind": type(exc).__name__})
    else:
        answer({"done": ""})
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
