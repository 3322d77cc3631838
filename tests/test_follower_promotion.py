"""After the loss of a journal its copy takes its place: nothing is given twice, each task is trained on as intended."""

from __future__ import annotations

import json
import random
import shutil
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from atpo_async.core.errors import SetupError
from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import FOLLOWING, PROMOTED, RunDir
from buffer.following.folder import FollowerFolder
from buffer.following.program import main as follow_program
from buffer.following.promotion import BATCHES, EPOCHS, Promoted, promote
from buffer.journal import entries
from buffer.journal.changes import CHUNKS, ROWS, STATE
from buffer.journal.marks import MARK, Mark, dump, read_mark
from tests.fault_support import Role, Spawner, until
from tests.follower_support import contents
from tests.oracle_support import Driver, Roles, Verdict, judge, make_run
from tests.scripted_roles_support import LINEAGE, Lineage

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds out through /proc who stands still")
NUM_STEPS = 24


class Loss:
    """A scripted run whose journal is lost on the way; a follower has a copy of it.

    Args:
        folder: for everything.
        spawner: forks the roles.
        seed: of the script.
        wait: ``buffer.follower_wait``.
    """

    def __init__(self, folder: Path, spawner: Spawner, *, seed: int, wait: bool) -> None:
        self.folder, self.spawner, self.seed = folder, spawner, seed
        buffer = {"follower": True, "follower_wait": wait, "max_reissues": 1000, "lease_lifetime_s": 2.0}
        self.rundir = make_run(
            folder / "run", run={"seed": seed, "max_tasks": 4 * NUM_STEPS}, buffer={**buffer, "max_bytes": 4 << 20}
        )
        self.roles = Roles(self.rundir, spawner, seed=seed, actors=2, checkpoint_every=3)
        self.driver = Driver(self.roles, random.Random(seed))
        self.copies = 0
        self.follower: Role | None = None

    def follow(self) -> Path:
        """Start another follower; its folder."""
        path = self.folder / f"copy-{self.copies}"
        self.copies += 1
        log = self.folder / f"{path.name}.log"
        self.follower = self.spawner.start(
            "follower", "tests.follower_support:run_follower", str(path), str(self.rundir.path), log=log
        )
        return path

    def reach(self, step: int) -> None:
        self.driver.allow(step)
        assert self.driver.until(lambda: self.roles.steps >= step, f"step {step}"), self.driver.problems

    def lose(self, copy: Path) -> Promoted:
        """Everything is killed at once, the journal is gone; its copy takes its place, the run's own folder is left."""
        self.roles.kill()
        assert self.follower is not None
        self.follower.kill()
        shutil.rmtree(self.rundir.journal)
        return promote(copy, into=self.rundir.path, certain=True)

    def finish(self) -> Verdict:
        self.driver.finish()
        return judge(self.rundir, seed=self.seed, problems=self.driver.problems, began=self.driver.began)

    def close(self) -> None:
        self.roles.kill()
        if self.follower is not None:
            self.follower.kill()


@linux
@pytest.mark.parametrize("seed", [0, 1])
def test_with_a_follower_that_is_waited_for_the_loss_of_the_journal_loses_nothing(
    seed: int, spawner: Spawner, tmp_path: Path
) -> None:
    loss = Loss(tmp_path, spawner, seed=seed, wait=True)
    try:
        copy = loss.follow()
        loss.roles.start()
        loss.reach(5)
        loss.driver.allow(1000)
        time.sleep(random.Random(seed).uniform(0.0, 0.1))  # a moment of chance: nothing is waited for
        promoted = loss.lose(copy)
        # The learner has been told of no batch that the copy does not know.
        assert Lineage.load(loss.rundir.path).step <= promoted.step
        assert loss.roles.steps <= promoted.step
        loss.follow()
        loss.roles.start()
        verdict = loss.finish()
    finally:
        loss.close()
    assert not verdict.problems, "\n".join(verdict.problems)


@linux
def test_without_waiting_what_was_not_mirrored_is_grown_again_and_nothing_is_trained_on_twice(
    spawner: Spawner, tmp_path: Path
) -> None:
    loss = Loss(tmp_path, spawner, seed=2, wait=False)
    try:
        copy = loss.follow()
        loss.roles.start()
        loss.reach(6)
        assert loss.follower is not None
        loss.follower.freeze()
        loss.reach(14)
        promoted = loss.lose(copy)
        lineage = Lineage.load(loss.rundir.path)
        assert promoted.step < lineage.step, "the learner's checkpoint knows more than the copy"
        taken = max(trace.version for trace in lineage.traces)
        # A checkpoint of a step that the copy knows, as the learner keeps several.
        earlier = Lineage(step=promoted.step, version=taken, traces=lineage.traces[: promoted.step])
        (loss.rundir.path / LINEAGE).write_text(json.dumps(asdict(earlier)))
        loss.roles.start()
        verdict = loss.finish()
    finally:
        loss.close()
    assert not verdict.problems, "\n".join(verdict.problems)
    assert verdict.lost_steps >= 14 - promoted.step


@linux
def test_a_learner_that_is_ahead_of_a_promoted_copy_is_refused_with_the_step_to_go_back_to(
    spawner: Spawner, tmp_path: Path
) -> None:
    loss = Loss(tmp_path, spawner, seed=3, wait=False)
    try:
        copy = loss.follow()
        loss.roles.start()
        loss.reach(4)
        assert loss.follower is not None
        loss.follower.freeze()
        loss.reach(12)
        promoted = loss.lose(copy)
        loss.driver.allow(1000)
        loss.roles.start("buffer", "learner")
        learner = loss.roles.alive["learner"]
        until(lambda: learner.poll() is not None, "the learner's end", story=loss.roles.story)
        assert f"knows the batches up to step {promoted.step}: start the learner from a checkpoint" in learner.said()
    finally:
        loss.close()


# --- what a promotion changes ---------------------------------------------------------------------------------------


def copied(folder: Path, *, run: str = "run-0", heard: float = 0.0, **changes: Any) -> Path:
    """A follower's folder as it is left: one tree under lease, one batch."""
    held = FollowerFolder(folder, sync=False)
    tree = entries.TreeStateEntry(
        number=1, task_index=0, kind="train", growing=True, epoch=2,
        lease=entries.LeaseEntry(
            holder="actor-0", seed=1, epoch=2, min_version=0, lost=0, waiting=False, eval_step=-1
        ),
    )  # fmt: skip
    batch = entries.BatchEntry(
        batch_id=1, step=3, version=7, num_ranks=1, metrics={}, drawn=(), trained=(), priorities={}, confirmed=False
    )
    state = {
        entries.RUN: entries.dump(entries.RunEntry(incarnation=2, saved_step=3, version=6, **changes)),
        entries.TREE + b"b2-00000000": entries.dump(tree),
        entries.BATCH + b"%020d" % 3: entries.dump(batch),
        MARK: dump(Mark(stream="s", number=9, last_chunk=4)),
    }
    with held._tables.env.begin(write=True) as txn:
        for key, value in state.items():
            txn.put(key, value, db=held._tables.tables[STATE])
    held.close()
    note = {"run": run, "join": "", "heard": heard, "max_bytes": 1}
    write_atomic(folder / FOLLOWING, json.dumps(note))
    made = make_run(folder.parent / f"made-for-{folder.name}")
    write_atomic(folder / "config.json", (made.path / "config.json").read_bytes())
    write_atomic(folder / "run.json", json.dumps({"run_id": run, "name": "run", "created": 0.0}))
    return folder


def test_a_promotion_changes_what_the_lost_buffer_may_have_given_out(tmp_path: Path) -> None:
    copy = copied(tmp_path / "copy")
    before = contents(copy / "journal")
    done = promote(copy, into=None, certain=False)
    assert (done.position, done.step, done.version, done.aside) == (9, 4, 10, ())
    after = contents(copy / "journal")
    run_before = entries.read(before[STATE], entries.RUN, entries.RunEntry)
    assert run_before is not None
    assert (after[CHUNKS], after[ROWS]) == (before[CHUNKS], before[ROWS])
    run = entries.read(after[STATE], entries.RUN, entries.RunEntry)
    tree = entries.read(after[STATE], entries.TREE + b"b2-00000000", entries.TreeStateEntry)
    mark = read_mark(after[STATE])
    assert run is not None
    assert tree is not None
    assert tree.lease is not None
    assert mark is not None
    assert (run.promotions, run.incarnation) == (1, 2)
    # No batch that the lost buffer made later has a number that is given again.
    assert run.next_batch - run_before.next_batch == BATCHES
    assert (tree.epoch, tree.lease.epoch, tree.lease.waiting) == (2 + EPOCHS, 2 + EPOCHS, True)
    assert (mark.number, mark.last_chunk) == (1, 4)
    assert mark.stream != "s"
    rundir = RunDir.open(copy)
    assert (rundir.run_id, rundir.journal, rundir.next_version()) == ("run-0", copy / "journal", 10)
    assert (rundir.config.run.dir, rundir.config.run.name, rundir.is_trained) == (tmp_path, "copy", True)
    assert (copy / PROMOTED).exists()
    assert not (copy / FOLLOWING).exists()
    with pytest.raises(SetupError, match="was promoted before"):
        promote(copy, into=None, certain=False)


def test_checkpoints_that_know_more_than_the_copy_are_put_aside(tmp_path: Path) -> None:
    copy = copied(tmp_path / "copy")
    rundir = make_run(tmp_path / "run")
    for step in (3, 4, 6):
        (rundir.checkpoints / f"step-{step:06d}-v{step:06d}").mkdir()
    names = sorted(path.name for path in rundir.checkpoints.iterdir())
    done = promote(copy, into=rundir.path, certain=False)
    assert [path.name for path in done.aside] == [f"unmirrored-{names[-1]}"]
    assert sorted(path.name for path in rundir.checkpoints.glob("step-*")) == names[:-1]
    assert set(contents(rundir.journal)[STATE]) > {MARK, entries.RUN}


def test_a_promotion_is_refused_while_the_old_buffer_may_be_alive(tmp_path: Path) -> None:
    copy = copied(tmp_path / "copy", heard=time.time())
    with pytest.raises(SetupError, match=r"heard of \d+ s ago: it may be cut off.*give_up_s = 60 s.*--certain"):
        promote(copy, into=None, certain=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        note = {"run": "run-0", "join": f"tcp://127.0.0.1:{port}", "heard": 0.0}
        write_atomic(copy / FOLLOWING, json.dumps(note))
        with pytest.raises(
            SetupError, match=rf"something listens at tcp://127.0.0.1:{port}, where this copy's buffer was"
        ):
            promote(copy, into=None, certain=False)
    running = FollowerFolder(copy, sync=False)
    with pytest.raises(SetupError, match="is in use by another"):
        promote(copy, into=None, certain=True)
    running.close()
    promote(copy, into=None, certain=False)


def test_what_is_no_whole_copy_of_the_run_is_not_promoted(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"is no follower's folder: it has no following.json"):
        promote(tmp_path, into=None, certain=True)
    empty = tmp_path / "empty"
    FollowerFolder(empty, sync=False).close()
    with pytest.raises(SetupError, match="holds no whole copy"):
        promote(empty, into=None, certain=True)
    other = copied(tmp_path / "other", run="another")
    rundir = make_run(tmp_path / "run")
    with pytest.raises(SetupError, match=r"is a copy of run 'another', .* is run 'run-0'"):
        promote(other, into=rundir.path, certain=True)
    fits = copied(tmp_path / "fits")
    rundir.journal.mkdir()
    (rundir.journal / "data.mdb").write_bytes(b"x")
    with pytest.raises(SetupError, match=r"has a journal at .*: put it aside, if it is lost"):
        promote(fits, into=rundir.path, certain=True)


def test_a_copy_is_no_run_to_train_before_it_is_promoted(tmp_path: Path) -> None:
    copy = copied(tmp_path / "copy")
    config = RunDir.open(copy).config
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path, "name": "copy"})})
    with pytest.raises(SetupError, match=r"is a follower's copy of a run.*atpo follower --promote --dir"):
        RunDir.create(config)
    promote(copy, into=None, certain=True)
    assert RunDir.create(config).run_id == "run-0"


def test_the_command_says_how_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = copied(tmp_path / "copy")
    assert follow_program(["--dir", str(copy), "--promote"]) == 0
    said = capsys.readouterr().out
    assert "holds run run-0 as of commit 9; its next version is 10" in said
    assert f"atpo train CONFIG --run.dir {tmp_path} --run.name copy --buffer.journal_dir none" in said
    assert follow_program(["--dir", str(copy), "--promote"]) == 2
    assert "was promoted before" in capsys.readouterr().err
    assert follow_program(["--dir", str(copy)]) == 2
    assert "a follower needs --join HOST:PORT" in capsys.readouterr().err
