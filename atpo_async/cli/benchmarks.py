"""Greedy evaluation on published test sets: which, from which folder of data, and the table of their results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from atpo_async.api.evaluation import failed_evaluation
from atpo_async.api.foreground import resolved_file, run_to_end
from atpo_async.config import Config
from atpo_async.core.errors import ConfigError, RoleCrashed
from atpo_async.environments.search_qa import results
from atpo_async.environments.search_qa.benchmarks import Benchmark, locate, sets_named
from atpo_async.environments.search_qa.retrievers import check_needs
from atpo_async.run import files, launch

SEARCH_QA = "search_qa"
OF_ENVIRONMENT = ("retriever", "instructions")
"""Options whose files and servers an evaluation needs too."""
TABLE, NUMBERS = "table.md", "results.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to evaluate on."""

    benchmarks: str
    """Names, or groups of them, with commas between."""
    data: Path
    """Folder of the test sets."""
    out: Path
    """Folder of the results; an evaluation that was stopped goes on from what is there."""
    limit: int = 0
    """The first questions of each; 0 for all."""


def with_search_qa_alone(config: Config) -> Config:
    """The same with its search_qa as the only environment, where it has several; the first, if more than one is."""
    number = next((number for number, each in enumerate(config.environments) if each.name == SEARCH_QA), None)
    return config if number is None else config.alone(number)


def found(asked: Asked, config: Config) -> list[Benchmark]:
    """The test sets' files.

    Raises:
        ConfigError: there is no such benchmark, or the configuration has another environment.
        SetupError: one is not in the folder, or the search engine does not answer.
    """
    if asked.limit < 0:
        raise ConfigError(f"--limit must be >= 0 (0: all questions), got {asked.limit}")
    wanted = sets_named(asked.benchmarks)
    if config.environments or config.environment.name != SEARCH_QA:
        raise ConfigError(
            f"--benchmarks: the test sets are questions for the environment {SEARCH_QA!r}, and the configuration's is "
            f"{config.task_name}; give one with it, such as configs/search_qa.toml"
        )
    benchmarks = locate(asked.data, wanted)
    check_needs({name: value for name, value in config.environment.options.items() if name in OF_ENVIRONMENT})
    return benchmarks


def evaluate_on(
    config: Config,
    model: Path,
    name: str,
    asked: Asked,
    benchmarks: Sequence[Benchmark],
    *,
    tell: Callable[[str], None],
) -> list[results.Line]:
    """Evaluate a model folder, ``name`` in errors and on the page, in a process of its own; writes table and numbers.

    Raises SetupError for what the user can mend, else RoleCrashed.
    """
    ours = ("note: ", *(f"{each.name}: " for each in benchmarks))
    with resolved_file(config) as file:
        code, said = run_to_end(
            [
                *launch.command("actors", "benchmarks", "--config", str(file), "--model", str(model)),
                *("--benchmarks", json.dumps([asdict(each) for each in benchmarks])),
                *("--out", str(asked.out), "--limit", str(asked.limit)),
            ],
            tell=lambda text: tell(text) if text.startswith(ours) else None,
        )
    if code:
        raise failed_evaluation(code, said, name)
    lines = [line(asked, each) for each in benchmarks]
    files.write_atomic(asked.out / TABLE, results.markdown(name, lines))
    files.write_atomic(asked.out / NUMBERS, json.dumps(results.as_json(name, lines), indent=2) + "\n")
    return lines


def line(asked: Asked, benchmark: Benchmark) -> results.Line:
    """Of a benchmark that is done.  Raises RoleCrashed where its results are not there."""
    path = asked.out / f"{benchmark.name}.jsonl"
    answers = sorted(results.every_answer(path).values(), key=lambda each: each.index)
    if not answers:
        raise RoleCrashed(f"the evaluation on {benchmark.name} ended without results in {path}")
    return results.line_of(benchmark.name, answers[: asked.limit or None])
