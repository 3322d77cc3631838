"""Seconds to 0.9 sampled success: this system against a synchronous loop, both from the same warm-started policy.

The peer is what one writes without a system: batched generation with transformers and a KV cache, all chains of a step
in one batch, token-level GRPO with the same clip, then the next step, on every core.  Both are timed from their first
training rollout to the end of the first three consecutive steps whose mean sampled success is 0.9; neither pays for
imports or an engine's start.  The system's time is read from its own metrics.

    .venv/bin/python benchmarks/synchronous_peer.py configs/demo.toml [--seeds 1 2 3]

Prints one JSON object a seed, and the ratio.  Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from atpo_async.config import Config, load
from atpo_async.environments.base import Episode
from atpo_async.environments.making import make_environment
from atpo_async.run.metrics import Record, read_metrics
from atpo_async.run.rundir import RunDir

GOAL = 0.9
WINDOW = 3


@dataclass
class Chain:
    """One rollout of the peer."""

    episode: Episode
    tokens: list[int]
    sampled: list[bool]
    logprobs: list[float]
    pending: list[int]
    """Observation tokens that the model has yet to read."""
    action: list[int]
    reward: float | None = None


class Peer:
    """Token-level GRPO, synchronous, on transformers alone."""

    def __init__(self, config: Config, model: Path, *, tasks: int, rollouts: int, lr: float, updates: int) -> None:
        self.config = config
        self.environment = make_environment(config, model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0)
        self.tasks, self.rollouts, self.updates = tasks, rollouts, updates
        self.next_task = 0
        torch.manual_seed(config.run.seed)

    async def step(self) -> float:
        """One step: generate, then train.  Returns the sampled success of its rollouts."""
        chains: list[Chain] = []
        for index in range(self.next_task, self.next_task + self.tasks):
            for _ in range(self.rollouts):
                episode = await self.environment.start("train", index)
                prompt = episode.prompt.tolist()
                chains.append(Chain(episode, list(prompt), [False] * len(prompt), [0.0] * len(prompt), [], []))
        self.next_task += self.tasks
        await self._generate(chains)
        rewards = np.array([chain.reward or 0.0 for chain in chains]).reshape(self.tasks, self.rollouts)
        spread = rewards.std(1, keepdims=True)
        advantages = np.where(spread > 0, (rewards - rewards.mean(1, keepdims=True)) / (spread + 1e-6), 0.0).ravel()
        self._train(chains, advantages)
        return float(rewards.mean())

    @torch.no_grad()
    async def _generate(self, chains: list[Chain]) -> None:
        stop = set(self.environment.stop_token_ids)
        most = self.config.search.max_action_tokens
        cache = DynamicCache(config=self.model.config)
        inputs = torch.tensor([chain.tokens for chain in chains])
        live = list(chains)
        while live:
            logits = self.model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[:, -1]
            logprobs = torch.log_softmax(logits, -1)
            drawn = torch.multinomial(logprobs.exp(), 1)
            found = logprobs.gather(1, drawn)[:, 0].tolist()
            fed: list[int] = []
            for chain, token, logprob in zip(live, drawn[:, 0].tolist(), found, strict=True):
                if chain.pending:
                    fed.append(chain.pending.pop(0))
                    self._extend(chain, fed[-1], 0.0, sampled=False)
                    continue
                fed.append(token)
                self._extend(chain, token, logprob, sampled=True)
                chain.action.append(token)
                if token in stop or len(chain.action) == most:
                    result = await chain.episode.step(np.array(chain.action, dtype=np.int32))
                    chain.action = []
                    chain.pending = result.observation.tolist()
                    chain.reward = result.reward
            keep = [i for i, chain in enumerate(live) if chain.reward is None]
            if len(keep) < len(live):
                cache.batch_select_indices(torch.tensor(keep, dtype=torch.long))
            live = [live[i] for i in keep]
            inputs = torch.tensor([[fed[i]] for i in keep])

    @staticmethod
    def _extend(chain: Chain, token: int, logprob: float, *, sampled: bool) -> None:
        chain.tokens.append(token)
        chain.sampled.append(sampled)
        chain.logprobs.append(logprob)

    def _train(self, chains: list[Chain], advantages: np.ndarray) -> None:
        useful = [(c, a) for c, a in zip(chains, advantages.tolist(), strict=True) if a != 0.0]
        settings = self.config.objective
        for part in np.array_split(torch.randperm(len(useful)).numpy(), self.updates):
            if not len(part):
                continue
            rows = [useful[i] for i in part]
            width = max(len(chain.tokens) for chain, _ in rows)
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            old = torch.zeros(len(rows), width)
            mask = torch.zeros(len(rows), width)
            for i, (chain, _) in enumerate(rows):
                tokens[i, : len(chain.tokens)] = torch.tensor(chain.tokens)
                old[i, : len(chain.tokens)] = torch.tensor(chain.logprobs)
                mask[i, : len(chain.tokens)] = torch.tensor(chain.sampled, dtype=torch.float)
            worth = torch.tensor([a for _, a in rows])[:, None]
            logits = self.model(input_ids=tokens[:, :-1]).logits
            new = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]
            ratio = (new - old[:, 1:]).exp()
            clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
            loss = -torch.minimum(ratio * worth, clipped * worth) * mask[:, 1:]
            loss = (loss.sum(1) / mask[:, 1:].sum(1)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.learner.max_grad_norm)
            self.optimizer.step()


async def peer(config: Config, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Steps and seconds to the goal; ``inf`` seconds if it is not reached within ``--most`` steps."""
    loop = Peer(config, model, tasks=args.tasks, rollouts=args.rollouts, lr=args.lr, updates=args.updates)
    began = time.perf_counter()
    seen: list[float] = []
    for _ in range(args.most):
        seen.append(await loop.step())
        if len(seen) >= WINDOW and statistics.mean(seen[-WINDOW:]) >= GOAL:
            return {"steps": len(seen), "seconds": time.perf_counter() - began}
    return {"steps": len(seen), "seconds": float("inf")}


def system(config_file: str, seed: int, folder: Path) -> tuple[dict[str, float], Path, Config]:
    """Train with the command line; the figures come from the run's own metrics."""
    command = [sys.executable, "-m", "atpo_async", "train", config_file, "--run.dir", str(folder)]
    subprocess.run([*command, "--run.seed", str(seed), "--run.name", f"seed-{seed}"], check=True, stdout=sys.stderr)
    rundir = RunDir.open(folder / f"seed-{seed}")
    return _to_goal(list(read_metrics(rundir.metrics_path))), Path(rundir.config.model.path), rundir.config


def _to_goal(records: list[Record]) -> dict[str, float]:
    began = next(r.metrics["time/first_lease"] for r in records if "time/first_lease" in r.metrics)
    seen: list[float] = []
    for record in records:
        if record.source == "learner" and "train/success" in record.metrics:
            seen.append(record.metrics["train/success"])
            if len(seen) >= WINDOW and statistics.mean(seen[-WINDOW:]) >= GOAL:
                return {"steps": record.step, "seconds": record.time - began}
    return {"steps": len(seen), "seconds": float("inf")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=2, help="of the peer")
    parser.add_argument("--tasks", type=int, default=16, help="of a step of the peer")
    parser.add_argument("--rollouts", type=int, default=12, help="of a task of the peer")
    parser.add_argument("--lr", type=float, default=6e-4, help="of the peer")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps of a step of the peer")
    parser.add_argument("--most", type=int, default=80, help="steps after which the peer gives up")
    args = parser.parse_args()
    load(args.config)
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory(prefix="atpo-peer-") as folder:
            ours, model, config = system(args.config, seed, Path(folder))
        theirs = asyncio.run(peer(config, model, args))
        ratio = ours["seconds"] / theirs["seconds"]
        print(json.dumps({"seed": seed, "system": ours, "peer": theirs, "seconds_ratio": round(ratio, 3)}), flush=True)


if __name__ == "__main__":
    main()
