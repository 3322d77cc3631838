"""Ports of this machine: whether the configured ones are free, and which process uses one that is not."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

import psutil

from atpo_async.config import LinksConfig
from atpo_async.core.errors import SetupError
from atpo_async.links import addresses
from atpo_async.run.endpoints import Endpoints

NAMES = ("actors", "learner", "weights", "announce", "follower")
"""Of sockets: the fields of ``Endpoints``, and with ``_port`` those of ``[links]``."""

_MAX_COMMAND = 120


def check(links: LinksConfig) -> None:
    """Raises SetupError naming a configured port that is taken now, or an address that this machine does not have.

    A port that is free now may be taken by the time it is bound; the bind then raises the same error.
    """
    for name in NAMES:
        _try(links.host, getattr(links, f"{name}_port"), f"links.{name}_port")


def to_bind(links: LinksConfig, name: str) -> str:
    """Where a role binds its socket ``name``; port 0 takes a free one."""
    return addresses.endpoint_of(links.host, getattr(links, f"{name}_port"))


def all_to_bind(links: LinksConfig) -> Endpoints:
    """``to_bind`` of each."""
    return Endpoints(**{name: to_bind(links, name) for name in NAMES})


def refused(number: int | None, *, host: str, port: int, setting: str) -> SetupError:
    """What a failed bind means.

    Args:
        number: the system's error number.
        setting: where the port was set.
    """
    if number == errno.EADDRINUSE and port:
        return SetupError(
            f"{setting} = {port} is in use on {host} by {holder(port)}; stop what listens there, choose another port, "
            "or 0 to have a free one taken"
        )
    if number in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return SetupError(
            f"links.host = {host!r} is no address of this machine; 0.0.0.0, or :: (IPv6 too), fits all machines"
        )
    if number == errno.EAFNOSUPPORT:
        return SetupError(f"links.host = {host!r} is of a kind that this machine does not have (IPv6 is off?)")
    if number == errno.EACCES:
        return SetupError(f"{setting} = {port} needs privileges; choose one above 1023, or 0")
    return SetupError(f"{setting} = {port} cannot be bound on {host}: {os.strerror(number or 0)}")


def holder(port: int) -> str:
    """What listens at a TCP port: its process and command, as far as this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr or connection.laddr.port != port:
                continue
            if connection.pid is not None:
                return f"process {connection.pid} ({_command(connection.pid)})"
    return "another process"


def _try(host: str, port: int, setting: str) -> None:
    bindable = addresses.bindable(host)
    try:
        family, _, _, _, address = socket.getaddrinfo(bindable, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as exc:
        raise SetupError(f"links.host = {host!r} is no address: {exc.strerror}") from None
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            # As the sockets to come: a port in TIME_WAIT after the last run is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
    except OSError as exc:
        raise refused(exc.errno, host=host, port=port, setting=setting) from None


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()).strip()[:_MAX_COMMAND] or "?"
    except (psutil.Error, OSError):
        return "?"
