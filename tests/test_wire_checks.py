"""What each message promises of its values, and that what breaks a promise is refused by name."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import VersionSpan
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from atpo_async.wire.records import TurnRecords
from tests.wire_support import EVERYTHING, contents, turn

# --- turns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"turn_id": 0, "parent_id": 0}, "turn_id is 0, expected 1 to"),
        ({"parent_id": 3}, "below its child's"),
        ({"parent_id": -1}, "parent_id is -1, expected 0 to"),
        ({"turn_id": 2**31}, "turn_id is 2147483648, expected 1 to"),
        ({"lease_epoch": -1}, "lease_epoch is -1, expected 0 to"),
        ({"expansion_round": 2**31}, "expansion_round is 2147483648, expected 0 to"),
        ({"run": "r\x07"}, "is no name"),
        ({"action": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "spans": ()}, "action is empty"),
        ({"action": np.array([1, -1, 2], np.int32)}, "negative token id -1"),
        ({"observation": np.full(100, -5, np.int32)}, "negative token id -5"),
        ({"logprobs": np.zeros(2, np.float32)}, "2 logprobs for 3 action tokens"),
        ({"logprobs": np.array([0, np.nan, 0], np.float32)}, r"logprobs\[1\] is nan"),
        ({"logprobs": np.array([0, 0, -np.inf], np.float32)}, r"logprobs\[2\] is -inf"),
        ({"logprobs": np.array([0.5, 0, 0], np.float32)}, r"logprobs\[0\] is 0.5"),
        ({"spans": ()}, "spans cover 0 of 3"),
        ({"spans": (VersionSpan(0, 0, 2),)}, "spans cover 2 of 3"),
        ({"spans": (VersionSpan(0, 0, 4),)}, "does not follow"),
        ({"spans": (VersionSpan(0, 0, 1), VersionSpan(0, 2, 3))}, "does not follow"),
        ({"spans": (VersionSpan(0, 0, 2), VersionSpan(0, 1, 3))}, "does not follow"),
        ({"spans": (VersionSpan(0, 0, 0), VersionSpan(0, 0, 3))}, "does not follow"),
        ({"spans": (VersionSpan(-1, 0, 3),)}, r"spans\[0\]: version is -1, expected 0 to"),
        ({"reward": None}, "reward"),
        ({"end": "continue", "success": None}, "reward"),
        ({"end": "continue", "reward": None}, "success"),
        ({"reward": math.nan}, "reward is nan"),
        ({"generate_s": -1.0}, "generate_s is -1.0"),
        ({"environment_s": math.inf}, "environment_s is inf"),
        ({"environment_s": 2e9}, "environment_s is 2000000000.0"),
        ({"reward": -1e39}, "fits float32"),
        ({"spans": (VersionSpan(2**31, 0, 3),)}, r"spans\[0\]: version is 2147483648"),
    ],
)
def test_a_turn_that_breaks_its_promises_is_refused_by_name(changes: dict[str, Any], fact: str) -> None:
    with pytest.raises(BadMessage, match=fact) as caught:
        codec.decode(codec.encode(turn(**changes)), m.ActorToBuffer)
    assert "tree_id 't7'" in str(caught.value)


def test_a_log_prob_rounded_to_just_above_zero_is_taken() -> None:
    for size in (3, 500):
        values = np.full(size, codec.LOGPROB_SLACK, np.float32)
        fine = turn(action=np.ones(size, np.int32), logprobs=values, spans=(VersionSpan(0, 0, size),))
        assert codec.decode(codec.encode(fine), m.ActorToBuffer).logprobs.tolist() == values.tolist()


def test_long_log_probs_are_held_to_the_same_rule_as_short_ones() -> None:
    for bad in (math.nan, math.inf, -math.inf, 0.01):
        values = np.full(500, -1.0, np.float32)
        values[321] = bad
        long = turn(action=np.ones(500, np.int32), logprobs=values, spans=(VersionSpan(0, 0, 500),))
        with pytest.raises(BadMessage, match=r"logprobs\[321\]"):
            codec.decode(codec.encode(long), m.ActorToBuffer)


def test_a_turn_inside_another_message_is_held_to_the_same_promises_when_it_is_looked_at() -> None:
    lease = m.Lease(
        tree_id="t",
        task_index=0,
        kind="train",
        epoch=0,
        lifetime_s=1,
        min_version=0,
        seed=1,
        committed=TurnRecords.of([turn(), turn(reward=None)]),
    )
    leases = m.Leases(leases=(lease,), closed_because=None, retry_after_s=0, finished=False)
    decoded = codec.decode(codec.encode(leases), m.BufferToActor)
    committed = decoded.leases[0].committed
    assert contents(committed[0]) == contents(turn())
    for look in (lambda: committed[1], lambda: list(committed), lambda: codec.check(decoded)):
        with pytest.raises(BadMessage, match="reward is None"):
            look()


# --- other messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "fact"),
    [
        (m.LeaseRequest(run="r", actor="a", count=2**31, version=0), "count is 2147483648"),
        (m.LeaseRequest(run="r", actor="a", count=1, version=2**31), "version is 2147483648"),
        (m.LeaseRequest(run="r", actor="a", count=1, version=-2), "version is -2"),
        (m.LeaseRequest(run="r\n", actor="a", count=1, version=1), r"run 'r\\n' is no name"),
        (m.LeaseRequest(run="r", actor="a" * 201, count=1, version=1), "actor 'aaa.* is no name"),
        (m.LeaseReturned(run="r", actor="a", tree_ids=("t", "\0")), r"tree_ids\[\d\] .* is no name"),
        (m.LeaseReturned(run="r", actor="a", tree_ids=("é" * 101,)), r"tree_ids\[\d\] .* is no name"),
        (m.ActorReport(run="r", actor="a", version=1, tree_ids=(), metrics={"\x1b[2J": 1.0}), "printable"),
        (m.Trained(run="r", batch_id=1, version=1, priorities={"t": math.inf}), "is inf"),
        (m.Trained(run="r", batch_id=1, version=1, priorities={"t": -1.0}), "is -1.0"),
        (m.Trained(run="r", batch_id=1, version=1, priorities={"t": 1e39}), "fits float32"),
        (m.Trained(run="r", batch_id=-1, version=1, priorities={}), "batch_id is -1"),
        (m.VersionPublished(run="r", version=1, weights_endpoint="x" * 65537, announce_endpoint=""), "65537 bytes"),
        (m.VersionPublished(run="r", version=1, weights_endpoint="é" * 32769, announce_endpoint=""), "65538 bytes"),
        (m.EvalQuery(run="r", step=1, wait_s=1e10), "at most 1e"),
        (m.EvalQuery(run="r", step=1, wait_s=math.nan), "finite"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(message: Any, fact: str) -> None:
    with pytest.raises(BadMessage, match=fact):
        codec.decode(codec.encode(message), EVERYTHING)


def test_counts_are_not_negative_and_floats_are_finite() -> None:
    with pytest.raises(BadMessage, match="count is -1"):
        codec.decode(codec.encode(m.LeaseRequest(run="r", actor="a", count=-1, version=0)), m.ActorToBuffer)
    trained = m.Trained(run="r", batch_id=1, version=2, priorities={"t": math.nan})
    with pytest.raises(BadMessage, match=r"priorities\['t'\] is nan"):
        codec.decode(codec.encode(trained), m.LearnerToBuffer)


def test_one_metric_that_is_not_finite_does_not_cost_an_actor_its_report() -> None:
    report = m.ActorReport(run="r", actor="a", version=-1, tree_ids=(), metrics={"x": math.nan})
    assert math.isnan(codec.decode(codec.encode(report), m.ActorToBuffer).metrics["x"])


def test_a_manifest_whose_tensors_do_not_fit_is_refused() -> None:
    def manifest(*specs: m.TensorSpec, num_logprobs: int = 1) -> m.WeightsManifest:
        return m.WeightsManifest(
            run="r",
            version=1,
            total_bytes=128,
            chunk_bytes=64,
            tensors=specs,
            probe_token_ids=np.array([1, 2], np.int32),
            probe_logprobs=np.zeros(num_logprobs, np.float32),
            probe_tolerance=1e-5,
        )

    def spec(shape: tuple[int, ...], offset: int, nbytes: int) -> m.TensorSpec:
        return m.TensorSpec(name="w", dtype="float32", shape=shape, offset=offset, nbytes=nbytes, digest="")

    fits = manifest(spec((4, 4), 64, 64), spec((4,), 0, 16), spec((2, 2), 0, 16))
    assert codec.decode(codec.encode(fits), m.LearnerToActor).tensors == fits.tensors
    for bad in (
        manifest(spec((4,), 0, 15)),
        manifest(spec((4,), 120, 16)),
        manifest(spec((4,), -16, 16)),
        manifest(spec((16,), 0, 64), spec((16,), 60, 64)),
        manifest(spec((16,), 0, 64), spec((8,), 0, 32)),
        manifest(spec((-4, -1), 0, 16)),
        manifest(spec((2**62,) * 33 + (0,), 0, 0)),
        manifest(num_logprobs=2),
        msgspec.structs.replace(fits, probe_sequences=0),
        msgspec.structs.replace(fits, probe_sequences=2),
        msgspec.structs.replace(fits, probe_sequences=3, probe_logprobs=np.zeros(0, np.float32)),
        msgspec.structs.replace(fits, probe_tolerance=-1.0),
    ):
        with pytest.raises(BadMessage):
            codec.decode(codec.encode(bad), m.LearnerToActor)
