"""Trees of every expansion through the buffer's assembly and the real Trainer: both layouts, any micro-batches."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from atpo_async.core.tree import Turn
from atpo_async.wire.messages import BatchTree, TreeClosed, TreeOpened
from atpo_async.wire.records import TurnRecords
from buffer.trees.assembly import Assembly
from buffer.trees.index import MemoryStore, StoredTurns
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.expansion_support import Uneven, search_of, settings
from tests.learner_support import VOCAB, batch_of, flat_gradient, in_double, make_config, make_model
from tests.test_search import Sink

KINDS: dict[str, dict[str, object]] = {
    "entropy-rise": {"strategy": "entropy-rise", "branch_prob": 0.9},
    "online": {"strategy": "entropy-rise", "expand": "online", "branch_prob": 0.9, "branch_penalty": 0.05},
    "diverse": {"strategy": "diverse", "prune_duplicates": True},
    "resample": {"strategy": "resample"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def small(found: Turn) -> Turn:
    """The turn in tokens that the policy has."""
    words = {name: getattr(found, name) % np.int32(VOCAB) for name in ("observation", "action")}
    return msgspec.structs.replace(found, **words)


async def served(kind: str, tree_id: str, seed: int) -> BatchTree:
    """A tree as the buffer serves it: grown, assembled, without what leads to no end."""
    config = settings(**{"initial_rollouts": 3, "rounds": 2, "branches": 3, **KINDS[kind]})
    sink, store = Sink(), MemoryStore()
    await search_of(config, sink=sink, environment=Uneven(turns=4), seed=seed).grow()
    assembly = Assembly(store)
    assembly.expect("t0", number=1, task_index=0, kind="train", epoch=0)
    for message in sink:
        assert isinstance(message, TreeOpened | Turn | TreeClosed)
        assembly.add(small(message) if isinstance(message, Turn) else message)
    assert assembly.is_complete("t0")
    whole = assembly.finish("t0")
    entry = whole.pruned()
    if kind in ("diverse", "resample"):
        assert len(entry) < len(whole), "some of it leads to no end"
    turns = tuple(msgspec.structs.replace(t, tree_id=tree_id) for t in StoredTurns(entry.rows, store))
    assert not any(t.end == "pruned" for t in turns)
    return BatchTree(
        tree_id=tree_id, task_index=0, prompt=np.array([10, 11, 12], dtype=np.int32), turns=TurnRecords.of(turns),
        failed_branches=0, probability=0.1, weight=0.5 + 0.1 * seed, uses=1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_both_layouts_and_any_micro_batches_give_one_gradient(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = tuple([await served(kind, f"tree-{seed}", seed) for seed in range(2)])
    gradients = []
    for learner in ({"packing": "flat"}, {"packing": "tree"}, {"packing": "tree", "micro_batch_tokens": 64}):
        config = make_config(folder, learner={**learner, "max_grad_norm": 1e9})
        trainer = Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(
            trainer.optimizer, "step", lambda seen=seen, of=trainer: seen.append(flat_gradient(of.policy))
        )
        trainer.train(batch_of(trees, trees), version=3)
        gradients += seen
    assert float(gradients[0].abs().sum()) > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-13, rtol=1e-9)
