"""The environments of a run in one process: those that only compute are called directly, the others are hosted."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from actors.environments import Environments, host_environment
from actors.hosting.host import HostedEnvironment
from actors.hosting.order import CallOrder
from atpo_async.config import Config
from atpo_async.environments.base import Environment
from atpo_async.environments.making import make_environment, vocab_size

DIRECT = frozenset({"hopqa"})
"""Built-in environments whose every call computes for microseconds, and waits for nothing."""


@contextlib.asynccontextmanager
async def make_environments(config: Config, folder: Path, order: CallOrder) -> AsyncIterator[Environments]:
    """Those of the configuration, made.

    Args:
        folder: of the policy.
        order: of the answers of those that are hosted, from when they are made.

    Raises ConfigError or SetupError where one cannot be imported or made.
    """
    made: list[Environment] = [
        make_environment(config, folder, number) if entry.name in DIRECT else host_environment(config, folder, number)
        for number, entry in enumerate(config.every_environment)
    ]
    async with Environments(config, made, policy_tokens=vocab_size(folder)) as environments:
        for each in made:
            if isinstance(each, HostedEnvironment):
                each.caller.order = order
        yield environments
