"""Hosts on one machine: network namespaces with addresses, a name, shared memory and a folder of their own, and cables.

    with Network() as network:
        head, gpu = network.host("head", folder / "head"), network.host("gpu-7", folder / "gpu-7")
        cable = network.cable(head, gpu, subnet="10.77.0.0/24")    # head is 10.77.0.1 there, gpu-7 is 10.77.0.2
        cable.limit(rate_mbit=100)
        process = gpu.start("actor", "run.toml", "--join", "head:7000")
        with cable.pulled(): ...

Hosts see nothing of one another but what goes over their cables; ``network.switch`` joins more than two.  A host knows
the names of the hosts on its cables.  Linux, root and iproute2 are needed: ``why_not`` says what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
ATPO = (sys.executable, "-m", "atpo_async")
WAIT_S = 120.0
_BURST_BYTES = 65536
"""What a limited cable passes at once: more than the largest packet that the system hands to a device."""
_QUEUE_MS = 400
_OWN_ETC = Path("/etc/netns")
"""``ip netns exec`` shows what lies there under a namespace's name as its /etc."""


class CannotMakeHosts(RuntimeError):
    """A command of iproute2 failed: the message has it."""


@functools.cache
def why_not() -> str:
    """Why this process cannot make hosts; empty where it can."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} (iproute2, util-linux) are missing"
    try:
        with Network() as network:
            host = network.host("probe")
            network.cable(host, network.host("other"))
            done = subprocess.run(host.inside("true"), check=False, capture_output=True, text=True)
    except (CannotMakeHosts, OSError) as exc:
        return f"network namespaces cannot be made here: {exc}"
    return f"unshare and mount do not work here: {done.stderr.strip()}" if done.returncode else ""


@functools.cache
def why_no_delay() -> str:
    """Why cables here cannot have a delay; empty where they can."""
    if reason := why_not():
        return reason
    try:
        with Network() as network:
            network.cable(network.host("probe"), network.host("other")).limit(delay_ms=1)
    except CannotMakeHosts as exc:
        return f"this kernel has no netem: {exc}"
    return ""


class Network:
    """Hosts and the cables between them; nothing is left of them after the block."""

    _made = 0

    def __init__(self) -> None:
        Network._made += 1
        # Unique on this machine: names of network devices have 15 characters.
        self.prefix = f"{os.getpid()}x{Network._made}"
        self.hosts: list[Host] = []
        self.cables: list[Cable] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host._remove()

    def host(self, name: str, folder: Path | None = None) -> Host:
        """A new host.

        Args:
            name: its host name.
            folder: where its user works, made if need be; the other hosts do not see what is in it.
        """
        host = Host(self, name, folder)
        self.hosts.append(host)
        host._make()
        return host

    def switch(self, name: str = "switch") -> Host:
        """A host that joins the cables that end in it; the hosts at their other ends take addresses of one subnet."""
        switch = self.host(name)
        _run("ip", "-n", switch.space, "link", "add", _BRIDGE, "type", "bridge")
        _run("ip", "-n", switch.space, "link", "set", _BRIDGE, "up")
        switch.is_switch = True
        return switch

    def cable(self, one: Host, other: Host, *, subnet: str = "", addresses: Sequence[str] = ()) -> Cable:
        """A cable between two hosts.

        Args:
            one: becomes the first address of the subnet, or the first free one at a switch.
            other: the next one; a switch has none.
            subnet: ``10.77.0.0/24`` or of IPv6; left out, one that no other cable has.
            addresses: of the ends without switches, instead of the first free ones.
        """
        cable = Cable(self, one, other, subnet or self._free_subnet(one, other), addresses)
        self.cables.append(cable)
        cable._plug()
        for host in self.hosts:
            host._write_names()
        return cable

    def at_switch(self, switch: Host) -> list[Cable]:
        return [cable for cable in self.cables if switch in cable.hosts]

    def _free_subnet(self, one: Host, other: Host) -> str:
        for switch in (one, other):
            if switch.is_switch and (cables := self.at_switch(switch)):
                return str(cables[0].subnet)
        return f"10.77.{len({cable.subnet for cable in self.cables})}.0/24"


_BRIDGE = "br0"


class Host:
    """A network namespace; made by ``Network.host``."""

    def __init__(self, network: Network, name: str, folder: Path | None) -> None:
        self.name = name
        self.is_switch = False
        self.space = f"atpo-{network.prefix}-{name}"
        self._network = network
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where its user works.  Raises ValueError where it was given none."""
        if self._folder is None:
            raise ValueError(f"{self.name} has no folder")
        return self._folder

    @property
    def addresses(self) -> list[str]:
        """On its cables, in the order in which these were plugged in."""
        return [cable.addresses[self] for cable in self._network.cables if self in cable.addresses]

    @property
    def address(self) -> str:
        """The first of them."""
        return self.addresses[0]

    def inside(self, *words: object) -> list[str]:
        """The command ``words`` as it runs on this host: with its network, name and shared memory, blind for what lies
        in the other hosts' folders."""
        prepare = [f"hostname {self.name}", "mount -t tmpfs tmpfs /dev/shm"]
        others = [host._folder for host in self._network.hosts if host is not self and host._folder is not None]
        prepare += [f"mount -t tmpfs tmpfs '{folder}'" for folder in others]
        script = " && ".join([*prepare, 'exec "$@"'])
        space = ["ip", "netns", "exec", self.space, "unshare", "--uts", "--mount", "--ipc", "--propagation", "private"]
        return [*space, "sh", "-c", script, "sh", *map(str, words)]

    def start(self, *words: object) -> Process:
        """A command of ``atpo`` in the background."""
        return self.start_program(*ATPO, *words)

    def start_program(self, *words: object, env: Mapping[str, str] | None = None) -> Process:
        """Any program in the background, in this host's folder."""
        return Process(self.inside(*words), self.folder, env or {})

    def run(self, *words: object) -> tuple[int, str]:
        """A command of ``atpo`` to its end: exit code, and what it said."""
        process = self.start(*words)
        try:
            return process.popen.wait(timeout=WAIT_S), process.said()
        finally:
            process.end()

    def _make(self) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        _run("ip", "netns", "add", self.space)
        _run("ip", "-n", self.space, "link", "set", "lo", "up")
        self._write_names()

    def _write_names(self) -> None:
        """/etc/hosts, with every host that a cable or a switch leads to."""
        lines = {"127.0.0.1 localhost": None, "::1 localhost": None}
        for cable in self._network.cables:
            if self in cable.hosts or any(h.is_switch and self in _around(self._network, h) for h in cable.hosts):
                lines |= {f"{address} {host.name}": None for host, address in cable.addresses.items()}
        hosts = _OWN_ETC / self.space / "hosts"
        hosts.parent.mkdir(parents=True, exist_ok=True)
        hosts.write_text("".join(f"{line}\n" for line in lines))

    def _remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.space], check=False, capture_output=True)
        shutil.rmtree(_OWN_ETC / self.space, ignore_errors=True)


def _around(network: Network, switch: Host) -> set[Host]:
    return {host for cable in network.at_switch(switch) for host in cable.hosts}


class Cable:
    """A cable between two hosts; made by ``Network.cable``."""

    def __init__(self, network: Network, one: Host, other: Host, subnet: str, addresses: Sequence[str]) -> None:
        number = len(network.cables)
        self.hosts = (one, other)
        self.subnet = ipaddress.ip_network(subnet)
        self._devices = {one: f"a{network.prefix}n{number}", other: f"b{network.prefix}n{number}"}
        taken = {found for cable in network.cables if cable.subnet == self.subnet for found in cable.addresses.values()}
        free = iter(addresses or (str(found) for found in self.subnet.hosts() if str(found) not in taken))
        self.addresses: dict[Host, str] = {host: next(free) for host in self.hosts if not host.is_switch}
        """Of its ends; switches have none."""

    def limit(self, *, rate_mbit: float = 0.0, delay_ms: float = 0.0) -> None:
        """Limit what goes over it, in each direction; 0 is no limit.

        Args:
            rate_mbit: 10^6 bits a second.
            delay_ms: of each packet one way; needs a kernel with netem, see ``why_no_delay``.
        """
        words: list[str] = []
        if delay_ms:
            words = ["netem", "delay", f"{delay_ms:g}ms", "limit", "100000"]
            words += ["rate", f"{rate_mbit:g}mbit"] if rate_mbit else []
        elif rate_mbit:
            words = ["tbf", "rate", f"{rate_mbit:g}mbit", "burst", str(_BURST_BYTES), "latency", f"{_QUEUE_MS}ms"]
        for host, device in self._devices.items():
            subprocess.run(
                ["tc", "-n", host.space, "qdisc", "del", "dev", device, "root"], check=False, capture_output=True
            )
            if words:
                _run("tc", "-n", host.space, "qdisc", "add", "dev", device, "root", *words)

    @contextlib.contextmanager
    def pulled(self) -> Iterator[None]:
        """Nothing goes over it inside the block."""
        host, device = next(iter(self._devices.items()))
        _run("ip", "-n", host.space, "link", "set", device, "down")
        try:
            yield
        finally:
            _run("ip", "-n", host.space, "link", "set", device, "up")

    def bytes_to(self, host: Host) -> int:
        """What has come over it to one of its ends so far, with the packets' headers."""
        counter = f"/sys/class/net/{self._devices[host]}/statistics/rx_bytes"
        return int(_run("ip", "netns", "exec", host.space, "cat", counter))

    def _plug(self) -> None:
        (one, end), (other, far_end) = self._devices.items()
        _run(
            "ip", "-n", one.space, "link", "add", end, "type", "veth", "peer", "name", far_end, "netns", other.space
        )  # fmt: skip
        for host, device in self._devices.items():
            if host.is_switch:
                _run("ip", "-n", host.space, "link", "set", device, "master", _BRIDGE)
            else:
                # Without a check for duplicates, during which an IPv6 address cannot be bound.
                nodad = ["nodad"] if self.subnet.version == 6 else []
                address = f"{self.addresses[host]}/{self.subnet.prefixlen}"
                _run("ip", "-n", host.space, "addr", "add", address, "dev", device, *nodad)
            _run("ip", "-n", host.space, "link", "set", device, "up")


class Process:
    """One command, what it said in a file, ended with all that it started."""

    number = 0

    def __init__(self, words: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        Process.number += 1
        self.output = folder / f"output-{Process.number}.txt"
        with self.output.open("wb") as file:
            self.popen = subprocess.Popen(
                words, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **env},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL, of all that it started too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def end(self) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self.popen.terminate()
            self.popen.wait(timeout=15.0)
        self.kill()


def _run(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise CannotMakeHosts(f"{' '.join(words)}: {done.stderr.strip()} (this needs Linux, root and iproute2)")
    return done.stdout
