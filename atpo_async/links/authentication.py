"""Which peers may connect: endpoints off the loopback interface need keys; a server admits the keys in its folder."""

from __future__ import annotations

import logging
from collections import OrderedDict

import zmq

from atpo_async.config import LinksConfig
from atpo_async.core.errors import SetupError
from atpo_async.links import addresses
from atpo_async.links.frames import worth_a_line
from atpo_async.links.keys import WHOSE, KeyFolder
from atpo_async.links.pump import Context, Pump
from atpo_async.wire import codec

log = logging.getLogger("atpo.links")

_LOCAL = ("ipc://", "inproc://")
_MAX_ADDRESSES = 1024


def is_loopback(endpoint: str) -> bool:
    """Whether only this machine can take part."""
    if endpoint.startswith(_LOCAL):
        return True
    return endpoint.startswith("tcp://") and addresses.is_loopback(addresses.host_of(endpoint))


def require_keys_off_loopback(endpoint: str, settings: LinksConfig, verb: str) -> None:
    """Raises SetupError where an endpoint is none, or leads off this machine and there are no keys."""
    _require_valid(endpoint)
    if settings.keys_dir is None and not is_loopback(endpoint):
        raise SetupError(
            f"will not {verb} {endpoint} without keys: it is not a loopback address; "
            "set links.keys_dir to a folder with CURVE keys (`atpo keys new` makes one), or use links.host 127.0.0.1"
        )


def _require_valid(endpoint: str) -> None:
    """libzmq itself takes port 99999 and means 34463."""
    if endpoint.startswith(_LOCAL):
        return
    try:
        if not endpoint.startswith("tcp://"):
            raise ValueError("expected tcp://HOST:PORT")
        addresses.split(endpoint)
    except ValueError as exc:
        raise SetupError(f"endpoint {endpoint!r} is none; {exc}") from None


class RefusedConnections:
    """Counts the connections that were refused, and logs them: the first ones of an address, then ever fewer."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """Reason -> how often."""
        self._lines: OrderedDict[tuple[str, str], int] = OrderedDict()

    def note(self, endpoint: str, address: str, reason: str, fact: str = "") -> None:
        """One more.  ``fact`` is the rest of the sentence."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        count = self._lines.pop((address, reason), 0) + 1
        self._lines[address, reason] = count
        if len(self._lines) > _MAX_ADDRESSES:
            self._lines.popitem(last=False)
        if count == 1 or (count > 3 and worth_a_line(count)):
            log.warning("%s refused %s (%d times): %s%s", endpoint, address, count, reason, fact)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


class Authenticator:
    """Answers libzmq's requests (ZAP, RFC 27) whether a peer may connect: one whose public key lies in the folder may.

    The key becomes the connection's user id, which libzmq attaches to every message of it.
    """

    def __init__(self, context: Context, keys: KeyFolder, refused: RefusedConnections, endpoint: str) -> None:
        self._keys = keys
        self._refused = refused
        self._endpoint = endpoint
        socket = context.socket(zmq.REP)
        socket.linger = 0
        socket.bind("inproc://zeromq.zap.01")
        self._pump = Pump(socket, self._on_question)

    def close(self) -> None:
        self._pump.close()

    def _on_question(self, frames: list[codec.Buffer], _: str) -> None:
        version, request_id, _domain, address, _identity, mechanism, *credentials = map(bytes, frames)
        key = zmq.utils.z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
        # At every connection, so that a key can be added or removed while the run goes on.
        self._keys.look()
        allowed = key in self._keys.names
        if not allowed:
            reason = f"is no {WHOSE[self._keys.only]} key" if key in self._everybody() else "unknown key"
            where = f", its public key {key} is not in {self._keys.folder}"
            self._refused.note(self._endpoint, address.decode(errors="replace"), reason, where)
        status = [b"200", b"OK", key.encode()] if allowed else [b"400", b"unknown key", b""]
        self._pump.send([version, request_id, *status, b""])

    def _everybody(self) -> frozenset[str]:
        if not self._keys.only:
            return frozenset()
        everybody = KeyFolder(self._keys.folder)
        everybody.look()
        return frozenset(everybody.names)
