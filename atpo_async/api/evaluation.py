"""Greedy evaluation on held-out tasks, or rewards of sampled chains on training tasks: which policy, under which
configuration, and the process that runs it.

``evaluate`` is for Python programs; the other functions are what it shares with ``atpo eval``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atpo_async.api import arguments, machine
from atpo_async.api.foreground import resolved_file, run_to_end
from atpo_async.config import Config, load, resolved
from atpo_async.core.errors import AtpoError, ConfigError, RoleCrashed, SetupError
from atpo_async.models.policy import is_there, latest_policy
from atpo_async.models.sources import model_folder
from atpo_async.ops.exits import EXIT_USER
from atpo_async.run import launch
from atpo_async.run.processes import signal_name
from atpo_async.run.rundir import LATEST
from atpo_async.run.temporary import make_temporary_folder_fit
from atpo_async.status.run_folders import run_at, runs_near

if TYPE_CHECKING:
    from atpo_async.api.run import Run

BEARS = ("run.seed", "model.", "environment.", "environments", "search.", "actor.", "eval.")
"""Fields, and sections of fields, that an evaluation reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Result of a greedy evaluation."""

    success: float | None
    """Share of the known tasks that succeeded; None where the environment reports success or failure of none."""
    num_tasks: int
    """Tasks evaluated."""
    unknown: int
    """Tasks for which the environment did not report success or failure; left out of ``success``."""
    reward_mean: float | None
    by_environment: Mapping[str, float | None] = field(default_factory=dict)
    """Success by label, where a run has several environments."""

    def line(self, name: str) -> str:
        """One line for people; ``name`` is the policy's."""
        if self.success is None:
            return (
                f"{name}: success unknown on {self.num_tasks} held-out tasks, greedy: the environment says of none "
                f"whether it succeeded (StepResult.success is None); mean reward {self.reward_mean or 0.0:.3f}"
            )
        left_out = f" ({self.unknown} more are unknown: success is None)" if self.unknown else ""
        known = self.num_tasks - self.unknown
        each = ", ".join(
            f"{label} {'unknown' if s is None else f'{s:.3f}'}" for label, s in self.by_environment.items()
        )
        parts = f" ({each})" if each else ""
        return f"{name}: success {self.success:.3f}{parts} on {known} held-out tasks, greedy{left_out}"


def evaluate(
    run_or_policy: Run | Path | str,
    config: Config | Path | str | Sequence[Path | str] | None = None,
    **overrides: Any,
) -> EvalResult:
    """Greedy success on held-out tasks, of a run's newest policy or of a model folder.

    Args:
        run_or_policy: a ``Run``, or the path of a run folder or of a model folder.
        config: under which configuration; None: the run's own, for a model folder the defaults.
        overrides: values on top, as for ``train``: ``eval={"num_tasks": 50}``, ``actor={"engine": "transformers"}``.

    Raises:
        ConfigError: a value is refused.
        SetupError: there is no such run or policy, or something is missing on this machine.
        RoleCrashed: the evaluation failed.
    """
    target = _target(run_or_policy)
    given = None if config is None else arguments.files_or_config(config, call="evaluate")
    make_temporary_folder_fit()
    with policy_of(target) as (model, name, own):
        asked = resolved(given if given is not None else own if own is not None else (), overrides)
        machine.engine_of(asked)
        return evaluate_policy(asked, model, name)


def _target(given: Any) -> Path:
    """The folder of a run or of a policy that a program passed.  Raises ConfigError for anything else."""
    from atpo_async.api.run import Run

    if isinstance(given, Run):
        return given.path
    takes = "a Run, or the path of a run folder or of a model folder"
    if isinstance(given, Config):
        raise ConfigError(f"evaluate() takes {takes}, got a Config; it goes second: evaluate('runs/run', config)")
    return arguments.path_of(given, call="evaluate", takes=takes)


def is_run(folder: Path) -> bool:
    """Whether a path names a run and no model folder."""
    return (folder / "run.json").is_file() or folder.name == LATEST


@contextlib.contextmanager
def policy_of(target: Path | str) -> Iterator[tuple[Path, str, Config | None]]:
    """(model folder, what to call it, configuration of its run) of a run folder or a model folder; a folder made for
    it goes with the block.  Raises SetupError where there is none."""
    folder = Path(target)
    if is_run(folder):
        rundir = run_at(folder)
        with latest_policy(rundir) as (model, name):
            yield model, name, rundir.config
    elif is_there(folder):
        yield folder, str(target), None
    elif folder.is_file():
        raise SetupError(
            f"{target} is a file; name a run folder or a model folder: atpo eval RUN, or atpo eval MODEL CONFIG"
        )
    else:
        raise SetupError(
            f"{target} is neither a run folder (run.json) nor a model folder (config.json); {runs_near(folder)}"
        )


@contextlib.contextmanager
def evaluation(
    target: str, files: Sequence[str], options: Mapping[str, str], *, default: Callable[[], Path]
) -> Iterator[tuple[Config, Path, str]]:
    """(configuration, model folder, the policy's name) of ``atpo eval TARGET [CONFIG…] --options``; a folder made for
    it is removed after the block.

    A run's own configuration and newest policy, unless ``files`` or ``--model.path`` say otherwise; or a model folder
    under ``files`` (``default`` without any).

    Raises SetupError where ``target`` is neither or there is no policy, ConfigError for two models at once.
    """
    folder, path = Path(target), options.get("model.path")
    if is_run(folder):
        own = [run_at(folder).path / "config.json"]
        if path is not None:
            yield load(files or own, options), model_folder(path), path
            return
    else:
        own = []
        if path is not None and is_there(folder):
            raise ConfigError(f"{target} and --model.path {path}: an evaluation is of one model; name one of them")
    with policy_of(target) as (model, name, _):
        yield load(files or own or [default()], options), model, name


def without_effect(options: Mapping[str, str]) -> list[str]:
    """Options that an evaluation does not read."""
    return [name for name in options if not name.startswith(BEARS)]


def evaluate_policy(config: Config, model: Path, name: str) -> EvalResult:
    """Evaluate a model folder, ``name`` in errors, in a process of its own.

    Raises SetupError for what the user can mend, else RoleCrashed.
    """
    with resolved_file(config) as file:
        code, said = run_to_end(
            [
                *launch.command("actors", "eval", "--config", str(file), "--model", str(model)),
                *("--num-tasks", str(config.eval.num_tasks)),
            ]
        )
    if code:
        raise failed_evaluation(code, said, name)
    try:
        found = json.loads(said.strip().splitlines()[-1])
        success, reward = found["success"], found["reward_mean"]
        return EvalResult(
            success=None if success is None else float(success),
            num_tasks=int(found["num_tasks"]),
            unknown=int(found["unknown"]),
            reward_mean=None if reward is None else float(reward),
            by_environment={
                label: None if (own := found[f"{label}/success"]) is None else float(own)
                for each in config.environments
                if f"{(label := each.label)}/success" in found
            },
        )
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise RoleCrashed(f"the evaluation of {name} ended without a result: {said[-200:]!r}") from exc


def tasks_of_a_run(config: Config) -> int:
    """Training tasks that a run leases at most while every tree has a signal: those of its batches, and those that lie
    ready or are grown when it ends."""
    s = config.staleness
    most = config.run.steps * s.trees_per_batch + s.max_trees_pending
    return most if config.run.max_tasks is None else min(most, config.run.max_tasks)


def sample_rewards(
    config: Config, model: Path, name: str, *, file: Path, num_tasks: int, rollouts: int
) -> dict[str, float]:
    """Sample chains of a model folder, ``name`` in errors, in a process of its own, which writes ``file``.

    Returns ``num_tasks`` that have a reward, and ``reward_mean``.
    Raises SetupError for what the user can mend, else RoleCrashed.
    """
    with resolved_file(config) as settings:
        code, said = run_to_end(
            [
                *launch.command("actors", "sampled", "--config", str(settings), "--model", str(model)),
                *("--num-tasks", str(num_tasks), "--rollouts", str(rollouts), "--out", str(file)),
            ]
        )
    if code:
        raise failed_evaluation(code, said, name)
    try:
        found = json.loads(said.strip().splitlines()[-1])
        return {key: float(found[key]) for key in ("num_tasks", "reward_mean")}
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise RoleCrashed(f"the sampling of {name} ended without a result: {said[-200:]!r}") from exc


def failed_evaluation(code: int, said: str, name: str) -> AtpoError:
    """What to raise where the process of an evaluation of ``name`` ended with ``code``, not 0, and this last line."""
    if code == EXIT_USER:
        return SetupError(said)
    how = f"killed by {signal_name(-code)}" if code < 0 else said or f"exit code {code}"
    return RoleCrashed(f"the evaluation of {name} failed: {how}")
