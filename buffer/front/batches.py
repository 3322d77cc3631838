"""Makes the batches of several shards: finds the parts of one that is there, or draws it; serves the ranks' shares.

A batch is there once every shard has its part under one number; what only some have was never sent (see
``buffer.front``).  One batch is made at a time.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from atpo_async.core.errors import BadMessage
from atpo_async.wire import messages as m
from buffer.batches.shares import split_by_tokens
from buffer.counters import filtered_words, left_out
from buffer.front import messages as f
from buffer.front.context import FrontContext
from buffer.front.draw import Choice, UnionDraw
from buffer.front.messages import ShardAway
from buffer.front.metrics import merged
from buffer.pool.checked import sampler_of
from buffer.pool.outcomes import ReadyTrees
from buffer.pool.weights import annealed_beta

T = TypeVar("T")

log = logging.getLogger("atpo.buffer")

ASK_S = 15.0
"""A shard that has not answered by then is away: the learner is told to ask again."""
DRAWS = 8
"""A tree that was drawn may leave before it is taken; then the batch is drawn again, so often at most."""


class FrontBatches:
    """The batches of one front.

    Args:
        context: of the front.

    Raises ConfigError or SetupError for a sampler that cannot be used.
    """

    def __init__(self, context: FrontContext) -> None:
        config = context.config
        self._context = context
        self._config = config
        self._shards = context.shards
        self._union = UnionDraw(
            sampler_of(config.buffer), exponent=config.buffer.priority_exponent, max_lag=config.staleness.max_lag,
            weights_over=config.buffer.weights_over,
        )  # fmt: skip
        self._beta_steps = config.buffer.weight_exponent_steps or config.run.steps
        self._front = secrets.randbits(62)
        self._alone = asyncio.Lock()
        self._made: Sequence[f.Part] = ()
        """Parts of the batch that was served last."""

    async def share(self, request: m.SampleRequest) -> m.Batch | m.Exhausted | None:
        """A rank's share of the batch of ``request.step``; None while there is not enough for one.

        Waits for: the shards, each for ``ASK_S`` at most.

        Raises:
            PeerLost: a shard does not answer.
            ShardAway: it cannot, for now.
            BadMessage: a shard refuses, or ranks of different starts ask.
            SamplerFault: a user's sampler failed.
        """
        async with self._alone:
            if not _is_of(self._made, request):
                found = await self._found(request)
                if found is None or isinstance(found, m.Exhausted):
                    return found
                self._made = found
            parts = self._made
        return await self._share(parts, request)

    def is_enough(self, request: m.SampleRequest) -> bool:
        """Whether, as last heard, another request for this batch may find what the last one did not."""
        shards, enough = self._shards, self._config.staleness.max_oversampling * request.num_trees
        produced = shards.total("produced")
        return (
            shards.total("ready") >= request.num_trees
            or produced + shards.total("fruitless") >= enough
            or _is_drained(shards.states)
        )

    # --- making one --------------------------------------------------------------------------------------------

    async def _found(self, request: m.SampleRequest) -> Sequence[f.Part] | m.Exhausted | None:
        while True:
            ready = self._shards.total("ready")
            prepares: list[f.Question] = [
                f.Prepare(front=self._front, request=request, ready=ready - (link.state.ready if link.state else 0))
                for link in self._shards
            ]
            prepared = await self._ask_all(prepares, f.Prepared)
            parts = [each.part for each in prepared]
            there = [part for part in parts if part is not None]
            if not there:
                break
            if len(there) == len(parts) and len({part.batch_id for part in there}) == 1:
                return there
            log.info("step %d: %d of %d shards have a part; it was not sent and is drawn again",
                     request.step, len(there), len(parts))  # fmt: skip
            await self._undo(parts)
        states = [each.state for each in prepared]
        if self._can_be_made(request, states):
            return await self._drawn(request, states)
        if _is_drained(states):
            done = _done(states)
            return m.Exhausted(reason=f"all run.max_tasks = {self._config.run.max_tasks} tasks are done: {done}")
        return None

    def _can_be_made(self, request: m.SampleRequest, states: Sequence[f.ShardState]) -> bool:
        """Whether there are enough trees for a batch, or as many as will ever come for it."""
        ready, produced, fruitless = (
            sum(int(getattr(state, name)) for state in states) for name in ("ready", "produced", "fruitless")
        )
        enough = self._config.staleness.max_oversampling * request.num_trees
        in_vain = not ready and produced + fruitless >= enough
        last = ready > 0 and _is_drained(states)
        return ready >= request.num_trees or produced >= enough or in_vain or last

    async def _drawn(self, request: m.SampleRequest, states: Sequence[f.ShardState]) -> Sequence[f.Part]:
        batch_id = max(state.next_batch for state in states)
        config = self._config
        beta = annealed_beta(request.step, start=config.buffer.weight_exponent, num_steps=self._beta_steps)
        highest = max(state.highest for state in states)
        lives = sum(state.incarnation for state in states)
        rng = np.random.default_rng([config.run.seed, lives, batch_id])
        own = self._context.take_metrics()
        for _ in range(DRAWS):
            weighed = await self._ask_all([f.Weigh(highest=highest)] * len(self._shards), f.Weighed)
            choices = self._union.draw([_ready(each) for each in weighed], request.num_trees, rng=rng, beta=beta)
            takes: list[f.Question] = [
                self._take(request, batch_id, choice, more={} if index else own) for index, choice in enumerate(choices)
            ]
            answers: list[f.Part | f.Gone] = await self._ask_all(takes, f.Part | f.Gone)  # type: ignore[arg-type]
            parts = [answer for answer in answers if isinstance(answer, f.Part)]
            if len(parts) == len(answers):
                return parts
            await self._undo([answer if isinstance(answer, f.Part) else None for answer in answers])
        raise ShardAway(f"batch {batch_id} was drawn {DRAWS} times, and each time a tree of it had left meanwhile")

    def _take(self, request: m.SampleRequest, batch_id: int, choice: Choice, *, more: dict[str, float]) -> f.TakePart:
        return f.TakePart(
            front=self._front, step=request.step, version=request.version, batch_id=batch_id,
            num_ranks=request.num_ranks, num_trees=request.num_trees, metrics=more,
            entered=choice.entered.astype(np.int64).tobytes(), probability=choice.probability.tobytes(),
            weight=choice.weight.astype(np.float64).tobytes(),
        )  # fmt: skip

    async def _undo(self, parts: Sequence[f.Part | None]) -> None:
        """Have the shards take back parts of a batch that not all of them have."""
        asked = (
            link.ask(f.UndoPart(front=self._front, step=part.step, batch_id=part.batch_id), f.Done, timeout_s=ASK_S)
            for link, part in zip(self._shards, parts, strict=True)
            if part is not None
        )
        await asyncio.gather(*asked)

    async def _ask_all(self, questions: Sequence[f.Question], kind: type[T]) -> list[T]:
        return await self._shards.ask_all(list(questions), kind, timeout_s=ASK_S)

    # --- serving it --------------------------------------------------------------------------------------------

    async def _share(self, parts: Sequence[f.Part], request: m.SampleRequest) -> m.Batch:
        first = parts[0]
        if request.num_ranks != first.num_ranks:
            raise BadMessage(
                f"batch {first.batch_id} was shared among {first.num_ranks} ranks, rank {request.rank} counts "
                f"{request.num_ranks}; all ranks must be of one start"
            )
        trees = [(index, tree) for index, part in enumerate(parts) for tree in part.trees]
        own = split_by_tokens([tree.num_tokens for _, tree in trees], first.num_ranks)[request.rank]
        metrics = merged(parts)
        others = left_out(metrics)
        fetched = await self._fetch(first, [(trees[i][0], trees[i][1].tree_id) for i in own])
        return m.Batch(
            batch_id=first.batch_id,
            step=first.step,
            num_trees=len(trees),
            num_leaves=sum(tree.num_leaves for _, tree in trees),
            num_action_tokens=sum(tree.num_action_tokens for _, tree in trees),
            num_turn_tokens=sum(tree.num_turn_tokens for _, tree in trees),
            trees=tuple(fetched),
            metrics=metrics,
            left_out_leaves=others.count,
            left_out_rewards=others.total,
            left_out_squares=others.squares,
            checkpoint_wanted=any(state.checkpoint_wanted for state in self._shards.states),
        )

    async def _fetch(self, batch: f.Part, wanted: Sequence[tuple[int, str]]) -> list[m.BatchTree]:
        """The trees of a rank's share, given by shard and id, in that order."""

        async def of(index: int) -> m.Batch:
            link = self._shards.links[index]
            tree_ids = tuple(tree_id for shard, tree_id in wanted if shard == index)
            question = f.asked(f.Fetch(step=batch.step, batch_id=batch.batch_id, tree_ids=tree_ids))
            answer = await link.client.request(question, timeout_s=ASK_S)
            if not isinstance(answer, m.Batch):
                self._made = ()
                raise ShardAway(f"{link.name}: {getattr(answer, 'reason', type(answer).__name__)}")
            return answer

        answers = await asyncio.gather(*(of(index) for index in sorted({index for index, _ in wanted})))
        by_id = {tree.tree_id: tree for answer in answers for tree in answer.trees}
        return [by_id[tree_id] for _, tree_id in wanted]


def _is_of(parts: Sequence[f.Part], request: m.SampleRequest) -> bool:
    return bool(parts) and (parts[0].step, parts[0].version) == (request.step, request.version)


def _is_drained(states: Sequence[f.ShardState]) -> bool:
    """Whether no further tree will come: every task is leased, none is under way or with the learner."""
    return bool(states) and all(s.all_leased and not s.under_lease and not s.out for s in states)


def _done(states: Sequence[f.ShardState]) -> str:
    """The outcomes of the tasks so far, as text."""
    tasks = {name: sum(state.tasks.get(name, 0) for state in states) for name in _OUTCOMES}
    retired = f" ({tasks['retired']} of them fewer times than meant, too old by then)" if tasks["retired"] else ""
    return (
        f"{tasks['trained']} trained on{retired}, {tasks['no_signal']} without signal, {tasks['failed']} failed, "
        f"{sum(state.given_up for state in states)} given up{filtered_words(tasks['filtered'])}"
    )


_OUTCOMES = ("trained", "retired", "no_signal", "failed", "filtered")


def _ready(weighed: f.Weighed) -> ReadyTrees:
    return ReadyTrees(
        entered=np.frombuffer(weighed.entered, dtype=np.int64), priority=np.frombuffer(weighed.priority, np.float64),
        oldest=np.frombuffer(weighed.oldest, dtype=np.int64), unserved=np.frombuffer(weighed.unserved, np.bool_),
        version=weighed.version,
    )  # fmt: skip
