"""Addresses of sockets as text: ``tcp://host:port``, an IPv6 host in brackets, as in ``tcp://[fe80::1%eth0]:7000``."""

from __future__ import annotations

import ipaddress
import socket

from atpo_async.core.errors import SetupError

_SCHEME = "tcp://"


def endpoint_of(host: str, port: int) -> str:
    """``tcp://host:port``; an IPv6 host gets its brackets."""
    host = host.strip("[]")
    return f"{_SCHEME}[{host}]:{port}" if ":" in host else f"{_SCHEME}{host}:{port}"


def split(text: str) -> tuple[str, int]:
    """Host, without brackets, and port of ``host:port`` or ``tcp://host:port``.  Raises ValueError saying what is
    wrong with it."""
    host, colon, port = text.removeprefix(_SCHEME).rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise ValueError("expected HOST:PORT with a port up to 65535")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare and bare == host:
        raise ValueError(f"an IPv6 address has to be in brackets: [{host}]:{port}")
    if ("[" in bare or "]" in bare) or (bare != host and _literal(bare) is None):
        raise ValueError(f"{host} is no IPv6 address in brackets")
    return bare, int(port)


def host_of(endpoint: str) -> str:
    """The host of an endpoint, without brackets; empty where there is none."""
    try:
        return split(endpoint)[0]
    except ValueError:
        return ""


def port_of(endpoint: str) -> int:
    """The port of an endpoint; 0 where there is none."""
    try:
        return split(endpoint)[1]
    except ValueError:
        return 0


def is_wildcard(host: str) -> bool:
    """Whether a socket bound to it listens at every address: ``*``, ``0.0.0.0``, ``::``."""
    address = _literal(host)
    return host == "*" or (address is not None and address.is_unspecified)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket bound to it."""
    address = _literal(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return host == "localhost" or (address is not None and address.is_loopback)


def is_ipv6(host: str) -> bool:
    """Whether a socket needs IPv6 to reach or to be ``host``.  For a name that has both kinds it is IPv4: a server that
    listens at a name may do so at that kind alone.  Asks the system about names."""
    address = _literal(host)
    if address is not None or host == "*":
        return isinstance(address, ipaddress.IPv6Address)
    families = {found[0] for found in _look_up(host)}
    return socket.AF_INET6 in families and socket.AF_INET not in families


def bindable(host: str) -> str:
    """The address that stands for ``host`` where a socket is bound, which takes no names.

    Raises SetupError if this machine knows no such name.
    """
    if host == "*" or _literal(host) is not None:
        return "0.0.0.0" if host == "*" else host
    found = _look_up(host)
    if not found:
        raise SetupError(f"links.host = {host!r} is no address, and this machine knows no host of that name")
    return min(found, key=lambda info: info[0] != socket.AF_INET)[1]


def seen_from(buffer_endpoint: str, endpoint: str) -> str:
    """The address of a learner that reports ``endpoint``, for a process that reached the buffer at ``buffer_endpoint``:
    the two share a host, which matters where the learner listens at every address, or at a link-local one."""
    host, there = host_of(endpoint), host_of(buffer_endpoint)
    if is_wildcard(host):
        return endpoint_of(from_here(there or "127.0.0.1"), port_of(endpoint))
    if _is_link_local(host) and _is_link_local(there):
        # The zone is the number or name of an interface of one's own machine.
        zone = there.partition("%")[1:]
        return endpoint_of(host.partition("%")[0] + "".join(zone), port_of(endpoint))
    return endpoint


def from_here(host: str) -> str:
    """Where a socket bound to ``host`` on this machine is reached from this machine."""
    if not is_wildcard(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


def reached_from_here(endpoint: str) -> str:
    """``from_here`` of an endpoint."""
    return endpoint_of(from_here(host_of(endpoint)), port_of(endpoint)) if host_of(endpoint) else endpoint


def _is_link_local(host: str) -> bool:
    address = _literal(host)
    return isinstance(address, ipaddress.IPv6Address) and address.is_link_local


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _look_up(host: str) -> list[tuple[int, str]]:
    """(family, address) of a name; none where it has none, or the system does not say."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [(info[0], str(info[4][0])) for info in found]
