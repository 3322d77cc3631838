"""What every node of a cluster needs of a run: its configuration as one file, without settings of one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.config import Config
from atpo_async.core.errors import SetupError

ACTORS_PORT, LEARNER_PORT, FOLLOWER_PORT, MEETING_PORT = 7000, 7001, 7002, 7003
"""Where the run names none: others have to know them before the buffer runs.  The last: where ranks on several nodes
meet."""


ACCELERATE = "accelerate.yaml"
"""What ``learner.accelerate_config`` names, as nodes get it."""


def files_of(config: Config) -> dict[str, str]:
    """Name -> text of the files beside the configuration that nodes need.  Raises SetupError for one not here."""
    named = config.learner.accelerate_config
    if named is None:
        return {}
    try:
        return {ACCELERATE: Path(named).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as exc:
        why = getattr(exc, "strerror", None) or exc
        raise SetupError(f"learner.accelerate_config = {named!r} cannot be read: {why}") from None


def for_nodes(config: Config, *, run_dir: str | None, host: str = "0.0.0.0") -> Config:
    """The configuration as nodes get it.

    GPUs are given by number where roles are placed, keys lie elsewhere on each node, and ports are known beforehand.

    Args:
        config: as the user has it.
        run_dir: folder for runs on the buffer's node; None: ``run.dir``.
        host: that sockets listen at.
    """
    links = config.links.model_copy(
        update={
            "host": config.links.host if config.links.host not in ("127.0.0.1", "localhost") else host,
            "actors_port": config.links.actors_port or ACTORS_PORT,
            "learner_port": config.links.learner_port or LEARNER_PORT,
            "follower_port": config.links.follower_port or (FOLLOWER_PORT if config.buffer.follower else 0),
            "keys_dir": None,
        }
    )
    run = config.run if run_dir is None else config.run.model_copy(update={"dir": Path(run_dir)})
    update = {
        "links": links,
        "run": run,
        "learner": config.learner.model_copy(update={"gpus": ()}),
        "actor": config.actor.model_copy(update={"gpus": ()}),
    }
    return configuration.build(config.model_copy(update=update).model_dump(mode="json"))


def as_text(config: Config) -> str:
    """The configuration as a file: the fields that are not the defaults, as JSON."""
    data: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    # Said also where it is the default: it names the folder.
    data["run"] = {"name": config.run.name, **data.get("run", {})}
    return json.dumps(data, indent=2) + "\n"
