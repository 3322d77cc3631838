"""Looks at what of a run is a user's own, before anything heavy begins: in a process, which imports all of it."""

from __future__ import annotations

import json
from collections.abc import Callable

from atpo_async.api.foreground import resolved_file, run_to_end
from atpo_async.api.own_parts_process import IMPORTING, STILL, named
from atpo_async.config import Config
from atpo_async.core import errors
from atpo_async.run import launch
from atpo_async.run.processes import signal_name


def check(config: Config, *, say: Callable[[str], None] = lambda line: None) -> None:
    """Import every part of a run that is a user's own, and see whether it can be called as its door calls it.

    Args:
        config: resolved.
        say: one line for the user, where an import takes long.

    Raises:
        ConfigError: a module has no such function or class, or it takes other arguments.
        SetupError: a module cannot be imported, ends the process, or does not come to an end.
    """
    if not named(config):
        return
    latest = ""

    def tell(line: str) -> None:
        nonlocal latest
        if line.startswith(IMPORTING):
            latest = line.removeprefix(IMPORTING)
        elif line.startswith(STILL):
            say(f"{latest}: {line.removeprefix(STILL)}")

    with resolved_file(config) as file:
        code, output = run_to_end(launch.command("atpo_async.api.own_parts_process", str(file)), tell=tell)
    try:
        said = json.loads(output.strip().splitlines()[-1]) if code == 0 else {}
    except (ValueError, IndexError):
        said = {}
    if "error" in said:
        kind = getattr(errors, said["kind"], errors.SetupError)
        raise kind(said["error"])
    if "done" not in said:
        how = f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"
        raise errors.SetupError(
            f"{latest or 'a part of your own'}: its module ended the process that imported it ({how}): an import may "
            "end nothing"
        )
