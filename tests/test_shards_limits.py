"""What a shard may hold: together they hold a batch wherever one buffer would."""

from __future__ import annotations

from pathlib import Path

from atpo_async.core.naming.shards import Shard
from atpo_async.wire.messages import Batch
from buffer.front import messages as f
from buffer.leases.admission import Elsewhere
from buffer.shard.settings import of_shard
from tests.buffer_peers_support import SOON_S, ask, grown
from tests.shards_support import cluster_of, sharded
from tests.waiting_support import until


async def test_a_limit_of_trees_that_no_number_of_shards_divides_leaves_space_for_a_batch(tmp_path: Path) -> None:
    config = sharded(buffer={"max_trees": 3}, staleness={"trees_per_batch": 3, "max_lag": 2})
    assert [of_shard(config, Shard(index, 2)).buffer.max_trees for index in range(2)] == [2, 2]
    async with cluster_of(config, tmp_path) as peers:
        for lease in (await peers.leases(4)).leases:
            await peers.send(*grown(lease))
        await until(lambda: peers.cluster.front.shards.total("ready") >= 3)
        answer = await peers.learner.request(ask(num_trees=3, wait_s=1.0), timeout_s=SOON_S)
        assert isinstance(answer, Batch), answer
        assert len(answer.trees) == 3


async def test_a_full_shard_is_no_longer_full_once_the_others_have_given_their_trees(tmp_path: Path) -> None:
    config = sharded(buffer={"max_trees": 4}, staleness={"trees_per_batch": 4, "max_lag": 2})
    async with cluster_of(config, tmp_path) as peers:
        for lease in (await peers.leases(4)).leases:
            await peers.send(*grown(lease))
        shard, front = peers.cluster.shards[0].state, peers.cluster.front.shards
        await until(lambda: front.total("ready") == 4)
        # As it was when this shard was asked for leases last; a full one is asked for none.
        shard.ledger.elsewhere = Elsewhere(ready=4)
        assert shard.trees.memory_full
        link = front.links[0]
        prepare = f.Prepare(front=1, request=ask(num_trees=5), ready=1)
        prepared = await link.ask(prepare, f.Prepared, timeout_s=SOON_S)
        assert not prepared.state.memory_full
