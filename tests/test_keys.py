"""Folders of keys: who is let in, under which name, and what is wrong in them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from atpo_async.core.errors import SetupError
from atpo_async.links.keys import FOLLOWERS, LEARNERS, RELAYS, KeyFolder, is_name, load_pair, load_public, make_keys


def lay(folder: Path, name: str, key_of: str = "") -> str:
    """Put a host's public key into ``folder`` as ``name``; the key.  ``key_of``: a name whose key this is to be."""
    home = folder.parent / f"home-of-{key_of or name.rpartition('/')[2]}"
    if not home.exists():
        make_keys(home, "client")
    path = folder / f"{name}.key"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes((home / "client.key").read_bytes())
    return load_public(path).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "keys"
    make_keys(made, "server")
    make_keys(made, "client")
    return made


def test_exactly_the_keys_in_the_folder_and_among_its_learners_are_let_in(folder: Path) -> None:
    own = load_public(folder / "client.key").decode()
    actors, learner = lay(folder, "gpu-7"), lay(folder, "learners/big")
    lay(folder / "gpu-9", "client")
    (folder / "notes.txt").write_text((folder / "gpu-7.key").read_text())
    keys = KeyFolder(folder)
    assert keys.look()
    # Neither the server's own, nor a secret file, nor what lies deeper.
    assert keys.names == {own: "client", actors: "gpu-7", learner: "big"}
    assert not keys.look()
    assert keys.trouble == ()


def test_only_this_hosts_own_key_and_those_of_learners_may_be_the_learner(folder: Path) -> None:
    lay(folder, "gpu-7")
    keys = KeyFolder(folder, only=LEARNERS)
    big = lay(folder, "learners/big")
    keys.look()
    assert keys.names == {load_public(folder / "client.key").decode(): "client", big: "big"}


def test_a_followers_key_may_follow_and_is_let_in_nowhere_else(folder: Path) -> None:
    own = load_public(folder / "client.key").decode()
    actors, learner, follower = lay(folder, "gpu-7"), lay(folder, "learners/big"), lay(folder, "followers/spare")
    names = {}
    for only in ("", LEARNERS, FOLLOWERS):
        keys = KeyFolder(folder, only=only)
        keys.look()
        names[only] = dict(keys.names)
    assert names[FOLLOWERS] == {own: "client", follower: "spare"}
    assert names[LEARNERS] == {own: "client", learner: "big"}
    assert names[""] == {own: "client", actors: "gpu-7", learner: "big"}


@pytest.mark.parametrize("right", [LEARNERS, FOLLOWERS, RELAYS])
def test_what_the_folder_itself_is_called_gives_its_keys_no_right(tmp_path: Path, right: str) -> None:
    folder = tmp_path / right
    make_keys(folder, "client")
    lay(folder, "gpu-7")
    keys = KeyFolder(folder, only="" if right == RELAYS else right)
    keys.look()
    assert set(keys.names.values()) == ({"client", "gpu-7"} if right == RELAYS else {"client"})
    assert not keys.relays


def test_keys_that_come_go_and_change_are_seen(folder: Path) -> None:
    keys = KeyFolder(folder)
    keys.look()
    first = lay(folder, "gpu-7")
    assert keys.look()
    assert keys.names[first] == "gpu-7"
    second = lay(folder, "gpu-7", key_of="its-new-key")
    # Written in place, to the same length, perhaps within the clock's resolution.
    os.utime(folder / "gpu-7.key", ns=(0, 0))
    assert keys.look()
    assert keys.names[second] == "gpu-7"
    assert first not in keys.names
    (folder / "gpu-7.key").unlink()
    assert keys.look()
    assert second not in keys.names


def test_a_folder_that_is_gone_lets_nobody_in_and_says_so_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "atpo.keys")
    keys = KeyFolder(folder)
    keys.look()
    folder.rename(folder.with_name("away"))
    assert keys.look()
    assert keys.names == {}
    keys.look()
    assert caplog.text.count("no peer is let in") == 1
    folder.with_name("away").rename(folder)
    assert keys.look()
    assert set(keys.names.values()) == {"client"}


def test_one_name_for_two_keys_lets_neither_in(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lay(folder, "gpu-7")
    lay(folder, "learners/gpu-7", key_of="another")
    for only in ("", LEARNERS):
        keys = KeyFolder(folder, only=only)
        keys.look()
        assert set(keys.names.values()) == {"client"}
    assert "two keys are called gpu-7; neither is let in, rename one" in caplog.text


def test_one_key_under_two_names_counts_as_the_first(folder: Path) -> None:
    key = lay(folder, "b-host")
    lay(folder, "a-host", key_of="b-host")
    keys = KeyFolder(folder)
    keys.look()
    assert keys.names[key] == "a-host"
    assert keys.trouble == ("b-host and a-host are one key; it counts as a-host",)


@pytest.mark.parametrize("content", [b"", b'public-key = "short"', b"\xff" * 1000, b'secret-key = "x"'])
def test_a_file_without_a_key_is_left_out_and_named(folder: Path, content: bytes) -> None:
    (folder / "gpu-7.key").write_bytes(content)
    keys = KeyFolder(folder)
    keys.look()
    assert set(keys.names.values()) == {"client"}
    assert keys.trouble == ("gpu-7.key holds no public key and is left out",)


def test_a_file_whose_name_could_pass_for_another_peers_is_left_out(folder: Path) -> None:
    lay(folder, "gpu 7")
    keys = KeyFolder(folder)
    keys.look()
    assert set(keys.names.values()) == {"client"}
    assert "'gpu 7.key' is no name for a key" in keys.trouble[0]


@pytest.mark.parametrize(
    "name", ["server", "client", "learners", "followers", "", "a/b", "..", ".hidden", "a b", "é", "x" * 101]
)
def test_reserved_and_odd_names_are_no_names_of_keys(name: str) -> None:
    assert not is_name(name)
    assert is_name("gpu-7.rack_2")


def test_made_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    public, secret = make_keys(tmp_path / "keys", "client")
    assert secret.stat().st_mode & 0o777 == 0o600
    before = secret.read_bytes()
    assert b"secret-key" in before
    assert b"secret-key" not in public.read_bytes()
    with pytest.raises(SetupError, match="exists"):
        make_keys(tmp_path / "keys", "client")
    assert secret.read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_secret_that_others_can_read_or_write_is_not_loaded(folder: Path, mode: int) -> None:
    (folder / "server.key_secret").chmod(mode)
    with pytest.raises(SetupError, match=rf"mode {mode:04o}; others must not read it: chmod 600"):
        load_pair(folder, "server")


def test_a_secret_file_without_a_secret_is_refused(folder: Path) -> None:
    (folder / "server.key_secret").write_bytes((folder / "server.key").read_bytes())
    with pytest.raises(SetupError, match="holds no secret key; remove it and make one: atpo keys new"):
        load_pair(folder, "server")
