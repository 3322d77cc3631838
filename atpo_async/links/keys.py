"""CURVE keys: making a pair, loading one's own, and which peers a folder of public keys admits.

The folder of a host that serves (``links.keys_dir``) holds::

    server.key  server.key_secret    the key pair of its sockets, for peers that connect
    client.key  client.key_secret    its own roles, where they connect; may be actors and learner
    NAME.key                         another host, whose actors may join
    learners/NAME.key                another host, which may be the learner as well
    followers/NAME.key               another host, which may follow the buffer's journal and nothing else
    relays/NAME.key                  another host, which may pass on what actors say that joined through it

and the folder of a host that connects ``client.key``, ``client.key_secret`` and the other's ``server.key``.  A relay
does both: ``upstream.key`` is the public key of the server that it connects to, ``server.key`` its own.  A key's name
is its file's; what a peer calls itself gives it no rights.  docs/keys.md has the commands.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth

from atpo_async.core.errors import SetupError

log = logging.getLogger("atpo.keys")

SERVER_KEY = "server"
CLIENT_KEY = "client"
UPSTREAM_KEY = "upstream"
"""In a relay's folder: of the server that it connects to."""
LEARNERS, FOLLOWERS, RELAYS = "learners", "followers", "relays"
"""Sub-folders: of keys that may be the learner, that may follow the buffer's journal, and that may be relays."""
WHOSE = {LEARNERS: "learner's", FOLLOWERS: "follower's"}
"""Sub-folder -> whose key one in it is, for sentences."""

RESERVED = frozenset({SERVER_KEY, CLIENT_KEY, UPSTREAM_KEY, RELAYS, *WHOSE})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PUBLIC = re.compile(r"[!-~]{40}")
_MAX_FILE_BYTES = 1 << 16


def is_name(name: str) -> bool:
    """Whether a key may be called so: letters, digits, ``.``, ``-`` and ``_``, none of the names with a meaning."""
    return _NAME.fullmatch(name) is not None and name not in RESERVED


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a CURVE key pair: ``NAME.key`` (public) and ``NAME.key_secret`` (mode 0600).

    Raises:
        SetupError: the pair is there already.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    public, secret = folder / f"{name}.key", folder / f"{name}.key_secret"
    for path in (public, secret):
        if path.exists():
            raise SetupError(f"key {path} exists; remove it first if its peers shall lose access")
    # Made empty and closed to others first: the secret is never readable, not for an instant.
    secret.touch(mode=0o600)
    zmq.auth.create_certificates(folder, name)
    _require_private(secret)
    return public, secret


def load_public(path: Path) -> bytes:
    """The public key in a file, 40 characters of Z85.  Raises SetupError if there is none."""
    try:
        return zmq.auth.load_certificate(path)[0]
    except (OSError, ValueError) as exc:
        raise SetupError(
            f"no CURVE public key at {path} ({exc}); copy it there from the host that serves, or make one: "
            f"atpo keys new --dir {path.parent}"
        ) from None


def load_pair(folder: Path, name: str) -> tuple[bytes, bytes]:
    """Public and secret key.  Raises SetupError if they are not there, or if others can read the secret."""
    path = folder / f"{name}.key_secret"
    way_out = f"make one: atpo keys new --dir {folder}"
    try:
        _require_private(path)
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as exc:
        raise SetupError(f"no CURVE secret key at {path} ({exc}); {way_out}") from None
    if secret is None:
        raise SetupError(f"{path} holds no secret key; remove it and {way_out}")
    return public, secret


def _require_private(secret: Path) -> None:
    mode = stat.S_IMODE(secret.stat().st_mode)
    if mode & 0o077:
        raise SetupError(f"secret key {secret} has mode {mode:04o}; others must not read it: chmod 600 {secret}")


# --- keys that a folder admits----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    """A key file as it was when it was read."""

    signature: tuple[int, ...]
    key: str | None


def why_not_said(peer: str, *, is_relay: bool, hello: bool) -> str:
    """Why a peer of the actors' socket may not send a message, by the key that its name begins with; empty if it may.

    Args:
        peer: its name, where there are keys: ``gpu-7/actor-0``; with a further slash it speaks for another peer.
        is_relay: whether its key lies in ``RELAYS``.
        hello: whether the message introduces a relay.
    """
    key, _, rest = peer.partition("/")
    if key == CLIENT_KEY:
        return ""
    if not is_relay and "/" in rest:
        return (
            f"{peer!r} speaks for another peer, which the key {key!r} may not: only keys in {RELAYS}/ of "
            "links.keys_dir may (docs/relays.md); a name of its own has no slash"
        )
    if not is_relay and hello:
        return (
            f"the key {key!r} is no relay's: it must lie in {RELAYS}/ of the links.keys_dir of the server that it "
            "joins (atpo keys new NAME --relay)"
        )
    if is_relay and "/" not in rest and not hello:
        return (
            f"the key {key!r} is a relay's: it passes on what others say, and may not be an actor itself; give this "
            "host a key of its own (atpo keys new NAME)"
        )
    return ""


class KeyFolder:
    """Whose keys lie in a folder now.  ``look`` reads what has changed; ``names`` is what it found.

    Args:
        folder: ``links.keys_dir`` of a host that serves.
        only: let in only the keys of this sub-folder (``LEARNERS``, ``FOLLOWERS``) and the host's own; empty for all
            that may be actors.
    """

    def __init__(self, folder: Path, *, only: str = "") -> None:
        self.folder = folder
        self.only = only
        self.names: Mapping[str, str] = {}
        """Public key (Z85) -> the name of its file, of those that are let in."""
        self.relays: frozenset[str] = frozenset()
        """Of those, the names of the keys that may be relays."""
        self._files: dict[Path, _File] = {}
        self.trouble: tuple[str, ...] = ()
        """What is wrong in the folder, a line each."""

    def look(self) -> bool:
        """Read what was added, removed or written since.  Whether ``names`` is another now.

        Costs a stat of each file.  A folder that cannot be read admits no peer.
        """
        trouble: list[str] = []
        files: dict[Path, _File] = {}
        try:
            # A follower's key is none on the other sockets: it may be neither an actor nor the learner.
            subs = (self.only,) if self.only else (LEARNERS, RELAYS)
            for folder in (self.folder, *(self.folder / sub for sub in subs)):
                files |= self._scan(folder, trouble)
        except OSError as exc:
            files = {}
            trouble.append(f"{exc.filename} cannot be read, no peer is let in: {exc.strerror}")
        self._files = files
        names = self._name(files, trouble)
        among = self.folder / RELAYS
        relays = {path.stem for path, file in files.items() if path.parent == among and file.key in names}
        self.relays = frozenset(relays.intersection(names.values()))
        # Logged once, and again only when it changes: this is called at every connection.
        for line in sorted(set(trouble).difference(self.trouble)):
            log.error("keys in %s: %s", self.folder, line)
        self.trouble = tuple(sorted(set(trouble)))
        changed, self.names = names != self.names, names
        return changed

    def _scan(self, folder: Path, trouble: list[str]) -> dict[Path, _File]:
        found = {}
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            if folder == self.folder:
                raise
            return {}
        for entry in entries:
            path = Path(entry.path)
            if path.suffix != ".key" or path.stem in (SERVER_KEY, UPSTREAM_KEY):
                continue
            try:
                status = path.stat()
                signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                known = self._files.get(path)
                found[path] = known if known and known.signature == signature else _File(signature, _read(path))
            except OSError as exc:
                trouble.append(f"{path.name} cannot be read and is left out: {exc.strerror}")
                continue
            if found[path].key is None:
                trouble.append(f"{path.name} holds no public key and is left out")
            elif _NAME.fullmatch(path.stem) is None:
                trouble.append(f"{path.name!r} is no name for a key; use letters, digits, '.', '-' and '_'")
                del found[path]
        return found

    def _name(self, files: Mapping[Path, _File], trouble: list[str]) -> dict[str, str]:
        owners: dict[str, set[str]] = {}
        for path, file in files.items():
            if file.key is not None:
                owners.setdefault(path.stem, set()).add(file.key)
        names: dict[str, str] = {}
        for path in sorted(files):
            key = files[path].key
            if key is None:
                continue
            if len(owners[path.stem]) > 1:
                # Two hosts of one name could take each other's work.
                trouble.append(f"two keys are called {path.stem}; neither is let in, rename one")
                continue
            if self.only and path.parent != self.folder / self.only and path.stem != CLIENT_KEY:
                continue
            first = names.setdefault(key, path.stem)
            if first != path.stem:
                trouble.append(f"{path.stem} and {first} are one key; it counts as {first}")
        return names


def _read(path: Path) -> str | None:
    """The public key in a file, or None.  Raises OSError."""
    with path.open("rb") as file:
        text = file.read(_MAX_FILE_BYTES).decode(errors="replace")
    match = re.search(r'^\s*public-key\s*=\s*["\']?([^"\'\s]*)', text, re.MULTILINE)
    return match[1] if match and _PUBLIC.fullmatch(match[1]) else None
