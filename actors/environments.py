"""The environments of a run, each on a loop of its own, and which of them a lease's task belongs to."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from actors.hosting import guard
from actors.hosting.host import HostedEnvironment
from atpo_async.config import Config
from atpo_async.config.doors import environment_door
from atpo_async.core.errors import ConfigError
from atpo_async.core.mixture import Mixture
from atpo_async.core.vocabulary import Split
from atpo_async.environments.base import Environment
from atpo_async.environments.making import make_environment, vocab_size
from atpo_async.ops.exits import DOING, ERROR_FILE


class LeasedTask(NamedTuple):
    """A task of the run in its own environment."""

    environment: Environment
    label: str
    task: int
    """Its number among the environment's own tasks."""


class Environments:
    """The environments of a run.

    Args:
        config: which there are, and their weights.
        made: one for each, in the configuration's order.
        policy_tokens: that the policy's model has, as of ``Facts``; None: as the environments' limits have it.
    """

    def __init__(self, config: Config, made: Sequence[Environment], *, policy_tokens: int | None = None) -> None:
        entries = config.every_environment
        self.made = tuple(made)
        self.labels = tuple(each.label for each in entries)
        self.several = bool(config.environments)
        self._mixture = Mixture([each.weight for each in entries], config.run.seed)
        self._opened = contextlib.AsyncExitStack()
        limits = (getattr(each, "limits", None) for each in self.made)
        self.policy_tokens = policy_tokens or next((known.vocab_size for known in limits if known is not None), None)

    @classmethod
    def of(cls, config: Config, made: Environment | Environments) -> Environments:
        """The same, or those of a run of one."""
        return made if isinstance(made, Environments) else cls(config, (made,))

    async def __aenter__(self) -> Self:
        """Makes them, one after another.  Raises what making one raises: ConfigError, SetupError."""
        async with contextlib.AsyncExitStack() as stack:
            for each in self.made:
                if isinstance(each, HostedEnvironment):
                    await stack.enter_async_context(each)
            self._opened = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.aclose()

    def task(self, split: Split, task_index: int) -> LeasedTask:
        """Where the run's task ``task_index`` belongs."""
        place = self._mixture.place(split, task_index)
        return LeasedTask(self.made[place.environment], self.labels[place.environment], place.task)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Of all of them, each once: what the engine must be able to look for."""
        return tuple(dict.fromkeys(text for each in self.made for text in getattr(each, "stop_strings", ())))

    def check_eval_tasks(self, num_tasks: int) -> None:
        """Raises ConfigError where an environment has fewer held-out tasks than its part of ``num_tasks``."""
        asked = self._mixture.num_held_out(num_tasks)
        for label, each, own in zip(self.labels, self.made, asked, strict=True):
            known = each.num_tasks("eval") if own else None
            if known is not None and own > known:
                part = f"eval.num_tasks = {num_tasks}" + (f" asks for {own} of each environment, which" * self.several)
                raise ConfigError(
                    f"{part} exceeds the {known} held-out tasks of environment {label!r}; lower it, or raise the "
                    "environment's own number"
                )

    def take_counts(self) -> dict[str, float]:
        """Metrics of the hosts, added up: what has happened since they were last taken."""
        counts: Counter[str] = Counter()
        for each in self.made:
            if isinstance(each, HostedEnvironment):
                counts.update(each.take_counts())
        return dict(counts)


def host_environments(config: Config, model: Path) -> Environments:
    """Those of the configuration, not made yet.  Raises ConfigError or SetupError where one cannot be imported."""
    entries = config.every_environment
    hosted = [host_environment(config, model, number) for number in range(len(entries))]
    return Environments(config, hosted, policy_tokens=vocab_size(model))


def host_environment(config: Config, model: Path, number: int = 0) -> HostedEnvironment:
    """One of them on a loop of its own, not made yet.  Raises ConfigError or SetupError where it cannot be imported."""
    entry = config.every_environment[number]
    # In the main thread: some libraries can be imported nowhere else.
    with guard.put_back():
        environment_door(number if config.environments else None).imported(entry.name)
    error_file = os.environ.get(ERROR_FILE)
    return HostedEnvironment(
        lambda: make_environment(config, model, number),
        name=entry.label,
        step_timeout_s=config.search.step_timeout_s,
        doing=Path(error_file).with_suffix(f".{number}{DOING}" if number else DOING) if error_file else None,
        facts=f"environment {entry.label}" if config.environments else "environment",
    )
