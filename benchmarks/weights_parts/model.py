"""Publishing beside real training steps, and real vLLM taking versions up with requests in flight."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.engines.base import EngineSettings, Sampling, SwapReport
from actors.weights.fetcher import WeightsFetcher
from atpo_async.config import Config, WeightsConfig, load
from atpo_async.core.errors import SetupError
from atpo_async.wire.messages import WeightsAnnounced
from benchmarks.learner_parts.gpu import NEEDS
from benchmarks.learner_parts.plan import Plan, made_for
from benchmarks.learner_parts.sides import SIZES, TimedTrainer, make_trainer
from benchmarks.learner_parts.tables import Table, say
from benchmarks.learner_parts.trees import SHAPES
from benchmarks.weights_parts.memory import RUN, Local, Silent
from learner.weights.probe import draw_probe, probe_shape
from learner.weights.staging import Stager
from learner.weights.store import WeightsStore

Over = Callable[[], bool]
PROMPT, ACTION = 64, 2000
"""Tokens of a request."""


def config_for(model: str) -> Config:
    # Nothing of the card is set aside for an engine.
    options = {"learner.lr": "1e-9", "staleness.max_lag": "0", "model.dtype": "bfloat16", "actor.count": "0"}
    if torch.cuda.is_available():
        options |= {"learner.mixed_precision": "bf16", **NEEDS.get(model, {})}
    else:
        options["learner.device"] = "cpu"
    return load((), options)


class Publishing:
    """As ``learner.weights.publication`` has it, without the event loop: copies in this thread, the rest in another."""

    def __init__(self, trainer: TimedTrainer, folder: Path) -> None:
        self.trainer = trainer
        self.store = WeightsStore(run=RUN, fallback=folder, settings=WeightsConfig())
        self.version = 0
        self.aside: list[float] = []
        self.announced: WeightsAnnounced | None = None
        self._stager = Stager("bfloat16")
        self._thread: threading.Thread | None = None
        self.probe = draw_probe(trainer, probe_shape(trainer.config), seed=(0,))

    def begin(self) -> tuple[float, float]:
        """Seconds that this thread was held up by the copies, and by the probe."""
        began = time.perf_counter()
        staged = self._stager.stage(self.trainer.whole.published(), copied=False)
        if staged is None:
            raise AssertionError("nothing asked it to stop")
        copied = time.perf_counter()
        logprobs = self.trainer.whole.probe(self.probe)
        probed = time.perf_counter()
        self.trainer.steps.before_update = staged.until_read
        self.version += 1

        def write(version: int = self.version) -> None:
            self.announced = self.store.add(version, staged, probe_tokens=self.probe, probe_logprobs=logprobs)
            staged.release()
            self.aside.append(time.perf_counter() - began)

        self.wait()
        self._thread = threading.Thread(target=write)
        self._thread.start()
        return copied - began, probed - copied

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        self.wait()
        self.store.close()


def step(model: str, *, rounds: int, trees: int, over: Over) -> tuple[Table, Any]:
    """Steps with and without a version after each."""
    config, cuda = config_for(model), torch.cuda.is_available()
    trainer = make_trainer(SIZES[model], config)
    trainer.warm_up()  # as a learner does: what is left to it, it decides here
    shapes = {"m8": SHAPES["m8"].scaled(1.0 if cuda else 1 / 6)}
    plan = Plan(
        config=config, options=(), device="cuda" if cuda else "cpu", model=model, shapes=shapes, trees=trees,
        rounds=rounds, threads=torch.get_num_threads(), seed=0, cpu_time=False,
    )  # fmt: skip
    batch = made_for(trainer, plan, shapes["m8"], trees)
    with tempfile.TemporaryDirectory(prefix="atpo-bench-") as folder:
        publishing = Publishing(trainer, Path(folder))
        try:
            alone, beside, copies, probes = [], [], [], []
            for number in range(rounds + 2):
                if number > 2 and over():
                    break
                bare = trainer.timed(batch, "tree")["step"]
                copy_s, probe_s = publishing.begin()
                overlapped = trainer.timed(batch, "tree")["step"]
                publishing.wait()
                say(f"step {bare:.3f} s; copies {copy_s:.4f} s, probe {probe_s:.4f} s; next step {overlapped:.3f} s")
                if number > 1:  # what is compiled, and the pinned memory, are made by then
                    alone.append(bare)
                    beside.append(overlapped)
                    copies.append(copy_s)
                    probes.append(probe_s)
        finally:
            publishing.close()
    median = statistics.median
    held = [100 * (c + p) / s for c, p, s in zip(copies, probes, alone, strict=True)]
    found = {
        "step_s": median(alone), "step_beside_s": median(beside), "copies_s": median(copies), "probe_s": median(probes),
        "held_percent": median(held), "until_written_s": median(publishing.aside[2:]),
    }  # fmt: skip
    rows = [
        ("a step", f"{found['step_s']:.3f} s"),
        ("a step while a version is written", f"{found['step_beside_s']:.3f} s"),
        ("held up by the copies", f"{found['copies_s']:.4f} s"),
        ("held up by the probe's log-probs", f"{found['probe_s']:.4f} s"),
        ("both, of a step", f"{found['held_percent']:.2f} % ({min(held):.2f} to {max(held):.2f})"),
        ("until it could be announced", f"{found['until_written_s']:.3f} s"),
    ]
    return Table(f"step, {model}", f"{trees} trees, {len(alone)} rounds", ("", ""), rows), found


def engine(model: str, *, rounds: int, requests: int, over: Over) -> tuple[Table, Any]:
    """Raises SetupError where vLLM is not there."""
    config = config_for(model)
    taking_no_step = config.learner.model_copy(update={"compile": "off"})
    trainer = make_trainer(SIZES[model], config.model_copy(update={"learner": taking_no_step}))
    with tempfile.TemporaryDirectory(prefix="atpo-bench-") as folder:
        there = Path(folder) / "model"
        trainer.policy.hf.to(torch.bfloat16).save_pretrained(there)
        (there / "tokenizer_config.json").write_text("{}")
        trainer.policy.hf.to(torch.float32)
        publishing = Publishing(trainer, Path(folder))
        try:
            taken = asyncio.run(_swaps(there, publishing, rounds=rounds, requests=requests, over=over))
        finally:
            publishing.close()
    if not taken:
        raise SetupError("no version was taken up within --limit-s")
    names = list(taken[0])
    found = {name: statistics.median(each[name] for each in taken) for name in names}
    rows = [(name, f"{found[name]:.3f}", f"{min(e[name] for e in taken):.3f} to {max(e[name] for e in taken):.3f}")
            for name in names]  # fmt: skip
    about = f"{requests} requests in flight, {len(taken)} swaps after the first, which vLLM reloads layer by layer"
    return Table(f"engine, {model}", about, ("seconds", "median", "range"), rows), found


async def _swaps(
    model: Path, publishing: Publishing, *, rounds: int, requests: int, over: Over
) -> list[dict[str, float]]:
    from actors.engines.vllm.engine import VllmEngine

    engine = VllmEngine(
        EngineSettings(
            model=model, dtype="bfloat16", max_model_len=PROMPT + ACTION, max_num_seqs=requests,
            gpu_memory_utilization=0.5,
        )
    )  # fmt: skip
    await engine.start()
    fetcher = WeightsFetcher(
        run=RUN, client=Local(publishing.store), listener=Silent(), settings=WeightsConfig()  # type: ignore[arg-type]
    )  # fmt: skip
    source = np.random.default_rng(0)
    vocab = int(publishing.trainer.policy.hf.config.vocab_size)

    async def generate(number: int) -> None:
        sampling = Sampling(max_tokens=ACTION, stop_token_ids=())
        while True:
            await engine.generate(source.integers(0, vocab, PROMPT), sampling, request_id=str(number))

    tasks = [asyncio.create_task(generate(number), name=f"request {number}") for number in range(requests)]
    taken = []
    try:
        for number in range(rounds + 1):
            if number > 1 and over():
                break
            publishing.begin()
            await asyncio.to_thread(publishing.wait)
            if publishing.announced is None:
                raise AssertionError("it has been written")
            began = time.perf_counter()
            weights = await fetcher.fetch(publishing.announced)
            if weights is None:
                raise AssertionError("it is the newest")
            fetched = time.perf_counter()
            report: SwapReport = await engine.swap(weights)
            all_s = time.perf_counter() - began
            fetcher.release(weights)
            found = {
                "fetch": fetched - began, "of it verification": fetcher.verify_s, "read ahead": report.read_s,
                "pause": report.pause_s, "of it load": report.load_s, "of it probe": report.probe_s,
                "fetch to swap": all_s,
            }  # fmt: skip
            say(", ".join(f"{name} {seconds:.3f}" for name, seconds in found.items()))
            if number:
                taken.append(found)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        fetcher.close()
        await engine.close()
    return taken
