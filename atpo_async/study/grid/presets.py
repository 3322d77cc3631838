"""The studies that come with a name: their files, axes, seeds and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CHEAP: dict[str, str] = {
    "actor.engine": "transformers",
    "eval.every_steps": "0",
    "eval.num_tasks": "100",
    "eval.at_start": "false",
    "learner.checkpoint_every": "1000",
}
"""Settings of many small cells: an engine that starts at once, one evaluation, no checkpoint on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A study by name.  What the user gives besides goes over it; an axis that he gives takes its place."""

    name: str
    title: str
    axes: Mapping[str, str]
    """Axis -> its values."""
    files: tuple[str, ...] = ()
    """Names of files in ``configs``."""
    seeds: int = 5
    options: Mapping[str, str] = field(default_factory=dict)
    by_tokens: bool = False


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="staleness",
            title="Staleness",
            files=("demo", "staleness"),
            axes={"lag": "0,2,8,16", "correction": "none,token,turn,turn+ess"},
        ),
        Preset(name="methods", title="Methods", axes={"recipe": "all", "task": "demo,demo_agent"}, options=CHEAP),
        Preset(
            name="placement",
            title="Placement of branches",
            axes={
                "config": ",".join(f"configs/placement/{name}.toml" for name in ("entropy", "random", "arpo", "none")),
                "task": "demo,demo_agent",
            },
            options=CHEAP,
            by_tokens=True,
            seeds=10,
        ),
    )
}

OWN_NAME = "grid"
"""Of a study that was given none."""
DEFAULT_SEEDS = 5
