"""A run in one process: it decodes as an engine must, repeats itself bit for bit, and trains as runs of several do."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines.base import EngineSettings, Generation, Sampling
from atpo_async.config import Config, build
from atpo_async.core.errors import ConfigError, RunMismatch
from atpo_async.run.metrics import Record, read_metrics
from atpo_async.study.workers.settings import in_one_process
from inprocess import idle
from inprocess.generation.decoder import Decoder
from inprocess.generation.engine import BatchEngine
from inprocess.generation.requests import Request, ScoreRequest
from inprocess.run import opened
from tests.e2e_support import WORLD
from tests.engine_support import VOCABULARY, save_model, tiny_model

STOPS = tuple(range(3, VOCABULARY, 9))


# --- decoding -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(1), tmp_path_factory.mktemp("model"))


def decoder_of(folder: Path, *, at_once: int = 64, kv_cache_gb: float = 1.0) -> Decoder:
    return Decoder(
        EngineSettings(
            model=folder, max_model_len=96, max_num_seqs=at_once, device="cpu", num_threads=1, kv_cache_gb=kv_cache_gb
        )
    )


def request(prompt: np.ndarray, **sampling: Any) -> Request:
    settings = Sampling(**{"max_tokens": 8, "stop_token_ids": STOPS, **sampling})
    return Request(prompt=prompt.astype(np.int32), sampling=settings, most=settings.max_tokens, version=3)


def decoded(decoder: Decoder, requests: Sequence[Request]) -> list[Request]:
    waiting, done = list(requests), []
    while waiting or decoder.under_way:
        number = decoder.max_active - len(decoder.under_way)
        new, waiting = waiting[:number], waiting[number:]
        done += decoder.advance(new)
    return done


def error_of(decoder: Decoder, *done: Request) -> float:
    """Nats between what was recorded and the same tokens scored from the beginning, the largest of all."""
    made = [each.generation() for each in done]
    expected = decoder.score_after(
        [ScoreRequest(each.prompt, one.token_ids) for each, one in zip(done, made, strict=True)]
    )
    return max(float(np.abs(a - one.logprobs).max()) for a, one in zip(expected, made, strict=True))


# The cache has space for so many rows of 97 tokens, a third of which are decoded at once.
@pytest.mark.parametrize(("at_once", "rows"), [(64, 1000), (7, 1000), (64, 12)])
def test_chains_that_share_prompts_go_on_and_branch_get_the_log_probs_of_their_own_context(
    folder: Path, at_once: int, rows: int
) -> None:
    decoder = decoder_of(folder, at_once=at_once, kv_cache_gb=rows * 97 * 2 * 2 * 2 * 32 * 4 / 2**30 * 1.001)
    assert decoder.rows._most == rows
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, rng.integers(1, 12)) for _ in range(5)]
    now, cached = [request(prompt) for prompt in prompts for _ in range(4)], 0
    for _ in range(4):
        done = decoded(decoder, now)
        assert len(done) == len(now)
        assert error_of(decoder, *done) < 1e-4
        cached += sum(each.cached for each in done)
        now = []
        for each in done:
            made = each.generation()
            for _ in range(int(rng.choice([0, 1, 1, 2]))):
                seen = rng.integers(0, VOCABULARY, 3)
                now.append(request(np.concatenate([each.prompt, made.token_ids, seen])))
    assert cached > (0 if rows < 20 else 500)


@pytest.mark.parametrize("rows", [12, 18, 24])
def test_a_full_cache_gives_up_no_row_that_is_still_to_be_copied(folder: Path, rows: int) -> None:
    # Branches at turns that others have gone on from, beside prompts that come several times.
    decoder = decoder_of(folder, kv_cache_gb=rows * 97 * 2 * 2 * 2 * 32 * 4 / 2**30 * 1.001)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        contexts = [rng.integers(0, VOCABULARY, rng.integers(2, 40)) for _ in range(4)]
        for _ in range(10):
            now = []
            for chosen in rng.integers(0, len(contexts), 2 * decoder.max_active):
                seen = rng.integers(0, VOCABULARY, int(rng.choice([0, 0, 1, 3])))
                prompt = np.concatenate([contexts[chosen], seen])
                now += [request(prompt) for _ in range(int(rng.choice([1, 1, 2, 3])))]
            done = decoded(decoder, now)
            assert error_of(decoder, *done) < 1e-4
            made = [np.concatenate([each.prompt, each.generation().token_ids]) for each in done]
            contexts += [each for each in made if len(each) < 80]


async def test_a_request_that_is_given_up_under_way_hinders_nothing(folder: Path) -> None:
    engine = BatchEngine(
        EngineSettings(model=folder, max_model_len=96, max_num_seqs=64, device="cpu", num_threads=1, kv_cache_gb=0.05)
    )
    await engine.start()

    def asked(number: int, *, most: int) -> asyncio.Task[Generation]:
        sampling = Sampling(max_tokens=most, stop_token_ids=())
        prompt = np.arange(2, 6 + number)
        return asyncio.ensure_future(engine.generate(prompt, sampling, request_id=str(number)))

    short, long = [asked(number, most=2) for number in range(7)], asked(8, most=60)
    await asyncio.sleep(0)
    assert engine.advance()
    assert [len((await each).token_ids) for each in short] == [2] * 7
    assert len(engine.decoder.under_way) == 1
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
    never = asked(9, most=5)
    await asyncio.sleep(0)
    never.cancel()
    await asyncio.gather(never, return_exceptions=True)
    assert not engine.advance()
    engine.load(tiny_model(2).state_dict(), 1)
    later = asked(3, most=4)
    await asyncio.sleep(0)
    assert engine.advance()
    assert (await later).spans[0].version == 1
    await engine.close()


def test_an_action_ends_at_a_stop_token_or_at_its_limit(folder: Path) -> None:
    for each in decoded(decoder_of(folder), [request(np.arange(1, 5 + i), max_tokens=1 + i % 6) for i in range(30)]):
        made = each.generation()
        assert all(token not in STOPS for token in made.token_ids[:-1])
        assert made.stop_reason == ("stop" if made.token_ids[-1] in STOPS else "length")
        assert len(made.token_ids) == each.most or made.stop_reason == "stop"
        assert [(span.version, span.start, span.end) for span in made.spans] == [(3, 0, len(made.token_ids))]


def test_greedy_takes_the_likeliest_token_beside_requests_that_are_sampled(folder: Path) -> None:
    decoder = decoder_of(folder)
    prompt = np.array([5, 9, 200])
    mixed = decoded(decoder, [request(prompt, temperature=t) for t in (0.0, 1.0, 0.0, 0.7)])
    greedy = [each.tokens for each in mixed if each.sampling.temperature == 0]
    assert greedy[0] == greedy[1]
    model = tiny_model(1)
    import torch

    with torch.no_grad():
        context = torch.tensor([[*prompt.tolist(), *greedy[0][:-1]]])
        assert model(context).logits[0, -1].argmax().item() == greedy[0][-1]


def test_tokens_are_drawn_as_often_as_they_are_likely(folder: Path) -> None:
    decoder = decoder_of(folder, at_once=500)
    prompt = np.array([5, 9, 200])
    drawn = decoded(decoder, [request(prompt, max_tokens=1) for _ in range(2000)])
    counts = np.bincount([each.tokens[0] for each in drawn], minlength=VOCABULARY) / len(drawn)
    every = [ScoreRequest(prompt, np.array([token])) for token in range(VOCABULARY)]
    expected = np.exp(np.concatenate(decoder.score_after(every)))
    assert np.abs(counts - expected).max() < 0.04  # four standard errors of the likeliest one
    assert abs(float(expected.sum()) - 1) < 1e-3


def test_other_weights_forget_what_was_computed_with_the_former_ones(folder: Path) -> None:
    decoder = decoder_of(folder)
    first = decoded(decoder, [request(np.array([5, 9, 200]))])[0]
    decoder.load(tiny_model(2).state_dict())
    later = request(np.concatenate([first.prompt, first.generation().token_ids]))
    assert decoded(decoder, [later])[0].cached == 0
    assert error_of(decoder, later) < 1e-4
    with pytest.raises(ValueError, match="is missing"):
        decoder.load({})


# --- whole runs ---------------------------------------------------------------------------------------------------


def small(policy: Path, out: Path, name: str, **sections: dict[str, object]) -> Config:
    data: dict[str, dict[str, object]] = {
        "run": {"name": name, "dir": str(out), "steps": 4, "seed": 3},
        "model": {"path": str(policy), "max_context_tokens": 64},
        "environment": {"name": "hopqa", "options": dict(WORLD)},
        "search": {"initial_rollouts": 4, "rounds": 1, "branches": 2, "max_action_tokens": 8},
        "staleness": {"max_lag": 1, "trees_per_batch": 4},
        "learner": {"lr": 1e-3, "num_threads": 1, "device": "cpu", "lineage": True},
        "actor": {"device": "cpu", "engine": "transformers"},
        "eval": {"num_tasks": 8, "every_steps": 2, "at_start": False},
        "metrics": {"trees": 1},
    }
    for section, fields in sections.items():
        data[section] = {**data.get(section, {}), **fields}
    return build(data)


def trained(config: Config) -> tuple[list[Record], str, str]:
    """Run it; returns its records, a digest of the weights and its lineage."""
    from atpo_async.run.rundir import RunDir

    loop, selector = idle.new_loop()
    digest = hashlib.sha256()

    async def work(rundir: RunDir) -> None:
        async with opened(in_one_process(config), rundir, selector, lambda step, success: None) as run:
            await run.run()
            for tensor in run.trainer.whole.tensors().values():
                digest.update(tensor.numpy().tobytes())

    try:
        with RunDir.held(in_one_process(config), resume=False) as rundir:
            loop.run_until_complete(work(rundir))
            lineage = (rundir.path / "lineage.jsonl").read_text()
            return list(read_metrics(rundir.metrics_path)), digest.hexdigest(), lineage
    finally:
        loop.close()


def test_the_same_seed_gives_the_same_bits_and_another_one_other_ones(hopqa_policy: Path, tmp_path: Path) -> None:
    first = trained(small(hopqa_policy, tmp_path, "one"))
    again = trained(small(hopqa_policy, tmp_path, "two"))
    other = trained(small(hopqa_policy, tmp_path, "three", run={"seed": 4}))
    assert first[1] == again[1] != other[1]

    def learned(records: list[Record]) -> list[dict[str, float]]:
        return [
            {name: value for name, value in each.metrics.items() if not name.startswith(("time/", "weights/"))
             and not name.endswith("_per_s")}
            for each in records
            if each.source in ("learner", "buffer")
        ]  # fmt: skip

    assert learned(first[0]) == learned(again[0])


def test_its_folder_reads_as_that_of_any_run(hopqa_policy: Path, tmp_path: Path) -> None:
    records, _, lineage = trained(small(hopqa_policy, tmp_path, "one"))
    by_step = {each.step: each.metrics for each in records if "train/loss" in each.metrics}
    assert sorted(by_step) == [1, 2, 3, 4]
    # The first batch is as young as can be, later ones are exactly staleness.max_lag versions old.
    assert [by_step[step]["lag/max"] for step in sorted(by_step)] == [0, 1, 1, 1]
    assert [by_step[step]["lag/mean"] for step in sorted(by_step)] == [0, 1, 1, 1]
    assert by_step[1]["train/trees"] >= 8  # of two batches
    for name in ("is/ess_frac", "kl/mu_prox_k1", "lr", "train/reward", "buffer/no_signal_trees", "tokens/trained"):
        assert name in by_step[3], name
    assert by_step[1]["mismatch/mean_abs"] < 1e-4  # the engine's log-probs are the learner's
    evaluated = {each.step: each.metrics for each in records if "eval/success" in each.metrics}
    assert sorted(evaluated) == [2, 4]
    assert evaluated[4]["eval/tasks"] == 8
    assert evaluated[4]["eval/version_min"] == evaluated[4]["eval/version_max"] == 4
    assert {each.source for each in records} == {"learner", "buffer", "actor-0"}
    assert lineage.count('"batch_id"') == 4

    from atpo_async.report.page import write_report
    from atpo_async.run.rundir import RunDir

    assert write_report(RunDir.open(tmp_path / "one")).is_file()


def test_a_folder_that_is_there_is_refused(hopqa_policy: Path, tmp_path: Path) -> None:
    config = small(hopqa_policy, tmp_path, "one", run={"steps": 1}, eval={"at_end": False})
    trained(config)
    with pytest.raises(RunMismatch, match="exists already"):
        trained(config)


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("learner", "num_processes", 2, "learner.num_processes = 2: one process has one rank"),
        ("actor", "engine", "mine:Engine", "generation has its own engine"),
        ("actor", "tensor_parallel_size", 2, "one process has the whole model"),
        ("metrics", "sinks", ["jsonl", "wandb"], "metrics.sinks has wandb"),
        ("buffer", "follower", True, "there is no journal"),
        ("staleness", "max_uses", 2, "every batch is exactly staleness.max_lag versions old: .*max_uses = 1"),
    ],
)
def test_what_one_process_cannot_do_is_refused_by_name(
    tmp_path: Path, section: str, field: str, value: object, words: str
) -> None:
    config = small(tmp_path, tmp_path, "one", **{section: {field: value}})
    with pytest.raises(ConfigError, match=words):
        in_one_process(config)


def test_nothing_is_given_up_in_one_process_for_the_time_that_it_took(tmp_path: Path) -> None:
    given: list[dict[str, object]] = [{"max_lag": 3}, {"max_lag": 3, "exact_lag": 1}]
    for staleness in given:
        config = in_one_process(small(tmp_path, tmp_path, "one", staleness=staleness))
        assert config.search.generate_timeout_s > 3e8  # ten years
        assert config.staleness.exact_lag == staleness.get("exact_lag", 3)
