"""Every message that crosses a socket: frozen, tagged, keyword-only.  Unions are named after their receiver.

A message's docstring names its producer and its consumer.  Arrays travel as raw little-endian bytes
(``atpo_async.wire.codec``).
Durations are seconds, sizes bytes, versions learner versions.
"""

from __future__ import annotations

import msgspec

from atpo_async.core.bounds import (
    Count,
    Id,
    Name,
    NotNegative,
    Number,
    Seconds,
    Size,
    Text,
    Tokens,
    TurnId,
    Version,
    VersionOrNone,
)
from atpo_async.core.tree import LeafReward, Turn
from atpo_async.core.vocabulary import Split
from atpo_async.wire.joined import BufferToJoined, JoinedToBuffer
from atpo_async.wire.message import Message as Message
from atpo_async.wire.records import TurnRecords
from atpo_async.wire.relayed import Hop as Hop
from atpo_async.wire.relayed import RelayHello as RelayHello
from atpo_async.wire.weights import ActorToLearner as ActorToLearner
from atpo_async.wire.weights import AnnouncementRequest as AnnouncementRequest
from atpo_async.wire.weights import Chunk as Chunk
from atpo_async.wire.weights import ChunkRequest as ChunkRequest
from atpo_async.wire.weights import Difference as Difference
from atpo_async.wire.weights import ManifestRequest as ManifestRequest
from atpo_async.wire.weights import TensorSpec as TensorSpec
from atpo_async.wire.weights import VersionGone as VersionGone
from atpo_async.wire.weights import WeightsAnnounced as WeightsAnnounced
from atpo_async.wire.weights import WeightsManifest as WeightsManifest

PROTOCOL = 8
"""Peers of another protocol number are refused by name."""


# --- actor -> buffer -------------------------------------------------------------------------------------------


class ActorHello(Message, frozen=True, tag="actor_hello"):
    """Actor introduces itself.  Answered by ``Welcome``, or ``Refused`` for another protocol or run."""

    protocol: Id
    run: Name
    """The run it expects; empty to join whatever runs there."""
    actor: Name
    environment: Name
    search_leaves: Count
    host: Name = ""
    """Name of its machine, for people; empty where it does not say."""
    host_id: Name = ""
    """Identity of its machine and boot (``run.host.host_id``): actors of one can share its memory."""
    continues: Name = ""
    """The name by which the buffer knows this very process, which has come another way since: its leases stay its own.
    Empty for a new process."""
    ticket: Name = ""
    """Of that name, from its ``Welcome``: proves that it may be continued."""


class LeaseRequest(Message, frozen=True, tag="lease_request"):
    """Actor requests leases for up to ``count`` trees.  Answered by ``Leases``."""

    run: Name
    actor: Name
    count: Count
    version: VersionOrNone
    """The version the actor's engine generates with now."""


class TreeOpened(Message, frozen=True, tag="tree_opened"):
    """Actor has built the prompt.  Sent before the tree's first turn; order of arrival does not matter."""

    run: Name
    tree_id: Name
    lease_epoch: Id
    prompt: Tokens
    """int32[P]; empty for a group of trees, whose first turns have their prompts (``Turn.role``)."""


class TreeClosed(Message, frozen=True, tag="tree_closed"):
    """Actor will send no further turn of this tree.  Complete once ``num_turns`` turns are there."""

    run: Name
    tree_id: Name
    lease_epoch: Id
    num_turns: Count
    failed_branches: Count
    failures: dict[Name, Size]
    """Reason -> count, of the failed branches."""
    leaf_rewards: tuple[LeafReward, ...] = ()
    """Rewards that were known only now, of a group: its proposers' after its synthesizers ended."""


class LeaseReturned(Message, frozen=True, tag="lease_returned"):
    """Actor gives leases back unfinished: it is shutting down, or the buffer refused what it sent of them."""

    run: Name
    actor: Name
    tree_ids: tuple[Name, ...]
    reason: Text = ""
    """Why the buffer refused it: counts as a lost holder.  Empty where the actor stops to grow trees: all of its
    leases go back then, those too of which it does not know yet."""


class ActorReport(Message, frozen=True, tag="actor_report"):
    """Actor's heartbeat, every few seconds: renews its leases and carries its metrics for the run's metrics file."""

    run: Name
    actor: Name
    version: VersionOrNone
    tree_ids: tuple[Name, ...]
    """Leases still being worked on; renewed by this message."""
    metrics: dict[Name, float]
    host: Name = ""
    """As in ``ActorHello``: a buffer that was restarted meanwhile has it from here only."""
    host_id: Name = ""


ActorToBuffer = ActorHello | LeaseRequest | TreeOpened | Turn | TreeClosed | LeaseReturned | ActorReport | RelayHello


# --- buffer -> actor -------------------------------------------------------------------------------------------


class Lease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, eq=False):
    """The right to grow one tree until ``lifetime_s`` from now, unless renewed."""

    tree_id: Name
    task_index: Id
    kind: Split
    epoch: Id
    """Rises with every reissue; turns under an older epoch are refused."""
    lifetime_s: Seconds
    min_version: VersionOrNone
    """Do not start before the engine has at least this version."""
    seed: int
    committed: TurnRecords
    """Turns already committed by an earlier holder: go on from them."""


class Welcome(Message, frozen=True, tag="welcome"):
    """Buffer's answer to ``ActorHello`` and ``RelayHello``: the run, and the endpoint of the weights (empty until
    known).  A relay that passes it on puts its own endpoints there."""

    run: Name
    weights_endpoint: Text
    announce_endpoint: Text
    name: Name = ""
    """What the buffer calls the asker: with the relays between, ``relay-1/gpu-7/actor-0``."""
    ticket: Name = ""
    """With it the asker may go on under another name, by another way (``ActorHello.continues``)."""
    way: tuple[Hop, ...] = ()
    """What lies beyond the server that the asker reached, up to the buffer; none where that is the buffer."""
    finished: bool = False
    """The run is over."""


class Leases(Message, frozen=True, tag="leases"):
    """Buffer's answer to ``LeaseRequest``; fewer than asked, or none, when admission is closed."""

    leases: tuple[Lease, ...]
    closed_because: Text | None
    """Why there are not more; None when all were granted."""
    retry_after_s: Seconds
    finished: bool
    """The run is over: the actor exits."""
    weights_endpoint: Text = ""
    """Endpoint of the weights now, as in ``Welcome``: a restarted learner may listen at another address."""
    announce_endpoint: Text = ""
    shards: tuple[Text, ...] = ()
    """Where the shards of the buffer take the messages of their trees (``core.naming.shards.shard_of``), by index; none
    where it has no shards."""


class Refused(Message, frozen=True, tag="refused"):
    """The receiver did not take a message, for good: sending it again will not help."""

    reason: Text


BufferToActor = Welcome | Leases | Refused


# --- learner -> buffer -----------------------------------------------------------------------------------------


class SampleRequest(Message, frozen=True, tag="sample_request"):
    """Learner asks for a batch of trees.  Answered by ``Batch`` when there is one, at the latest after ``wait_s``."""

    run: Name
    rank: Id
    num_ranks: Count
    step: Id
    version: Version
    """The learner's version: lag is measured against it."""
    num_trees: Count
    """Of the whole batch over all ranks."""
    wait_s: Seconds


class Trained(Message, frozen=True, tag="trained"):
    """One rank confirms its share of a batch after the optimizer step; carries new priorities by tree.

    The batch is confirmed when every rank has sent this.
    """

    run: Name
    batch_id: Id
    version: Version
    """The learner's version after the step."""
    priorities: dict[Name, NotNegative]
    """Of the trees of this rank's share."""
    rank: Id = 0


class Checkpointed(Message, frozen=True, tag="checkpointed"):
    """Learner has a durable checkpoint that holds every batch below ``step``; sent by rank 0.

    Only now may the buffer forget the trees that were used up in them: a learner that falls back to an earlier
    checkpoint trains on them again.
    """

    run: Name
    step: Id
    version: Version
    where: Text = ""
    """Of a checkpoint that is not in the run's folder: its place, for people."""


class VersionPublished(Message, frozen=True, tag="version_published"):
    """Learner reports to the buffer which version the actors can fetch, and where."""

    run: Name
    version: Version
    weights_endpoint: Text
    announce_endpoint: Text


class EvalRequest(Message, frozen=True, tag="eval_request"):
    """Learner asks for a greedy evaluation on the held-out tasks with weights of at least ``version``."""

    run: Name
    step: Id
    version: Version
    num_tasks: Count
    blocking: bool
    """True: no training lease is granted until it is done."""


class EvalQuery(Message, frozen=True, tag="eval_query"):
    """Learner asks whether the evaluation requested for ``step`` is done.  Answered by ``EvalResult``."""

    run: Name
    step: Id
    wait_s: Seconds


class RunFinished(Message, frozen=True, tag="run_finished"):
    """Learner has done its steps: no more leases."""

    run: Name


LearnerToBuffer = (
    SampleRequest | Trained | Checkpointed | VersionPublished | EvalRequest | EvalQuery | RunFinished | JoinedToBuffer
)


# --- buffer -> learner -----------------------------------------------------------------------------------------


class BatchTree(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, eq=False):
    """One tree of a batch, with how it was drawn."""

    tree_id: Name
    task_index: Id
    prompt: Tokens
    """int32[P]."""
    turns: TurnRecords
    """Fresh and stale ones; the learner masks those over ``max_lag``."""
    failed_branches: Count
    probability: NotNegative
    """P_i at sampling (ALGORITHM, section 4)."""
    weight: NotNegative
    """w_PER, as the buffer's settings have it."""
    uses: Count
    """How often it was served, this time included."""
    leaf_rewards: tuple[LeafReward, ...] = ()
    """In place of the rewards of these leaves: as its actor closed it."""


class BatchRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, eq=False):
    """One leaf of an earlier tree that is imitated: its path, a chain from the prompt."""

    tree_id: Name
    leaf: TurnId
    task_index: Id
    prompt: Tokens
    """int32[P]."""
    turns: TurnRecords
    """From the first one down to the leaf; the oldest is within ``imitation.max_lag``."""
    advantage: NotNegative
    """Of all its turns, by the medians of when the batch was made (ALGORITHM, "Imitation")."""
    uses: Count
    """How often it was served to be imitated, this time included."""


class Batch(Message, frozen=True, tag="batch"):
    """One rank's share of a batch.  May be empty (``trees == ()``): nothing had a signal, the step counts anyway."""

    batch_id: Id
    step: Id
    num_trees: Count
    """Trees of the whole batch over all ranks."""
    num_leaves: Count
    """Leaves of the whole batch over all ranks: the global normaliser of seq-mean aggregation."""
    num_action_tokens: Size
    """Action tokens over all leaf rows of the whole batch: the global normaliser of token-mean aggregation."""
    num_turn_tokens: Size
    """Action tokens of the whole batch over all ranks, each turn once: the normaliser of unique-token-mean."""
    trees: tuple[BatchTree, ...]
    metrics: dict[Name, float]
    """The buffer's side of this step: train/reward, train/success, buffer/*, counted since the batch before."""
    checkpoint_wanted: bool = False
    """Trees retained for a learner that might fall back fill the buffer: the learner should save a checkpoint."""
    rows: tuple[BatchRow, ...] = ()
    """This rank's share of the leaves that are imitated with this batch (``[imitation]``)."""
    num_rows: Count = 0
    """Such leaves of the whole batch over all ranks."""
    num_row_tokens: Size = 0
    """Action tokens of these leaves' paths, over all ranks."""
    left_out_leaves: NotNegative = 0.0
    """Leaves of trees that ended since the batch before and had no signal; 0 where the run does not ask for it."""
    left_out_rewards: Number = 0.0
    """The sum of their rewards."""
    left_out_squares: NotNegative = 0.0
    """The sum of the squares of these."""


class NotYet(Message, frozen=True, tag="not_yet"):
    """No batch within ``wait_s``: what is missing, for the log."""

    waiting_for: Text
    progress: Size = 0
    """Turns and ends of trees received so far, used or not: while it changes, the wait makes progress."""
    checkpoint_wanted: bool = False
    """As in ``Batch``."""


class Exhausted(Message, frozen=True, tag="exhausted"):
    """Every task below ``run.max_tasks`` has been trained on or is accounted for: there is no further batch."""

    reason: Text


class EvalResult(Message, frozen=True, tag="eval_result"):
    """State of an evaluation; ``success`` is None until it is done, and where all tasks failed or are unknown."""

    step: Id
    done: bool
    success: NotNegative | None
    """Mean over the tasks that are not unknown; a failed one counts as no success."""
    num_done: Count
    num_tasks: Count
    num_unknown: Count = 0
    """Tasks done for which the environment did not report success or failure."""
    version_min: VersionOrNone = -1
    version_max: VersionOrNone = -1
    """Oldest and newest version that sampled any of its turns so far; -1 while there is none."""


BufferToLearner = Batch | NotYet | Exhausted | EvalResult | BufferToJoined | Refused


# --- learner -> actors -----------------------------------------------------------------------------------------

LearnerToActor = WeightsAnnounced | WeightsManifest | Chunk | VersionGone | Refused
