"""Messages about the weights: what a learner, or a relay, announces to actors and answers on its weights port."""

from __future__ import annotations

import msgspec

from atpo_async.core.bounds import (
    Count,
    Id,
    Logprobs,
    Name,
    NotNegative,
    RawBytes,
    Shape,
    Size,
    Text,
    Tokens,
    Version,
    VersionOrNone,
)
from atpo_async.core.vocabulary import Precision
from atpo_async.wire.message import Message


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one tensor lies in the payload."""

    name: Text
    dtype: Precision
    shape: Shape
    offset: Size
    """Aligned to 64 bytes.  Tied tensors lie at one place."""
    nbytes: Size
    digest: Text
    """BLAKE3 of its bytes, 16 bytes of it, hex."""


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A lossless difference that leads from one version's payload to a newer one's (``atpo_async.transports.deltas``).
    The payloads have one layout: their manifests differ in digests only."""

    version: Version
    """That it leads to."""
    base: Version
    """That it is put on; older than ``version``."""
    base_digest: Text
    """Of the base as a whole, as in its announcement: a difference on anything else leads nowhere."""
    nbytes: Size
    digest: Text
    """BLAKE3 of its own bytes, hex."""
    codec: Name
    """The form of its bytes; an actor that does not know it takes the version whole."""


class WeightsManifest(Message, frozen=True, tag="weights_manifest"):
    """Everything about one version except its bytes.  Learner -> actor, answer to ``ManifestRequest``."""

    run: Name
    version: Version
    total_bytes: Size
    chunk_bytes: Size
    tensors: tuple[TensorSpec, ...]
    """Every tensor the engine holds, the tied output head too; of adapters each ``<layer>.lora_A.weight`` and
    ``.lora_B.weight``, in float32."""
    probe_token_ids: Tokens
    """int32[S * T]: S sequences that the policy sampled, all of one length, one after another."""
    probe_logprobs: Logprobs
    """float32[S * (T - 1)]: the learner's log-prob of each token but the first of its sequence, given those before."""
    probe_tolerance: NotNegative | None = None
    """Nats of noise on the logits; None: the engine's own measure."""
    probe_sequences: Count = 1
    """S."""
    adapter_scale: NotNegative | None = None
    """The payload is adapters, to be merged into ``model.path``: their products count so often; None: it is whole."""
    adapter_base: Text | None = None
    """Of adapters: digest of the weights under them (``models.adapters.base_digest``), which an actor must have too."""
    differences: tuple[Difference, ...] = ()
    """That lead to this version, each to the base of the next one: an actor that has one of the bases may fetch those
    from there on instead of the payload.  No part of what ``WeightsAnnounced.digest`` binds: what they lead to is."""
    differences_pending: bool = False
    """A difference that leads here from the base of the request is still being made: ask again."""


class WeightsAnnounced(Message, frozen=True, tag="weights_announced"):
    """PUB, and the answer to ``AnnouncementRequest``."""

    run: Name
    version: Version
    total_bytes: Size
    digest: Text
    """Of the manifest's tensors, their places and their digests (``wire.digests.root_of``), hex."""
    host_id: Text
    """Identity of the learner's machine and boot: only an actor on the same one may use ``shm_path``."""
    shm_path: Text | None


class AnnouncementRequest(Message, frozen=True, tag="announcement_request"):
    run: Name


class ManifestRequest(Message, frozen=True, tag="manifest_request"):
    run: Name
    version: Version
    base: VersionOrNone = -1
    """The version that the actor has the bytes of, for differences; -1: it takes none."""


class ChunkRequest(Message, frozen=True, tag="chunk_request"):
    run: Name
    version: Version
    index: Id
    base: VersionOrNone = -1
    """Of the difference that leads from this version to ``version``; -1: of the whole payload."""


class Chunk(Message, frozen=True, tag="chunk"):
    version: Version
    index: Id
    data: RawBytes
    """uint8[N]."""
    base: VersionOrNone = -1
    """As in the request."""


class VersionGone(Message, frozen=True, tag="version_gone"):
    """The requested version is no longer available; ``newest`` is."""

    version: Version
    newest: VersionOrNone


ActorToLearner = AnnouncementRequest | ManifestRequest | ChunkRequest
