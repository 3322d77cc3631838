"""``atpo keys``: key pairs for this host and for others that are to join, and who is let in."""

from __future__ import annotations

import shutil
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.links.keys import CLIENT_KEY, LEARNERS, SERVER_KEY, KeyFolder, is_name, load_public, make_keys


def new(folder: Path, name: str | None, *, learner: bool) -> list[str]:
    """Make what this host lacks in ``folder`` and, with a name, a folder for another host; the lines to be said.

    Raises:
        SetupError: the name is none or is taken, or nothing can be written there.
    """
    if name is not None and not is_name(name):
        raise SetupError(
            f"{name!r} is no name for a host's keys; use letters, digits, '.', '-' and '_', "
            f"and not {SERVER_KEY}, {CLIENT_KEY} or {LEARNERS}"
        )
    if learner and name is None:
        raise SetupError("--learner is for another host's key: atpo keys new NAME --learner")
    try:
        said = _for_this_host(folder)
        if name is None:
            return [*said, f"for another host that is to join:  atpo keys new NAME --dir {folder}"]
        return said + _for_another(folder, name, learner=learner)
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


def _for_another(folder: Path, name: str, *, learner: bool) -> list[str]:
    for known in (folder / f"{name}.key", folder / LEARNERS / f"{name}.key"):
        if known.exists():
            raise SetupError(
                f"{known} exists: that host has its keys; remove the file first if it shall lose access, "
                "or choose another name"
            )
    theirs = folder / name
    public, _ = make_keys(theirs, CLIENT_KEY)
    shutil.copyfile(folder / f"{SERVER_KEY}.key", theirs / f"{SERVER_KEY}.key")
    known = folder / LEARNERS / f"{name}.key" if learner else folder / f"{name}.key"
    known.parent.mkdir(exist_ok=True, mode=0o700)
    # Whole or not at all: a run that goes on looks at the folder whenever somebody connects.
    unfinished = known.with_suffix(".unfinished")
    shutil.copyfile(public, unfinished)
    unfinished.rename(known)
    return [
        f"{known} lets {name} in{', as actors and as the learner' if learner else ', as actors'}; it stays here",
        f"{theirs} ({CLIENT_KEY}.key, {CLIENT_KEY}.key_secret, {SERVER_KEY}.key) goes to {name}, over a safe way "
        "(scp -rp), and away from here: there --links.keys_dir names it",
        f"{name} loses access when {known} is removed, also while a run goes on",
    ]


def listed(folder: Path) -> list[str]:
    """Who is let in, a line each.  Raises SetupError if there is no such folder."""
    if not folder.is_dir():
        raise SetupError(f"{folder} is no folder; `atpo keys new --dir {folder}` makes it")
    said = []
    if (folder / f"{SERVER_KEY}.key").exists():
        said.append(f"{load_public(folder / f'{SERVER_KEY}.key').decode()}  {SERVER_KEY}: what this host is known by")
    keys, learners = KeyFolder(folder), KeyFolder(folder, learners_only=True)
    keys.look()
    learners.look()
    for key, name in sorted(keys.names.items(), key=lambda item: item[1]):
        host = (
            "this host's own roles" if name == CLIENT_KEY else "actors" + (" and the learner" * (key in learners.names))
        )
        said.append(f"{key}  {name}: {host}")
        if (left := folder / name / f"{CLIENT_KEY}.key_secret").exists():
            said.append(f"{left} still lies here: it belongs on {name}, and nowhere else")
    return [*said, *keys.trouble] or [f"{folder} holds no keys; `atpo keys new --dir {folder}` makes them"]
