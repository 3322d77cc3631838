"""What one peer of a relay, or what comes from upstream, does not cost the others: its end, its names, its numbers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async.core.errors import AtpoError
from atpo_async.relay import passages
from atpo_async.relay.differences import KeptDifferences
from atpo_async.relay.passages import Passages
from atpo_async.transports.deltas.codec import CODEC
from atpo_async.wire import messages as m
from atpo_async.wire.digests import TENSOR_DIGEST_BYTES
from tests.relay_support import RUN, actor_at, head, relay_to
from tests.waiting_support import LIMIT_S, until, within

# --- one peer ---------------------------------------------------------------------------------------------------


async def test_an_actor_that_goes_while_it_waits_for_leases_does_not_end_its_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its link upstream is closed with a request open."""
    monkeypatch.setattr(passages, "GONE_BEATS", 4)
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as stays:
        answered, held = top.service._actor_handler._lease, asyncio.Event()

        async def holding(peer: str, request: m.LeaseRequest) -> m.Leases:
            await held.wait()
            return await answered(peer, request)

        monkeypatch.setattr(top.service._actor_handler, "_lease", holding)
        async with actor_at(site.endpoint, "actor-1") as goes:
            asking = asyncio.create_task(goes.link.request(request(), timeout_s=LIMIT_S))
            passage = next(each for each in site.relay.passages if each.known_as == "relay-1/actor-1")
            await until(lambda: bool(len(passage.link._requests)))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: len(site.relay.passages) == 1 or site.serving.done())
        await stays.report()
        assert not site.serving.done()


def request() -> m.LeaseRequest:
    return m.LeaseRequest(run=RUN, actor="a", count=8, version=0)


async def test_an_actor_that_came_another_way_takes_its_name_there_and_may_come_back(tmp_path: Path) -> None:
    """Two relays with one key: the buffer drops the link of the first one, which is no loss of upstream."""
    async with (
        head(tmp_path) as top,
        relay_to(top.endpoint) as first,
        relay_to(top.endpoint, "relay-2") as second,
    ):
        second.relay.passages._name = "relay-1"
        async with actor_at(first.endpoint):
            pass
        (before,) = first.relay.passages
        async with actor_at(second.endpoint):
            await until(lambda: before.link.failure is not None)
        async with actor_at(first.endpoint) as back:
            await back.report()
            assert back.known_as == "relay-1/actor-0"
        assert not first.serving.done()


async def test_the_key_of_an_actor_is_no_relays_at_a_relay_either() -> None:
    """As at the buffer: only keys among the relays may introduce relays and speak for others."""
    said = []
    for peer, message in [
        ("gpu-7/a/b", request()),
        ("gpu-7/a", m.RelayHello(protocol=m.PROTOCOL, run="", relay="a", via=("a-1",))),
        ("relay-2/a", request()),
    ]:
        made = Passages.__new__(Passages)
        made._settings = _Keyed()  # type: ignore[assignment]
        made._is_relay = lambda peer: peer.startswith("relay-2/")
        answer = await made.handle(peer, message, ())
        assert isinstance(answer, m.Refused)
        said.append(answer.reason)
    assert "which the key 'gpu-7' may not" in said[0]
    assert "the key 'gpu-7' is no relay's" in said[1]
    assert "the key 'relay-2' is a relay's" in said[2]


class _Keyed:
    keys_dir = Path("keys")


# --- upstream ---------------------------------------------------------------------------------------------------


def difference(base: int, payload: bytes, base_digest: str = "0") -> m.Difference:
    from blake3 import blake3

    return m.Difference(
        version=base + 1, base=base, base_digest=base_digest, nbytes=len(payload),
        digest=blake3(payload).hexdigest(length=TENSOR_DIGEST_BYTES), codec=CODEC,
    )  # fmt: skip


def manifest(*differences: m.Difference) -> m.WeightsManifest:
    return m.WeightsManifest(
        run=RUN, version=differences[-1].version, total_bytes=100, chunk_bytes=16, tensors=(),
        probe_token_ids=np.zeros(0, dtype=np.int32), probe_logprobs=np.zeros(0, dtype=np.float32),
        differences=differences,
    )  # fmt: skip


def take(kept: KeptDifferences, made: m.WeightsManifest, payload: bytes, folder: Path) -> None:
    """The last difference of a manifest comes, and what it leads to is verified."""
    last = made.differences[-1]
    kept.expect(made, folder, most=32)
    kept.note(m.Chunk(version=last.version, base=last.base, index=0, data=np.frombuffer(payload, dtype=np.uint8)))
    kept.keep(made)


def test_a_difference_of_a_learner_that_fell_back_replaces_the_one_of_the_same_numbers(tmp_path: Path) -> None:
    kept = KeptDifferences()
    for payload, base_digest in ((b"first", "0"), (b"second", "1")):
        made = manifest(difference(3, payload, base_digest))
        take(kept, made, payload, tmp_path)
        assert kept.describe(made, 3).differences == made.differences
        answer = kept.answer(m.ChunkRequest(run=RUN, version=4, base=3, index=0))
        assert isinstance(answer, m.Chunk)
        assert answer.data.tobytes() == payload
    kept.close()


def test_no_more_files_are_opened_than_differences_are_taken(tmp_path: Path) -> None:
    kept = KeptDifferences()
    kept.expect(manifest(*(difference(base, b"x") for base in range(1000))), tmp_path, most=3)
    assert sorted(kept._coming) == [(998, 997), (999, 998), (1000, 999)]
    kept.expect(manifest(difference(3, b"x")), tmp_path, most=0)
    assert not kept._coming
    kept.close()


async def test_a_file_that_is_removed_once_it_is_verified_costs_the_version_one_more_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with head(tmp_path / "top") as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        await far.weights(0)
        versions = site.relay.weights.versions
        assert versions is not None
        offer, faults = versions._offer, 1

        async def removed(made: m.WeightsManifest, announced: m.WeightsAnnounced, path: Path) -> m.WeightsAnnounced:
            nonlocal faults
            if faults:
                faults -= 1
                path.unlink()  # noqa: ASYNC240  (at once)
            return await offer(made, announced, path)

        monkeypatch.setattr(versions, "_offer", removed)
        await top.publish(1)
        assert await far.weights(1)
        assert site.relay.weights.rejected == 1
        assert not site.serving.done()


async def test_upstream_that_is_lost_for_good_still_ends_the_relay(tmp_path: Path) -> None:
    short: dict[str, Any] = {"links": {"give_up_s": 0.3}}
    async with head(tmp_path) as top:
        where = top.endpoint
        async with relay_to(where, **short) as site, actor_at(site.endpoint):
            await top.service.actors.__aexit__(None, None, None)
            with pytest.raises(ExceptionGroup) as caught:
                await within(site.serving)
        assert isinstance(caught.value.exceptions[0], AtpoError)
