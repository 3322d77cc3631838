"""One shard's part of a batch: which trees it could give, which it gives, and what became of them.

A batch of several shards is made by their front (``buffer.front``); every shard has a part of it under the same number,
an empty one if none of its trees was drawn.  Pure: clock and randomness are passed in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atpo_async.core.credit import leaf_tokens
from atpo_async.wire.messages import Batch, SampleRequest
from buffer.batches.served import ServedBatch, Share
from buffer.batches.server import BatchServer
from buffer.front.messages import Part, PartTree, TakePart
from buffer.pool.outcomes import ReadyTrees


class PartServer(BatchServer):
    """Serves the parts of batches that are one shard's."""

    def prepare(self, request: SampleRequest) -> ServedBatch | None:
        """The part of the batch of ``request.step``, if it was made at this version.

        Otherwise what follows from the request for the batches from that step on, as where there is one buffer.
        """
        served = self._batches.by_step.get(request.step)
        if served is not None and served.version == request.version:
            return served
        self._look_after_batches(request.step)
        self._heard(request)
        self._trees.advance()
        return None

    def weigh(self, highest: float) -> ReadyTrees:
        """What can be drawn, where ``highest`` is the highest priority that was confirmed in any shard."""
        self._trees.pool.restore_highest_priority(highest)
        return self._trees.pool.ready_trees()

    def take(self, chosen: TakePart, now: float) -> ServedBatch | None:
        """Make the part of a batch; None, and nothing is changed, where one of its trees has left meanwhile, or where
        there is a batch of that step: both have to be looked at once more."""
        if chosen.step in self._batches.by_step:
            return None
        rows = self._trees.pool.find_entered(np.frombuffer(chosen.entered, dtype=np.int64))
        if rows is None:
            return None
        metrics = self._flush(now)
        for name, value in chosen.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
        drawn = self._trees.pool.take_rows(
            rows,
            np.frombuffer(chosen.probability, dtype=np.float64),
            np.frombuffer(chosen.weight, dtype=np.float64),
        )
        request = SampleRequest(
            run="", rank=0, num_ranks=chosen.num_ranks, step=chosen.step, version=chosen.version,
            num_trees=chosen.num_trees, wait_s=0.0,
        )  # fmt: skip
        served = self._serve(request, drawn, metrics, chosen.batch_id)
        served.means = dict(self._counters.flushed_means)
        return served

    def undo_part(self, step: int, batch_id: int) -> bool:
        """Undo the part of a batch that not every shard has; False where it is not here."""
        served = self._batches.by_step.get(step)
        if served is None or served.batch_id != batch_id:
            return False
        self._undo(served)
        return True

    def describe(self, served: ServedBatch) -> Part:
        """What the front needs to know of a part.  Raises BadMessage where one of its trees is gone."""
        return Part(
            batch_id=served.batch_id, step=served.step, version=served.version, num_ranks=served.num_ranks,
            metrics=served.metrics, means=served.means,
            trees=tuple(self._described(served)),
        )  # fmt: skip

    def _described(self, served: ServedBatch) -> Sequence[PartTree]:
        trees = [self._trees.registry.as_served(drawn) for drawn in served.drawn]
        return [
            PartTree(
                tree_id=tree.tree_id,
                num_tokens=tree.num_tokens,
                num_leaves=tree.num_leaves,
                num_action_tokens=int(leaf_tokens(arrays).sum()),
                num_turn_tokens=int(arrays.num_action_tokens.sum()),
            )
            for tree, arrays in ((tree, tree.arrays()) for tree in trees)
        ]

    def fetch(self, step: int, batch_id: int, tree_ids: Sequence[str]) -> Share | None:
        """Some of a part's trees, in this order; None where the part is not here."""
        served = self._batches.by_step.get(step)
        if served is None or served.batch_id != batch_id:
            return None
        by_id = {each.tree_id: each for each in served.drawn}
        drawn = tuple(by_id[tree_id] for tree_id in tree_ids)
        trees = tuple(self._trees.registry.as_served(each) for each in drawn)
        head = Batch(
            batch_id=batch_id, step=step, num_trees=len(drawn), num_leaves=0, num_action_tokens=0, num_turn_tokens=0,
            trees=(), metrics={},
        )  # fmt: skip
        return Share(head, drawn, trees)
