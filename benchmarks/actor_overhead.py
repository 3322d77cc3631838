"""What the actor costs: tokens/s over an actor, against the same requests sent straight to the same engine.

Both sides run in one process on one engine, one after the other, several times in turn.  The actor's side is the real
thing: leases over a socket from another process, the environment, tree search, and every turn streamed, checked, and
acknowledged there.  The straight side sends the recorded requests (same prompts, same number of tokens) in the order in
which they came, with as many in flight as the actor had on average, and an equally empty prefix cache; with vLLM they
go to its AsyncLLM itself, past everything of ours.

    .venv/bin/python benchmarks/actor_overhead.py configs/demo.toml --model MODEL_FOLDER
    .venv/bin/python benchmarks/actor_overhead.py --model 0.6b --in-flight 256 --device cuda --limit-s 540

``--model`` takes a folder, or a size (``demo``, ``0.6b``, ``1.7b``, ``4b``: Qwen3's shape, random weights, made here).
With ``--in-flight N`` the task is made up (benchmarks/fast_engine.py): 12 chains a tree of 4 turns, 512 tokens of
prompt, 200 of observation and 128 of action, and as many trees as have N requests in flight.

With ``--messages`` what the message layer costs: the actor on the demo's task in token ids, and on the same task, with
the same ids, in messages (benchmarks/message_task.py), in turn.

Prints one JSON object; ``--json FILE`` writes it too.  No round begins after ``--limit-s``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

# A script's own folder comes first on the path, and there `buffer.py` would be taken for the package `buffer`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil

from actors.actor import Actor
from actors.engines import base
from actors.engines.vllm.engine import VllmEngine
from actors.environments import host_environment
from actors.factory import engine_name, make_engine
from atpo_async.config import Config, LinksConfig, load
from atpo_async.links.client import Client
from atpo_async.links.server import Server
from atpo_async.wire.messages import ActorToBuffer, BufferToActor, Lease, LeaseRequest, Leases, Message, TreeClosed
from atpo_async.wire.records import TurnRecords
from benchmarks import message_task
from benchmarks.script import machine


def serve(pipe: Connection, settings: LinksConfig, num_trees: int) -> None:
    """A process that grants ``num_trees`` leases a round and acknowledges every turn."""

    async def main() -> None:
        granted = closed = round_number = 0
        over = asyncio.Event()

        async def handle(peer: str, message: object) -> Message | None:
            nonlocal granted, closed
            if isinstance(message, TreeClosed):
                closed += 1
            if not isinstance(message, LeaseRequest):
                return None
            count = min(message.count, num_trees - granted)
            leases = tuple(_lease(round_number * num_trees + granted + i) for i in range(count))
            granted += count
            finished = closed >= num_trees
            return Leases(leases=leases, closed_because="all are out", retry_after_s=0.005, finished=finished)

        async with Server(
            "tcp://127.0.0.1:0", name="buffer", receives=ActorToBuffer, handler=handle, settings=settings
        ) as server:
            pipe.send(server.endpoint)
            while not over.is_set():
                word = await asyncio.to_thread(pipe.recv)
                if word == "end":
                    over.set()
                granted = closed = 0
                round_number += 1
                pipe.send("ready")

    asyncio.run(main())


def _lease(index: int) -> Lease:
    return Lease(
        tree_id=f"b{index}",
        task_index=index,
        kind="train",
        epoch=0,
        lifetime_s=600.0,
        min_version=0,
        seed=index,
        committed=TurnRecords.of(()),
    )


class Recorder:
    """The engine, and what was asked of it."""

    def __init__(self, engine: base.Engine) -> None:
        self._engine = engine
        self.requests: list[tuple[np.ndarray, base.Sampling]] = []
        self.in_flight_s = 0.0

    async def generate(
        self, prompt: base.Tokens, sampling: base.Sampling, *, request_id: str, on_running: base.OnRunning = base.ignore
    ) -> base.Generation:
        began = time.perf_counter()
        made = await self._engine.generate(prompt, sampling, request_id=request_id, on_running=on_running)
        self.in_flight_s += time.perf_counter() - began
        exact = base.Sampling(temperature=sampling.temperature, max_tokens=len(made.token_ids), stop_token_ids=())
        self.requests.append((np.asarray(prompt), exact))
        return made

    def stats(self) -> base.EngineStats:
        return self._engine.stats()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def swap(self, weights: base.WeightsFile) -> base.SwapReport:
        raise NotImplementedError("the benchmark swaps nothing")

    async def score(self, token_ids: base.Tokens) -> np.ndarray:
        return await self._engine.score(token_ids)


class NoWeights:
    """The engine's own weights are version 0; no other comes."""

    endpoint = ""

    async def next(self) -> None:
        await asyncio.Event().wait()

    def take_counts(self) -> dict[str, float]:
        return {}


async def over_actor(
    config: Config, engine: base.Engine, model: Path, endpoint: str, name: str
) -> tuple[float, Recorder]:
    """Seconds for the trees of one round."""
    recorder = Recorder(engine)
    settings = config.links
    async with (
        host_environment(config, model) as environment,
        Client(endpoint, peer="buffer", identity=name, receives=BufferToActor, settings=settings) as buffer,
    ):
        actor = Actor(
            run="bench",
            name=name,
            config=config,
            engine=recorder,
            environment=environment,
            buffer=buffer,
            weights=NoWeights(),  # type: ignore[arg-type]
            stopping=asyncio.Event(),
        )
        actor.uptake.version = 0
        began = time.perf_counter()
        await actor.work()
        return time.perf_counter() - began, recorder


async def straight(engine: base.Engine, recorder: Recorder, at_once: int, name: str) -> float:
    """Seconds for the same requests, ``at_once`` in flight."""
    places = asyncio.Semaphore(at_once)
    send = raw(engine)

    async def one(number: int, prompt: np.ndarray, sampling: base.Sampling) -> None:
        async with places:
            await send(prompt, sampling, f"{name}-{number}")

    began = time.perf_counter()
    await asyncio.gather(*(one(i, p, s) for i, (p, s) in enumerate(recorder.requests)))
    return time.perf_counter() - began


Send = Callable[[np.ndarray, base.Sampling, str], Awaitable[object]]


def raw(engine: base.Engine) -> Send:
    """One request, past everything of ours where the engine is vLLM's."""
    if not isinstance(engine, VllmEngine):
        return lambda prompt, sampling, request_id: engine.generate(prompt, sampling, request_id=request_id)
    from vllm.inputs import tokens_input

    llm, params = engine._llm, engine._params

    async def send(prompt: np.ndarray, sampling: base.Sampling, request_id: str) -> object:
        output = None
        async for output in llm.generate(tokens_input(prompt.tolist()), params.of(sampling), request_id):  # noqa: B007
            pass
        return output

    return send


async def forget_prefixes(engine: base.Engine) -> None:
    """So that the second side does not live on the first one's cache."""
    llm = getattr(engine, "_llm", None)
    if llm is not None:
        await llm.reset_prefix_cache()


@asynccontextmanager
async def both_sides(config: Config, model: Path, num_trees: int) -> AsyncIterator[tuple[base.Engine, Connection, str]]:
    """A started engine, and the pipe and the endpoint of a process that grants leases."""
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    server = context.Process(target=serve, args=(child, config.links, num_trees), daemon=True)
    server.start()
    endpoint = parent.recv()
    engine = make_engine(config, model, actor="actor-0")
    try:
        await engine.start()
        yield engine, parent, endpoint
    finally:
        await engine.close()
        with suppress(BrokenPipeError):
            parent.send("end")
        server.join(5)
        server.kill()


async def measure(
    config: Config, model: Path, num_trees: int, rounds: int, *, limit_s: float = float("inf")
) -> dict[str, object]:
    """The actor's tokens/s and the straight side's, in turn; no round begins after ``limit_s``, but a first one."""
    actor_rates, straight_rates = [], []
    actor_cpu, straight_cpu = [], []
    in_flight = tokens = turns = 0
    started = time.perf_counter()
    async with both_sides(config, model, num_trees) as (engine, parent, endpoint):
        loaded_s = time.perf_counter() - started
        for number in range(rounds + 1):
            if number > 1 and time.perf_counter() - started > limit_s:
                break
            await asyncio.to_thread(_new_round, parent)
            await forget_prefixes(engine)
            cpu_s = time.process_time()
            seconds, recorder = await over_actor(config, engine, model, endpoint, f"actor-{number}")
            actor_cpu_s = time.process_time() - cpu_s
            tokens = sum(s.max_tokens for _, s in recorder.requests)
            turns = len(recorder.requests)
            in_flight = max(1, round(recorder.in_flight_s / seconds))
            await forget_prefixes(engine)
            cpu_s = time.process_time()
            alone = await straight(engine, recorder, in_flight, f"s{number}")
            if number > 0:  # the first round warms both sides up
                actor_rates.append(tokens / seconds)
                straight_rates.append(tokens / alone)
                actor_cpu.append(1e6 * actor_cpu_s / turns)
                straight_cpu.append(1e6 * (time.process_time() - cpu_s) / turns)
    ratios = [a / s for a, s in zip(actor_rates, straight_rates, strict=True)]
    return {
        "engine": engine_name(config),
        "trees": num_trees,
        "rounds": len(ratios),
        "turns": turns,
        "tokens": tokens,
        "engine_start_s": round(loaded_s, 1),
        "in_flight_mean": in_flight,
        "actor_tokens_per_s": round(statistics.median(actor_rates), 1),
        "straight_tokens_per_s": round(statistics.median(straight_rates), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "front_end_cpu_us_per_turn": {
            "actor": round(statistics.median(actor_cpu), 1),
            "straight": round(statistics.median(straight_cpu), 1),
        },
    }


async def measure_messages(config: Config, model: Path, num_trees: int, rounds: int) -> dict[str, object]:
    """The actor's tokens/s on the task in token ids and in messages, each first in every other round."""
    in_messages = config.environment.model_copy(update={"name": "benchmarks.message_task:make"})
    sides = {"tokens": config, "messages": config.model_copy(update={"environment": in_messages})}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu_us: dict[str, list[float]] = {name: [] for name in sides}
    async with both_sides(config, model, num_trees) as (engine, parent, endpoint):
        for number in range(rounds + 1):
            for name in sorted(sides, reverse=bool(number % 2)):
                await asyncio.to_thread(_new_round, parent)
                await forget_prefixes(engine)
                message_task.SPENT.clear()
                cpu_s = cpu_seconds()
                seconds, recorder = await over_actor(sides[name], engine, model, endpoint, f"{name}-{number}")
                tokens = sum(s.max_tokens for _, s in recorder.requests)
                if number > 0:  # the first round warms both sides up
                    rates[name].append(tokens / seconds)
                    cpu_us[name].append(1e6 * (cpu_seconds() - cpu_s) / tokens)
                if name == "messages":
                    spent = {what: statistics.median(times) for what, times in message_task.SPENT.items()}
    ratios = [m / t for m, t in zip(rates["messages"], rates["tokens"], strict=True)]
    cpu_ratios = [m / t for m, t in zip(cpu_us["messages"], cpu_us["tokens"], strict=True)]
    return {
        "engine": engine_name(config),
        "trees": num_trees,
        "rounds": rounds,
        "tokens_per_s": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "cpu_us_per_token": {name: round(statistics.median(found), 1) for name, found in cpu_us.items()},
        "cpu_ratio_median": round(statistics.median(cpu_ratios), 3),
        "cpu_ratios": [round(r, 3) for r in cpu_ratios],
        "layer_us": {what: round(1e6 * seconds, 1) for what, seconds in spent.items()},
    }


def cpu_seconds() -> float:
    """Of this process and all below it, the engine's included: what other load on the machine changes least."""
    here = psutil.Process()
    spent = 0.0
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent += times.user + times.system
    return spent


def _new_round(pipe: Connection) -> None:
    pipe.send("round")
    pipe.recv()


CHAINS = 12
"""Of a tree of the made-up task."""


def in_flight_settings(count: int, *, size: str) -> dict[str, str]:
    """The made-up task, with ``count`` requests in flight; on a small policy with short turns."""
    prompt, observation, action = (512, 200, 128) if size in QWEN3 else (32, 16, 8)
    settings: dict[str, object] = {
        "environment.name": "benchmarks.fast_engine:Chains",
        "environment.options.turns": 4,
        "environment.options.prompt": prompt,
        "environment.options.observation": observation,
        "model.max_context_tokens": prompt + 4 * (observation + action),
        "search.initial_rollouts": CHAINS,
        "search.strategy": "none",
        "search.max_action_tokens": action,
        "actor.max_num_seqs": count,
        "actor.trees_in_flight": max(1, round(count / CHAINS)),
    }
    return {name: str(value) for name, value in settings.items()}


def made(size: str, folder: Path, *, dtype: str) -> Path:
    """A model folder of that size with random weights."""
    import torch

    from benchmarks.learner_parts.sides import SIZES

    SIZES[size].make().to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


QWEN3 = ("0.6b", "1.7b", "4b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="needed without --in-flight")
    parser.add_argument("--model", required=True, help=f"a folder, or a size: demo, {', '.join(QWEN3)}")
    parser.add_argument("--in-flight", type=int, help="requests in flight, of a made-up task")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="actor.device")
    parser.add_argument("--trees", type=int, help="of a round; 48, or four times those in flight")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="no round begins after so many seconds")
    parser.add_argument("--json", type=Path, help="file that gets the result too")
    parser.add_argument("--messages", action="store_true", help="what the message layer costs, instead")
    parser.add_argument("--engine", help="actor.engine")
    args = parser.parse_args()
    if args.config is None and args.in_flight is None:
        parser.error("name a configuration, or --in-flight N for the made-up task")
    options: dict[str, str] = {} if args.in_flight is None else in_flight_settings(args.in_flight, size=args.model)
    options |= {"model.dtype": "bfloat16"} if args.model in QWEN3 else {}
    options |= {"actor.engine": args.engine} if args.engine else {}
    options |= {"actor.device": args.device} if args.device else {}
    config = load(args.config or [], options)
    trees = args.trees or (4 * config.actor.trees_in_flight if args.in_flight else 48)
    with tempfile.TemporaryDirectory(prefix="atpo-bench-") as folder:
        named = args.model in (*QWEN3, "demo")
        model = made(args.model, Path(folder) / "made", dtype=config.model.dtype) if named else Path(args.model)
        if args.messages:
            model = message_task.with_template(model, Path(folder) / "policy")
            found = asyncio.run(measure_messages(config, model, trees, args.rounds))
        else:
            found = asyncio.run(measure(config, model, trees, args.rounds, limit_s=args.limit_s))
    record = {"machine": machine(), "model": args.model, **found}
    print(json.dumps(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
