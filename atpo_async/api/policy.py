"""Makes and warm-starts the small policy where the configuration asks for one; later runs use it again."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from rich.console import Console

from atpo_async.api.foreground import run_to_end
from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.models.policy import is_there, warm_start_command, with_path
from atpo_async.run.processes import signal_name


def ensure_policy(config: Config, console: Console) -> Config:
    """Make and warm-start the small policy where the configuration says so and there is none.

    Returns the configuration with ``model.path`` set to it.  Raises SetupError naming what went wrong.
    """
    if not config.model.warm_start or (config.model.path and is_there(Path(config.model.path))):
        return config
    command = warm_start_command(config)
    told = False
    said_at = [time.monotonic()]

    def tell(line: str) -> None:
        nonlocal told
        if not told:
            told = True
            console.print(f"making the policy: {config.model.warm_start_steps} supervised steps; later runs use it")
        if console.is_terminal:
            console.print(line, end="\r")
        elif time.monotonic() - said_at[0] > 5.0:
            said_at[0] = time.monotonic()
            console.print(line)

    code, words = run_to_end(command, tell=tell)
    if told and console.is_terminal:
        console.print(" " * 60, end="\r")
    if -code in (signal.SIGINT, signal.SIGTERM):
        raise KeyboardInterrupt
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        raise SetupError(f"the warm start was killed by {signal_name(-code)}{hint}")
    path = words.strip().splitlines()[-1] if code == 0 and words.strip() else ""
    if code or not is_there(Path(path)):
        raise SetupError(f"the warm start failed: {words or f'exit code {code}'}")
    if config.model.path and Path(config.model.path) != Path(path):
        raise SetupError(
            f"model.path = {config.model.path!r} is not there, and the warm start makes {path!r}; name a model folder "
            "and set --model.warm_start false, leave model.path out to use the warm-started one, or, where a run began "
            "with that folder, use another --run.name"
        )
    if told:
        console.print(f"the policy is in {path}")
    return with_path(config, path)
