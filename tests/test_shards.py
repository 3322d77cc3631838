"""A buffer of several shards behind one front, at real sockets: what actors and learner see of it, and that a restart
of any part changes nothing for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from atpo_async.config import build, resuming
from atpo_async.core.errors import ConfigError
from atpo_async.core.naming.shards import Shard, index_of, role_of, shard_of, shard_roles
from atpo_async.links.client import Client
from atpo_async.links.keys import CLIENT_KEY, SERVER_KEY, make_keys
from atpo_async.wire import messages as m
from buffer.front import actors as front_actors
from buffer.front import service as front_service
from buffer.front.messages import ActorRow, Part
from buffer.front.metrics import merged
from buffer.front.overview import put_together
from tests.buffer_peers_support import SOON_S, ask, closed, grown, hello, leaf, opened, wants
from tests.shards_support import ShardPeers, by_shard, cluster_of, sharded
from tests.waiting_support import until


def uneven(lease: m.Lease) -> list[Any]:
    """A tree with something to learn from, of another size for each task."""
    return grown(lease, (1.0, 0.0), tokens=3 + lease.task_index)


async def ready(peers: ShardPeers, count: int) -> None:
    await until(lambda: peers.cluster.front.shards.total("ready") == count)


async def batch(peers: ShardPeers, **changes: Any) -> m.Batch:
    answer = await peers.learner.request(ask(**changes), timeout_s=SOON_S)
    assert isinstance(answer, m.Batch), answer
    return answer


# --- leases ----------------------------------------------------------------------------------------------------


async def test_tasks_are_leased_in_their_order_each_by_the_shard_that_owns_it(tmp_path: Path) -> None:
    async with cluster_of(sharded(staleness={"trees_per_batch": 4, "max_lag": 1}), tmp_path) as peers:
        leases = await peers.leases(6)
        assert sorted(lease.task_index for lease in leases.leases) == list(range(6))
        assert by_shard(leases) == {0: [0, 2, 4], 1: [1, 3, 5]}
        assert all(lease.tree_id.startswith(f"s{lease.task_index % 2}b1-") for lease in leases.leases)


async def test_no_more_trees_are_pending_over_all_shards_than_one_buffer_admits(tmp_path: Path) -> None:
    config = sharded(3, staleness={"trees_per_batch": 2, "max_lag": 2})
    async with cluster_of(config, tmp_path) as peers:
        first = await peers.leases(50)
        assert len(first.leases) == config.staleness.max_trees_pending == 6
        assert [lease.min_version for lease in sorted(first.leases, key=lambda each: each.task_index)] == [0] * 6
        more = await peers.leases(1)
        assert not more.leases
        assert more.closed_because is not None
        assert "staleness.max_lag = 2 allows 6" in more.closed_because


async def test_what_a_shard_has_lost_is_leased_again_by_it_with_the_turns_that_are_there(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        lease = next(each for each in (await peers.leases(2)).leases if each.task_index == 1)
        await peers.send(opened(lease), leaf(lease, 1, 1.0))
        await peers.send(m.LeaseReturned(run="r", actor="a", tree_ids=(lease.tree_id,), reason="refused"))
        await until(lambda: peers.cluster.front.shards.total("lost") == 1)
        (again,) = (await peers.leases(1)).leases
        assert (again.tree_id, again.epoch) == (lease.tree_id, lease.epoch + 1)
        assert [turn.turn_id for turn in again.committed] == [1]


async def test_an_actor_that_leaves_gives_back_what_it_holds_in_every_shard(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        held = (await peers.leases(4)).leases
        await peers.send(m.LeaseReturned(run="r", actor="a", tree_ids=()))
        async with peers.another("b") as other:
            again: set[tuple[str, int]] = set()
            while len(again) < len(held):  # one shard may hear of it after the other has granted its part
                answer = await other.request(wants(4 - len(again), "b"), timeout_s=SOON_S)
                assert isinstance(answer, m.Leases)
                again |= {(each.tree_id, each.epoch) for each in answer.leases}
            assert again == {(each.tree_id, 1) for each in held}


async def test_leases_of_a_shard_that_answers_late_go_back_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_actors, "LATE_S", 0.05)
    async with cluster_of(sharded(), tmp_path) as peers:
        journal = peers.cluster.shards[1].journal
        settle, slow = journal.settle, asyncio.Event()

        async def slowly(**options: Any) -> None:
            await slow.wait()
            await settle(**options)

        monkeypatch.setattr(journal, "settle", slowly)
        answer = await peers.actor.request(wants(2), timeout_s=SOON_S)
        assert isinstance(answer, m.Leases)
        assert by_shard(answer) == {0: [0]}
        ledger = peers.cluster.shards[1].state.ledger
        assert ledger.num_training == 1
        assert ledger.num_waiting("train") == 0
        slow.set()
        await until(lambda: ledger.num_waiting("train") == 1)


# --- turns -----------------------------------------------------------------------------------------------------


async def test_turns_come_through_the_front_or_straight_to_the_shard_and_are_in_one_batch(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        leases = await peers.leases(2)
        first, second = leases.leases
        await peers.send(*uneven(first))
        direct = Client(
            leases.shards[shard_of(second.tree_id) or 0], peer="shard", identity="a", receives=m.BufferToActor,
            settings=peers.cluster.config.links,
        )  # fmt: skip
        async with direct:
            welcome = await direct.request(hello(peers.cluster.config, run="r"), timeout_s=SOON_S)
            assert isinstance(welcome, m.Welcome)
            for message in uneven(second):
                await direct.send(message)
            await direct.drain(timeout_s=SOON_S)
        served = await batch(peers)
        assert {tree.tree_id for tree in served.trees} == {first.tree_id, second.tree_id}
        assert (served.num_trees, served.num_leaves) == (2, 4)
        assert served.num_action_tokens == served.num_turn_tokens == 2 * 3 + 2 * 4
        assert [tree.probability for tree in served.trees] == [0.5, 0.5]
        assert served.metrics["train/trees"] == 2
        assert served.metrics["train/reward"] == 0.5
        # The greeting at the shard is no new process: its leases were not lost.
        assert all(
            service.state.counters.since.counts["refused_trees"] == 0 for service in peers.cluster.shards.values()
        )


async def test_with_keys_front_shards_and_actors_know_one_another_by_them(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for name in (SERVER_KEY, CLIENT_KEY):
        make_keys(keys, name)
    async with cluster_of(sharded(links={"keys_dir": keys}), tmp_path) as peers:
        config = peers.cluster.config
        leases = await peers.leases(2)
        assert len(leases.shards) == 2
        first, second = leases.leases
        await peers.send(*uneven(first))
        where = leases.shards[shard_of(second.tree_id) or 0]
        direct = Client(where, peer="shard", identity="a", receives=m.BufferToActor, settings=config.links)
        async with direct:
            for message in uneven(second):
                await direct.send(message)
            await direct.drain(timeout_s=SOON_S)
        assert len((await batch(peers)).trees) == 2
        held = [service.state.ledger.actors.alive(0.0) for service in peers.cluster.shards.values()]
        assert all("client/a" in names for names in held)


async def test_a_turn_that_its_shard_refuses_is_refused_to_its_sender_with_the_reason(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        (lease,) = (await peers.leases(1)).leases
        turn = leaf(lease, 1, 1.0)
        await peers.send(opened(lease), turn, msgspec.structs.replace(turn, reward=0.0))
        assert len(peers.refusals) == 1
        assert "turn 1" in peers.refusals[0]


@pytest.mark.parametrize(
    ("tree_id", "why"),
    [
        ("b1-00000001", "its id names no shard"),
        ("s2b1-00000002", "this buffer has 2 shards"),
        ("s0b1-00000099", "s0b1-00000099"),
    ],
)
async def test_a_tree_of_no_shard_or_of_no_lease_is_refused_by_name(tree_id: str, why: str, tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        (lease,) = (await peers.leases(1)).leases
        await peers.send(opened(msgspec.structs.replace(lease, tree_id=tree_id)))
        assert len(peers.refusals) == 1
        assert why in peers.refusals[0]


async def test_a_shard_takes_nothing_but_its_trees_from_an_actor(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        service = peers.cluster.shards[0]
        direct = Client(
            service.actors.endpoint, peer="shard", identity="a", receives=m.BufferToActor,
            settings=peers.cluster.config.links,
        )  # fmt: skip
        async with direct:
            answer = await direct.request(m.LeaseRequest(run="r", actor="a", count=1, version=0), timeout_s=SOON_S)
            assert isinstance(answer, m.Refused)
            assert "buffer-0 takes the messages of its trees alone: LeaseRequest goes to the buffer" in answer.reason
            stranger = await direct.request(hello(peers.cluster.config, run="other"), timeout_s=SOON_S)
            assert isinstance(stranger, m.Refused)


async def test_an_actor_behind_a_relay_is_not_sent_to_the_shards(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        relay = m.RelayHello(protocol=m.PROTOCOL, run="r", relay="relay-1", via=("relay-1",))
        assert len((await peers.leases(1)).shards) == 2
        async with peers.another("relay-1") as link, peers.another("relay-1/b") as behind:
            welcome = await link.request(relay, timeout_s=SOON_S)
            assert isinstance(welcome, m.Welcome)
            assert (welcome.name, welcome.weights_endpoint, welcome.finished) == ("relay-1", "tcp://w:1", False)
            leases = await behind.request(wants(1, "b"), timeout_s=SOON_S)
            assert isinstance(leases, m.Leases)
            assert leases.shards == ()
            (lease,) = leases.leases
            for message in uneven(lease):
                await behind.send(message)
            await behind.drain(timeout_s=SOON_S)
        await ready(peers, 1)


async def test_an_actor_that_comes_another_way_goes_on_with_its_leases_in_all_shards(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        config = peers.cluster.config
        first = await peers.actor.request(hello(config), timeout_s=SOON_S)
        assert isinstance(first, m.Welcome)
        held = (await peers.leases(2)).leases
        async with peers.another("relay-1/a") as other:
            wrong = await other.request(hello(config, continues="a", ticket="x"), timeout_s=SOON_S)
            assert isinstance(wrong, m.Refused)
            assert "its ticket is not that of this name" in wrong.reason
            welcome = await other.request(hello(config, continues="a", ticket=first.ticket), timeout_s=SOON_S)
            assert isinstance(welcome, m.Welcome)
        for service, lease in zip(peers.cluster.shards.values(), sorted(held, key=lambda x: x.task_index), strict=True):
            now = service.state.ledger.held(lease.tree_id)
            assert now is not None
            assert (now.holder, now.waiting) == ("relay-1/a", False)


async def test_what_the_front_refuses_is_in_the_metrics_of_the_next_batch_once(tmp_path: Path) -> None:
    async with cluster_of(sharded(staleness={"trees_per_batch": 2, "max_lag": 3}), tmp_path) as peers:
        leases = (await peers.leases(4)).leases
        await peers.send(opened(msgspec.structs.replace(leases[0], tree_id="b1-1")))
        for lease in leases:
            await peers.send(*uneven(lease))
        first = await batch(peers)
        await peers.tell(m.Trained(run="r", batch_id=first.batch_id, version=1, priorities={}))
        second = await batch(peers, step=1, version=1)
        assert [each.metrics["buffer/bad_messages"] for each in (first, second)] == [1.0, 0.0]


# --- batches ---------------------------------------------------------------------------------------------------


async def test_ranks_share_the_trees_of_all_shards_by_tokens(tmp_path: Path) -> None:
    config = sharded(staleness={"trees_per_batch": 4, "max_lag": 1})
    async with cluster_of(config, tmp_path) as peers:
        for lease in (await peers.leases(4)).leases:
            await peers.send(*uneven(lease))
        shares = [await batch(peers, rank=rank, num_ranks=2, num_trees=4) for rank in (0, 1)]
        assert len({share.batch_id for share in shares}) == 1
        assert {share.num_trees for share in shares} == {4}
        tasks = [sorted(tree.task_index for tree in share.trees) for share in shares]
        assert sorted(tasks[0] + tasks[1]) == [0, 1, 2, 3]
        assert all(len(own) == 2 for own in tasks)
        wrong = await peers.learner.request(ask(rank=2, num_ranks=3, num_trees=4), timeout_s=SOON_S)
        assert isinstance(wrong, m.Refused)
        assert "shared among 2 ranks, rank 2 counts 3" in wrong.reason


@pytest.mark.parametrize("part", ["front", "shard 0", "shard 1"])
async def test_the_batch_of_a_step_is_the_same_after_any_part_was_started_again(part: str, tmp_path: Path) -> None:
    async with cluster_of(sharded(staleness={"trees_per_batch": 2, "max_lag": 3}), tmp_path) as peers:
        for lease in (await peers.leases(6)).leases:
            await peers.send(*uneven(lease))
        before = await batch(peers)
        cluster = peers.cluster
        await cluster.end(part)
        await (cluster.start_front() if part == "front" else cluster.start_shard(int(part[-1])))
        await cluster.heard()
        after = await batch(peers)
        assert (after.batch_id, after.num_leaves) == (before.batch_id, before.num_leaves)
        assert after.metrics == before.metrics
        assert [(t.tree_id, t.probability, t.weight, t.uses) for t in after.trees] == [
            (t.tree_id, t.probability, t.weight, t.uses) for t in before.trees
        ]


async def test_a_batch_of_which_one_shard_alone_has_its_part_is_taken_back_and_drawn_again(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        for lease in (await peers.leases(2)).leases:
            await peers.send(*uneven(lease))
        await batch(peers)
        # As if the front had been killed before shard 1 got to its part.
        state = peers.cluster.shards[1].state
        state.batch_server.undo_part(0, 1)  # type: ignore[attr-defined]
        assert peers.cluster.shards[0].state.batches.by_step.keys() == {0}
        await peers.cluster.end("front")
        await peers.cluster.start_front()
        again = await batch(peers)
        assert again.batch_id == 2
        assert sorted(tree.task_index for tree in again.trees) == [0, 1]
        parts = [service.state.batches.by_step[0] for service in peers.cluster.shards.values()]
        assert [part.batch_id for part in parts] == [2, 2]
        assert [len(part.drawn) for part in parts] == [1, 1]


async def test_while_a_shard_is_away_the_learner_is_told_which(tmp_path: Path) -> None:
    config = sharded(links={"heartbeat_s": 0.1})
    async with cluster_of(config, tmp_path) as peers:
        for lease in (await peers.leases(2)).leases:
            await peers.send(*uneven(lease))
        await peers.cluster.end("shard 1")
        await until(lambda: peers.cluster.front.shards.missing == "buffer-1")
        asked = asyncio.create_task(batch(peers))
        await peers.cluster.start_shard(1)
        assert len((await asked).trees) == 2


async def test_what_was_trained_on_is_told_to_every_shard_and_raises_the_priority_of_new_trees_in_all(
    tmp_path: Path,
) -> None:
    async with cluster_of(sharded(staleness={"trees_per_batch": 2, "max_lag": 3, "max_uses": 2}), tmp_path) as peers:
        for lease in (await peers.leases(4)).leases:
            await peers.send(*uneven(lease))
        served = await batch(peers)
        priorities = {tree.tree_id: 5.0 + i for i, tree in enumerate(served.trees)}
        await peers.tell(m.Trained(run="r", batch_id=served.batch_id, version=1, priorities=priorities))
        assert all(service.state.batches.by_step[0].confirmed for service in peers.cluster.shards.values())
        await batch(peers, step=1, version=1)
        assert {service.state.pool.highest_priority for service in peers.cluster.shards.values()} == {6.0}
        await peers.tell(m.Checkpointed(run="r", step=1, version=1))
        assert all(set(service.state.batches.by_step) == {1} for service in peers.cluster.shards.values())


async def test_a_run_of_so_many_tasks_ends_when_those_of_all_shards_are_done(tmp_path: Path) -> None:
    config = sharded(run={"max_tasks": 3, "steps": 10}, staleness={"trees_per_batch": 2, "max_lag": 2})
    async with cluster_of(config, tmp_path) as peers:
        leases = await peers.leases(8)
        assert sorted(lease.task_index for lease in leases.leases) == [0, 1, 2]
        for lease in leases.leases:
            await peers.send(*uneven(lease))
        for step, size in ((0, 2), (1, 1)):
            served = await batch(peers, step=step, version=step)
            assert len(served.trees) == size
            priorities = {tree.tree_id: 1.0 for tree in served.trees}
            await peers.tell(m.Trained(run="r", batch_id=served.batch_id, version=step + 1, priorities=priorities))
        over = await peers.learner.request(ask(step=2, version=2), timeout_s=SOON_S)
        assert isinstance(over, m.Exhausted)
        assert (
            over.reason == "all run.max_tasks = 3 tasks are done: 3 trained on, 0 without signal, 0 failed, 0 given up"
        )


# --- evaluations, the end --------------------------------------------------------------------------------------


async def test_an_evaluation_is_shared_out_and_its_results_are_put_together(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        await peers.tell(m.EvalRequest(run="r", step=0, version=0, num_tasks=3, blocking=True))
        await until(lambda: all(state.evaluations for state in peers.cluster.front.shards.states))
        leases = await peers.leases(3)
        assert sorted((lease.kind, lease.task_index) for lease in leases.leases) == [("eval", i) for i in range(3)]
        (none,) = [await peers.leases(1)]
        assert none.closed_because is not None
        assert "the evaluation of step 0 comes first" in none.closed_because
        for lease in leases.leases:
            await peers.send(opened(lease), leaf(lease, 1, float(lease.task_index > 0)), closed(lease, 1))
        result = await peers.learner.request(m.EvalQuery(run="r", step=0, wait_s=SOON_S), timeout_s=SOON_S)
        assert isinstance(result, m.EvalResult)
        assert (result.done, result.num_done, result.num_tasks) == (True, 3, 3)
        assert result.success == pytest.approx(2 / 3)
        unknown = await peers.learner.request(m.EvalQuery(run="r", step=7, wait_s=0.0), timeout_s=SOON_S)
        assert isinstance(unknown, m.Refused)


async def test_when_the_run_is_over_actors_are_told_and_all_parts_end(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        await peers.tell(m.RunFinished(run="r"))
        answer = await peers.leases(1)
        assert answer.finished
        await until(lambda: all(service._stopping.is_set() for service in peers.cluster.shards.values()))


async def test_an_actor_is_let_in_by_all_shards_and_one_of_another_run_by_none(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        held = (await peers.leases(2)).leases
        welcome = await peers.actor.request(hello(peers.cluster.config), timeout_s=SOON_S)
        assert isinstance(welcome, m.Welcome)
        assert (welcome.weights_endpoint, welcome.name) == ("tcp://w:1", "a")
        # A new process of this name: what the former held is leased again.
        again = await peers.leases(2)
        assert {lease.tree_id for lease in again.leases} == {lease.tree_id for lease in held}
        refused = await peers.actor.request(hello(peers.cluster.config, run="other"), timeout_s=SOON_S)
        assert isinstance(refused, m.Refused)
        assert refused.reason == "actor a belongs to run 'other', this buffer to 'r'"


async def test_the_status_has_each_actor_once_with_what_all_shards_know_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_service, "ACTORS_S", 0.05)
    async with cluster_of(sharded(), tmp_path) as peers:
        await peers.actor.request(hello(peers.cluster.config, host="node-1"), timeout_s=SOON_S)
        await peers.leases(2)
        await until(lambda: peers.cluster.front.actor_facts().get("a", {}).get("trees") == 2)
        row = peers.cluster.front.actor_facts()["a"]
        assert (row["host"], row["silent"], row["done"]) == ("node-1", False, 0)


# --- pure ------------------------------------------------------------------------------------------------------


def part(metrics: dict[str, float], **means: float) -> Part:
    return Part(batch_id=1, step=0, version=0, num_ranks=1, trees=(), metrics=metrics, means=means)


def test_metrics_of_parts_are_summed_and_means_weighed_by_what_they_are_taken_over() -> None:
    first = part(
        {"train/reward": 1.0, "train/trees": 3.0, "buffer/trees": 1.0, "buffer/priority_mean": 2.0,
         "buffer/commit_s/max": 0.5, "buffer/commit_s/mean": 0.1},
        **{"train/reward": 3.0},
    )  # fmt: skip
    second = part(
        {"train/reward": 0.0, "train/trees": 1.0, "buffer/trees": 3.0, "buffer/priority_mean": 4.0,
         "buffer/commit_s/max": 0.2, "buffer/commit_s/mean": 0.3},
        **{"train/reward": 1.0},
    )  # fmt: skip
    assert merged([first, second]) == pytest.approx(
        {"train/reward": 0.75, "train/trees": 4.0, "buffer/trees": 4.0, "buffer/priority_mean": 3.5,
         "buffer/commit_s/max": 0.5, "buffer/commit_s/mean": 0.2}
    )  # fmt: skip
    assert merged([first, part({})])["train/reward"] == 1.0


def test_what_shards_say_of_an_actor_is_weighed_by_the_turns_that_come_to_them() -> None:
    def row(rate: float | None, lag: float | None, share: float | None, **changes: Any) -> ActorRow:
        fields: dict[str, Any] = {"host": "", "trees": 1, "done": 2, "silent_s": 1.0, "silent": False} | changes
        return ActorRow(turns_per_s=rate, lag=lag, share=share, **fields)

    found = put_together(
        [
            {"a": row(3.0, 1.0, 1.0, host="node-1"), "new": row(None, None, None, silent=True, silent_s=9.0)},
            {"a": row(0.5, 4.0, 0.5, silent_s=0.2), "b": row(0.5, 2.0, 0.5)},
        ]
    )
    assert found["a"] == {
        "host": "node-1", "turns_per_s": 3.5, "lag": 1.43, "trees": 2, "done": 4, "silent_s": 0.2, "silent": False,
        "share": 0.875,
    }  # fmt: skip
    assert (found["b"]["share"], found["b"]["lag"]) == (0.125, 2.0)
    assert (found["new"]["turns_per_s"], found["new"]["lag"], found["new"]["silent"]) == (None, None, True)


def test_a_trees_id_and_a_roles_name_say_which_shard_it_is() -> None:
    assert [shard_of(name) for name in ("s0b1-00000003", "s12b3-e0v1-000001", "b1-00000003", "s01b1-1", "sb1-1")] == [
        0, 12, None, None, None,
    ]  # fmt: skip
    assert [index_of(role) for role in ("buffer-0", "buffer-13", "buffer", "buffer-x", "actor-0")] == [
        0, 13, None, None, None,
    ]  # fmt: skip
    assert shard_roles(3) == tuple(role_of(k) for k in range(3)) == ("buffer-0", "buffer-1", "buffer-2")
    assert shard_roles(1) == ()
    assert [Shard(k, 3).num_tasks(7) for k in range(3)] == [3, 2, 2]


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"staleness": {"exact_lag": 1}}, "the order in which all trees of the run come"),
        ({"buffer": {"follower": True}}, "a follower copies one journal"),
        ({"buffer": {"max_bytes": 1 << 20}}, "raise it to 2097152 at least"),
        ({"buffer": {"max_trees": 1}, "staleness": {"trees_per_batch": 1}}, "leaves some of buffer.shards = 2 none"),
        ({"links": {"shards_port": 65535}}, "the highest that does is 65534"),
        ({"links": {"shards_port": 7000, "actors_port": 7001}}, "links.shards_port (of shard 1) are both 7001"),
    ],
)
def test_settings_that_shards_cannot_hold_are_refused_with_a_way_out(sections: dict[str, Any], why: str) -> None:
    data = {**sections, "buffer": {"shards": 2, **sections.get("buffer", {})}}
    with pytest.raises(ConfigError) as refused:
        build(data)
    assert why in str(refused.value)
    build({**sections, "buffer": {**data["buffer"], "shards": 1}})


def test_a_run_keeps_the_number_of_shards_that_it_began_with() -> None:
    one, two = build({}), build({"buffer": {"shards": 2}})
    assert resuming.refused(one, two) == [("buffer.shards", 1, 2)]
    assert resuming.refused(two, two) == []
