"""``atpo eval``: which policy is evaluated under which configuration, from what the user names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atpo_async.config import Config, load
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.models.policy import is_there, latest_policy
from atpo_async.models.sources import model_folder
from atpo_async.run.rundir import LATEST, RunDir

BEARS = ("run.seed", "model.", "environment.", "search.", "actor.", "eval.")
"""Fields, and sections of fields, that an evaluation reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is to be evaluated."""

    config: Config
    model: Path
    """A model folder."""
    name: str
    """For people."""


@contextlib.contextmanager
def evaluation(
    target: str, files: Sequence[str], options: Mapping[str, str], *, default: Callable[[], Path]
) -> Iterator[Evaluation]:
    """What ``atpo eval TARGET [CONFIG…] --options`` asks for; a folder made for it goes with the block.

    A run's own configuration and newest policy, unless ``files`` or ``--model.path`` say otherwise; or a model folder
    under ``files`` (``default`` without any).

    Raises SetupError where ``target`` is neither or there is no policy, ConfigError for two models at once.
    """
    folder = Path(target)
    with contextlib.ExitStack() as held:
        if (folder / "run.json").is_file() or folder.name == LATEST:
            rundir = RunDir.open(folder)
            config = load(files or [rundir.path / "config.json"], options)
            if "model.path" in options:
                path = options["model.path"]
                yield Evaluation(config=config, model=model_folder(path), name=path)
                return
            model, name = held.enter_context(latest_policy(rundir))
            yield Evaluation(config=config, model=model, name=name)
        elif is_there(folder):
            if "model.path" in options:
                raise ConfigError(
                    f"{target} and --model.path {options['model.path']}: an evaluation is of one model; name one of "
                    "them"
                )
            yield Evaluation(config=load(files or [default()], options), model=folder, name=target)
        elif folder.is_file():
            raise SetupError(
                f"{target} is a file; name a run folder or a model folder: atpo eval RUN, or atpo eval MODEL CONFIG"
            )
        else:
            raise SetupError(f"{target} is neither a run folder (run.json) nor a model folder (config.json)")


def without_effect(options: Mapping[str, str]) -> list[str]:
    """Options that an evaluation does not read."""
    return [name for name in options if not name.startswith(BEARS)]
