"""What the front of a buffer and its shards say to one another beside the messages that the front passes on.  Pure.

A question or an answer is one of the structs below, as msgpack in the body of ``ShardAsk`` and ``ShardAnswer``: both
ends are one program of one version.  It is checked for its types when it is read.
"""

from __future__ import annotations

from types import UnionType
from typing import TypeVar

import msgspec
import numpy as np

from atpo_async.core.bounds import RawBytes
from atpo_async.core.errors import AtpoError, BadMessage
from atpo_async.core.tree import Turn
from atpo_async.wire import messages as m
from buffer.journal.entries import EvaluationEntry

T = TypeVar("T")


class ShardAsk(m.Message, frozen=True, tag="shard_ask"):
    """Front -> shard: one of ``Question``."""

    body: RawBytes


class ShardAnswer(m.Message, frozen=True, tag="shard_answer"):
    """Shard -> front: the answer to it."""

    body: RawBytes


FrontToShard = (
    ShardAsk
    | m.ActorHello
    | m.TreeOpened
    | Turn
    | m.TreeClosed
    | m.LeaseReturned
    | m.ActorReport
    | m.Trained
    | m.Checkpointed
    | m.VersionPublished
    | m.EvalRequest
    | m.RunFinished
)
ShardToFront = ShardAnswer | m.Welcome | m.Leases | m.Batch | m.Refused


class _Said(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


# --- questions -------------------------------------------------------------------------------------------------


class Look(_Said, frozen=True, tag="look"):
    """Answered by ``ShardState`` once it is another than ``seen``, at the latest after ``wait_s``."""

    seen: int
    """``ShardState.changes`` as last heard."""
    wait_s: float
    heard: dict[str, float]
    """Actor -> seconds since its last sign of life at the front."""


class Grant(_Said, frozen=True, tag="grant"):
    """Answered by ``Leases``, once committed."""

    request: m.LeaseRequest
    under_lease: int
    ready: int
    produced: int
    blocked_by: str | None
    """What the other shards have (``leases.admission.Elsewhere``)."""


class GiveBack(_Said, frozen=True, tag="give_back"):
    """These leases never reached their actor.  Answered by ``Done``."""

    actor: str
    tree_ids: tuple[str, ...]


class Prepare(_Said, frozen=True, tag="prepare"):
    """The learner requests a batch.  Answered by ``Prepared``."""

    front: int
    """Number of the process that asks, by chance: what an earlier one has sent may come after it is gone."""
    request: m.SampleRequest
    ready: int = 0
    """Trees that are ready in the other shards: a shard that is full is asked for no leases, and learns it here."""


class Weigh(_Said, frozen=True, tag="weigh"):
    """Answered by ``Weighed``."""

    highest: float
    """The highest priority that was confirmed in any shard."""


class TakePart(_Said, frozen=True, tag="take"):
    """Make the part of a batch.  Answered by ``Part``, once committed, or ``Gone``."""

    front: int
    """As in the last ``Prepare``; answered by ``Gone`` otherwise."""
    step: int
    version: int
    batch_id: int
    num_ranks: int
    num_trees: int
    """That the learner has asked for."""
    entered: bytes
    """int64[n]."""
    probability: bytes
    """float64[n]."""
    weight: bytes
    """float64[n]."""
    metrics: dict[str, float]
    """The front's own share of the batch's, added to the shard's."""


class UndoPart(_Said, frozen=True, tag="undo"):
    """Undo the part of a batch that not every shard has.  Answered by ``Done``."""

    front: int
    """As in the last ``Prepare``; answered by ``Gone`` otherwise."""
    step: int
    batch_id: int


class Fetch(_Said, frozen=True, tag="fetch"):
    """Answered by ``Batch`` with these trees alone, or ``Refused`` where the part is not here."""

    step: int
    batch_id: int
    tree_ids: tuple[str, ...]


class LookAtEvaluation(_Said, frozen=True, tag="evaluation"):
    """Answered by ``EvaluationPart``."""

    step: int


class LookAtActors(_Said, frozen=True, tag="actors"):
    """Answered by ``ActorRows``."""


class End(_Said, frozen=True, tag="end"):
    """The run is over and the actors know of it: the shard ends.  Answered by ``Done``."""


Question = (
    Look | Grant | GiveBack | Prepare | Weigh | TakePart | UndoPart | Fetch | LookAtEvaluation | LookAtActors | End
)


# --- answers ---------------------------------------------------------------------------------------------------


class EvaluationState(_Said, frozen=True):
    step: int
    version: int
    num_tasks: int
    """Of all shards."""
    num_done: int
    """Of this shard."""
    done: bool
    """All of this shard's."""


class ShardState(_Said, frozen=True, tag="state"):
    """The numbers of one shard that decisions over all shards are made of."""

    changes: int
    """Another one after every change that the front waits for."""
    incarnation: int
    turns_endpoint: str
    """Where it takes turns from actors."""
    ready: int
    waiting: int
    """Trees that wait to be served and are not under lease; those that come back from the learner too."""
    under_lease: int
    out: int
    """Trees with the learner."""
    produced: int
    fruitless: int
    """Trees since the last batch that came to their end with too few leaves."""
    memory_full: bool
    lost: int
    """Training leases that wait for another holder."""
    to_evaluate: int
    """Tasks of evaluations that can be leased now."""
    blocked_by: str | None
    """The evaluation of its own that comes before any training tree."""
    next_task: int
    retries: int
    all_leased: bool
    leased_before: bool
    published: int | None
    next_version: int
    version: int
    step: int
    saved_step: int
    next_batch: int
    highest: float
    checkpoint_wanted: bool
    finished: bool
    failing: str | None
    weights_endpoint: str
    announce_endpoint: str
    nbytes: int
    progress: int
    given_up: int
    tasks: dict[str, int]
    drops: str
    last_turn_s: float | None
    """Seconds since the last turn."""
    evaluations: tuple[EvaluationState, ...]


class PartTree(_Said, frozen=True):
    tree_id: str
    num_tokens: int
    num_leaves: int
    num_action_tokens: int
    """Over its leaf rows."""
    num_turn_tokens: int
    """Each turn once."""


class Part(_Said, frozen=True, tag="part"):
    """One shard's part of a batch."""

    batch_id: int
    step: int
    version: int
    num_ranks: int
    trees: tuple[PartTree, ...]
    metrics: dict[str, float]
    means: dict[str, float]
    """Over how many values each mean in ``metrics`` is taken."""


class Prepared(_Said, frozen=True, tag="prepared"):
    state: ShardState
    part: Part | None
    """Where the batch that is requested was made before."""


class Weighed(_Said, frozen=True, tag="weighed"):
    """``ReadyTrees`` of a shard."""

    entered: bytes
    priority: bytes
    oldest: bytes
    unserved: bytes
    version: int


class Gone(_Said, frozen=True, tag="gone"):
    """A tree that was drawn has left meanwhile: draw again."""


class EvaluationPart(_Said, frozen=True, tag="evaluation_part"):
    entry: EvaluationEntry | None
    """None where it is not known here."""


class ActorRow(_Said, frozen=True):
    """One actor, as ``leases.overview.actor_rows`` has it."""

    host: str
    turns_per_s: float | None
    lag: float | None
    trees: int
    done: int
    silent_s: float
    silent: bool
    share: float | None


class ActorRows(_Said, frozen=True, tag="actor_rows"):
    rows: dict[str, ActorRow]


class Done(_Said, frozen=True, tag="done"):
    pass


class Unwritten(_Said, frozen=True, tag="unwritten"):
    """Decided and not committed: the disk is slow or refuses."""

    reason: str


Answer = ShardState | Prepared | Weighed | Part | Gone | EvaluationPart | ActorRows | Done | Unwritten

_QUESTIONS = msgspec.msgpack.Decoder(Question)
_ANSWERS = msgspec.msgpack.Decoder(Answer)


def asked(question: Question) -> ShardAsk:
    return ShardAsk(body=_packed(question))


def answered(answer: Answer) -> ShardAnswer:
    return ShardAnswer(body=_packed(answer))


def question_in(message: ShardAsk) -> Question:
    """Raises BadMessage where it is none of this program's."""
    try:
        found: Question = _QUESTIONS.decode(message.body.data)
    except msgspec.MsgspecError as exc:
        raise BadMessage(f"a question of a buffer's front that this shard does not know: {exc}") from None
    return found


class ShardAway(AtpoError):
    """A shard has no answer for now: it is to be asked again."""


def answer_in(message: object, kind: type[T] | UnionType) -> T:
    """The answer of a shard.

    Raises:
        BadMessage: the shard refuses.
        ShardAway: it answers something else than ``kind``.
    """
    if isinstance(message, m.Refused):
        raise BadMessage(message.reason)
    if not isinstance(message, ShardAnswer):
        raise ShardAway(f"a shard answers with {type(message).__name__}, expected {_name(kind)}")
    try:
        found = _ANSWERS.decode(message.body.data)
    except msgspec.MsgspecError as exc:
        raise ShardAway(f"an answer of a shard that this front does not know: {exc}") from None
    if not isinstance(found, kind):
        what = found.reason if isinstance(found, Unwritten) else type(found).__name__
        raise ShardAway(f"a shard answers: {what}; expected {_name(kind)}")
    return found


def _name(kind: type | UnionType) -> str:
    return getattr(kind, "__name__", str(kind))


def _packed(said: object) -> np.ndarray:
    return np.frombuffer(msgspec.msgpack.encode(said), dtype=np.uint8)
