"""The transformers engine against the transformers model itself."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from actors.engines.base import EngineSettings, Sampling, WeightsFile
from actors.engines.common.admission import Queue
from actors.engines.transformers.engine import TransformersEngine
from actors.engines.transformers.requests import Request
from actors.factory import make_engine
from atpo_async.config import build
from atpo_async.core.errors import EngineDead, GenerationFailed, ProbeMismatch, SetupError, WaitTimeout, WeightsRejected
from tests.engine_support import (
    END,
    PROBE,
    REJECTED,
    altered,
    largest_error,
    reference_logprobs,
    reference_rows,
    sampled,
    save_model,
    tiny_model,
    truncated,
    weights_file,
)

PROMPT = [7, 30, 41, 9, 200, 13]
MODELS = {version: tiny_model(version) for version in range(3)}


def to_length(count: int, **changes: object) -> Sampling:
    return Sampling(max_tokens=count, stop_token_ids=(), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(MODELS[0], tmp_path_factory.mktemp("model"))


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_num_seqs=8, max_model_len=256))
    await engine.start()
    yield engine
    await engine.close()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_log_probs_are_those_of_the_model(engine: TransformersEngine, temperature: float) -> None:
    prompts = [[*PROMPT[: 2 + i % 5], 50 + i] for i in range(12)]
    found = await asyncio.gather(
        *(
            engine.generate(p, to_length(10 + i, temperature=temperature), request_id=str(i))
            for i, p in enumerate(prompts)
        )
    )
    for i, (prompt, generation) in enumerate(zip(prompts, found, strict=True)):
        assert len(generation.token_ids) == 10 + i
        assert generation.stop_reason == "length"
        assert largest_error(generation, prompt, MODELS, temperature=temperature) < 1e-5


async def test_greedy_takes_the_likeliest_token_each_time(engine: TransformersEngine) -> None:
    generation = await engine.generate(PROMPT, to_length(8, temperature=0.0), request_id="greedy")
    tokens = list(PROMPT)
    for token in generation.token_ids:
        with torch.no_grad():
            assert int(MODELS[0](torch.tensor([tokens])).logits[0, -1].argmax()) == token
        tokens.append(int(token))
    assert largest_error(generation, PROMPT, MODELS) < 1e-5


async def test_log_probs_are_under_the_truncated_distribution(engine: TransformersEngine) -> None:
    sampling = to_length(1, top_k=20, top_p=0.5, temperature=0.8)
    expected = truncated(MODELS[0], PROMPT, sampling)
    found = await asyncio.gather(*(engine.generate(PROMPT, sampling, request_id=str(i)) for i in range(40)))
    for generation in found:
        assert generation.logprobs[0] == pytest.approx(expected[int(generation.token_ids[0])], abs=1e-5)


async def test_the_stop_token_ends_the_action_and_is_part_of_it(engine: TransformersEngine) -> None:
    free = await engine.generate(PROMPT, to_length(30, seed=3), request_id="free")
    stop = int(free.token_ids[5])
    first = free.token_ids.tolist().index(stop)
    found = await engine.generate(
        PROMPT, Sampling(max_tokens=30, stop_token_ids=(END, stop), seed=3), request_id="stopped"
    )
    assert found.stop_reason == "stop"
    assert found.token_ids.tolist() == free.token_ids[: first + 1].tolist()


async def test_a_swap_in_mid_request_leaves_each_span_to_its_own_weights(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    long = [asyncio.create_task(engine.generate([*PROMPT, i], to_length(60), request_id=f"long{i}")) for i in range(4)]
    for version in (1, 2):
        # All requests of a step get one token, so the long ones have about ten more when this one ends.
        await engine.generate(PROMPT, to_length(10), request_id="short")
        report = await engine.swap(weights_file(MODELS[version], tmp_path / str(version), version=version))
        assert report.version == version
        assert report.in_flight == 4
        assert report.probe_error < 1e-5
    for i, generation in enumerate(await asyncio.gather(*long)):
        assert [span.version for span in generation.spans] == [0, 1, 2]
        assert largest_error(generation, [*PROMPT, i], MODELS) < 1e-5
    assert np.abs(await engine.score(PROBE) - reference_logprobs(MODELS[2], PROBE)).max() < 1e-5
    assert engine.stats().version == 2


async def test_an_older_version_is_refused_and_the_engine_goes_on(engine: TransformersEngine, tmp_path: Path) -> None:
    await engine.swap(weights_file(MODELS[2], tmp_path / "2", version=2))
    with pytest.raises(WeightsRejected, match="version 1 is older than version 2"):
        await engine.swap(weights_file(MODELS[1], tmp_path / "1", version=1))
    generation = await engine.generate(PROMPT, to_length(5), request_id="after")
    assert largest_error(generation, PROMPT, MODELS) < 1e-5


@pytest.mark.parametrize(("fault", "named"), REJECTED)
async def test_faulty_weights_are_rejected_by_name_and_change_nothing(
    engine: TransformersEngine, tmp_path: Path, fault: str, named: str
) -> None:
    good = weights_file(MODELS[1], tmp_path / "weights", version=1)
    with pytest.raises(WeightsRejected, match=named):
        await engine.swap(altered(good, fault))
    generation = await engine.generate(PROMPT, to_length(5), request_id="after")
    assert generation.spans[0].version == 0
    assert largest_error(generation, PROMPT, MODELS) < 1e-5


async def test_a_tied_head_may_be_left_out_but_must_not_differ(engine: TransformersEngine, tmp_path: Path) -> None:
    await engine.swap(weights_file(MODELS[1], tmp_path / "1", version=1, drop="lm_head.weight"))
    untied = tiny_model(2, tied=False)
    with pytest.raises(WeightsRejected, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        await engine.swap(weights_file(untied, tmp_path / "2", version=2))
    assert (await engine.generate(PROMPT, to_length(3), request_id="after")).spans[0].version == 1


async def test_a_head_of_its_own_must_be_in_the_stream(tmp_path: Path) -> None:
    untied = tiny_model(0, tied=False)
    engine = TransformersEngine(
        EngineSettings(model=save_model(untied, tmp_path / "model"), device="cpu", max_model_len=64)
    )
    await engine.start()
    try:
        with pytest.raises(WeightsRejected, match=r"lm_head\.weight is missing"):
            await engine.swap(weights_file(untied, tmp_path / "1", version=1, drop="lm_head.weight"))
    finally:
        await engine.close()


async def test_after_a_failed_probe_requests_wait_until_other_weights_have_passed_it(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    wrong = altered(weights_file(MODELS[1], tmp_path / "1", version=1), "other probe")
    long = asyncio.create_task(engine.generate(PROMPT, to_length(200), request_id="long"))
    await engine.generate(PROMPT, to_length(3), request_id="short")
    for _ in range(2):
        with pytest.raises(ProbeMismatch, match=r"version 1: the engine .* is \d.* nats off .*tolerance 0.0001"):
            await engine.swap(wrong)
    after = asyncio.create_task(engine.generate(PROMPT, to_length(3), request_id="after"))
    with pytest.raises(WeightsRejected, match="nonsense"):
        await engine.swap(altered(weights_file(MODELS[1], tmp_path / "1", version=1), "unknown tensor"))
    assert np.abs(await engine.score(PROBE) - reference_logprobs(MODELS[1], PROBE)).max() < 1e-5
    assert not long.done()
    assert not after.done()
    assert (engine.is_dead, engine.stats().version) == (False, 0)
    await engine.swap(weights_file(MODELS[1], tmp_path / "1", version=1))
    assert [span.version for span in (await long).spans] == [0, 1]
    assert largest_error(await long, PROMPT, MODELS) < 1e-5
    assert [span.version for span in (await after).spans] == [1]


async def test_bytes_altered_after_the_fetch_are_caught_by_the_probe(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    wrong = altered(weights_file(MODELS[1], tmp_path / "1", version=1), "altered file")
    with pytest.raises(ProbeMismatch, match=r"version 1: the engine .* is \d"):
        await engine.swap(wrong)


@pytest.mark.parametrize("name", list(MODELS[0].state_dict()))
async def test_every_tensor_that_is_left_as_it_was_is_named_however_small_the_step(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stepped = copy.deepcopy(MODELS[0])
    with torch.no_grad():
        for parameter in stepped.parameters():
            parameter.mul_(1.000001)
    weights = weights_file(stepped, tmp_path / "1", version=1, tolerance=None)
    plain = engine.runner.copy
    # Tied tensors are one: it is left out under both names.
    head = {"lm_head.weight", "model.embed_tokens.weight"}
    stale = head if name in head else {name}

    def copy_most(held: torch.Tensor, tensor: torch.Tensor, of: str) -> None:
        if of not in stale:
            plain(held, tensor, of)

    monkeypatch.setattr(engine.runner, "copy", copy_most)
    with pytest.raises(ProbeMismatch, match=rf"version 1: after the load ({'|'.join(stale)}) is not what the learner"):
        await engine.swap(weights)
    monkeypatch.undo()
    await engine.swap(weights)
    assert engine.stats().version == 1


async def test_a_file_that_vanishes_before_the_load_changes_nothing(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_file(MODELS[1], tmp_path / "1", version=1)
    monkeypatch.setattr(
        "actors.engines.transformers.engine.check_weights", lambda *args, **kwargs: weights.path.unlink()
    )
    with pytest.raises(WeightsRejected, match="version 1: cannot read"):
        await engine.swap(weights)
    assert (await engine.generate(PROMPT, to_length(3), request_id="after")).spans[0].version == 0


async def test_in_bfloat16_honest_swaps_pass_by_the_engines_own_measure_and_other_weights_do_not(
    folder: Path, tmp_path: Path
) -> None:
    engine = TransformersEngine(
        EngineSettings(model=folder, device="cpu", dtype="bfloat16", max_num_seqs=2, max_model_len=256)
    )
    await engine.start()
    stepped, source = copy.deepcopy(MODELS[0]), torch.Generator().manual_seed(0)
    probe = sampled(MODELS[0], sequences=8, length=33)
    try:
        for version in range(1, 6):
            with torch.no_grad():
                for parameter in stepped.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=source), alpha=1e-3)
            report = await engine.swap(
                weights_file(
                    stepped, tmp_path / "w", version=version, tolerance=None, probe=probe, dtype="bfloat16"
                )
            )  # fmt: skip
            assert 1e-4 < report.probe_error < 0.2
        other = weights_file(MODELS[1], tmp_path / "w", version=9, tolerance=None, probe=probe, dtype="bfloat16")
        wrong = msgspec.structs.replace(other.manifest, probe_logprobs=reference_rows(stepped, probe))
        with pytest.raises(ProbeMismatch, match=r"version 9: the engine \(bfloat16 on cpu\) is .* before"):
            await engine.swap(WeightsFile(path=other.path, manifest=wrong))
    finally:
        await engine.close()


@pytest.mark.parametrize("stuck", ["_load", "_step"])
async def test_a_swap_that_is_stuck_fails_the_engine_by_name_and_does_not_hold_up_its_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: str
) -> None:
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_model_len=256, swap_deadline_s=0.05))
    await engine.start()
    goes_on = threading.Event()
    plain = getattr(engine, stuck)

    def waits(work: object) -> None:
        goes_on.wait()
        plain(work)

    monkeypatch.setattr(engine, stuck, waits)
    try:
        long = asyncio.create_task(engine.generate(PROMPT, to_length(200), request_id="long"))
        await asyncio.sleep(0)
        with pytest.raises(WaitTimeout, match=r"waited over 0\.05 s .* weights version 1"):
            await engine.swap(weights_file(MODELS[1], tmp_path / "1", version=1))
        with pytest.raises(EngineDead):
            await long
        assert engine.is_dead
        stepper = engine._stepper
        assert stepper is not None
        if stuck == "_step":
            goes_on.set()  # it comes back after all, to requests that have ended
            await asyncio.wait([stepper])
            assert stepper.exception() is None
        await engine.close()
    finally:
        goes_on.set()


async def test_cancelling_frees_the_slot(folder: Path) -> None:
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_num_seqs=1, max_model_len=256))
    await engine.start()
    try:
        long = asyncio.create_task(engine.generate(PROMPT, to_length(250), request_id="long"))
        await asyncio.sleep(0)
        assert engine.stats().in_flight == 1
        long.cancel()
        await engine.generate(PROMPT, to_length(2), request_id="short")
        assert long.cancelled()
        assert engine.stats().in_flight == 0
        assert engine.stats().generated_tokens == 2
    finally:
        await engine.close()


async def test_a_next_turn_starts_from_the_keys_of_the_turn_before(engine: TransformersEngine) -> None:
    first = await engine.generate(PROMPT, to_length(6), request_id="first")
    context = [*PROMPT, *first.token_ids.tolist(), 77, 78]
    second = await engine.generate(context, to_length(6), request_id="second")
    assert first.cached_prompt_tokens == 0
    # The last token of an action was sampled but never fed.
    assert second.cached_prompt_tokens == len(PROMPT) + 5
    assert largest_error(second, context, MODELS) < 1e-5
    assert engine.stats().cached_prompt_tokens == len(PROMPT) + 5


async def test_a_seed_fixes_the_action_whatever_else_runs(engine: TransformersEngine) -> None:
    alone = await engine.generate(PROMPT, to_length(12, seed=5), request_id="alone")
    crowd = await asyncio.gather(
        *(engine.generate(PROMPT, to_length(12, seed=5 + i), request_id=f"crowd{i}") for i in range(20))
    )
    assert crowd[0].token_ids.tolist() == alone.token_ids.tolist()
    assert len({tuple(g.token_ids) for g in crowd}) > 10


async def test_a_prompt_that_is_too_long_fails_alone(engine: TransformersEngine) -> None:
    with pytest.raises(GenerationFailed, match="a prompt of 256 tokens"):
        await engine.generate([5] * 256, to_length(3), request_id="long")
    cut = await engine.generate([5] * 250, to_length(30), request_id="cut")
    assert len(cut.token_ids) == 6
    assert engine.stats().failed_requests == 1


async def test_closing_fails_what_is_in_flight_and_may_be_repeated(folder: Path) -> None:
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_model_len=256))
    await engine.start()
    long = asyncio.create_task(engine.generate(PROMPT, to_length(250), request_id="long"))
    await asyncio.sleep(0)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineDead, match="closed"):
        await long
    assert engine.is_dead


async def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="nowhere does not exist"):
        await TransformersEngine(EngineSettings(model=tmp_path / "nowhere", max_model_len=64)).start()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
async def test_a_gpu_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(SetupError, match="no GPU here"):
        await TransformersEngine(EngineSettings(model=folder, device="cuda", max_model_len=64)).start()


@pytest.mark.parametrize("unknown", [-1, 256, 1_000_000])
async def test_a_token_id_beyond_the_model_fails_its_own_request_and_none_beside_it(
    engine: TransformersEngine, unknown: int
) -> None:
    found = await asyncio.gather(
        engine.generate(PROMPT, to_length(5), request_id="good"),
        engine.generate([*PROMPT, unknown], to_length(5), request_id="bad"),
        return_exceptions=True,
    )
    assert isinstance(found[1], GenerationFailed)
    assert f"request bad: token id {unknown} at 6; this model has 0 to 255" in str(found[1])
    assert len(found[0].token_ids) == 5  # type: ignore[union-attr]
    assert engine.stats().failed_requests == 1


@pytest.mark.parametrize("where", ["_admit", "stop_reason", "_drop_cancelled"])
async def test_an_error_between_two_steps_fails_every_request_at_once_with_its_cause(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a slip of ours")

    monkeypatch.setattr(Request if where == "stop_reason" else engine, where, breaks)
    requests = [asyncio.create_task(engine.generate(PROMPT, to_length(5), request_id=str(i))) for i in range(3)]
    for request in requests:
        with pytest.raises(EngineDead, match="its steps ended: ZeroDivisionError: a slip of ours"):
            await request
    assert engine.is_dead
    with pytest.raises(EngineDead, match="a slip of ours"):
        await engine.generate(PROMPT, to_length(5), request_id="late")


async def test_steps_that_somebody_cancels_end_the_engine_by_name(engine: TransformersEngine) -> None:
    request = asyncio.create_task(engine.generate(PROMPT, to_length(200), request_id="long"))
    await asyncio.sleep(0)
    assert engine._stepper is not None
    engine._stepper.cancel()
    with pytest.raises(EngineDead, match="its steps were cancelled"):
        await request
    assert engine.is_dead


async def test_each_actor_draws_its_own_numbers_and_the_same_ones_in_every_run(folder: Path) -> None:
    async def drawn(seed: int, actor: str) -> list[int]:
        config = build(
            {
                "run": {"seed": seed}, "model": {"path": str(folder), "max_context_tokens": 128},
                "actor": {"engine": "transformers", "device": "cpu"},
            }
        )  # fmt: skip
        engine = make_engine(config, folder, actor=actor)
        await engine.start()
        try:
            return list((await engine.generate(PROMPT, to_length(20), request_id="a")).token_ids)
        finally:
            await engine.close()

    one = await drawn(5, "actor-0")
    assert await drawn(5, "actor-0") == one
    assert await drawn(5, "actor-1") != one
    assert await drawn(6, "actor-0") != one


async def test_a_request_says_when_it_has_left_the_queue(folder: Path) -> None:
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_num_seqs=1, max_model_len=256))
    await engine.start()
    said: list[str] = []

    async def generate(name: str) -> None:
        await engine.generate(PROMPT, to_length(5), request_id=name, on_running=lambda: said.append(f"{name} runs"))
        said.append(f"{name} is done")

    try:
        await asyncio.gather(*(generate(name) for name in "abc"))
    finally:
        await engine.close()
    assert [line for line in said if line.endswith("runs")] == ["a runs", "b runs", "c runs"]
    assert said.index("a runs") < said.index("a is done") < said.index("c runs")


async def test_a_queue_lets_the_next_in_when_one_ends_or_gives_up_waiting() -> None:
    queue, runs = Queue(2), []
    with queue.entered(lambda: runs.append("a")):
        with queue.entered(lambda: runs.append("b")):
            third = queue.entered(lambda: runs.append("c"))
            third.__enter__()
            with queue.entered(lambda: runs.append("d")):
                assert runs == ["a", "b"]
            assert runs == ["a", "b"]
        assert runs == ["a", "b", "c"]
        third.__exit__(None, None, None)
        with queue.entered(lambda: runs.append("e")):
            assert runs == ["a", "b", "c", "e"]
