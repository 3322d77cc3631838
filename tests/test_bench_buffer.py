"""The buffer's benchmarks: what they send, what they check, and small runs of each against a real buffer process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from atpo_async.core.tree import Turn, TurnTree
from atpo_async.wire import codec
from atpo_async.wire.messages import ActorToBuffer, Lease
from atpo_async.wire.records import TurnRecords
from benchmarks import buffer as serving
from benchmarks import load, peers, soak, transport
from buffer.pool.sum_tree import SumTree

ROOT = Path(__file__).resolve().parent.parent


def lease(tree_id: str = "t", task: int = 3) -> Lease:
    return Lease(
        tree_id=tree_id, task_index=task, kind="train", epoch=0, lifetime_s=1.0, min_version=0, seed=0,
        committed=TurnRecords.of(()),
    )  # fmt: skip


def made(num_turns: int = 20, num_bytes: int = 4096, **changes: object) -> list[Turn]:
    turns = load.Turns(num_bytes, **changes)  # type: ignore[arg-type]
    return [turns.turn("r", lease(), i) for i in range(1, num_turns + 1)]


# --- what is sent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [64, 4096, 16384])
def test_the_arrays_of_a_made_up_turn_have_the_bytes_asked_for_and_the_wire_takes_them(num_bytes: int) -> None:
    for turn in made(num_bytes=num_bytes):
        assert turn.observation.nbytes + turn.action.nbytes + turn.logprobs.nbytes == num_bytes
        there = codec.decode([bytes(frame) for frame in codec.encode(turn)], ActorToBuffer)
        assert load.content(there) == load.content(turn)


def test_a_made_up_tree_is_chains_that_all_end_and_do_not_all_earn_the_same() -> None:
    tree = TurnTree("t", 0, load.Turns(64).prompt, tuple(made(20)))
    assert [len(tree.path(leaf.turn_id)) for leaf in tree.leaves()] == [load.CHAIN_TURNS] * 4
    assert {leaf.reward for leaf in tree.leaves()} == {0.0, 1.0}


def test_bytes_that_no_turn_can_have_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        load.Turns(100)


def test_content_tells_apart_whatever_a_turn_can_differ_in() -> None:
    turn = made(1)[0]
    other_action = turn.action.copy()
    other_action[-1] += 1
    others = [
        msgspec.structs.replace(turn, tree_id="u"),
        msgspec.structs.replace(turn, turn_id=2),
        msgspec.structs.replace(turn, parent_id=1),
        msgspec.structs.replace(turn, action=other_action),
        msgspec.structs.replace(turn, logprobs=turn.logprobs * np.float32(1.5)),
        msgspec.structs.replace(turn, end="done", reward=1.0),
        msgspec.structs.replace(turn, end="done", reward=0.0),
    ]
    assert len({load.content(each) for each in (turn, *others)}) == 1 + len(others)


def test_marked_turns_of_different_places_are_all_different() -> None:
    turns = load.Turns(64, marked=True, of=2)
    actions = {turns.turn("r", lease("t", task), i).action.tobytes() for task in range(5) for i in range(1, 21)}
    assert len(actions) == 100


def test_senders_are_spread_over_no_more_processes_than_there_are_senders() -> None:
    made_plans = load.plans(5, 2, endpoint="", run="r", config=None, trees=1)
    assert sorted(name for plan in made_plans for name in plan.names) == [f"sender-{i}" for i in range(5)]
    assert len(load.plans(1, 2, endpoint="", run="r", config=None, trees=1)) == 1


# --- the soak's verdict ----------------------------------------------------------------------------------------


def samples(**series: list[float]) -> list[dict[str, float]]:
    named = {name.replace("_", ".", 1): values for name, values in series.items()}
    count = len(next(iter(named.values())))
    return [{"at_s": 5.0 * i, **{name: values[i] for name, values in named.items()}} for i in range(count)]


def kept(**series: list[float]) -> bool:
    (judged,) = soak.judge_samples(samples(**series))
    return bool(judged["kept"])


def test_growth_is_that_of_the_second_half_and_one_spike_is_none() -> None:
    at_s = [float(i) for i in range(101)]
    assert soak.growth(at_s, [max(i - 50.0, 0.0) * 3 for i in range(101)]) == pytest.approx(150)
    assert soak.growth(at_s, [min(i, 50.0) for i in range(101)]) == pytest.approx(0, abs=1e-6)
    assert soak.growth(at_s, [1000.0 if i == 90 else 5.0 for i in range(101)]) == 0


def test_memory_that_rises_to_a_level_and_stays_there_is_kept_and_one_that_goes_on_rising_is_not() -> None:
    level, slack = 60e6, float(soak.MEMORY_SLACK_BYTES)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1e5, 121)
    assert kept(memory_private_bytes=[min(i, 20) / 20 * level + float(noise[i]) for i in range(121)])
    assert not kept(memory_private_bytes=[level + 4 * slack * i / 120 for i in range(121)])


def test_a_queue_that_goes_up_and_down_is_kept_and_one_that_goes_up_and_up_is_not() -> None:
    assert kept(queue_links=[float(i * 37 % 400) for i in range(121)])
    assert not kept(queue_links=[5.0 * i for i in range(121)])


def test_counts_may_grow() -> None:
    assert kept(count_trees_served=[100.0 * i for i in range(121)])


def test_queues_are_found_anywhere_in_a_status_and_summed_over_peers() -> None:
    peer = {"peer": "a", "queued": 2, "silent_s": 9.0, "requests": [{"what": "x"}], "handled": 50}
    status = {
        "links": {"buffer": {"window": 256, "peers": [peer, {**peer, "queued": 5}], "keys": False}},
        "facts": {"journal": {"waiting": 3, "bytes": 10}},
    }
    assert soak.queues_of(status) == {
        "links.buffer.peers.queued": 7,
        "links.buffer.peers.requests": 2,
        "facts.journal.waiting": 3,
    }


def seen(**changes: object) -> soak.Seen:
    said = {f"t{i}": soak.packed({1: i, 2: i + 1}) for i in range(5)}
    fields: dict[str, object] = {"closed": dict(said), "served": dict(said), "times_served": Counter(said.keys())}
    return soak.Seen(**(fields | changes))  # type: ignore[arg-type]


def test_trees_that_were_all_served_once_as_they_were_sent_are_kept() -> None:
    judged = soak.judge_trees(seen())
    assert judged["kept"]
    assert (judged["trees_acknowledged"], judged["turns_acknowledged"], judged["lost"]) == (5, 10, 0)


def test_a_tree_that_was_never_served_is_lost_unless_the_buffer_says_that_it_dropped_one() -> None:
    served = {f"t{i}": soak.packed({1: i, 2: i + 1}) for i in range(4)}
    judged = soak.judge_trees(seen(served=served))
    assert (judged["kept"], judged["lost"]) == (False, 1)
    judged = soak.judge_trees(seen(served=served, dropped=Counter({"buffer/dropped_stale": 1})))
    assert (judged["kept"], judged["lost"]) == (True, 0)


def test_another_byte_a_second_service_a_refusal_or_nothing_at_all_breaks_the_verdict() -> None:
    served = {f"t{i}": soak.packed({1: i, 2: i + 1}) for i in range(5)}
    assert soak.judge_trees(seen(served=served | {"t0": soak.packed({1: 0, 2: 2})}))["changed"] == 1
    assert not soak.judge_trees(seen(served=served | {"t0": soak.packed({1: 0, 2: 2})}))["kept"]
    assert not soak.judge_trees(seen(times_served=Counter({"t0": 2})))["kept"]
    assert not soak.judge_trees(seen(refused=["Turn: no"]))["kept"]
    assert not soak.judge_trees(soak.Seen())["kept"]


# --- priorities ------------------------------------------------------------------------------------------------


def test_the_numpy_reference_keeps_the_same_sums_as_a_sum_tree_and_draws_in_proportion() -> None:
    rng = np.random.default_rng(0)
    reference, sums = serving.NumpyPriorities(100), SumTree(100)
    for _ in range(20):
        indices = rng.choice(100, 30, replace=False)
        values = rng.random(30) + 0.01
        reference.update(indices, values)
        sums.set(indices, values**serving.EXPONENT)
    assert reference._nodes[1] == pytest.approx(sums.total)
    drawn = np.bincount(reference.draw(20_000, rng), minlength=100) / 20_000
    assert drawn == pytest.approx(sums.values()[:100] / sums.total, abs=1e-3)


def test_a_cost_that_doubles_from_a_thousand_trees_to_a_million_is_logarithmic() -> None:
    def record(trees: int, **costs: float) -> serving.Record:
        return {"part": "growth", "side": "ours", "trees": trees, **costs}

    found = serving.verdict(
        [record(1000, insert_us=10.0, update_us=10.0), record(10**6, insert_us=20.0, update_us=10_000.0)]
    )
    over = {f["operation"]: f["over_log"] for f in found}
    assert {f["operation"]: f["power"] for f in found}["update"] == pytest.approx(1.0)
    assert over["insert"] == pytest.approx(1.0)
    assert over["update"] == pytest.approx(1000 / (math.log2(10**6) / math.log2(1000)))


def test_a_real_pool_keeps_its_size_while_it_is_measured() -> None:
    pool = serving.Pool(300, turns=10)
    names, priorities = pool.to_confirm(64)
    pool.confirm((names, priorities))
    assert len(pool.pool) == 300
    assert [entry.priority for name in names if (entry := pool.pool.snapshot(name))] == [
        priorities[name] for name in names
    ]
    pool.insert()
    pool.evict()
    assert len(pool.pool) == 300
    assert "b1-00000000" not in pool.pool


def test_a_draw_from_a_pool_that_ages_is_measured() -> None:
    record = serving.ageing_by_size(100, 0.01)
    assert record["first_draw64_us"] > 0
    assert record["draw64_us"] > 0


# --- peers -----------------------------------------------------------------------------------------------------


def test_a_peer_that_pip_cannot_install_is_named_with_its_reason_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        failed = "pip" in command
        return subprocess.CompletedProcess(command, int(failed), "", "ERROR: No matching distribution\n" * failed)

    monkeypatch.setattr(subprocess, "run", run)
    assert peers.found_or_told(peers.CPPRB, tmp_path) is None
    assert "No matching distribution" in capsys.readouterr().err
    assert peers.measured(None, [], timeout_s=1.0) is None


def test_a_peer_is_installed_once_and_again_only_for_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (tmp_path / "one").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    one = peers.PeerSet(name="one", packages=("a==1",), script=ROOT / "x.py")
    assert peers.installed(one, tmp_path) == peers.installed(one, tmp_path)
    assert len(commands) == 2
    peers.installed(peers.PeerSet(name="one", packages=("a==2",), script=ROOT / "x.py"), tmp_path)
    assert len(commands) == 4


def test_a_peers_script_that_prints_nothing_is_named_with_what_it_said(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text("import sys; sys.exit('no such table')\n")
    with pytest.raises(peers.PeerMissing, match="no such table"):
        peers.Peer(python=Path(sys.executable), script=script).run(["x"], timeout_s=60.0)
    script.write_text("print('chatter'); print('{\"a\": 1}')\n")
    assert peers.Peer(python=Path(sys.executable), script=script).run([], timeout_s=60.0) == {"a": 1}


# --- small runs ------------------------------------------------------------------------------------------------


def test_turns_are_ingested_from_two_processes_into_a_real_buffer_and_every_one_is_acknowledged(tmp_path: Path) -> None:
    config = load.configuration(tmp_path, name="in", buffer={"journal_sync": False})
    record = transport.ingest(config, senders=3, processes=2, turns=120, turn_bytes=64, turns_per_tree=10)
    assert record["turns"] == 120
    assert record["ack_p99_ms"] >= record["ack_p50_ms"] > 0
    assert record["journal_bytes"] > 120 * 64
    assert not (tmp_path / "in").exists()


def test_what_the_buffer_acknowledged_before_kill_9_is_there_after_it(tmp_path: Path) -> None:
    record = transport.lost(load.configuration(tmp_path, name="lost"), turns=200, turn_bytes=64, trees=4)
    assert record["acknowledged"] >= 200 - 4
    assert record["present"] == record["acknowledged"]


def test_whole_trees_are_served_one_request_at_a_time_and_ahead(tmp_path: Path) -> None:
    args = serving.parse(
        ["--trees", "12", "--turns", "10", "--bytes", "64", "--batches", "4", "--seconds", "0.05", "--no-sync"]
    )
    records = serving.serve(args, tmp_path)
    assert [r.get("mode") for r in records] == [None, "plain", "ahead"]
    assert all(r["turns_per_s"] > 0 for r in records)


@pytest.mark.slow
def test_a_short_soak_serves_every_tree_that_was_acknowledged(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "soak.py", "--minutes", "0.07", "--actors", "4", "--turns", "10", "--bytes", "64",
            "--turns-per-s", "600", "--every", "1", "--dir", str(tmp_path),
        ],
        capture_output=True, text=True, timeout=150, check=False, cwd=ROOT / "benchmarks",
    )  # fmt: skip
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert verdict["trees"]["kept"], done.stdout + done.stderr
    assert verdict["trees"]["trees_acknowledged"] >= 4


@pytest.mark.parametrize("script", ["buffer.py", "transport.py"])
def test_the_scripts_start_from_their_own_folder(script: str) -> None:
    done = subprocess.run(
        [sys.executable, script, "--help"],
        capture_output=True, text=True, timeout=150, check=False, cwd=ROOT / "benchmarks",
    )  # fmt: skip
    assert (done.returncode, "--peers" in done.stdout) == (0, True), done.stderr
