"""The grid of a study: lags, corrections and seeds over one configuration, each cell a run of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.config import Config
from atpo_async.core.errors import ConfigError
from atpo_async.study.cells import Cell

ASK_GRACE_S = 1.0
"""supervisor.stop_grace_s of a cell: a cell that is interrupted begins anew, so its roles have nothing to save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A named setting of ``[correction]``.  Fields it does not name keep what the configuration says."""

    phrase: str
    """Its name in a sentence."""
    fields: Mapping[str, Any]


_PLAIN: dict[str, Any] = {
    # A name stands for exactly its correction: no guard that changes the exponent, no gate, nothing besides.
    "exponent": "fixed",
    "exponent_value": 1.0,
    "ess_floor": 0.0,
    "floor": 0.0,
    "gate": None,
    "numerator": "prox",
    "accept_bias": False,
}

CORRECTIONS: dict[str, Correction] = {
    name: Correction(phrase=phrase, fields=_PLAIN | fields)
    for name, phrase, fields in (
        ("none", "no correction", {"action": "none", "level": "turn", "accept_bias": True}),
        ("token", "token-level truncation", {"action": "truncate", "level": "token"}),
        ("turn", "turn-level truncation", {"action": "truncate", "level": "turn"}),
        (
            "turn+ess",
            "turn-level truncation at a bounded ESS",
            {"action": "truncate", "level": "turn", "exponent": "ess"},
        ),
        ("prefix", "truncation by prefix", {"action": "truncate", "level": "prefix"}),
        ("sequence", "sequence-level truncation", {"action": "truncate", "level": "sequence"}),
        ("mask", "turn-level masking", {"action": "mask", "level": "turn", "floor": 0.5, "cap": 2.0}),
        ("icepop", "IcePop", {"action": "icepop", "level": "token", "floor": 0.5, "cap": 5.0}),
        ("m2po", "M2PO", {"action": "m2po", "level": "token", "cap": 1e6}),
        ("topr", "TOPR", {"action": "topr", "level": "sequence", "cap": 1.0}),
    )
}
"""What ``--corrections`` may name."""

MAX_SEED = 2**31
LEAST_STEPS = 3
"""Steps over which sampled success is averaged."""
DEFAULT_LAGS = "0,2,8,16"
DEFAULT_CORRECTIONS = "none,token,turn,turn+ess"
DEFAULT_SEEDS = 2

SET_BY_THE_STUDY: dict[str, str] = {
    "run.name": "--out",
    "run.dir": "--out",
    "staleness.exact_lag": "--lags",
    "staleness.max_lag": "--lags",
    "correction.action": "--corrections",
    "correction.level": "--corrections",
    **{f"correction.{name}": "--corrections" for name in _PLAIN},
}
"""Fields that the grid decides, and the option that does."""

FREE: tuple[str, ...] = ("supervisor.*", "links.*", "metrics.*", "ray.*", "run.seed")
"""Fields that may change when a study goes on: none affects what a cell learns; seeds are compared as a list."""


def parse_lags(text: str) -> tuple[int, ...]:
    """``0,2,8`` as ascending lags.  Raises ConfigError."""
    lags = set()
    for word in _words(text, "--lags"):
        if not word.isdecimal():
            raise ConfigError(f"--lags {text}: {word!r} is no lag; lags are learner versions from 0 on, as in 0,2,8")
        lags.add(int(word))
    return tuple(sorted(lags))


def parse_corrections(text: str) -> tuple[str, ...]:
    """Names out of ``CORRECTIONS``, in the order given.  Raises ConfigError listing them."""
    names: list[str] = []
    for word in _words(text, "--corrections"):
        if word not in CORRECTIONS:
            raise ConfigError(f"--corrections {text}: {word!r} is unknown; known: {', '.join(CORRECTIONS)}")
        if word not in names:
            names.append(word)
    return tuple(names)


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{option} names nothing; separate names with commas")
    return words


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The grid over a configuration."""

    base: Config
    lags: tuple[int, ...]
    corrections: tuple[str, ...]
    seeds: tuple[int, ...]
    arguments: tuple[str, ...] = ()
    """Files and options that make ``base`` on a command line; none for what a study takes where none are given."""

    @classmethod
    def of(
        cls,
        base: Config,
        *,
        lags: str = DEFAULT_LAGS,
        corrections: str = DEFAULT_CORRECTIONS,
        seeds: int = DEFAULT_SEEDS,
        options: Sequence[str] = (),
        arguments: Sequence[str] = (),
    ) -> Plan:
        """From the command line; ``options`` are the dotted fields that the user set, ``arguments`` as the field.

        The seeds are ``base.run.seed`` and those that follow.  Raises ConfigError for anything that does not make a
        grid, and for a cell that no run could have.
        """
        for name in options:
            if name in SET_BY_THE_STUDY:
                raise ConfigError(f"--{name}: the grid of the study sets it; use {SET_BY_THE_STUDY[name]}")
        if seeds < 1:
            raise ConfigError(f"--seeds must be >= 1, got {seeds}")
        if base.run.seed + seeds > MAX_SEED:
            raise ConfigError(
                f"--seeds {seeds} from run.seed = {base.run.seed} on: seeds are below {MAX_SEED}; use fewer, or a "
                "lower run.seed"
            )
        if base.run.steps < LEAST_STEPS:
            raise ConfigError(
                f"run.steps = {base.run.steps}: a cell's success is the mean of its last {LEAST_STEPS} steps; use at "
                f"least --run.steps {LEAST_STEPS}"
            )
        longest = max(parse_lags(lags))
        if longest >= base.run.steps:
            raise ConfigError(
                f"--lags {lags}: lag {longest} with run.steps = {base.run.steps} would never be reached while success "
                f"is measured: the lag grows from 0 by one a step; use smaller lags or --run.steps {2 * longest}"
            )
        if base.learner.schedule != "constant":
            raise ConfigError(
                f"learner.schedule = {base.learner.schedule!r} ends with the run, and a cell's run is longer by its "
                "lag: cells would differ by more than their lag; use --learner.schedule constant"
            )
        plan = cls(
            base=base,
            lags=parse_lags(lags),
            corrections=parse_corrections(corrections),
            seeds=tuple(range(base.run.seed, base.run.seed + seeds)),
            arguments=tuple(arguments),
        )
        for cell in plan.cells():
            plan.config(cell, runs=Path("runs"))
        return plan

    def cells(self) -> list[Cell]:
        """The whole grid seed by seed: a study that is stopped early then has all of it once, rather than half."""
        return [
            Cell(lag=lag, correction=name, seed=seed)
            for seed in self.seeds
            for lag in self.lags
            for name in self.corrections
        ]

    def config(self, cell: Cell, *, runs: Path, model: str | None = None) -> Config:
        """A cell's whole configuration.  ``model`` is its seed's policy.  Raises ConfigError naming the cell."""
        data = self.base.model_dump(mode="json")
        # The last batches of a run are trained on and no longer grown: every lag is to grow as many.
        steps = data["run"]["steps"] + cell.lag
        data["run"] |= {"name": cell.name, "dir": str(runs), "seed": cell.seed, "steps": steps}
        data["buffer"]["weight_exponent_steps"] = data["buffer"]["weight_exponent_steps"] or self.base.run.steps
        data["staleness"] |= {"exact_lag": cell.lag, "max_lag": cell.lag}
        data["correction"] |= CORRECTIONS[cell.correction].fields
        # A role that crashes ends its cell: trees lost on the way would make the lag another one.
        data["supervisor"] |= {"max_restarts": 0, "stop_grace_s": min(ASK_GRACE_S, data["supervisor"]["stop_grace_s"])}
        # Cells run side by side.
        data["links"] |= {"actors_port": 0, "learner_port": 0, "weights_port": 0, "announce_port": 0}
        if model is not None:
            data["model"]["path"] = model
        try:
            return configuration.build(data)
        except ConfigError as exc:
            raise ConfigError(f"cell {cell.label}: {exc}") from None

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Dotted path -> value of all settings that affect what the cell learns, as JSON has it."""
        config = self.config(cell, runs=Path("runs"))
        found = settings_of(config, leaving=(*FREE, "run.name", "run.dir"))
        if config.model.warm_start:
            found.pop("model.path")  # follows from the rest, and is made when it is needed
        return found | {"run.seed": cell.seed}


def settings_of(config: Config, *, leaving: Sequence[str]) -> dict[str, Any]:
    """Dotted path -> value, as JSON has it, of all fields but ``leaving``; ``links.*`` names a whole section."""
    data = config.model_dump(mode="json")
    found = {}
    for path in configuration.fields():
        if any(path == free or (free.endswith("*") and path.startswith(free[:-1])) for free in leaving):
            continue
        here: Any = data
        for part in path.split("."):
            here = here[part]
        found[path] = here
    if not config.environments:
        found.pop("environments", None)  # cells that were trained before there could be several keep their names
    if not config.learner.lora.rank:  # nor do those from before there were adapters
        found = {path: value for path, value in found.items() if not path.startswith("learner.lora.")}
    return found


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits: other settings, another cell."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
