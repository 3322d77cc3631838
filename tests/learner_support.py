"""Small policies and batches for the learner's tests."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from atpo_async.config import Config, CorrectionConfig, build
from atpo_async.config.credit_rule import credit_rule
from atpo_async.config.doors import CORRECTION
from atpo_async.core.tree import Turn, spans_of
from atpo_async.environments.hopqa.warm_start import Recipe, make_policy
from atpo_async.wire.messages import Batch, BatchTree
from atpo_async.wire.records import TurnRecords
from learner.loss.correction import OffPolicyCorrection
from learner.loss.loading import correction_of
from learner.policy.model import Policy
from tests.e2e_support import WORLD

VOCAB = 31


def make_model(
    folder: Path, *, seed: int = 0, tie: bool = True, hidden_size: int = 16, layers: int = 2, head_dim: int = 8
) -> Path:
    """A Qwen3 model of two narrow layers, saved as an ordinary folder."""
    torch.manual_seed(seed)
    hf = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=hidden_size, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim, tie_word_embeddings=tie,
            max_position_embeddings=128, initializer_range=0.3,
        )
    )  # fmt: skip
    hf.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def in_double(policy: Policy) -> Policy:
    """The policy in float64 throughout: transformers rounds through float32 in its norms, whatever its dtype."""

    def forward(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)
        scaled: torch.Tensor = module.weight * (hidden * scale)
        return scaled

    doubled: Policy = policy.double()
    for module in doubled.modules():
        if isinstance(module, Qwen3RMSNorm):
            module.forward = MethodType(forward, module)
    return doubled


def flat_gradient(module: torch.nn.Module) -> torch.Tensor:
    """The gradients of all parameters, one after another; every parameter must have one."""
    parts = []
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        parts.append(parameter.grad.reshape(-1))
    return torch.cat(parts)


def make_config(model: Path, **sections: dict[str, object]) -> Config:
    data: dict[str, dict[str, object]] = {
        "model": {"path": str(model)},
        "learner": {"lr": 1e-3, "num_threads": 1, "device": "cpu"},
        "objective": {"clip_low": 0.2, "clip_high": 0.3},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return build(data)


def correction_for(settings: CorrectionConfig) -> OffPolicyCorrection:
    """``[correction]`` with its action loaded, whatever the other sections would say to it."""
    return correction_of(settings, CORRECTION.load(settings.action, settings.action_options))


def make_tree(tree_id: str, rng: np.random.Generator, *, version: int = 0, leaves: int = 5) -> BatchTree:
    """A chain that forks: some leaves at the first turn, the rest under a shared second one, with unequal rewards."""

    def turn(turn_id: int, parent: int, reward: float | None) -> Turn:
        length = int(rng.integers(1, 6))
        return Turn(
            run="run", tree_id=tree_id, turn_id=turn_id, parent_id=parent, lease_epoch=0, expansion_round=0,
            observation=rng.integers(0, VOCAB, int(rng.integers(0, 4)) if parent else 0).astype(np.int32),
            action=rng.integers(0, VOCAB, length).astype(np.int32),
            logprobs=-rng.uniform(1.5, 5.0, length).astype(np.float32),
            spans=spans_of(np.sort(rng.integers(max(0, version - 2), version + 1, length))),
            end="continue" if reward is None else "done", reward=reward,
            success=None if reward is None else reward > 0, generate_s=0.0, environment_s=0.0,
        )  # fmt: skip

    turns = [turn(1, 0, None), turn(2, 1, None)]
    for i in range(leaves):
        turns.append(turn(3 + i, 2 if i % 2 else 1, float(i % 3 == 0)))
    tree = BatchTree(
        tree_id=tree_id, task_index=0, prompt=rng.integers(0, VOCAB, 4).astype(np.int32),
        turns=TurnRecords.of(()), failed_branches=0, probability=0.1, weight=float(rng.uniform(0.3, 1.0)), uses=1,
    )  # fmt: skip
    # Decoded, as intake hands trees on: it takes the very same objects for a batch without a fault.
    return msgspec.structs.replace(tree, turns=tuple(turns))


def make_batch(*, seed: int = 0, step: int = 0, num_trees: int = 4, version: int = 3) -> Batch:
    rng = np.random.default_rng(seed)
    trees = tuple(make_tree(f"tree-{i}", rng, version=version, leaves=4 + i % 3) for i in range(num_trees))
    return batch_of(trees, trees, step=step)


def batch_of(trees: tuple[BatchTree, ...], whole: tuple[BatchTree, ...], *, step: int = 0) -> Batch:
    """A share ``trees`` of the batch ``whole``."""
    from learner.packing.credited import CreditedTree

    credited = [CreditedTree.of(tree, credit_rule(Config().credit)) for tree in whole]
    return Batch(
        batch_id=step, step=step, num_trees=len(whole), num_leaves=sum(t.num_leaves for t in credited),
        num_action_tokens=sum(t.num_action_tokens for t in credited),
        num_turn_tokens=sum(t.num_turn_tokens for t in credited), trees=trees,
        metrics={"train/reward": 0.25, "train/success": 0.5},
    )  # fmt: skip


def small_policy(folder: Path, *, steps: int) -> Path:
    """Two layers of width 64, warm-started on one-hop questions; 60 steps let it answer a third of them."""
    recipe = Recipe(
        steps=steps,
        min_hops=WORLD["hops"],
        max_hops=WORLD["hops"],
        num_names=WORLD["num_names"],
        num_relations=WORLD["num_relations"],
        mixed_up=0,
        layers=2,
        width=64,
    )
    make_policy(folder, recipe, device="cpu", num_threads=1)
    return folder
