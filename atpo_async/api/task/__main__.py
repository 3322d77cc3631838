"""The process of ``atpo task``: the user's code is imported as a run's roles import it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from atpo_async.api.task.play import Player
from atpo_async.api.task.screen import Screen
from atpo_async.api.task.scripts import HELP, Actions, Function, from_file, typed
from atpo_async.api.task.voice import Voice
from atpo_async.config import Config, load
from atpo_async.core.errors import AtpoError, ConfigError
from atpo_async.core.mixture import Mixture
from atpo_async.core.vocabulary import Split
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.making import make_environment
from atpo_async.models.sources import model_folder

EXIT_DONE, EXIT_FAILED, EXIT_USER = 0, 1, 2


def main(file: str, words: str) -> int:
    """Plays the task; returns the exit code.

    Args:
        file: the resolved configuration.
        words: JSON: ``split``, ``index``, ``ids``, ``raw``, ``show``, ``actions``, ``policy``.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, asked = load(file), json.loads(words)
    folder = model_folder(config.model.path)
    return asyncio.run(_play(config, folder, asked))


async def _play(config: Config, folder: Path, asked: dict[str, Any]) -> int:
    split, index = cast(Split, asked["split"]), int(asked["index"])
    if config.environments:
        place = Mixture([each.weight for each in config.environments], config.run.seed).place(split, index)
        config, index = config.alone(place.environment), place.task
    environment = make_environment(config, folder)
    chat = getattr(environment.plain, "format", None)
    voice = Voice(folder, chat, environment.stop_token_ids, environment.stop_strings)
    screen = Screen(Console(highlight=False, soft_wrap=True), voice, with_ids=asked["ids"])
    _check_index(environment, split, index)
    actions = _actions(asked)
    screen.headline(config.environment.name, environment, split, index)
    if actions is not None and sys.stdin.isatty() and not (asked["actions"] or asked["policy"]):
        screen.note(HELP.format(call=screen.example_call()))
    player = Player(config, environment, voice, screen, raw=asked["raw"])
    return EXIT_DONE if await player.play(split, index, actions) else EXIT_FAILED


def _check_index(environment: CheckedEnvironment, split: Split, index: int) -> None:
    known = environment.num_tasks(split)
    if index < 0 or (known is not None and index >= known):
        raise ConfigError(f"--index {index}: split {split!r} has tasks 0 to {(known or 0) - 1}")


def _actions(asked: dict[str, Any]) -> Actions | None:
    if asked["show"]:
        return None
    if asked["policy"]:
        return Function(asked["policy"])
    return from_file(Path(asked["actions"])) if asked["actions"] else typed()


if __name__ == "__main__":
    try:
        code = main(sys.argv[1], sys.argv[2])
    except AtpoError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        code = EXIT_USER
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    os._exit(code)  # whatever threads a task has started
