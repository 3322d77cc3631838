"""``python -m actors benchmarks …``: greedy answers to the questions of published test sets, one after another."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from actors.engines.base import Engine
from actors.environments import host_environment
from actors.factory import make_engine
from actors.faults.fault import first_of
from actors.faults.faults import Faults
from actors.greedy import Grown, grow_greedy
from actors.hosting import guard, printed
from actors.hosting.host import HostedEnvironment
from atpo_async.config import Config, load
from atpo_async.core.errors import AtpoError, EnvironmentBroken
from atpo_async.environments.search_qa.benchmarks import Benchmark
from atpo_async.environments.search_qa.dialects import dialect_of
from atpo_async.environments.search_qa.results import Answered, ResultFile
from atpo_async.models.sources import model_folder
from atpo_async.models.tokenizers import decode, load_tokenizer
from atpo_async.run.temporary import make_temporary_folder_fit

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
"""Parts of a weights file that its fingerprint is made of."""

TOLD_EVERY = 20
"""So many lines about a benchmark's progress."""


class Benchmarks:
    """Test sets under one engine.

    Args:
        config: of the run, its environment search_qa.
        model: folder of the policy.
        out: folder of the result files.
        limit: the first questions of each; 0 for all.
    """

    def __init__(self, config: Config, model: Path, out: Path, *, limit: int = 0) -> None:
        self._config, self._model, self._out, self._limit = config, model, out, limit
        self._engine: Engine | None = None
        self._tokenizer = load_tokenizer(model)
        dialect = dialect_of(config.environment.options.get("dialect", "at2po"))
        self._result_tag = f"<{dialect.result_tag}>"
        self._policy = fingerprint(model)

    async def run(self, benchmarks: Sequence[Benchmark]) -> None:
        """Raises ConfigError, SetupError, EnvironmentBroken, EngineDead."""
        try:
            for benchmark in benchmarks:
                await self._one(benchmark)
        finally:
            if self._engine is not None:
                await self._engine.close()

    async def _one(self, benchmark: Benchmark) -> None:
        config = of(self._config, benchmark)
        file = ResultFile(self._out / f"{benchmark.name}.jsonl", made_by(config, self._policy, benchmark))
        done = {index: each for index, each in file.read().items() if each.turns}
        async with host_environment(config, self._model) as environment:
            known = environment.num_tasks("eval") or 0
            number = min(known, self._limit) if self._limit else known
            missing = [index for index in range(number) if index not in done]
            tell(benchmark, number - len(missing), number, [*done.values()])
            if not missing:
                return
            file.begin(done)
            engine = await self._started(environment)
            await self._ask(benchmark, config, engine, environment, file, missing, list(done.values()))

    async def _started(self, environment: HostedEnvironment) -> Engine:
        if self._engine is None:
            engine = make_engine(self._config, self._model, actor="eval", stop_strings=environment.stop_strings)
            self._engine = engine
            await engine.start()
        return self._engine

    async def _ask(
        self,
        benchmark: Benchmark,
        config: Config,
        engine: Engine,
        environment: HostedEnvironment,
        file: ResultFile,
        missing: list[int],
        done: list[Answered],
    ) -> None:
        """Waits for: the answers to all that is missing.  Each is written down at once."""
        number, failures = len(missing) + len(done), 0
        at_once = asyncio.Semaphore(config.actor.max_num_seqs)
        faults = Faults(config.environment.name, at_once=config.actor.max_num_seqs)

        async def one(index: int) -> None:
            nonlocal failures
            async with at_once:
                grown = await grow_greedy(config, engine=engine, environment=environment, faults=faults, index=index)
            answered = self.answered(index, grown)
            file.append(answered)
            done.append(answered)
            failures += not answered.turns
            if len(done) % max(1, number // TOLD_EVERY) == 0:
                tell(benchmark, len(done), number, done)

        async with asyncio.TaskGroup() as questions:
            for index in missing:
                questions.create_task(one(index), name=f"{benchmark.name}/{index}")
        if failures == len(missing) == number:
            raise EnvironmentBroken(f"{benchmark.name}: all {number} chains failed; the latest: {done[-1].failure}")

    def answered(self, index: int, grown: Grown) -> Answered:
        """The result of one chain; one that ran out of context has no answer."""
        turns = list(grown.tree)
        if not turns or not turns[-1].is_leaf:
            return Answered(
                index=index, em=0.0, f1=0.0, reward=0.0, turns=0, searches=0, end="failed", failure=grown.failure
            )  # fmt: skip
        leaf = turns[-1]
        return Answered(
            index=index,
            em=leaf.rewards.get("em", 0.0),
            f1=leaf.rewards.get("f1", 0.0),
            reward=leaf.reward or 0.0,
            turns=len(turns),
            searches=sum(self._result_tag in decode(self._tokenizer, turn.observation.tolist()) for turn in turns[1:]),
            end=leaf.end,
        )


def of(config: Config, benchmark: Benchmark) -> Config:
    """The configuration whose environment has this benchmark's questions."""
    without = ("data", "eval_data", "eval_share", "split")
    options = {name: value for name, value in config.environment.options.items() if name not in without}
    options |= {"held_out": benchmark.file, "source": benchmark.source}
    return config.model_copy(update={"environment": config.environment.model_copy(update={"options": options})})


def made_by(config: Config, policy: str, benchmark: Benchmark) -> str:
    """What decides the answers: the policy, the questions' file, and the settings of environment and search."""
    file = Path(benchmark.file).stat()
    said = {
        "policy": policy,
        "file": [file.st_size, file.st_mtime_ns, benchmark.source],
        "options": {k: v for k, v in config.environment.options.items() if k not in ("seed", "held_out", "source")},
        "search": [config.search.max_action_tokens, config.search.max_observation_tokens],
        "model": [config.model.max_context_tokens, config.model.dtype],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(model: Path) -> str:
    """Of the weights: the sizes of their files, and parts of them that lie evenly apart."""
    found = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for part in range(SAMPLES):
                stream.seek(part * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                found.update(stream.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def tell(benchmark: Benchmark, done: int, number: int, answers: Sequence[Answered]) -> None:
    """One line on stderr."""
    em = f", EM {sum(each.em for each in answers) / len(answers):.3f} so far" if answers else ""
    print(f"{benchmark.name}: {done:,} of {number:,} questions{em}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Exit code 2 and one line for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m actors benchmarks")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--benchmarks", required=True, help="JSON: a list of name, file and source")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        make_temporary_folder_fit(lambda line: print(f"note: {line}", file=sys.stderr, flush=True))
        benchmarks = [Benchmark(**each) for each in json.loads(args.benchmarks)]
        with guard.stray_signals_end_nothing(), printed.limited():
            work = Benchmarks(load(args.config), model_folder(args.model), args.out, limit=args.limit)
            asyncio.run(work.run(benchmarks))
    except (AtpoError, ExceptionGroup) as failure:
        first = first_of(failure) if isinstance(failure, ExceptionGroup) else failure
        if not isinstance(first, AtpoError):
            raise
        print(f"error: {first}", file=sys.stderr, flush=True)
        return 2
    return 0
