"""Lines for the user when a run begins, is resumed or ends: changes, settings without effect, what is saved."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from atpo_async.api import other_run
from atpo_async.api.beginning import Beginning
from atpo_async.config import Config, resuming
from atpo_async.config.credit_rule import rewards_file
from atpo_async.config.idle_settings import idle_settings
from atpo_async.models.policy import list_checkpoints, steps_trained
from atpo_async.run.metrics import Record, read_metrics
from atpo_async.run.rundir import RunDir

REFUSED = "dropped/"
"""Prefix of the learner's metrics that count the trees it left out, by reason."""


def at_the_start(begun: Beginning, rundir: RunDir) -> list[str]:
    """Lines about a run that begins or is resumed: where its policy is from, what was changed, which schedule jumps."""
    lines = []
    if rundir.started_from is not None:
        lines.append(other_run.described(rundir.started_from))
    known = begun.known
    lines += of_another_policy(rundir.config)
    if known is None:
        return lines
    if begun.anew:
        lines.append("nothing was trained in this folder yet: it begins anew with this configuration")
    steps = 0 if begun.anew else steps_trained(known)
    return lines + resuming.describe_changes(known.config, rundir.config, updates=_updates(known, steps), steps=steps)


def of_another_policy(config: Config) -> list[str]:
    """A line about a file of rewards whose chains another policy than the first one sampled; empty where none is."""
    found = rewards_file(config.credit)
    if found is None:
        return []
    name, file = found
    try:
        of = Path(json.loads(file.read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # made by hand, or refused by ``config.credit_rule``
    first = Path(config.model.path)
    if not (of.is_dir() and first.is_dir()) or of.samefile(first):
        return []
    return [
        f"{name} = {str(file)!r} has what chains of {of} earned, and this run's first policy is {first}: V* is another "
        f"policy's; make one with atpo eval {first} CONFIG --rewards FILE"
    ]


def too_late(known: RunDir, config: Config) -> list[str]:
    """A line about settings that were changed for a run whose steps are done; empty where none was."""
    changes = resuming.describe_changes(known.config, config, updates=0, steps=0)
    if not changes:
        return []
    return [
        f"changed settings have no effect, as the run is done: {'; '.join(changes)}; train with them in another run "
        f"(--run.name NEW), or go on with this one (--run.steps, more than {steps_trained(known)})"
    ]


def idle(config: Config, rundir: RunDir) -> list[str]:
    """Settings without effect; without those of the warm start in a run that began with another run's policy."""
    lines = idle_settings(config)
    if rundir.started_from is None:
        return lines
    return [line for line in lines if not line.startswith("model.warm_start")]


def _updates(rundir: RunDir, steps: int) -> int:
    """Optimizer steps up to the newest checkpoint."""
    learner = rundir.config.learner
    checkpoints = list_checkpoints(rundir.checkpoints)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        return int(json.loads((checkpoints[-1] / "state.json").read_text(encoding="utf-8"))["updates"])
    return steps * learner.minibatches * learner.epochs


def missing(rundir: RunDir) -> list[str]:
    """Files that a resumed run should find and does not, and the consequence."""
    if steps_trained(rundir):
        if rundir.journal.is_dir():
            return []
        return [
            f"{rundir.journal} is gone, and all that the buffer had stored in it: the learner goes on from its "
            "checkpoint, tasks begin at 0 once more"
        ]
    if not rundir.is_trained:
        return []
    url = rundir.config.learner.checkpoint_url
    begins = "begins at step 0 once more"
    if url is not None:
        begins = f"goes on from the newest at learner.checkpoint_url = {url!r}, and where none is there either {begins}"
    return [
        f"steps were done in this run, and {rundir.checkpoints} holds no checkpoint: the learner {begins}; "
        "tasks that the buffer knows to be in a checkpoint are not trained on again"
    ]


def saved(rundir: RunDir) -> str:
    """Up to which step a stopped run is saved, and which steps are lost."""
    steps, wanted = steps_trained(rundir), rundir.config.run.steps
    seen = max((r.step for r in read_metrics(rundir.metrics_path) if "train/loss" in r.metrics), default=0)
    if not steps:
        lost = f"  Steps 1 to {seen} were not saved and are done again." if seen else ""
        return f"Nothing is saved: the run begins with step 1 of {wanted}.{lost}"
    lost = "" if seen <= steps else f"  What was done after it, to step {seen}, was not saved and is done again."
    return f"Saved: step {steps} of {wanted}.{lost}"


def trained(records: Iterable[Record]) -> str:
    """How many trees a run was trained on, for its last line; empty where its metrics do not say.

    A step that was done again counts as it was done last.
    """
    by_step: dict[int, dict[str, float]] = {}
    for record in records:
        if record.source == "learner" and "batch/trees" in record.metrics:
            by_step[record.step] = dict(record.metrics)
    if not by_step:
        return ""
    trees = {step: int(metrics.get("batch/trained", metrics["batch/trees"])) for step, metrics in by_step.items()}
    empty = sum(not count for count in trees.values())
    line = f"trained on {sum(trees.values())} trees in {len(trees) - empty} of {len(trees)} steps"
    if empty:
        line += f"; {steps_text(empty)} had none to learn from"
    without = int(sum(metrics.get("buffer/no_signal_trees", 0) for metrics in by_step.values()))
    refused = int(sum(v for metrics in by_step.values() for k, v in metrics.items() if k.startswith(REFUSED)))
    failed = int(
        sum(
            metrics.get("buffer/dropped_no_leaf", 0) + metrics.get("buffer/dropped_one_leaf", 0)
            for metrics in by_step.values()
        )
    )
    said = [(without, "without a signal"), (failed, "failed"), (refused, "refused or too old")]
    more = ", ".join(f"{count} {what}" for count, what in said if count)
    return f"{line}.  Other trees: {more}" if more else line


def steps_text(count: int) -> str:
    """``1 step``, ``2 steps``."""
    return "1 step" if count == 1 else f"{count} steps"
