"""``atpo keys``: makes key pairs for this host and for others that are to join, and lists the keys that are let in."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from atpo_async.cli.common import EXIT_DONE, Asked
from atpo_async.core.errors import SetupError
from atpo_async.links.keys import (
    CLIENT_KEY,
    FOLLOWERS,
    LEARNERS,
    RELAYS,
    SERVER_KEY,
    UPSTREAM_KEY,
    KeyFolder,
    is_name,
    load_public,
    make_keys,
)


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    doings = parser.add_subparsers(dest="doing", metavar="new|list", required=True)
    text = "make this host's keys where they are missing and, with NAME, the folder of another host that is to join"
    making = doings.add_parser("new", help=text, description=text, allow_abbrev=False)
    making.add_argument("name", metavar="NAME", nargs="?", help="another host: a folder DIR/NAME for it is made")
    may = making.add_mutually_exclusive_group()
    may.add_argument("--learner", action="store_true", help="that host may be the learner, not only run actors")
    may.add_argument("--follower", action="store_true", help="that host may follow the buffer's journal, nothing else")
    may.add_argument("--relay", action="store_true", help="that host may be a relay for others (docs/relays.md)")
    text = "list the keys that are let in"
    for doing in (making, doings.add_parser("list", help=text, description=text, allow_abbrev=False)):
        doing.add_argument("--dir", metavar="DIR", default="keys", help="the run's links.keys_dir; ./keys if left out")


def run(asked: Asked) -> int:
    """Prints what was made, or the keys that are let in."""
    args, folder = asked.args, Path(asked.args.dir)
    print("\n".join(new(folder, args.name, right=_right(args)) if args.doing == "new" else listed(folder)))
    return EXIT_DONE


def _right(args: argparse.Namespace) -> str:
    return LEARNERS if args.learner else FOLLOWERS if args.follower else RELAYS if args.relay else ""


def new(folder: Path, name: str | None, *, right: str = "") -> list[str]:
    """Make the keys that this host lacks in ``folder``; with a name, also another host's folder.  Returns the lines.

    Args:
        right: the sub-folder that the other host's key goes into: ``LEARNERS``, ``FOLLOWERS``, ``RELAYS``, or empty for
            actors.

    Raises:
        SetupError: the name is none or is taken, or nothing can be written there.
    """
    if name is not None and not is_name(name):
        raise SetupError(
            f"{name!r} is no name for a host's keys; use letters, digits, '.', '-' and '_', "
            f"and not {SERVER_KEY}, {CLIENT_KEY}, {UPSTREAM_KEY}, {LEARNERS}, {FOLLOWERS} or {RELAYS}"
        )
    if right and name is None:
        option = f"--{right.removesuffix('s')}"
        raise SetupError(f"{option} is for another host's key: atpo keys new NAME {option}")
    try:
        said = _for_this_host(folder)
        if name is None:
            return [*said, f"for another host that is to join:  atpo keys new NAME --dir {folder}"]
        return said + _for_another(folder, name, right=right)
    except OSError as exc:
        raise SetupError(f"keys cannot be made in {folder}: {exc.strerror}; name a folder that can be written") from exc


def _for_this_host(folder: Path) -> list[str]:
    made: list[Path] = []
    for name in (SERVER_KEY, CLIENT_KEY):
        if not ((folder / f"{name}.key").exists() and (folder / f"{name}.key_secret").exists()):
            made += make_keys(folder, name)
    if made:
        return [f"made {', '.join(path.name for path in made)} in {folder}, for this host: --links.keys_dir {folder}"]
    return [f"{folder} has this host's keys: --links.keys_dir {folder}"]


_RIGHTS = {
    "": ", as actors",
    LEARNERS: ", as actors and as the learner",
    FOLLOWERS: ", as a follower of the journal",
    RELAYS: ", as a relay for actors that join through it",
}


def _for_another(folder: Path, name: str, *, right: str) -> list[str]:
    for known in (folder / sub / f"{name}.key" for sub in _RIGHTS):
        if known.exists():
            raise SetupError(
                f"{known} exists: that host has its keys; remove the file first if it shall lose access, "
                "or choose another name"
            )
    theirs = folder / name
    public, _ = make_keys(theirs, CLIENT_KEY)
    # A relay is a server too, with a pair of its own by that name.
    server = f"{UPSTREAM_KEY if right == RELAYS else SERVER_KEY}.key"
    shutil.copyfile(folder / f"{SERVER_KEY}.key", theirs / server)
    known = folder / right / f"{name}.key"
    known.parent.mkdir(exist_ok=True, mode=0o700)
    # Renamed when whole: a running buffer reads the folder whenever a client connects.
    unfinished = known.with_suffix(".unfinished")
    shutil.copyfile(public, unfinished)
    unfinished.rename(known)
    return [
        f"{known} lets {name} in{_RIGHTS[right]}; it stays here",
        f"{theirs} ({CLIENT_KEY}.key, {CLIENT_KEY}.key_secret, {server}) goes to {name}, over a safe way "
        "(scp -rp), and away from here: there --links.keys_dir names it",
        f"{name} loses access when {known} is removed, also while a run goes on",
    ]


def _by_name(item: tuple[str, str]) -> str:
    return item[1]


def listed(folder: Path) -> list[str]:
    """The hosts that are let in, one line each.  Raises SetupError if there is no such folder."""
    if not folder.is_dir():
        raise SetupError(f"{folder} is no folder; `atpo keys new --dir {folder}` makes it")
    said = []
    if (folder / f"{SERVER_KEY}.key").exists():
        said.append(
            f"{load_public(folder / f'{SERVER_KEY}.key').decode()}  {SERVER_KEY}: "
            "the public key of this host, which others need to connect"
        )
    keys, learners, followers = (KeyFolder(folder, only=only) for only in ("", LEARNERS, FOLLOWERS))
    keys.look()
    learners.look()
    followers.look()
    for key, name in sorted(keys.names.items(), key=_by_name):
        if name == CLIENT_KEY:
            host = "this host's own roles"
        elif name in keys.relays:
            host = "a relay"
        else:
            host = "actors" + (" and the learner" * (key in learners.names))
        said.append(f"{key}  {name}: {host}")
        if (left := folder / name / f"{CLIENT_KEY}.key_secret").exists():
            said.append(f"{left} still lies here: it belongs on {name}, and nowhere else")
    only_follow = {key: name for key, name in followers.names.items() if name != CLIENT_KEY}
    said += [f"{key}  {name}: a follower of the journal" for key, name in sorted(only_follow.items(), key=_by_name)]
    trouble = sorted({*keys.trouble, *followers.trouble})
    return [*said, *trouble] or [f"{folder} holds no keys; `atpo keys new --dir {folder}` makes them"]
