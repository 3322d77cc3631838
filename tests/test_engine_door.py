"""The engine door: an engine of one's own is loaded by name, held to the protocol, and grows a tree."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from actors.engines.base import Engine, EngineSettings, Sampling, WeightsFile
from actors.engines.checked import CheckedEngine
from actors.expansion.expansion import Expansion
from actors.factory import make_engine
from actors.search.tree_search import TreeSearch
from atpo_async.config import Config, build
from atpo_async.core.errors import ConfigError, EngineDead, GenerationFailed, ProbeMismatch, SetupError, WeightsRejected
from atpo_async.core.tree import TurnTree
from tests.actor_support import STOP, CountingEnvironment, lease
from tests.engine_support import VOCABULARY, altered, save_model, tiny_model, weights_file

TABLE = """
import numpy as np

from actors.engines.base import EngineStats, Generation, SwapReport
from atpo_async.core.tree import VersionSpan


class TableEngine:
    def __init__(self, settings, *, tokens=256, longest=4):
        self.p, self.longest = np.arange(1.0, tokens + 1) / np.arange(1.0, tokens + 1).sum(), longest
        self.draw, self.version, self.done = np.random.default_rng(settings.seed), settings.initial_version, 0

    async def start(self): ...
    async def close(self): ...

    async def generate(self, prompt, sampling, *, request_id, on_running=lambda: None):
        on_running()
        length = min(self.longest, sampling.max_tokens)
        action = np.append(self.draw.choice(len(self.p), length - 1, p=self.p), sampling.stop_token_ids[0])
        span, self.done = VersionSpan(self.version, 0, length), self.done + 1
        return Generation(token_ids=action, logprobs=await self.score([0, *action]), spans=(span,),
                          stop_reason="stop", cached_prompt_tokens=0)

    async def swap(self, weights):
        self.version = weights.manifest.version  # a real engine loads weights.path here
        return SwapReport(version=self.version, pause_s=0.0, load_s=0.0, probe_error=0.0, in_flight=0)

    async def score(self, token_ids):
        return np.log(self.p[np.asarray(token_ids)[1:]]).astype(np.float32)

    def stats(self):
        return EngineStats(version=self.version, in_flight=0, prompt_tokens=0, cached_prompt_tokens=0,
                           generated_tokens=self.done, finished_requests=self.done, failed_requests=0)
"""
"""A user's own engine: every token comes from one table of probabilities, whatever came before it."""

FAULTS = """
import asyncio
from dataclasses import replace

from table_of_this_test import TableEngine


class Lacking:
    def __init__(self, settings): ...
    async def start(self): ...
    async def generate(self, prompt, sampling, *, request_id, on_running): ...


class Plain(TableEngine):
    def score(self, token_ids): ...


class NoStart(TableEngine):
    async def start(self):
        raise OSError("no such accelerator")


class Altering(TableEngine):
    change = staticmethod(lambda made: made)
    gate = None

    async def generate(self, *args, **kwargs):
        made = await super().generate(*args, **kwargs)
        if self.gate is not None:
            await self.gate.wait()
        return self.change(made)


class Swapping(TableEngine):
    raises = returns = None

    async def swap(self, weights):
        report = await super().swap(weights)
        if self.raises is not None:
            raise self.raises
        return report if self.returns is None else self.returns
"""


@pytest.fixture(autouse=True)
def users_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "table_of_this_test.py").write_text(TABLE)
    (tmp_path / "faults_of_this_test.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.endswith("of_this_test")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(0), tmp_path_factory.mktemp("model"))


def config_of(engine: str, **options: object) -> Config:
    return build(
        {
            "search": {"initial_rollouts": 2, "rounds": 1, "branches": 1, "max_action_tokens": 8},
            "model": {"max_context_tokens": 64},
            "actor": {"engine": engine, "engine_options": options},
        }
    )


async def started(folder: Path, engine: str, **options: object) -> CheckedEngine:
    made = make_engine(config_of(engine, **options), folder, actor="actor-0")
    assert isinstance(made, CheckedEngine)
    await made.start()
    return made


def weights_of(tmp_path: Path, version: int, *, off_by: float = 0.0) -> WeightsFile:
    """A version of the model whose probe has the table's log-probs."""
    made = weights_file(tiny_model(version), tmp_path / f"v{version}", version=version)
    p = np.arange(1.0, VOCABULARY + 1) / np.arange(1.0, VOCABULARY + 1).sum()
    logprobs = np.log(p[made.manifest.probe_token_ids[1:]]) + off_by
    manifest = msgspec.structs.replace(made.manifest, probe_logprobs=logprobs.astype(np.float32))
    return WeightsFile(path=made.path, manifest=manifest)


async def act(engine: Engine, count: int = 4) -> Any:
    return await engine.generate([3, 4], Sampling(max_tokens=count, stop_token_ids=(STOP,)), request_id="r")


async def grown(engine: Engine) -> TurnTree:
    async def drop(message: object) -> None: ...

    config = config_of("transformers")
    search = TreeSearch(
        run="r", lease=lease(), engine=engine, environment=CountingEnvironment(), search=config.search,
        expansion=Expansion.of(config.search), max_context_tokens=64, emit=drop,
    )  # fmt: skip
    return await search.grow()


async def test_a_users_engine_grows_a_tree_with_its_own_log_probs_and_version_spans(
    folder: Path, tmp_path: Path
) -> None:
    engine = await started(folder, "table_of_this_test:TableEngine", longest=3)
    report = await engine.swap(weights_of(tmp_path, 1))
    assert report.version == 1
    assert report.probe_error < 1e-6
    tree = await grown(engine)
    assert len(tree.leaves()) == 3
    p = np.arange(1.0, VOCABULARY + 1) / np.arange(1.0, VOCABULARY + 1).sum()
    for turn in tree:
        np.testing.assert_allclose(turn.logprobs, np.log(p[turn.action]), rtol=1e-5)
        assert [(span.version, span.start, span.end) for span in turn.spans] == [(1, 0, 3)]
    assert engine.stats().finished_requests == len(tree)
    await engine.close()


def test_the_example_of_an_engine_is_no_longer_than_the_page_promises() -> None:
    assert len([line for line in TABLE.splitlines() if line.strip()]) <= 30


# --- what is no engine


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [  # what is wrong with each: a part, a part that is not async, the name, the options, the module
        ("faults_of_this_test:Lacking", ConfigError, "Lacking is not an engine: it lacks swap, score, stats, close"),
        ("faults_of_this_test:Plain", ConfigError, "Plain is not an engine: score must be async"),
        ("faults_of_this_test:Nobody", ConfigError, "has no 'Nobody'"),
        ("table_of_this_test:TableEngine", ConfigError, "unexpected keyword argument 'size'"),
        ("nowhere_of_this_test:Engine", SetupError, "cannot be imported"),
    ],
)
def test_what_is_no_engine_is_refused_by_name_when_it_is_made(
    folder: Path, name: str, error: type[Exception], said: str
) -> None:
    options = {"size": 1} if name.startswith("table") else {}
    with pytest.raises(error, match=rf"actor\.engine = '{name}'.*{said}"):
        make_engine(config_of(name, **options), folder, actor="a")


async def test_what_an_engine_raises_at_its_start_is_one_line_with_its_name(folder: Path) -> None:
    with pytest.raises(SetupError, match=r"faults_of_this_test:NoStart' could not be started: .*no such accelerator"):
        await started(folder, "faults_of_this_test:NoStart")


# --- what it generates


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: None, "returned NoneType, not a Generation"),
        (lambda made: with_(made, logprobs=made.logprobs[:-1]), r"logprobs of shape \(3,\) for 4 tokens"),
        (lambda made: with_(made, logprobs=made.logprobs * np.nan), "each needs one, at most 0"),
        (lambda made: with_(made, logprobs=-made.logprobs), "each needs one, at most 0"),
        (lambda made: with_(made, token_ids=made.token_ids[:0]), "at least one integer"),
        (lambda made: with_(made, token_ids=made.token_ids * 1.0), "type float64"),
        (lambda made: with_(made, spans=()), "spans that do not cover 4 tokens"),
        (lambda made: with_(made, stop_reason="eos"), "stop_reason 'eos'"),
    ],
)
async def test_a_generation_that_contradicts_itself_fails_its_request_by_the_field(
    folder: Path, change: Callable[[Any], Any], said: str
) -> None:
    engine = await started(folder, "faults_of_this_test:Altering")
    engine._engine.change = change  # type: ignore[attr-defined]
    with pytest.raises(GenerationFailed, match=f"request r: actor.engine = .*{said}"):
        await act(engine)


def with_(made: Any, **changes: object) -> Any:
    from dataclasses import replace

    return replace(made, **changes)


# --- its weights


async def test_weights_that_the_engine_does_not_reproduce_are_refused_and_requests_wait_for_others(
    folder: Path, tmp_path: Path
) -> None:
    engine = await started(folder, "table_of_this_test:TableEngine")
    with pytest.raises(ProbeMismatch, match=r"version 1: .* nats off .*compared was what score\(\) of actor\.engine"):
        await engine.swap(weights_of(tmp_path, 1, off_by=-0.5))
    waiting = asyncio.create_task(act(engine))
    await asyncio.sleep(0)
    assert not waiting.done()
    await engine.swap(weights_of(tmp_path, 2))
    assert (await waiting).spans[0].version == 2


async def test_what_was_generated_while_weights_failed_their_probe_is_not_handed_out(
    folder: Path, tmp_path: Path
) -> None:
    engine = await started(folder, "faults_of_this_test:Altering")
    gate = engine._engine.gate = asyncio.Event()  # type: ignore[attr-defined]
    request = asyncio.create_task(act(engine))
    await asyncio.sleep(0)
    with pytest.raises(ProbeMismatch):
        await engine.swap(weights_of(tmp_path, 1, off_by=-0.5))
    gate.set()
    await asyncio.sleep(0)
    assert not request.done()
    await engine.swap(weights_of(tmp_path, 1))
    with pytest.raises(GenerationFailed, match="weights failed the probe while it ran"):
        await request


@pytest.mark.parametrize("fault", ["missing tensor", "wrong shape", "short file"])
async def test_weights_that_are_not_the_models_never_reach_the_engine(folder: Path, tmp_path: Path, fault: str) -> None:
    engine = await started(folder, "table_of_this_test:TableEngine")
    with pytest.raises(WeightsRejected, match="weights version 1"):
        await engine.swap(altered(weights_of(tmp_path, 1), fault))
    assert (await act(engine)).spans[0].version == 0


async def test_an_older_version_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = await started(folder, "table_of_this_test:TableEngine")
    await engine.swap(weights_of(tmp_path, 2))
    with pytest.raises(WeightsRejected, match="version 1 is older than version 2"):
        await engine.swap(weights_of(tmp_path, 1))


async def test_weights_that_the_engine_itself_rejects_change_nothing(folder: Path, tmp_path: Path) -> None:
    engine = await started(folder, "faults_of_this_test:Swapping")
    engine._engine.raises = WeightsRejected("not mine")  # type: ignore[attr-defined]
    with pytest.raises(WeightsRejected, match="not mine"):
        await engine.swap(weights_of(tmp_path, 1))
    assert len((await act(engine)).token_ids) == 4


@pytest.mark.parametrize(("attribute", "value"), [("raises", RuntimeError("out of memory")), ("returns", "done")])
async def test_a_swap_that_fails_otherwise_ends_the_engine(
    folder: Path, tmp_path: Path, attribute: str, value: object
) -> None:
    engine = await started(folder, "faults_of_this_test:Swapping")
    setattr(engine._engine, attribute, value)
    with pytest.raises(EngineDead, match=r"weights version 1: actor\.engine = .*(out of memory|not a SwapReport)"):
        await engine.swap(weights_of(tmp_path, 1))
    with pytest.raises(EngineDead, match="is dead: the swap to version 1 failed"):
        await act(engine)


def test_the_built_in_engines_come_in_by_the_same_door(folder: Path) -> None:
    made = make_engine(config_of("transformers"), folder, actor="a")
    assert type(made).__name__ == "TransformersEngine"
    assert EngineSettings(model=folder, max_model_len=8, num_threads=3).cpu_threads == 3
