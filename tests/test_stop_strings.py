"""Texts that end an action: in both engines, from the environment on, and refused where nothing looks for them."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from actors.engines.base import Engine, EngineSettings, Generation, Sampling
from actors.engines.checked import CheckedEngine
from actors.engines.common.stop_strings import StopStrings
from actors.engines.transformers.engine import TransformersEngine
from actors.factory import make_engine
from actors.hosting.host import HostedEnvironment
from actors.search.budget import budget_of
from atpo_async.config import build
from atpo_async.core.errors import ConfigError, GenerationFailed, SetupError
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.values import Limits
from atpo_async.models.tokenizers import load_tokenizer
from tests.actor_support import CountingEnvironment
from tests.engine_support import largest_error, save_model, tiny_model

PROMPT = [7, 30, 41, 9, 200, 13]
MODELS = {0: tiny_model(0)}
PIECES = ["a ", "<", "</", "sea", "rch", ">", ">\n", "> y", "é", "<|end|>"]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def of_pieces(tokens: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in tokens)


def first_end(tokens: Sequence[int], *strings: str) -> int | None:
    """How many tokens an action has when it ends; None where it does not."""
    looks = StopStrings(of_pieces)
    return next((n for n in range(1, len(tokens) + 1) if looks.ended(tokens[:n], strings)), None)


@pytest.mark.parametrize(
    ("tokens", "strings", "end"),
    [
        ([0, 2, 3, 4, 5, 0], ("</search>",), 5),
        ([0, 2, 3, 4, 6, 0], ("</search>",), 5),  # its last token reaches beyond the text
        ([2, 3, 4, 7], ("</search>",), 4),
        ([1, 3, 4, 5, 0], ("</search>",), None),
        ([2, 3, 4, 0, 5], ("</search>",), None),
        ([0, 8, 0], ("é",), 2),
        ([0, 9], ("<|end|>",), 2),
        ([2, 3, 4, 5], ("a ", "</search>"), 4),
        ([0, 2, 3, 4, 5], ("a ", "</search>"), 1),
    ],
)
def test_an_action_ends_with_the_token_that_completes_the_text(
    tokens: list[int], strings: tuple[str, ...], end: int | None
) -> None:
    assert first_end(tokens, *strings) == end


# --- the engines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(MODELS[0], tmp_path_factory.mktemp("model"))


def settings(folder: Path, **changes: Any) -> EngineSettings:
    return EngineSettings(
        model=folder, device="cpu", max_model_len=256, max_num_seqs=4, kv_cache_gb=0.25, **changes
    )  # fmt: skip


async def generated(engine: Engine, request_id: str, **changes: Any) -> Generation:
    sampling = Sampling(max_tokens=24, stop_token_ids=(), seed=3, **changes)
    return await engine.generate(PROMPT, sampling, request_id=request_id)


async def check_the_text_ends_the_action_and_no_token_is_lost(engine: Engine, folder: Path) -> None:
    free = await generated(engine, "free")
    tokenizer = load_tokenizer(folder)
    words = tokenizer.decode(free.token_ids.tolist()).split()
    # From within one token to within another: the last one reaches beyond the text.
    stop = f"{words[9][1:]} {words[10]} {words[11][:2]}"
    found = await generated(engine, "stopped", stop_strings=("nowhere", stop))
    assert found.stop_reason == "stop"
    assert found.token_ids.tolist() == free.token_ids[:12].tolist()
    assert [(span.start, span.end) for span in found.spans] == [(0, 12)]
    assert largest_error(found, PROMPT, MODELS) < 1e-5
    other = await generated(engine, "other", stop_strings=("nowhere",))
    assert other.stop_reason == "length"
    assert other.token_ids.tolist() == free.token_ids.tolist()


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(settings(folder, stop_strings=True))
    await engine.start()
    yield engine
    await engine.close()


async def test_the_transformers_engine_ends_an_action_at_a_text(engine: TransformersEngine, folder: Path) -> None:
    await check_the_text_ends_the_action_and_no_token_is_lost(engine, folder)


async def test_a_special_tokens_own_text_ends_an_action(engine: TransformersEngine, folder: Path) -> None:
    looks = StopStrings.of_folder(folder)
    assert looks.ended([9, 9, 1], ("<end>",))
    assert not looks.ended([9, 1, 9, 9, 9, 9, 9, 9], ("<end>",))


async def test_an_engine_made_without_a_tokenizer_says_so(folder: Path) -> None:
    engine = TransformersEngine(settings(folder))
    await engine.start()
    with pytest.raises(GenerationFailed, match=r"request r has stop strings; .*EngineSettings\(stop_strings=True\)"):
        await generated(engine, "r", stop_strings=("x",))
    await engine.close()


async def test_a_model_folder_without_a_tokenizer_is_refused_at_the_start(tmp_path: Path) -> None:
    MODELS[0].save_pretrained(tmp_path)
    engine = TransformersEngine(settings(tmp_path, stop_strings=True))
    with pytest.raises(SetupError, match=r"ends actions at texts \(stop_strings\).* copy the tokenizer's files"):
        await engine.start()
    await engine.close()


@pytest_asyncio.fixture
async def vllm_engine(folder: Path) -> AsyncIterator[Engine]:
    from actors.engines.vllm.engine import VllmEngine

    engine = VllmEngine(settings(folder, stop_strings=True))
    await engine.start()
    yield engine
    await engine.close()


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
async def test_vllm_ends_an_action_at_a_text(vllm_engine: Engine, folder: Path) -> None:
    await check_the_text_ends_the_action_and_no_token_is_lost(vllm_engine, folder)


# --- the environment's part ------------------------------------------------------------------------------------------


class Tagged(CountingEnvironment):
    stop_strings: Any = ("</search>", "</answer>")


def checked(strings: Any) -> CheckedEnvironment:
    plain = Tagged()
    plain.stop_strings = strings
    return CheckedEnvironment(plain, name="my_task:make", limits=Limits(vocab_size=256, max_context_tokens=64))


@pytest.mark.parametrize(
    ("said", "taken"),
    [("</a>", ("</a>",)), (["</a>", "</b>", "</a>"], ("</a>", "</b>")), ({"</a>"}, ("</a>",)), ((), ())],
)
def test_stop_strings_become_a_tuple(said: Any, taken: tuple[str, ...]) -> None:
    assert checked(said).stop_strings == taken


@pytest.mark.parametrize("said", [None, 3, ("",), ("</a>", 5), [b"</a>"], {"</a>": 1}, ["x"] * 65])
def test_what_is_no_list_of_texts_is_refused_before_anything_starts(said: Any) -> None:
    with pytest.raises(ConfigError, match=r"^environment 'my_task:make': stop_strings is .*expected a tuple"):
        checked(said)


def test_an_environment_without_the_attribute_has_none() -> None:
    plain = CountingEnvironment()
    found = CheckedEnvironment(plain, name="my_task:make", limits=Limits(vocab_size=256, max_context_tokens=64))
    assert found.stop_strings == ()


async def test_the_environments_strings_reach_the_sampling_of_every_action() -> None:
    async with HostedEnvironment(lambda: checked(("</search>",)), name="tagged", step_timeout_s=30.0) as environment:
        assert environment.stop_strings == ("</search>",)
        assert environment.stop_token_ids
    search = build({}).search
    budget = budget_of(search, kind="train", stop_token_ids=(1,), stop_strings=environment.stop_strings)
    assert budget.sampling.stop_strings == ("</search>",)
    assert hash(budget.sampling)


class Deaf:
    """An engine that knows nothing of stop strings."""

    def __init__(self, settings: EngineSettings) -> None: ...
    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def generate(self, *args: Any, **options: Any) -> Any: ...
    async def swap(self, weights: Any) -> Any: ...
    async def score(self, token_ids: Any) -> np.ndarray:
        return np.zeros(1)

    def stats(self) -> Any: ...


class Hearing(Deaf):
    supports_stop_strings = True


def test_a_users_engine_that_does_not_look_for_texts_is_refused_with_the_reason(folder: Path) -> None:
    def made(engine: str, strings: tuple[str, ...]) -> Engine:
        config = build({"environment": {"name": "my_task:make"}, "actor": {"engine": engine}})
        return make_engine(config, folder, actor="a", stop_strings=strings)

    with pytest.raises(
        ConfigError, match=r"environment 'my_task:make' ends actions at texts .*test_stop_strings:Deaf'"
    ):
        made("tests.test_stop_strings:Deaf", ("</search>",))
    assert isinstance(made("tests.test_stop_strings:Deaf", ()), CheckedEngine)
    assert isinstance(made("tests.test_stop_strings:Hearing", ("</search>",)), CheckedEngine)
