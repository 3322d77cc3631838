"""A relay between actors and a buffer: what it passes on, which weights it serves, and how actors go past it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from pathlib import Path

import pytest

from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.run import scratch
from atpo_async.wire import messages as m
from tests.buffer_peers_support import grown, leaf, opened
from tests.relay_support import RUN, Far, Head, Site, actor_at, configured, head, known_by, relay_to
from tests.waiting_support import LIMIT_S, until, within

WHOLE = [(-1, index) for index in range(20)]
"""All chunks of a version."""


def trees_in(head: Head) -> int:
    """Complete trees that the buffer has."""
    return len(head.service.state.pool)


# --- passing on -------------------------------------------------------------------------------------------------


async def test_an_actor_joins_through_a_relay_and_grows_trees(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        assert far.known_as == "relay-1/actor-0"
        assert far.client.endpoint == site.relay.weights.server.endpoint
        leases = await far.leases(3)
        assert top.held_by("relay-1/actor-0") == {lease.tree_id for lease in leases}
        for lease in leases:
            await far.send(*grown(lease))
        assert trees_in(top) == 3
        assert top.held_by("relay-1/actor-0") == set()
        assert not far.refusals


async def test_a_turn_is_acknowledged_only_once_the_buffer_has_committed_it(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        (lease,) = await far.leases(1)
        disk = asyncio.Event()
        settle = top.service.journal.settle

        async def slow_disk(*, timeout_s: float | None = None) -> None:
            await disk.wait()
            await settle()

        top.service.actors._acknowledgements._settled = slow_disk
        before = far.link.stats.acked
        for message in grown(lease):
            await far.link.send(message)
        await until(lambda: trees_in(top) == 1)
        passage = next(iter(site.relay.passages))
        assert passage.link.stats.unacked == 4
        assert far.link.stats.acked == before
        disk.set()
        await far.link.drain(timeout_s=LIMIT_S)
        assert far.link.stats.acked == before + 4


async def test_what_the_buffer_refuses_is_refused_to_the_actor_with_the_buffers_reason(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        (lease,) = await far.leases(1)
        stray = leaf(lease, 1, 1.0)
        await far.send(opened(lease), m.TreeOpened(run=RUN, tree_id="none", lease_epoch=0, prompt=stray.action))
        (reason,) = far.refusals
        assert "none" in reason
        await far.send(*grown(lease)[1:])
        assert trees_in(top) == 1


async def test_a_refused_hello_is_refused_by_the_buffers_own_words(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site:
        with pytest.raises(SetupError, match=r"grows .* trees of up to 9 leaves, this run"):
            async with actor_at(site.endpoint, search={"initial_rollouts": 9, "rounds": 0}):
                pass


async def test_leases_reports_and_returns_count_for_the_actor_they_are_of(tmp_path: Path) -> None:
    async with (
        head(tmp_path) as top,
        relay_to(top.endpoint) as site,
        actor_at(site.endpoint, "one") as one,
        actor_at(site.endpoint, "two") as two,
    ):
        mine, theirs = await one.leases(2), await two.leases(2)
        back = m.LeaseReturned(run=RUN, actor="one", tree_ids=tuple(lease.tree_id for lease in (*mine, *theirs)))
        await one.send(back)
        assert top.held_by("relay-1/one") == set()
        assert top.held_by("relay-1/two") == {lease.tree_id for lease in theirs}
        assert top.actors >= {"relay-1/one", "relay-1/two", "relay-1"}


async def test_the_relay_gives_no_sign_of_life_for_an_actor_that_gives_none(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site:
        async with actor_at(site.endpoint) as far:
            leases = await far.leases(2)

        def silent(name: str) -> float:
            return top.service.actors.peers[name].silent_s

        await until(lambda: silent("relay-1/actor-0") > 10 * top.config.links.heartbeat_s > 20 * silent("relay-1"))
        later = top.service._clock() + 3600.0
        assert {held.tree_id for held in top.service.state.ledger.lapsed(later)} == {each.tree_id for each in leases}


async def test_the_buffer_shows_relays_and_who_comes_through_them_and_counts_no_relay_as_an_actor(
    tmp_path: Path,
) -> None:
    async with (
        head(tmp_path) as top,
        relay_to(top.endpoint) as site,
        actor_at(site.endpoint, "one"),
        actor_at(top.endpoint, "near"),
    ):
        relays = top.service.facts()["relays"]
        assert isinstance(relays, dict)
        assert relays["relay-1"].endswith("1 actors: relay-1/one")
        assert top.service.facts()["actors alive"] == 2


async def test_the_end_of_a_run_ends_the_relay_once_its_actors_know_of_it(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        top.service.state.finish()
        top.service._changes.notify()
        answer = await far.link.request(m.LeaseRequest(run=RUN, actor="a", count=1, version=0), timeout_s=LIMIT_S)
        assert answer.finished
        await within(site.serving)


async def test_a_relay_that_is_asked_to_stop_ends_and_its_actors_go_on(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        _, rest = await half_grown(far)
        site.relay._stopping.set()
        await within(site.serving)
        await site.kill()
        for message in rest:
            await far.link.send(message)
        await far.link.drain(timeout_s=LIMIT_S)
        assert trees_in(top) == 1


# --- weights ----------------------------------------------------------------------------------------------------


async def test_a_version_is_fetched_once_for_all_actors_of_a_relay(tmp_path: Path) -> None:
    async with (
        head(tmp_path) as top,
        relay_to(top.endpoint) as site,
        actor_at(site.endpoint, "one") as one,
        actor_at(site.endpoint, "two") as two,
    ):
        found = await asyncio.gather(one.weights(0), two.weights(0))
        assert found[0] == found[1]
        assert top.chunks(0) == WHOLE
        versions = site.relay.weights.versions
        assert versions is not None
        assert versions.fetched == 1


async def test_the_differences_that_a_relay_took_are_served_to_its_actors(tmp_path: Path) -> None:
    async with (
        head(tmp_path) as top,
        relay_to(top.endpoint) as site,
        actor_at(site.endpoint, "one") as one,
        actor_at(site.endpoint, "two") as two,
    ):
        for version in range(4):
            announced = top.publisher.store.announcement(0) if version == 0 else await top.publish(version)
            found = await asyncio.gather(one.weights(version), two.weights(version))
            assert found[0] == found[1]
            assert announced.version == version
        # Whole the first time; then each difference once, for the relay and both actors.
        for version in (2, 3):
            asked = top.chunks(version)
            assert asked == sorted(set(asked))
            assert {base for base, _ in asked} == {version - 1}
        for far in (one, two):
            assert far.fetcher.take_counts()["weights/differences/versions"] >= 2


async def test_the_relay_holds_the_newest_two_versions_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "versions"
    place.mkdir()
    async with (
        head(tmp_path / "head") as top,
        relay_to(top.endpoint, folder=place) as site,
        actor_at(site.endpoint) as far,
    ):
        for version in range(4):
            if version:
                await top.publish(version)
            await far.weights(version)
        held = sorted(path.name.partition("-")[0] for path in place.glob("atpo-r.relay-*/*.bin"))
        assert held == ["v2", "v3"]
        answer = await far.client.request(m.ManifestRequest(run=RUN, version=0), timeout_s=LIMIT_S)
        assert (answer.version, answer.newest) == (0, 3)
    assert list(place.iterdir()) == []


async def test_an_actor_gets_nothing_of_a_version_that_came_wrong_until_it_has_come_right(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site:
        answer = top.publisher.store.answer
        spoilt = list[int]()

        def spoil(request: m.ActorToLearner) -> m.LearnerToActor:
            found = answer(request)
            if isinstance(found, m.Chunk) and found.index == 1 and not spoilt:
                spoilt.append(found.version)
                data = found.data.copy()
                data[0] ^= 1
                return m.Chunk(version=found.version, index=found.index, data=data)
            return found

        top.publisher.store.answer = spoil  # type: ignore[method-assign]
        async with actor_at(site.endpoint) as far:
            assert await far.weights(0)
            assert spoilt == [0]
            assert site.relay.weights.rejected == 1
            assert far.fetcher.take_counts().get("weights/rejected", 0) == 0


async def test_a_version_that_does_not_fit_is_passed_on_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from atpo_async.relay import versions

    place = tmp_path / "versions"
    place.mkdir()
    monkeypatch.setattr(versions, "SPARE_BYTES", 1 << 62)
    async with (
        head(tmp_path / "head") as top,
        relay_to(top.endpoint, folder=place) as site,
        actor_at(site.endpoint) as far,
    ):
        assert await far.weights(0)
        assert site.relay.weights.passed_on > 0
        assert f"for which there is no space here ({place} has" in caplog.text
        # There is space again: the next version is held.
        monkeypatch.setattr(versions, "SPARE_BYTES", 0)
        await top.publish(1)
        assert await far.weights(1)
        newest = site.relay.weights.versions
        assert newest is not None
        await until(lambda: newest.newest is not None and newest.newest.version == 1)


async def test_a_disk_that_fills_up_while_a_version_is_fetched_has_it_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "versions"
    place.mkdir()
    plain = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        if str(place) in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(file, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    async with (
        head(tmp_path / "head") as top,
        relay_to(top.endpoint, folder=place) as site,
        actor_at(site.endpoint) as far,
    ):
        assert await far.weights(0)
        assert site.relay.weights.passed_on > 0
        assert f"no space here ({place}: No space left on device)" in caplog.text


async def test_a_relay_without_actors_fetches_nothing(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site:
        await top.publish(1)
        for _ in range(3):
            await site.relay.weights._listener.next(timeout_s=0.02)
        assert not any(isinstance(request, m.ChunkRequest) for request in top.requests)


# --- trees of relays, and going past them -------------------------------------------------------------------------


async def test_relays_join_relays(tmp_path: Path) -> None:
    async with (
        head(tmp_path) as top,
        relay_to(top.endpoint, "near") as near,
        relay_to(near.endpoint, "far") as far_site,
        actor_at(far_site.endpoint) as far,
    ):
        assert far.known_as == "near/far/actor-0"
        assert [hop.endpoint for hop in far.link.way.rest] == [far_site.endpoint, near.endpoint, top.endpoint]
        (lease,) = await far.leases(1)
        await far.send(*grown(lease))
        assert trees_in(top) == 1
        assert await far.weights(0)
        assert top.chunks(0) == WHOLE
        assert set(top.service.facts()["relays"]) == {"near", "near/far"}  # type: ignore[call-overload]


async def half_grown(far: Far) -> tuple[m.Lease, list[object]]:
    """A lease, with the tree opened and a turn of it sent; and what is left of it."""
    (lease,) = await far.leases(1)
    messages = grown(lease)
    await far.send(*messages[:2])
    return lease, list(messages[2:])


async def test_an_actor_goes_past_a_relay_that_died_and_keeps_its_leases_and_its_trees(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        lease, rest = await half_grown(far)
        assert await far.weights(0)
        await site.kill()
        for message in rest:
            await far.link.send(message)
        await far.link.drain(timeout_s=LIMIT_S)
        assert far.known_as == "actor-0"
        assert not far.refusals
        assert trees_in(top) == 1
        held = top.service.state.pool
        assert len(held) == 1
        assert "actor relay-1/actor-0 goes on as actor-0, with 1 leases" in caplog.text
        # Its next lease and the next weights come from the head itself.
        (again,) = await far.leases(1)
        assert top.held_by("actor-0") == {again.tree_id}
        await top.publish(1)
        assert await far.weights(1)
        assert far.client.endpoint == top.publisher.weights_endpoint
        assert lease.tree_id != again.tree_id


async def test_what_was_not_acknowledged_when_the_relay_died_is_sent_again_and_counts_once(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        (lease,) = await far.leases(1)
        disk = asyncio.Event()
        settle = top.service.journal.settle

        async def slow_disk(*, timeout_s: float | None = None) -> None:
            await disk.wait()
            await settle()

        top.service.actors._acknowledgements._settled = slow_disk
        for message in grown(lease):
            await far.link.send(message)
        await until(lambda: trees_in(top) == 1)
        await site.kill()
        await known_by(top, "actor-0")
        disk.set()
        await far.link.drain(timeout_s=LIMIT_S)
        assert far.link.stats.resent == 4
        assert trees_in(top) == 1
        assert not far.refusals


async def test_an_actor_goes_past_a_relay_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        lease, rest = await half_grown(far)
        pump = site.relay.actors._pump
        assert pump is not None
        # Its connections stay; it hears nothing and says nothing.
        monkeypatch.setattr(pump, "_on_message", lambda frames, user: None)
        await until(lambda: top.held_by("actor-0") == {lease.tree_id})
        for message in rest:
            await far.link.send(message)
        await far.link.drain(timeout_s=LIMIT_S)
        assert trees_in(top) == 1


async def test_a_relay_goes_past_a_relay_that_died_and_its_actors_do_not_notice(tmp_path: Path) -> None:
    async with (
        head(tmp_path) as top,
        relay_to(top.endpoint, "near") as near,
        relay_to(near.endpoint, "far") as far_site,
        actor_at(far_site.endpoint) as far,
    ):
        _, rest = await half_grown(far)
        await near.kill()
        for message in rest:
            await far.link.send(message)
        await far.link.drain(timeout_s=LIMIT_S)
        assert trees_in(top) == 1
        assert far.link.num_moves == 0
        assert "far/actor-0" in top.actors
        # Then that one dies as well: the buffer knows who the actor has become meanwhile.
        lease, rest = await half_grown(far)
        assert top.held_by("far/actor-0") == {lease.tree_id}
        await far_site.kill()
        await until(lambda: top.held_by("actor-0") == {lease.tree_id})
        for message in rest:
            await far.link.send(message)
        await far.link.drain(timeout_s=LIMIT_S)
        assert trees_in(top) == 2
        assert not far.refusals


async def test_a_relay_that_comes_back_goes_on_with_actors_that_reach_nothing_else(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site, actor_at(site.endpoint) as far:
        far.link.way.learn([m.Hop(endpoint="tcp://127.0.0.1:1")])  # the head cannot be reached from here
        _, rest = await half_grown(far)
        port = int(site.endpoint.rpartition(":")[2])
        await site.kill()
        async with relay_to(top.endpoint, port=port):
            for message in rest:
                await far.link.send(message)
            await far.link.drain(timeout_s=LIMIT_S)
            assert trees_in(top) == 1
            assert far.known_as == "relay-1/actor-0"
            assert await far.weights(0)


async def test_a_new_process_of_an_actor_loses_the_leases_of_the_former_one_behind_a_relay_too(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site:
        async with actor_at(site.endpoint) as far:
            await far.leases(2)
        async with actor_at(site.endpoint):
            assert top.held_by("relay-1/actor-0") == set()


async def test_no_other_may_go_on_as_an_actor_whose_ticket_it_has_not(tmp_path: Path) -> None:
    async with (
        head(tmp_path) as top,
        relay_to(top.endpoint) as site,
        actor_at(site.endpoint, "one") as one,
        actor_at(top.endpoint, "thief") as thief,
    ):
        leases = await one.leases(2)
        hello = m.ActorHello(
            protocol=m.PROTOCOL, run=RUN, actor="thief", environment=top.config.task_name,
            search_leaves=top.config.search.max_leaves, continues="relay-1/one", ticket=thief.place._ticket,
        )  # fmt: skip
        answer = await thief.link.request(hello, timeout_s=LIMIT_S)
        assert isinstance(answer, m.Refused)
        assert "thief cannot go on as relay-1/one" in answer.reason
        assert top.held_by("relay-1/one") == {lease.tree_id for lease in leases}


# --- bad input ----------------------------------------------------------------------------------------------------


async def ends_with(site: Site) -> str:
    with pytest.raises(ExceptionGroup) as caught:
        await within(site.serving)
    (error,) = caught.value.exceptions
    assert isinstance(error, AtpoError)
    return f"{type(error).__name__}: {error}"


async def test_a_relay_that_joins_the_learners_port_or_the_weights_says_so(tmp_path: Path) -> None:
    async with head(tmp_path) as top:
        for endpoint in (top.service.learner.endpoint, top.publisher.weights_endpoint):
            async with relay_to(endpoint, joined=False) as site:
                said = await ends_with(site)
                assert said.startswith(f"SetupError: {endpoint} refuses relay relay-1: it is no port for actors")


async def test_a_relay_that_joins_nothing_waits_and_gives_up() -> None:
    nothing = "tcp://127.0.0.1:1"
    async with relay_to(nothing, joined=False, links={"give_up_s": 0.5, "heartbeat_s": 0.05}) as site:
        said = await ends_with(site)
        assert "WaitTimeout" in said
        assert f"{nothing} does not answer (nothing listens there)" in said


async def test_relays_in_a_circle_are_found_out(tmp_path: Path) -> None:
    async with head(tmp_path) as top:
        port = int(top.endpoint.rpartition(":")[2])
    async with (
        relay_to(f"tcp://127.0.0.1:{port}", "one", joined=False) as one,
        relay_to(one.endpoint, "two", port=port, joined=False),
    ):
        assert "in a circle lead to no buffer: one-" in await ends_with(one)


async def test_too_many_relays_in_a_row_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atpo_async.relay import uplink

    monkeypatch.setattr(uplink, "MAX_HOPS", 1)
    async with (
        head(tmp_path) as top,
        relay_to(top.endpoint, "one") as one,
        relay_to(one.endpoint, "two", joined=False) as two,
    ):
        assert "relay two is more than 1 relays away from the buffer" in await ends_with(two)


async def test_a_relay_of_another_run_or_protocol_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atpo_async.relay import uplink

    async with head(tmp_path) as top:
        async with relay_to(top.endpoint, run="other", joined=False) as site:
            assert "relay relay-1 belongs to run 'other', this buffer to 'r'" in await ends_with(site)
        monkeypatch.setattr(uplink, "PROTOCOL", 6)
        async with relay_to(top.endpoint, joined=False) as site:
            assert f"relay relay-1 speaks protocol 6, this buffer {m.PROTOCOL}" in await ends_with(site)


async def test_a_name_that_grows_too_long_on_the_way_is_refused(tmp_path: Path) -> None:
    async with head(tmp_path) as top, relay_to(top.endpoint) as site:
        with pytest.raises(SetupError, match="a link's identity must have 1 to 200 bytes"):
            async with actor_at(site.endpoint, "x" * 199):
                pass


def test_the_folder_of_a_relay_is_one_that_dead_ones_leave_to_be_swept() -> None:
    assert scratch.weights_folder(RUN).name == "atpo-r"
    assert configured().weights.transport == "chunks"
