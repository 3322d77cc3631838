"""Makes the environment of a configuration for one policy, its values checked."""

from __future__ import annotations

import json
from pathlib import Path

from atpo_async.config import Config
from atpo_async.config.doors import environment_door
from atpo_async.core.errors import ConfigError
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.values import Limits


def make_environment(config: Config, model: Path, number: int = 0) -> CheckedEnvironment:
    """The environment, of several the one of that number, its values checked.

    Built-in ones are seeded by the run unless their options set a seed.

    Raises ConfigError or SetupError naming the environment.
    """
    entry = config.every_environment[number]
    door = environment_door(number if config.environments else None)
    seeded = {"seed": config.run.seed} if entry.name in door.names() else {}
    plain = door.make(entry.name, model, options=seeded | entry.options)
    limits = Limits(
        vocab_size=vocab_size(model),
        max_context_tokens=config.model.max_context_tokens,
        max_observation_tokens=config.search.max_observation_tokens,
    )
    made = CheckedEnvironment(plain, name=entry.label, limits=limits)
    if config.search.turn_reward == "information-gain" and not made.has_references:
        raise ConfigError(
            f"search.turn_reward = 'information-gain' measures the probability of right answers, which environment "
            f"{entry.label!r} does not tell: give it reference(split, task_index) -> (answer ids, prefix ids) or None "
            '(a MessageTask: right_answer(split, index) -> text; docs/extending.md, "Environment"), or set '
            "--search.turn_reward none"
        )
    if config.team.on:
        made.check_team(f"team.proposers = {config.team.proposers}")
    return made


def vocab_size(model: Path) -> int | None:
    """How many tokens the model has embeddings for, from its config.json; None where that does not have it."""
    try:
        said = json.loads((model / "config.json").read_text(encoding="utf-8"))
        found = said.get("vocab_size", said.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None  # the engine reports what is wrong with the folder
    return found if isinstance(found, int) and found > 0 else None
