"""The way up to the buffer: the servers that lead there, the nearest first, and which of them is in use.

An actor that joined through relays learns from each ``Welcome`` what lies beyond the server that it reached.  When that
server falls silent the next one is used instead, and after the last one the first again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from atpo_async.links.addresses import endpoint_of, host_of, is_loopback, is_wildcard, port_of, split
from atpo_async.wire.relayed import MAX_HOPS, Hop

_KEY = re.compile(r"[!-~]{40}")


class Way:
    """Servers by which one peer reaches the buffer.

    Args:
        nearest: endpoint of the one that it was told to join.
        server_key: its public key (Z85); empty for that of the peer's own folder.
    """

    def __init__(self, nearest: str, server_key: str = "") -> None:
        self._hops = [Hop(endpoint=nearest, server_key=server_key)]
        self._at = 0

    @property
    def current(self) -> Hop:
        """The server in use."""
        return self._hops[self._at]

    @property
    def rest(self) -> tuple[Hop, ...]:
        """The server in use and those beyond it."""
        return tuple(self._hops[self._at :])

    @property
    def has_others(self) -> bool:
        """Whether there is another server than the one in use."""
        return len(self._hops) > 1

    def at(self, endpoint: str) -> None:
        """The server in use is found at another address now."""
        self._hops[self._at] = Hop(endpoint=endpoint, server_key=self.current.server_key)

    def learn(self, beyond: Sequence[Hop]) -> None:
        """The server in use says what lies beyond it; hops that are none are left out."""
        found = self._hops[: self._at + 1]
        for hop in beyond[:MAX_HOPS]:
            if _is_usable(hop):
                found.append(Hop(endpoint=_from(found[-1].endpoint, hop.endpoint), server_key=hop.server_key))
        self._hops = found

    def step(self) -> Hop:
        """Use the next server from now on; behind the last one comes the first."""
        self._at = (self._at + 1) % len(self._hops)
        return self.current


def _is_usable(hop: Hop) -> bool:
    try:
        host, port = split(hop.endpoint)
    except ValueError:
        return False
    return port > 0 and not is_wildcard(host) and (not hop.server_key or _KEY.fullmatch(hop.server_key) is not None)


def _from(nearer: str, endpoint: str) -> str:
    """Where a server is found that the one before it reaches at ``endpoint``: one that this reaches on its own machine
    is on that machine."""
    host = host_of(nearer)
    if is_loopback(host_of(endpoint)) and host and not is_loopback(host):
        return endpoint_of(host, port_of(endpoint))
    return endpoint
