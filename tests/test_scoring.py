"""Engines tell how probable given tokens are to them: the transformers engine, and users' own as they are watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from actors.engines.base import EngineSettings, Sampling, Scored, SwapReport, WeightsFile
from actors.engines.checked import CheckedEngine
from actors.engines.transformers.engine import TransformersEngine
from atpo_async.core.errors import EngineDead, GenerationFailed
from tests.actor_support import ScriptedEngine
from tests.engine_support import reference_logprobs, save_model, tiny_model, weights_file

CONTEXT = [7, 30, 41, 9, 200, 13]
ANSWER = [50, 8, 91, 120]
MODELS = {version: tiny_model(version) for version in range(2)}


def expected(context: list[int], answer: list[int], version: int = 0) -> np.ndarray:
    return reference_logprobs(MODELS[version], [*context, *answer])[len(context) - 1 :]


def to_length(count: int) -> Sampling:
    return Sampling(max_tokens=count, stop_token_ids=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(MODELS[0], tmp_path_factory.mktemp("model"))


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_num_seqs=4, max_model_len=64))
    await engine.start()
    yield engine
    await engine.close()


async def test_scores_are_the_models_log_probs_beside_requests_that_generate(engine: TransformersEngine) -> None:
    asked = [(CONTEXT[: 1 + i % 6], ANSWER[: 1 + i % 4]) for i in range(9)]
    acting = [engine.generate([*CONTEXT, i], to_length(6), request_id=f"a{i}") for i in range(3)]
    scoring = [engine.score_continuation(*pair, request_id=f"s{i}") for i, pair in enumerate(asked)]
    found = await asyncio.gather(*scoring, *acting)
    for pair, scored in zip(asked, found, strict=False):
        assert isinstance(scored, Scored)
        assert scored.version == 0
        assert scored.logprobs.dtype == np.float32
        np.testing.assert_allclose(scored.logprobs, expected(*pair), atol=1e-5)
    assert engine.stats().scored_requests == 9
    assert engine.stats().finished_requests == 3
    read = sum(len(context) + len(answer) for context, answer in asked)
    assert engine.stats().prompt_tokens == read + 3 * (len(CONTEXT) + 1)


async def test_many_scores_in_little_memory_are_the_same(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.engines.transformers.runner.SCORED_LOGITS", 1500)
    asked = [([*CONTEXT, i], ANSWER[: 1 + i]) for i in range(4)]
    found = await asyncio.gather(*(engine.score_continuation(*pair, request_id="s") for pair in asked))
    for pair, scored in zip(asked, found, strict=True):
        np.testing.assert_allclose(scored.logprobs, expected(*pair), atol=1e-5)


async def test_a_score_begins_from_the_keys_of_its_chain_and_the_next_turn_from_those_of_the_score(
    engine: TransformersEngine,
) -> None:
    first = await engine.generate(CONTEXT, to_length(4), request_id="first")
    context = [*CONTEXT, *first.token_ids.tolist(), 77, 78]
    scored = await engine.score_continuation(context, ANSWER, request_id="score")
    assert scored.cached_prompt_tokens == len(CONTEXT) + 3
    np.testing.assert_allclose(scored.logprobs, expected(context, ANSWER), atol=1e-5)
    second = await engine.generate([*context], to_length(2), request_id="second")
    assert second.cached_prompt_tokens == len(context) - 1
    again = await engine.score_continuation(context, ANSWER, request_id="again")
    np.testing.assert_allclose(again.logprobs, scored.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "answer", "said"),
    [
        ([], [5], "1 tokens to score after a context of 0"),
        ([5], [], "0 tokens to score after a context of 1"),
        ([5] * 60, [5] * 4, "together this engine takes up to 63"),
        ([5], [6, 256], "token id 256 at 2; this model has 0 to 255"),
    ],
)
async def test_what_cannot_be_scored_fails_alone_by_name(
    engine: TransformersEngine, context: list[int], answer: list[int], said: str
) -> None:
    good, bad = await asyncio.gather(
        engine.score_continuation(CONTEXT, ANSWER, request_id="good"),
        engine.score_continuation(context, answer, request_id="bad"),
        return_exceptions=True,
    )
    assert isinstance(good, Scored)
    assert isinstance(bad, GenerationFailed)
    assert "request bad" in str(bad)
    assert said in str(bad)
    assert engine.stats().failed_requests == 1


async def test_a_score_waits_for_its_turn_and_a_cancelled_one_takes_no_place(engine: TransformersEngine) -> None:
    acting = [asyncio.create_task(engine.generate([*CONTEXT, i], to_length(50), request_id=f"{i}")) for i in range(4)]
    begun: list[str] = []
    dropped = asyncio.create_task(
        engine.score_continuation(CONTEXT, ANSWER, request_id="dropped", on_running=lambda: begun.append("dropped"))
    )
    kept = asyncio.create_task(
        engine.score_continuation(CONTEXT, ANSWER, request_id="kept", on_running=lambda: begun.append("kept"))
    )
    await asyncio.sleep(0)
    dropped.cancel()
    await asyncio.wait({dropped})
    assert begun == []
    acting[0].cancel()
    scored = await kept
    assert begun == ["kept"]
    np.testing.assert_allclose(scored.logprobs, expected(CONTEXT, ANSWER), atol=1e-5)
    for task in acting:
        task.cancel()
    await asyncio.wait(acting)
    assert engine.stats().scored_requests == 1


async def test_a_score_during_a_swap_is_under_one_version_and_says_which(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    weights = weights_file(MODELS[1], tmp_path / "v1", version=1)
    swap = asyncio.create_task(engine.swap(weights))
    scoring = [engine.score_continuation([*CONTEXT, i], ANSWER, request_id=str(i)) for i in range(6)]
    found = await asyncio.gather(*scoring)
    await swap
    after = await engine.score_continuation(CONTEXT, ANSWER, request_id="after")
    assert after.version == 1
    np.testing.assert_allclose(after.logprobs, expected(CONTEXT, ANSWER, 1), atol=1e-5)
    for i, scored in enumerate(found):
        np.testing.assert_allclose(scored.logprobs, expected([*CONTEXT, i], ANSWER, scored.version), atol=1e-5)


async def test_a_closed_engine_scores_nothing(folder: Path) -> None:
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_model_len=64))
    await engine.start()
    pending = asyncio.create_task(engine.score_continuation(CONTEXT, ANSWER, request_id="pending"))
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineDead):
        await pending
    with pytest.raises(EngineDead, match="late"):
        await engine.score_continuation(CONTEXT, ANSWER, request_id="late")


# --- engines of users ----------------------------------------------------------------------------------------------


class Own(ScriptedEngine):
    """``score`` counts tokens down from 0; a swap waits for ``gate`` where that is set."""

    gate: asyncio.Event | None = None
    off_by = 0

    async def score(self, token_ids: Any) -> np.ndarray:
        if self.gate is not None and len(token_ids) > 8:
            await self.gate.wait()
        return -np.arange(len(token_ids) - 1 + self.off_by, dtype=np.float32) - self.version

    async def swap(self, weights: WeightsFile) -> SwapReport:
        report = await super().swap(weights)
        return msgspec.structs.replace(report) if isinstance(report, msgspec.Struct) else report


class Scoring(Own):
    answers: Any = Scored(logprobs=np.array([-0.5, -0.25, 0.0, -1.0]), version=3, cached_prompt_tokens=2)

    async def score_continuation(self, context: Any, continuation: Any, *, request_id: str, on_running: Any) -> Any:
        on_running()
        return self.answers


async def watched(engine: ScriptedEngine, folder: Path) -> CheckedEngine:
    made = CheckedEngine(engine, EngineSettings(model=folder, device="cpu", max_model_len=64), name="own:Engine")
    await made.start()
    return made


async def test_an_engine_without_a_method_of_its_own_is_asked_by_its_score(folder: Path) -> None:
    engine = await watched(Own(), folder)
    begun: list[bool] = []
    scored = await engine.score_continuation(
        np.array(CONTEXT), np.array(ANSWER), request_id="r", on_running=lambda: begun.append(True)
    )
    assert scored.logprobs.tolist() == [-5.0, -6.0, -7.0, -8.0]
    assert (scored.version, begun) == (0, [True])


async def test_an_engines_own_method_is_preferred(folder: Path) -> None:
    scored = await (await watched(Scoring(), folder)).score_continuation(CONTEXT, ANSWER, request_id="r")
    assert scored.logprobs.tolist() == [-0.5, -0.25, 0.0, -1.0]
    assert (scored.version, scored.cached_prompt_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (np.zeros(4), r"score_continuation\(\) returned ndarray, not a Scored"),
        (Scored(logprobs=np.zeros(3), version=0), r"shape \(3,\) for 4 tokens"),
        (Scored(logprobs=np.array([0.0, np.nan, 0.0, 0.0]), version=0), "each needs one, at most 0"),
        (Scored(logprobs=np.array([0.0, 0.5, 0.0, 0.0]), version=0), "each needs one, at most 0"),
    ],
)
async def test_what_a_users_engine_says_is_checked_by_name(folder: Path, answers: object, said: str) -> None:
    own = Scoring()
    own.answers = answers
    with pytest.raises(GenerationFailed, match=f"request r: actor.engine = 'own:Engine'.*{said}"):
        await (await watched(own, folder)).score_continuation(CONTEXT, ANSWER, request_id="r")


async def test_a_score_of_another_length_fails_by_name(folder: Path) -> None:
    own = Own()
    own.off_by = 1
    with pytest.raises(GenerationFailed, match=r"score\(\) returned log-probs of shape \(10,\) for 9 tokens"):
        await (await watched(own, folder)).score_continuation(CONTEXT, ANSWER, request_id="r")


async def test_a_users_engine_scores_again_where_a_swap_fell_in_between(folder: Path, tmp_path: Path) -> None:
    own = Own()
    own.gate = asyncio.Event()
    engine = await watched(own, folder)
    pending = asyncio.create_task(engine.score_continuation(CONTEXT, ANSWER, request_id="r"))
    await asyncio.sleep(0)
    weights = weights_file(MODELS[0], tmp_path / "v1", version=1, probe=np.array([3, 4, 5], dtype=np.int32))
    manifest = msgspec.structs.replace(weights.manifest, probe_logprobs=np.array([-1.0, -2.0], dtype=np.float32))
    await engine.swap(WeightsFile(path=weights.path, manifest=manifest))
    own.gate.set()
    scored = await pending
    assert scored.version == 1
    assert scored.logprobs.tolist() == [-6.0, -7.0, -8.0, -9.0]
