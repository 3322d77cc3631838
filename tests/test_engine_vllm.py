"""The vLLM engine, real, against the transformers model.

One engine serves most tests, because it takes 20 s to start; each takes the next version of the weights.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from actors.engines.base import EngineSettings, Generation, Sampling
from actors.engines.vllm import stages
from actors.engines.vllm.engine import VllmEngine
from actors.engines.vllm.plugin import register
from atpo_async.core.errors import EngineDead, GenerationFailed, ProbeMismatch, SetupError, WeightsRejected
from atpo_async.run.installed import VLLM_PRIVATE
from tests.engine_support import (
    REJECTED,
    altered,
    largest_error,
    reference_logprobs,
    save_model,
    tiny_model,
    truncated,
    weights_file,
)
from tests.vllm_support import (
    LAYERS,
    PROMPT,
    Engine,
    check_layer_left_out,
    check_log_probs,
    check_probe_of_many_sequences,
    check_swap_in_mid_request,
    to_length,
)

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

SEEDS = [tiny_model(seed) for seed in range(3)]
MODELS = {version: SEEDS[version % 3] for version in range(60)}
"""By version; neighbours differ."""


STAGES: list[str] = []
"""What the engine said it was at while it started."""


def as_held(engine: VllmEngine) -> Engine:
    return Engine(engine, MODELS, tolerance=1e-5)


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    folder = save_model(MODELS[0], tmp_path_factory.mktemp("model"))
    engine = VllmEngine(EngineSettings(model=folder, device="cpu", max_model_len=512, max_num_seqs=8, kv_cache_gb=0.25))
    STAGES.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.engines.vllm.engine._at_stage", STAGES.append)
        await engine.start()
    yield engine
    await engine.close()


async def every_place_taken(engine: VllmEngine, *, tokens: int) -> list[asyncio.Task[Generation]]:
    """Twelve requests for eight places, once the engine has begun with them."""
    long = [
        asyncio.create_task(engine.generate([*PROMPT, i], to_length(tokens), request_id=f"long{i}")) for i in range(12)
    ]
    await engine.generate(PROMPT, to_length(1), request_id="short")
    return long


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
@pytest.mark.asyncio(loop_scope="class")
class TestOneEngine:
    async def test_its_start_told_each_stage_in_turn(self, engine: VllmEngine) -> None:
        known = [stages.IMPORTING, stages.PROCESSES, stages.DEVICE, stages.WEIGHTS, stages.WARMING_UP]
        assert [stage for stage in dict.fromkeys(STAGES) if stage in known] == known

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    async def test_log_probs_are_those_of_the_model(self, engine: VllmEngine, temperature: float) -> None:
        await check_log_probs(as_held(engine), temperature=temperature)

    async def test_log_probs_are_under_the_truncated_distribution(self, engine: VllmEngine) -> None:
        sampling = to_length(1, top_k=20, top_p=0.5, temperature=0.8)
        expected = truncated(MODELS[0], PROMPT, sampling)
        found = await asyncio.gather(*(engine.generate(PROMPT, sampling, request_id=str(i)) for i in range(30)))
        for generation in found:
            assert generation.logprobs[0] == pytest.approx(expected[int(generation.token_ids[0])], abs=1e-5)

    async def test_the_stop_token_ends_the_action_and_is_part_of_it(self, engine: VllmEngine) -> None:
        greedy = await engine.generate(PROMPT, to_length(12, temperature=0.0), request_id="greedy")
        stop = int(greedy.token_ids[5])
        first = greedy.token_ids.tolist().index(stop)
        sampling = Sampling(max_tokens=12, temperature=0.0, stop_token_ids=(stop,))
        found = await engine.generate(PROMPT, sampling, request_id="stopped")
        assert found.stop_reason == "stop"
        assert found.token_ids.tolist() == greedy.token_ids[: first + 1].tolist()

    async def test_a_token_id_beyond_the_model_fails_its_own_request_alone(self, engine: VllmEngine) -> None:
        found = await asyncio.gather(
            engine.generate(PROMPT, to_length(5), request_id="good"),
            engine.generate([*PROMPT, 1_000_000], to_length(5), request_id="bad"),
            return_exceptions=True,
        )
        assert isinstance(found[1], GenerationFailed)
        assert "request bad: token id 1000000 at 6; this model has 0 to 255" in str(found[1])
        assert len(found[0].token_ids) == 5  # type: ignore[union-attr]

    async def test_prompt_tokens_from_the_prefix_cache_are_counted(self, engine: VllmEngine) -> None:
        prompt = [(3 * i) % 250 + 3 for i in range(100)]
        before = engine.stats()
        first = await engine.generate(prompt, to_length(3), request_id="first")
        second = await engine.generate([*prompt, 5], to_length(3), request_id="second")
        assert first.cached_prompt_tokens == 0
        # Whole blocks of 32 only.
        assert second.cached_prompt_tokens == 96
        assert largest_error(second, [*prompt, 5], MODELS) < 1e-5
        after = engine.stats()
        assert after.cached_prompt_tokens - before.cached_prompt_tokens == 96
        assert after.prompt_tokens - before.prompt_tokens == 201
        assert after.generated_tokens - before.generated_tokens == 6

    async def test_scores_are_the_models_log_probs_and_begin_from_the_cache(self, engine: VllmEngine) -> None:
        context, answer = [(5 * i) % 250 + 3 for i in range(70)], [50, 8, 91]
        expected = reference_logprobs(MODELS[0], [*context, *answer])[69:]
        before = engine.stats()
        for cached in (0, 64):
            scored = await engine.score_continuation(context, answer, request_id="score")
            assert (scored.version, scored.cached_prompt_tokens) == (0, cached)
            np.testing.assert_allclose(scored.logprobs, expected, atol=1e-5)
        # Blocks of 32 that the cache holds of a continuation are computed again.
        for _ in range(2):
            parted = await engine.score_continuation(context[:20], context[20:], request_id="parted")
            np.testing.assert_allclose(parted.logprobs, reference_logprobs(MODELS[0], context)[19:], atol=1e-5)
        after = engine.stats()
        assert after.scored_requests - before.scored_requests == 4
        assert after.prompt_tokens - before.prompt_tokens == 2 * 73 + 2 * 70
        with pytest.raises(GenerationFailed, match="together this engine takes up to 511"):
            await engine.score_continuation([5] * 511, [6], request_id="long")

    async def test_a_swap_in_mid_request_leaves_each_span_to_its_own_weights(
        self, engine: VllmEngine, tmp_path: Path
    ) -> None:
        await check_swap_in_mid_request(as_held(engine), tmp_path)

    async def test_after_a_swap_no_key_of_the_old_weights_is_served(self, engine: VllmEngine, tmp_path: Path) -> None:
        prompt = [(5 * i) % 250 + 3 for i in range(70)]
        await engine.generate(prompt, to_length(2), request_id="before")
        version = engine.stats().version + 1
        await engine.swap(weights_file(MODELS[version], tmp_path / "weights", version=version))
        generation = await engine.generate(prompt, to_length(20), request_id="after")
        assert generation.cached_prompt_tokens == 0
        assert largest_error(generation, prompt, MODELS) < 1e-5

    async def test_with_every_place_taken_and_the_cache_not_cleared_the_probe_still_runs(
        self, engine: VllmEngine, tmp_path: Path
    ) -> None:
        version = engine.stats().version + 1
        long = await every_place_taken(engine, tokens=300)
        engine._clear_cache = False
        try:
            report = await engine.swap(weights_file(MODELS[version], tmp_path / "weights", version=version))
        finally:
            engine._clear_cache = True
        assert report.probe_error < 1e-5
        for generation in await asyncio.gather(*long):
            assert len(generation.token_ids) == 300
            assert generation.spans[-1].version == version

    async def test_an_older_version_is_refused_and_the_engine_goes_on(self, engine: VllmEngine, tmp_path: Path) -> None:
        version = engine.stats().version
        assert version > 0
        with pytest.raises(WeightsRejected, match=f"version {version - 1} is older than version {version}"):
            await engine.swap(weights_file(MODELS[version - 1], tmp_path / "old", version=version - 1))
        generation = await engine.generate(PROMPT, to_length(5), request_id="after")
        assert largest_error(generation, PROMPT, MODELS) < 1e-5

    @pytest.mark.parametrize(("fault", "named"), REJECTED)
    async def test_faulty_weights_are_rejected_by_name_and_change_nothing(
        self, engine: VllmEngine, tmp_path: Path, fault: str, named: str
    ) -> None:
        version = engine.stats().version
        good = weights_file(MODELS[version + 1], tmp_path / "weights", version=version + 1)
        with pytest.raises(WeightsRejected, match=named):
            await engine.swap(altered(good, fault))
        generation = await engine.generate(PROMPT, to_length(5), request_id="after")
        assert generation.spans[0].version == version
        assert largest_error(generation, PROMPT, MODELS) < 1e-5

    async def test_cancelling_aborts_the_request(self, engine: VllmEngine) -> None:
        long = [
            asyncio.create_task(engine.generate([*PROMPT, i], to_length(200), request_id=f"l{i}")) for i in range(8)
        ]
        await asyncio.sleep(0)
        assert engine.stats().in_flight == 8
        generated = engine.stats().generated_tokens
        for task in long:
            task.cancel()
        # All eight places were taken: this one runs because they are free again.
        await engine.generate(PROMPT, to_length(2), request_id="short")
        assert all(task.cancelled() for task in long)
        assert engine.stats().in_flight == 0
        assert engine.stats().generated_tokens == generated + 2
        assert engine._llm.output_processor.get_num_unfinished_requests() == 0

    async def test_a_prompt_that_is_too_long_fails_alone(self, engine: VllmEngine) -> None:
        with pytest.raises(GenerationFailed, match=r"request long: .*maximum model length of 512"):
            await engine.generate([5] * 600, to_length(3), request_id="long")
        cut = await engine.generate([5] * 506, to_length(30), request_id="cut")
        assert len(cut.token_ids) == 6
        assert cut.stop_reason == "length"

    async def test_a_dropped_tied_head_is_caught_by_the_probe_before_a_token_is_made(
        self, engine: VllmEngine, tmp_path: Path
    ) -> None:
        version = engine.stats().version + 1
        weights = weights_file(MODELS[version], tmp_path / "weights", version=version, drop="lm_head.weight")
        long = asyncio.create_task(engine.generate(PROMPT, to_length(200), request_id="long"))
        await engine.generate(PROMPT, to_length(2), request_id="short")
        after = None
        for _ in range(2):  # the second time with a request that would be served between the two
            with pytest.raises(ProbeMismatch, match=rf"version {version}: (the engine .* nats off|vLLM did not take)"):
                await engine.swap(weights)
            after = after or asyncio.create_task(engine.generate(PROMPT, to_length(5), request_id="after"))
        assert after is not None
        assert not engine.is_dead
        assert not long.done()
        assert not after.done()
        await engine.swap(weights_file(MODELS[version], tmp_path / "whole", version=version))
        assert largest_error(await after, PROMPT, MODELS) < 1e-5
        assert largest_error(await long, PROMPT, MODELS) < 1e-5
        assert (await long).spans[-1].version == version

    async def test_bytes_altered_after_the_fetch_are_caught_by_the_probe(
        self, engine: VllmEngine, tmp_path: Path
    ) -> None:
        version = engine.stats().version + 1
        wrong = altered(weights_file(MODELS[version], tmp_path / "weights", version=version), "altered file")
        with pytest.raises(ProbeMismatch, match=rf"version {version}: the engine .* is \d"):
            await engine.swap(wrong)
        await engine.swap(weights_file(MODELS[version], tmp_path / "whole", version=version))
        generation = await engine.generate(PROMPT, to_length(5), request_id="whole")
        assert largest_error(generation, PROMPT, MODELS) < 1e-5

    async def test_a_file_that_a_worker_cannot_take_changes_nothing(
        self, engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version = engine.stats().version + 1
        good = weights_file(MODELS[version], tmp_path / "weights", version=version)
        long = asyncio.create_task(engine.generate(PROMPT, to_length(200), request_id="long"))
        # As if the file were cut, or removed, between the check and the load.
        monkeypatch.setattr("actors.engines.vllm.engine.check_weights", lambda *args, **kwargs: None)
        with pytest.raises(WeightsRejected, match=f"version {version}: .*has 100 bytes"):
            await engine.swap(altered(good, "short file"))
        with pytest.raises(WeightsRejected, match=f"version {version}: .*No such file"):
            await engine.swap(altered(good, "missing file"))
        assert largest_error(await long, PROMPT, MODELS) < 1e-5
        assert {span.version for span in (await long).spans} == {version - 1}
        await engine.swap(weights_file(MODELS[version], tmp_path / "whole", version=version))
        generation = await engine.generate(PROMPT, to_length(5), request_id="whole")
        assert largest_error(generation, PROMPT, MODELS) < 1e-5

    @pytest.mark.parametrize("name", LAYERS)
    async def test_a_layer_that_a_load_leaves_out_is_named(
        self, engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        await check_layer_left_out(as_held(engine), tmp_path, name, monkeypatch)

    async def test_a_probe_of_many_sequences_runs_with_every_place_taken(
        self, engine: VllmEngine, tmp_path: Path
    ) -> None:
        await check_probe_of_many_sequences(as_held(engine), tmp_path)

    async def test_when_the_core_is_killed_every_request_fails(self, engine: VllmEngine) -> None:
        # Last: nothing brings the core back.
        long = [
            asyncio.create_task(engine.generate([*PROMPT, i], to_length(200), request_id=f"l{i}")) for i in range(4)
        ]
        await engine.generate(PROMPT, to_length(2), request_id="short")
        os.kill(core_of(os.getpid()), signal.SIGKILL)
        for result in await asyncio.gather(*long, return_exceptions=True):
            assert isinstance(result, EngineDead)
        with pytest.raises(EngineDead):
            await engine.generate(PROMPT, to_length(2), request_id="after")
        assert engine.is_dead
        assert engine.stats().in_flight == 0
        await engine.close()
        await engine.close()


def children_of(pid: int) -> dict[int, str]:
    """Process id -> name of the direct children (Linux)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == pid:
            found[int(stat.parent.name)] = name
    return found


def core_of(pid: int) -> int:
    return next(child for child, name in children_of(pid).items() if name.startswith("VLLM::"))


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the tie to the parent is Linux's")
def test_the_engines_processes_end_with_a_killed_actor(tmp_path: Path) -> None:
    folder = save_model(SEEDS[0], tmp_path / "model")
    script = tmp_path / "actor.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import asyncio, sys
            from pathlib import Path
            from actors.engines.base import EngineSettings
            from actors.engines.vllm.engine import VllmEngine

            async def main():
                settings = EngineSettings(
                    model=Path({str(folder)!r}), device="cpu", max_model_len=64, max_num_seqs=2, kv_cache_gb=0.1
                )
                engine = VllmEngine(settings)
                await engine.start()
                print("started", flush=True)
                await asyncio.to_thread(sys.stdin.read)

            if __name__ == "__main__":
                asyncio.run(main())
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as actor:
        assert actor.stdout is not None
        assert any(line == "started\n" for line in actor.stdout), "the engine did not start"
        children = children_of(actor.pid)
        watched = {os.pidfd_open(pid): name for pid, name in children.items()}
        assert any(name.startswith("VLLM::") for name in watched.values())
        actor.kill()
        while watched:
            ended, _, _ = select.select(list(watched), [], [], 20)
            assert ended, f"still there: {list(watched.values())}"
            for fd in ended:
                os.close(fd)
                del watched[fd]


async def test_without_vllm_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(SEEDS[0], tmp_path / "model")
    monkeypatch.setattr("actors.engines.vllm.engine.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="package vllm is not installed; pip install"):
        await VllmEngine(EngineSettings(model=folder, max_model_len=64, max_num_seqs=2)).start()


async def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="nowhere does not exist"):
        await VllmEngine(EngineSettings(model=tmp_path / "nowhere", max_model_len=64, max_num_seqs=2)).start()


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
async def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    folder = save_model(SEEDS[0], tmp_path / "model")
    with pytest.raises(SetupError, match="no GPU here"):
        await VllmEngine(EngineSettings(model=folder, device="cuda", max_model_len=64, max_num_seqs=2)).start()


def test_the_plugin_leaves_other_users_of_vllm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATPO_VLLM_FRONT_END", raising=False)
    monkeypatch.delitem(sys.modules, "actors.engines.vllm.inside", raising=False)
    monkeypatch.setattr(
        "actors.engines.vllm.plugin.die_with_parent", lambda *_: pytest.fail("tied a stranger's process")
    )
    register()
    assert "actors.engines.vllm.inside" not in sys.modules


@needs_vllm
def test_a_scheduler_that_lacks_a_field_which_ours_sets_is_named_with_the_range() -> None:
    from actors.engines.vllm.inside import _ProbesWhilePaused

    class Another:
        def __init__(self) -> None:
            for name in VLLM_PRIVATE:
                if name != "_pause_state":
                    setattr(self, name, None)

    class Ours(_ProbesWhilePaused, Another):
        pass

    with pytest.raises(SetupError, match=r"another scheduler .* it lacks _pause_state; install vllm>=0\.32,<0\.33"):
        Ours()
