"""Checkpoints at a URL: whole or not there, verified when they come back, and counted on by the run only then."""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

from atpo_async.config import Config, build
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.models.checkpoint_store import CheckpointStore, StoreFault
from atpo_async.run.replica.elsewhere import Elsewhere, note
from atpo_async.run.rundir import RunDir
from learner.checkpoints import uploading
from learner.checkpoints.durable import Durable
from learner.ranks import Ranks
from tests.waiting_support import until

LOG = logging.getLogger("test")
NUMBERS = itertools.count()


@pytest.fixture
def url() -> Iterator[str]:
    """A place in memory that no other test has."""
    place = f"memory://checkpoints-{next(NUMBERS)}"
    yield place
    fsspec.filesystem("memory").store.clear()


def files_at(url: str) -> set[str]:
    fs, root = fsspec.core.url_to_fs(url)
    return {str(path).removeprefix(f"{root}/") for path in fs.find(root)}


def checkpoint(folder: Path, step: int, version: int | None = None, *, text: str = "weights") -> Path:
    path = folder / f"step-{step:06d}-v{step if version is None else version:06d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(f"{text} {step}")
    (path / "state.json").write_text("{}")
    return path


# --- the store -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(url: str, tmp_path: Path) -> None:
    store = CheckpointStore(url, run_id="run-1")
    store.put(checkpoint(tmp_path, 7))
    assert [each.name for each in store.stored()] == ["step-000007-v000007"]
    assert not CheckpointStore(url, run_id="run-2").stored()
    (tmp_path / "back").mkdir()
    store.fetch("step-000007-v000007", tmp_path / "back")
    assert {path.name: path.read_text() for path in (tmp_path / "back").iterdir()} == {
        "model.safetensors": "weights 7", "state.json": "{}",
    }  # fmt: skip


def test_a_checkpoint_that_was_broken_off_is_none_and_goes_with_the_old_ones(url: str, tmp_path: Path) -> None:
    store = CheckpointStore(url, run_id="r")
    store.put(checkpoint(tmp_path, 1))

    def killed() -> None:
        if any("state.json" not in name and "step-000002" in name for name in files_at(url)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put(checkpoint(tmp_path, 2), may_stop=killed)
    assert [each.step for each in store.stored()] == [1]
    for step in (3, 4):
        store.put(checkpoint(tmp_path, step))
    store.keep_newest(2)
    assert {name.split("/")[1].removesuffix(".json") for name in files_at(url)} == {
        "step-000003-v000003", "step-000004-v000004",
    }  # fmt: skip


def test_a_list_of_files_of_which_half_was_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system, where a file appears with its first byte; in a folder with a space and a percent sign."""
    url = f"file://{tmp_path}/a folder 100%"
    store = CheckpointStore(url, run_id="r")
    store.put(checkpoint(tmp_path, 1))
    fs, _ = fsspec.core.url_to_fs(url)

    def half(path: str, data: bytes) -> None:
        Path(path).write_bytes(data[: len(data) // 2])
        raise KeyboardInterrupt

    second = checkpoint(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(fs, "pipe_file", half)
        with pytest.raises(KeyboardInterrupt):
            store.put(second)
    assert [each.step for each in store.stored()] == [1]
    (tmp_path / "back").mkdir()
    store.fetch("step-000001-v000001", tmp_path / "back")
    store.put(second)
    store.keep_newest(1)
    assert {name.split("/")[1] for name in files_at(url)} == {"step-000002-v000002.json", "step-000002-v000002"}


def test_a_folder_that_is_put_there_again_is_not_complete_until_all_of_it_is_new(url: str, tmp_path: Path) -> None:
    store = CheckpointStore(url, run_id="r")
    store.put(checkpoint(tmp_path / "one", 1), name="model")

    def killed() -> None:
        raise KeyboardInterrupt

    newer = checkpoint(tmp_path / "two", 2)
    with pytest.raises(KeyboardInterrupt):
        store.put(newer, name="model", may_stop=killed)
    assert "r/model.json" not in files_at(url)


def test_of_one_step_the_newest_version_counts_and_steps_are_numbers(url: str, tmp_path: Path) -> None:
    store = CheckpointStore(url, run_id="r")
    for step, version in ((1_000_000, 5), (999_999, 7), (1_000_000, 4)):
        store.put(checkpoint(tmp_path, step, version))
    assert [(each.step, each.version) for each in store.stored()] == [(999_999, 7), (1_000_000, 4), (1_000_000, 5)]


@pytest.mark.parametrize("damage", ["other bytes", "a list that is none", "a file outside"])
def test_what_is_damaged_is_refused_by_its_url(url: str, tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(url, run_id="r")
    name = checkpoint(tmp_path, 3).name
    store.put(tmp_path / name)
    fs, root = fsspec.core.url_to_fs(url)
    if damage == "other bytes":
        fs.pipe_file(f"{root}/r/{name}/model.safetensors", b"weights 4")
    elif damage == "a list that is none":
        fs.pipe_file(f"{root}/r/{name}.json", b"{")
    else:
        said = fs.cat_file(f"{root}/r/{name}.json").replace(b'"state.json"', b'"../../../evil"')
        fs.pipe_file(f"{root}/r/{name}.json", said)
    (tmp_path / "back").mkdir()
    with pytest.raises(SetupError, match=f"{url}/r/{name}"):
        store.fetch(name, tmp_path / "back")


def test_a_url_that_needs_a_package_names_it_and_a_password_is_not_repeated() -> None:
    with pytest.raises(SetupError, match="needs a package that is missing: pip install adlfs"):
        CheckpointStore("abfs://container/folder", run_id="r")
    with pytest.raises(SetupError, match=r"learner\.checkpoint_url = nix://…: Protocol not known"):
        CheckpointStore("nix://bucket", run_id="r")
    for bad in ("s3://key:secret@bucket/folder", "key:secret@bucket", "folder", "s3:/bucket"):
        with pytest.raises(ConfigError) as caught:
            build({"learner": {"checkpoint_url": bad}})
        assert str(caught.value).startswith("learner.checkpoint_url: ")
        assert "secret" not in str(caught.value)
        assert (", got " in str(caught.value)) == (bad in ("folder", "s3:/bucket"))
    assert CheckpointStore("memory://user@b/c", run_id="r").shown("x") == "memory://b/c/r/x"


# --- what the run counts on ----------------------------------------------------------------------------------------


class OneRank(Ranks):
    """One of several ranks, which get the numbers of the first."""

    def __init__(self, rank: int = 0, num_ranks: int = 1, *, chosen: list[list[int]] | None = None) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._chosen = [] if chosen is None else chosen

    def same_numbers(self, own: Sequence[int]) -> list[int]:
        if self.is_first:
            self._chosen.append(list(own))
        return self._chosen[-1]


def config_of(folder: Path, **learner: Any) -> Config:
    return build({"run": {"name": "r", "dir": str(folder)}, "learner": learner, "links": {"give_up_s": 0.05}})


class Reported:
    """A learner's durable checkpoints, and what the buffer was told of them."""

    def __init__(self, run: RunDir, config: Config, ranks: Ranks | None = None) -> None:
        self.told: list[tuple[int, str]] = []
        self.durable = Durable(config, run, ranks=ranks or OneRank(), tell=self._tell, log=LOG)

    async def _tell(self, step: int, version: int, where: str) -> None:
        self.told.append((step, where))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(config_of(tmp_path / "runs"))


async def test_the_buffer_is_told_of_a_checkpoint_once_it_is_at_the_url(
    run: RunDir, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "PAUSE_S", 0.01)
    made = Reported(run, config_of(tmp_path, checkpoint_url=url, keep_checkpoints=2))
    assert made.durable.choose() is None
    made.durable.begin()
    refuses, put = threading.Event(), CheckpointStore.put
    refuses.set()

    def refusing(self: CheckpointStore, folder: Path, **options: Any) -> int:
        if refuses.is_set():
            raise StoreFault("it is full")
        return put(self, folder, **options)

    monkeypatch.setattr(CheckpointStore, "put", refusing)
    await made.durable.saved(checkpoint(run.checkpoints, 2))
    await until(lambda: made.durable.trouble == "it is full")
    assert made.told == []
    refuses.clear()
    await made.durable.settled()
    await until(lambda: bool(made.told))
    assert made.told == [(2, f"{url}/{run.run_id}")]
    assert made.durable.trouble == ""
    await made.durable.saved(checkpoint(run.checkpoints, 4))
    await made.durable.settled()
    await until(lambda: len(made.told) == 2)
    await made.durable.saved(checkpoint(run.checkpoints, 6))
    await made.durable.settled()
    await until(lambda: len(made.told) == 3)
    assert {name.split("/")[1][:11] for name in files_at(url)} == {"step-000004", "step-000006"}
    made.durable.close()


async def test_one_that_is_on_its_way_is_spared_and_of_those_that_wait_the_newest_follows(
    run: RunDir, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Reported(run, config_of(tmp_path, checkpoint_url=url))
    made.durable.choose()
    first = checkpoint(run.checkpoints, 1)
    under_way, go_on, put = threading.Event(), threading.Event(), CheckpointStore.put

    def slow(self: CheckpointStore, folder: Path, **options: Any) -> int:
        under_way.set()
        assert go_on.wait(30)
        return put(self, folder, **options)

    monkeypatch.setattr(CheckpointStore, "put", slow)
    await made.durable.saved(first)
    await asyncio.to_thread(under_way.wait, 30)
    assert made.durable.spared == first
    for step in (2, 3):
        await made.durable.saved(checkpoint(run.checkpoints, step))
    go_on.set()
    await made.durable.settled()
    await until(lambda: len(made.told) == 2)
    # What is told is the newest that is safe by then: on a slow machine the third may be so before the first is told.
    assert [step for step, _ in made.told] in ([1, 3], [3, 3])
    assert made.durable.spared is None


async def test_a_learner_resumes_from_the_newest_of_both_places(run: RunDir, url: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, checkpoint_url=url)
    store = CheckpointStore(url, run_id=run.run_id)
    store.put(checkpoint(tmp_path / "lost", 5))
    checkpoint(run.checkpoints, 3)
    found = Reported(run, config).durable.choose()
    assert found == run.checkpoints / "step-000005-v000005"
    assert (found / "model.safetensors").read_text() == "weights 5"
    newer = checkpoint(run.checkpoints, 8)
    made = Reported(run, config)
    assert made.durable.choose() == newer
    await made.durable.report()
    assert made.told == [(5, f"{url}/{run.run_id}")], "the one here is not durable yet"
    made.durable.begin()
    await made.durable.settled()
    await until(lambda: len(made.told) == 2)
    assert made.told[1][0] == 8
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    assert Reported(run, config).durable.choose() == newer


def test_a_run_that_counts_on_a_checkpoint_which_is_gone_is_not_begun_anew(
    run: RunDir, url: str, tmp_path: Path
) -> None:
    note(run.path, Elsewhere(step=6, where="on a machine that is lost"))
    CheckpointStore(url, run_id=run.run_id).put(checkpoint(tmp_path / "x", 4))
    with pytest.raises(SetupError, match=r"counts on a checkpoint of step 6 \(on a machine that is lost\)"):
        Reported(run, config_of(tmp_path, checkpoint_url=url)).durable.choose()
    checkpoint(run.checkpoints, 6)
    assert Reported(run, config_of(tmp_path)).durable.choose() is not None


def test_a_place_that_takes_nothing_is_refused_before_anything_is_trained(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SetupError, match=r"learner\.checkpoint_url: file:///.* cannot be written: .*; mend that first"):
        Reported(run, config_of(tmp_path, checkpoint_url=f"file://{tmp_path}/file")).durable.choose()


def test_ranks_on_several_machines_take_what_rank_0_chooses_from_the_url(
    run: RunDir, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    chosen: list[list[int]] = []
    first, second = OneRank(0, 2, chosen=chosen), OneRank(1, 2, chosen=chosen)
    there = RunDir.create(config_of(tmp_path / "other machine"))
    there.run_id = run.run_id
    checkpoint(run.checkpoints, 9)
    with pytest.raises(SetupError, match=r"several machines, which share no folder: set learner\.checkpoint_url"):
        Reported(run, config_of(tmp_path), first).durable.choose()
    config = config_of(tmp_path, checkpoint_url=url)
    own = Reported(run, config, first).durable.choose()
    found = Reported(there, config, second).durable.choose()
    assert own is not None
    assert found == there.checkpoints / own.name
    assert (found / "model.safetensors").read_text() == "weights 9"
    shutil.rmtree(own)
    note(run.path, Elsewhere(step=10, where="gone"))
    with pytest.raises(SetupError, match="counts on a checkpoint of step 10"):
        Reported(run, config, first).durable.choose()
    with pytest.raises(SetupError, match="rank 0 found no checkpoint to go on from"):
        Reported(there, config, second).durable.choose()
