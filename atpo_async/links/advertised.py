"""Which address of this machine others are told: the learner's for actors, the buffer's for roles started by hand.

A socket that listens at every address has no address to tell.  A learner on the buffer's machine then says so, and each
actor finds it where it found the buffer (``addresses.seen_from``): two actors that reached the buffer over two networks
reach the learner over the same two.  A learner on another machine tells the address from which it speaks to the buffer.
``links.advertise`` names the machine where neither is right: behind NAT, or under a name.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket

import psutil

from atpo_async.core.errors import SetupError
from atpo_async.links import addresses
from atpo_async.links.addresses import endpoint_of, host_of, is_loopback, is_wildcard, port_of

MAX_TOLD = 4
"""Addresses to join at that are told; a machine may have dozens."""

_VIRTUAL = ("docker", "br-", "virbr", "cni", "veth", "podman", "lxc", "flannel", "cali")
"""Beginnings of the names of interfaces that lead to containers of this machine, whose addresses say nothing to other
machines."""
_ANYWHERE = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))
"""Addresses for documentation (RFC 5737, RFC 3849): the way to them is the way to the outside."""


def told(bound: str, *, buffer: str, advertise: str | None) -> str:
    """The endpoint under which actors are told to look for this learner.

    Args:
        bound: where its socket listens.
        buffer: the endpoint at which it reached the buffer.
        advertise: ``links.advertise``.

    Raises:
        SetupError: it listens where only its own machine reaches it, and the buffer is on another.
    """
    host, port, there = host_of(bound), port_of(bound), host_of(buffer)
    if not host or not there:  # the buffer of this run's folder, which has not said yet where it listens
        return bound
    here = towards(there)
    if is_loopback(there) or (here is not None and (is_loopback(here) or here in resolved(there))):
        # One machine, one ``links.host``, one NAT before it: what leads to the buffer leads to the learner.
        return endpoint_of("::" if ":" in host else "0.0.0.0", port) if advertise else bound
    if advertise:
        return endpoint_of(advertise, port)
    if is_loopback(host):
        raise SetupError(
            f"links.host = {host!r}: no actor of another machine reaches this learner, and the buffer at {buffer} is "
            "on another one; set links.host to 0.0.0.0, to :: (IPv6 too), or to an address of this machine"
        )
    if is_wildcard(host):
        return endpoint_of(here or host, port)
    return bound


def to_join(endpoint: str, *, advertise: str | None = None) -> tuple[str, ...]:
    """HOST:PORT for joining from another machine, the likeliest first: several where a socket listens at every address
    of a machine that has several; from this machine alone where the endpoint is local to it."""
    host, port = addresses.split(endpoint)
    if advertise and not is_loopback(host):
        hosts: tuple[str, ...] = (advertise,)
    elif is_wildcard(host):
        hosts = own_addresses(ipv6=":" in host) or (addresses.from_here(host),)
    else:
        hosts = (host,)
    return tuple(endpoint_of(each, port).removeprefix("tcp://") for each in hosts)


def sentence(endpoint: str, *, advertise: str | None = None) -> str:
    """``HOST:PORT``, or ``HOST:PORT (or … or …)``."""
    first, *others = to_join(endpoint, advertise=advertise)
    return f"{first} (or {' or '.join(others)})" if others else first


def own_addresses(*, ipv6: bool) -> tuple[str, ...]:
    """Addresses of this machine at which others may reach it, the one that leads outside first.

    Args:
        ipv6: those of IPv6 too; link-local ones, whose zone is another one on each machine, only where there are no
            others.
    """
    outside = [local for target, _ in _ANYWHERE if (local := towards(target)) is not None]
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    listed = [
        info.address
        for name, infos in sorted(psutil.net_if_addrs().items(), key=lambda item: item[0].startswith(_VIRTUAL))
        if name in up
        for info in infos
        if info.family in (socket.AF_INET, socket.AF_INET6)
    ]
    found = [each for each in dict.fromkeys([*outside, *listed]) if not is_loopback(each)]
    found = [each for each in found if ipv6 or ":" not in each]
    routed = [each for each in found if not ipaddress.ip_address(each).is_link_local]
    return tuple((routed or found)[:MAX_TOLD])


def towards(host: str) -> str | None:
    """The address from which this machine speaks to ``host``, with its zone where it is link-local; None where there is
    no way.  Nothing is sent: a UDP socket that is connected has chosen its address."""
    for family, address in _targets(host):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return _plain(str(probe.getsockname()[0]))
    return None


def resolved(host: str) -> set[str]:
    """The addresses of ``host``; a name has several, or none."""
    return {_plain(str(address[0])) for _, address in _targets(host)}


def _targets(host: str) -> list[tuple[int, tuple[object, ...]]]:
    """(family, address) to connect a socket to, in the order in which a link would use them: IPv4 first."""
    if not host or is_wildcard(host):
        return []
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return []
    return sorted(((info[0], info[4]) for info in found), key=lambda each: each[0] != socket.AF_INET)


def _plain(address: str) -> str:
    """An IPv4 address that is written as one of IPv6 (``::ffff:10.0.0.5``) is written as itself."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return address if mapped is None else str(mapped)
