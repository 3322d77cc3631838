"""What a joined learner passes on is in the run's folder once, in order, and nowhere else, whatever breaks off when."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from atpo_async.config import build
from atpo_async.core.errors import BadMessage
from atpo_async.run.replica import names
from atpo_async.run.rundir import RunDir
from atpo_async.wire.digests import digest_of
from buffer.uplink import lines as lines_module
from buffer.uplink.lines import LineFiles
from buffer.uplink.versions import VersionCount
from buffer.uplink.wholes import WholeFiles


def opened(run: Path, rank: int = 0) -> LineFiles:
    """As a buffer finds it that starts now."""
    return LineFiles(run, run / "joined" / f"rank-{rank}.json", rank=rank)


def record(step: int, source: str = "learner") -> bytes:
    return (
        json.dumps({"time": 1.0, "source": source, "step": step, "version": step, "metrics": {"x": 1}}).encode() + b"\n"
    )


class Killed(BaseException):
    """The process ends here."""


# --- lines ---------------------------------------------------------------------------------------------------------


def test_lines_that_come_again_are_not_written_again(tmp_path: Path) -> None:
    files = opened(tmp_path)
    files.begin("a", {})
    first, second = record(1) + record(2), record(3)
    assert files.add("metrics.jsonl", 0, first) == len(first)
    assert files.add("metrics.jsonl", 0, first) == len(first), "the answer was lost: the learner asks again"
    assert files.add("metrics.jsonl", len(first), second) == len(first + second)
    assert (tmp_path / "metrics.jsonl").read_bytes() == first + second


@pytest.mark.parametrize("written", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", [0, 5, -1])
def test_a_buffer_killed_amid_a_write_goes_on_after_the_lines_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, torn: int
) -> None:
    data = b"".join(record(step) for step in (1, 2, 3))
    parts = data.split(b"\n")
    upto = b"".join(part + b"\n" for part in parts[:written])
    rest = parts[written] + b"\n" if written < 3 else b""
    upto += rest[:torn] if torn else b""
    files = opened(tmp_path)
    files.begin("a", {})

    def killed(path: Path, whole: bytes) -> None:
        path.write_bytes(upto)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(lines_module, "_append", killed)
        with pytest.raises(Killed):
            files.add("metrics.jsonl", 0, data)
    (tmp_path / "metrics.jsonl").open("ab").write(b"" if torn else record(7, "buffer"))
    again = opened(tmp_path)
    assert again.replica == "a"
    at = again.taken.get("metrics.jsonl", 0)
    assert again.add("metrics.jsonl", at, data[at:]) == len(data)
    found = [line for line in (tmp_path / "metrics.jsonl").read_bytes().split(b"\n") if _step(line) in (1, 2, 3)]
    assert [_step(line) for line in found] == [1, 2, 3]


def _step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return None


def test_a_full_disk_leaves_what_it_took_and_the_rest_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = opened(tmp_path)
    files.begin("a", {})
    data = record(1) + record(2)
    cut = len(record(1)) + 9
    write = os.write

    def full(fd: int, part: bytes) -> int:
        if len(part) == len(data):
            return write(fd, part[:cut])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            files.add("metrics.jsonl", 0, data)
    assert files.add("metrics.jsonl", 0, data) == len(record(1)), "it says where to go on"
    assert files.add("metrics.jsonl", len(record(1)), record(2)) == len(data)
    assert (tmp_path / "metrics.jsonl").read_bytes().split(b"\n") == [
        record(1).strip(), record(2)[:9], record(2).strip(), b"",
    ]  # fmt: skip


def test_lines_of_others_stay_and_those_that_are_not_the_learners_own_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(record(0, "buffer"))
    files = opened(tmp_path)
    files.begin("a", {})
    data = record(1) + record(1, "buffer") + b"no record\n" + record(2)
    assert files.add("metrics.jsonl", 0, data) == len(data)
    assert (tmp_path / "metrics.jsonl").read_bytes() == record(0, "buffer") + record(1) + record(2)
    of_rank = opened(tmp_path, rank=1)
    of_rank.begin("b", {})
    lineage = b'{"step":1,"rank":1}\n{"step":1,"rank":0}\n'
    assert of_rank.add("lineage.jsonl", 0, lineage) == len(lineage)
    assert (tmp_path / "lineage.jsonl").read_bytes() == b'{"step":1,"rank":1}\n'


@pytest.mark.parametrize(
    ("rank", "file"),
    [(0, "config.json"), (0, "../metrics.jsonl"), (0, "logs/learner.0.log"), (1, "metrics.jsonl"), (0, "")],
)
def test_no_other_file_takes_lines(tmp_path: Path, rank: int, file: str) -> None:
    files = opened(tmp_path, rank)
    files.begin("a", {})
    with pytest.raises(BadMessage, match="adds no lines"):
        files.add(file, 0, b"{}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"joined"}


def test_a_new_replica_begins_where_it_is_told_to(tmp_path: Path) -> None:
    files = opened(tmp_path)
    files.begin("a", {})
    files.add("metrics.jsonl", 0, record(1))
    files.begin("b", {"metrics.jsonl": 10})
    assert opened(tmp_path).taken == {"metrics.jsonl": 10}
    assert files.add("metrics.jsonl", 10, record(2)) == 10 + len(record(2))
    assert files.add("metrics.jsonl", 10 + len(record(2)), b"", left_out=7) == 17 + len(record(2))


# --- files and folders ---------------------------------------------------------------------------------------------


def wholes(run: Path, rank: int = 0) -> WholeFiles:
    return WholeFiles(run, run / "joined" / f"rank-{rank}", rank=rank)


def pass_file(files: WholeFiles, file: str, data: bytes, *, part: int = 4) -> None:
    at, about = 0, {"total": len(data), "digest": digest_of(data)}
    while True:
        at = files.add(file, at, data[at : at + part], **about)  # type: ignore[arg-type]
        if at == len(data):
            return


def test_a_file_appears_once_all_of_it_is_there_and_goes_on_where_it_was(tmp_path: Path) -> None:
    data = b"0123456789"
    about: dict[str, Any] = {"total": 10, "digest": digest_of(data)}
    name = "skipped/step-000004-rank-0.batch"
    assert wholes(tmp_path).add(name, 0, data[:6], **about) == 6
    assert not (tmp_path / "skipped").exists()
    assert wholes(tmp_path).add(name, 0, b"", **about) == 6, "a buffer that has started anew knows how much is there"
    assert wholes(tmp_path).add(name, 4, data[4:], **about) == 6, "a part that does not follow"
    assert wholes(tmp_path).add(name, 6, data[6:], **about) == 10
    assert (tmp_path / name).read_bytes() == data


def test_a_file_that_arrives_with_other_bytes_is_begun_again(tmp_path: Path) -> None:
    about: dict[str, Any] = {"total": 4, "digest": digest_of(b"good")}
    assert wholes(tmp_path).add("status/learner.json", 0, b"evil", **about) == 0
    assert not (tmp_path / "status").exists()
    assert wholes(tmp_path).add("status/learner.json", 0, b"good", **about) == 4


def test_a_folder_appears_with_all_its_files_in_place_of_a_former_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.json").write_bytes(b"{}")
    files = wholes(tmp_path)
    pass_file(files, "model/config.json", b"{}")
    sizes = {"config.json": 2, "model.safetensors": 9}
    with pytest.raises(BadMessage, match=r"model lacks model\.safetensors"):
        files.finish("model", sizes)
    pass_file(files, "model/model.safetensors", b"123456789")
    assert (tmp_path / "model" / "old.json").exists(), "until then the former one stays"
    files.finish("model", sizes)
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == {
        "config.json": b"{}", "model.safetensors": b"123456789",
    }  # fmt: skip
    files.finish("model", sizes)


@pytest.mark.parametrize(
    ("rank", "file", "total"),
    [
        (0, "run.json", 4),
        (0, "model/../run.json", 4),
        (0, "model/sub/config.json", 4),
        (0, "model/.hidden", 4),
        (0, "/etc/passwd", 4),
        (0, "status/buffer.json", 4),
        (1, "status/learner.json", 4),
        (1, "model/config.json", 4),
        (0, "skipped/step-000001-rank-1.batch", 4),
        (0, "checkpoints/step-000001-v000001/state.json", 4),
        (0, "status/learner.json", names.MAX_STATUS_BYTES + 1),
        (0, "status/learner.json", 3),
    ],
)
def test_no_other_file_is_written_and_none_that_is_too_large(tmp_path: Path, rank: int, file: str, total: int) -> None:
    with pytest.raises(BadMessage):
        wholes(tmp_path, rank).add(file, 0, b"evil", total=total, digest=digest_of(b"evil"))
    assert not list(tmp_path.iterdir())


def test_only_the_newest_skipped_batches_of_a_rank_stay(tmp_path: Path) -> None:
    for step in range(8):
        pass_file(wholes(tmp_path, 2), f"skipped/step-{step:06d}-rank-2.batch", b"batch")
    assert sorted(p.name[5:11] for p in (tmp_path / "skipped").iterdir()) == [f"{step:06d}" for step in range(3, 8)]


# --- versions ------------------------------------------------------------------------------------------------------


def test_a_number_is_given_to_one_question_only_and_again_to_that_one(tmp_path: Path) -> None:
    run = RunDir.create(build({"run": {"dir": str(tmp_path)}}))

    def count() -> VersionCount:
        return VersionCount(run, run.path / "joined" / "version.json")

    assert [count().take("a", 1), count().take("a", 2), count().take("a", 2)] == [0, 1, 1]
    assert count().take("b", 1) == 2, "another learner with the same number of questions"
    assert run.next_version() == 3, "a learner with the run's folder goes on"
    assert count().take("b", 2) == 4
    assert count().raise_above(9) == (10, 5)
    (run.path / "version").write_text("10\n")
    given = run.path / "joined" / "version.json"
    given.write_text('{"life":"b","number":3,"version":10}')
    assert count().take("c", 1) == 11, "a buffer that was killed between the two files may have given number 10"
