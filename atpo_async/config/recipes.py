"""Which fields make up the algorithm, and the ``[recipe]`` table with which a file sets all of them.

A file that has the table is a recipe: laid over others, it takes the algorithm's fields out of them, so that what it
does not set is at its default, whatever recipe or task file lies underneath.  All other fields (task, machine, scale)
stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from atpo_async.config.schema import fields
from atpo_async.core.errors import ConfigError

TABLE = "recipe"

SECTIONS = frozenset({"credit", "correction", "objective", "imitation", "implicit_reward", "team", "search"})
"""An algorithm's own, but for ``KEPT``."""

KEPT = frozenset(
    {
        "correction.accept_bias",  # a permission, and no part of an algorithm
        *("search.initial_rollouts", "search.rounds", "search.branches"),
        *("search.max_action_tokens", "search.max_observation_tokens"),
        *("search.temperature", "search.top_p", "search.top_k"),
        *("search.generate_timeout_s", "search.step_timeout_s"),
        "search.truncated_reward",  # in units of the task's rewards
    }
)
"""In those sections the task's, its machine's or its scale's: they stay."""

OTHERS = frozenset(
    {
        *("staleness.max_oversampling", "buffer.keep_share", "buffer.keep_by"),
        *("learner.minibatches", "learner.epochs"),
    }
)
"""Of other sections an algorithm's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a file says about itself in ``[recipe]``."""

    name: str
    source: str = ""
    """The publication, for people."""
    task: str = ""
    """The ``environment.name`` of a method that is its task; empty for one that trains on any."""


def algorithm() -> dict[str, FieldInfo]:
    """Dotted path -> field, of all that a recipe sets or leaves at its default."""
    return {
        name: field
        for name, field in fields().items()
        if name in OTHERS or (name.partition(".")[0] in SECTIONS and name not in KEPT)
    }


def taken_from(table: dict[str, Any], file: str) -> Recipe | None:
    """The ``[recipe]`` of a file's content, which loses it; None where there is none.

    Raises:
        ConfigError: it is no table, lacks a name, or has a key or a value that does not belong there.
    """
    if TABLE not in table:
        return None
    found = table.pop(TABLE)
    meant = f'as in [{TABLE}] with name = "grpo" and source = "arXiv 2402.03300"'
    if not isinstance(found, Mapping):
        raise ConfigError(f"{TABLE} = {found!r} in {file} is no table; a recipe says what it is, {meant}")
    known = Recipe.__dataclass_fields__
    for key, value in found.items():
        if key not in known:
            raise ConfigError(f"{TABLE}.{key}: unknown key in {file}; known in [{TABLE}]: {', '.join(known)}")
        if not isinstance(value, str):
            raise ConfigError(f"{TABLE}.{key} must be text, got {value!r} in {file}")
    if not found.get("name"):
        raise ConfigError(f"{TABLE}.name is missing in {file}: a recipe has a name, {meant}")
    return Recipe(**found)


def begin_anew(data: dict[str, Any], holders: dict[str, str]) -> None:
    """Take the algorithm's fields out of ``data`` (nested) and out of ``holders`` (dotted path -> file)."""
    for name in algorithm():
        *sections, leaf = name.split(".")
        here: Any = data
        for section in sections:
            here = here.get(section) if isinstance(here, dict) else None
        if isinstance(here, dict) and leaf in here:
            del here[leaf]
            for held in [held for held in holders if held == name or held.startswith(f"{name}.")]:
                del holders[held]
