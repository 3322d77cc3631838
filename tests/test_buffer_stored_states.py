"""What earlier programs wrote into the journal is read and written the same today, entry by entry.

``vectors/buffer_states.json`` holds four states of buffers as the program wrote them before its parts had their present
names: trees that grow, wait, are with the learner, ended meanwhile or are used up, leases of both kinds, batches,
evaluations, tasks to begin anew, a delay line amid a set.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from atpo_async.config import Config, build
from buffer.journal import entries
from buffer.journal.persistence import StatePersistence
from buffer.state import BufferState
from buffer.trees.index import TurnEntry
from tests.buffer_support import Disk

STATES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "vectors" / "buffer_states.json").read_text())


def config_of(kind: str, max_lag: int, max_uses: int) -> Config:
    if kind == "exact":
        staleness: dict[str, Any] = {"exact_lag": 2, "trees_per_batch": 2, "max_lag": max_lag, "max_oversampling": 2.0}
        return build({"run": {"steps": 8}, "search": {"initial_rollouts": 4, "rounds": 0}, "staleness": staleness})
    return build(
        {
            "run": {"max_tasks": 12},
            "staleness": {"trees_per_batch": 3, "max_lag": max_lag, "max_uses": max_uses},
            "search": {"initial_rollouts": 5, "rounds": 0},
            "buffer": {"ready": kind, "max_reissues": 3},
        }
    )


def stored_disk(stored: dict[str, Any]) -> Disk:
    records = {int(chunk): base64.b64decode(record) for chunk, record in stored["records"].items()}
    return Disk.holding(
        state={key.encode(): base64.b64decode(value) for key, value in stored["state"].items()},
        rows=[TurnEntry(*fields) for fields in stored["entries"]],
        records=records,
    )


def written(state: BufferState) -> dict[bytes, bytes]:
    """All that the journal would hold if it held nothing yet."""
    found: dict[bytes, bytes | None] = {}
    persistence = StatePersistence(state)
    trees = [state.trees.registry._ids[number] for number in sorted(state.trees.registry._ids)]
    found |= {entries.TREE + tree_id.encode(): entries.dump(persistence._tree(tree_id)) for tree_id in trees}
    found |= {
        entries.BATCH + b"%020d" % step: entries.dump(served.snapshot())
        for step, served in state.batches.by_step.items()
    }
    found |= {
        entries.EVALUATION + b"%020d" % each.step: entries.dump(each.snapshot()) for each in state.ledger.evaluations
    }
    persistence.collect(lambda key, value: found.update({key: value}))
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("stored", STATES, ids=lambda stored: "-".join(map(str, stored["config"])))
def test_a_stored_state_is_written_as_it_was_read(stored: dict[str, Any]) -> None:
    disk = stored_disk(stored)
    before, num_records = dict(disk.state), len(stored["records"])
    state = disk.open(config_of(*stored["config"]), now=stored["now"])
    after = written(state)
    earlier = msgspec.msgpack.decode(before.pop(entries.RUN))
    run = msgspec.msgpack.decode(after.pop(entries.RUN))
    assert run == earlier | {"incarnation": earlier["incarnation"] + 1}
    assert {k: msgspec.msgpack.decode(v) for k, v in after.items()} == {
        k: msgspec.msgpack.decode(v) for k, v in before.items()
    }
    assert after == before
    assert len(disk._records) == num_records


@pytest.mark.parametrize("stored", STATES, ids=lambda stored: "-".join(map(str, stored["config"])))
def test_every_record_of_a_stored_state_has_its_tree(stored: dict[str, Any]) -> None:
    disk = stored_disk(stored)
    state = disk.open(config_of(*stored["config"]), now=stored["now"])
    # Of trees that are gone, rows may still be there: a chunk goes as a whole.
    assert len(state.trees.registry.live(disk.rows())) == len(stored["records"])
