"""Hosts of one machine in network namespaces (``scripts/namespaces.py``): what they see of one another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.namespaces import Host, Network, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

REACHES = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])).close()"
LISTENS = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7000), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print("listens", flush=True)
while True:
    listener.accept()[0].close()
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


def reaches(host: Host, name: str, *, within_s: float = 10.0) -> bool:
    done = subprocess.run(host.inside(sys.executable, "-c", REACHES, name, within_s), capture_output=True, timeout=30)
    return done.returncode == 0


def listening(host: Host, address: str) -> subprocess.Popen[str]:
    words = host.inside(sys.executable, "-c", LISTENS, address)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listens\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_hosts_at_a_switch_reach_one_another_by_name_and_a_host_without_a_cable_reaches_none(network: Network) -> None:
    head, gpu, stranger = network.host("head"), network.host("gpu-7"), network.host("stranger")
    switch = network.switch()
    cable, _ = network.cable(head, switch), network.cable(gpu, switch)
    server = listening(head, head.address)
    try:
        assert reaches(gpu, "head")
        assert not reaches(stranger, head.address)
        cable.limit(rate_mbit=50)
        assert reaches(gpu, "head")
        assert cable.bytes_to(head) > 0
    finally:
        end(server)


def test_a_cable_may_have_ipv6_addresses(network: Network) -> None:
    head, gpu = network.host("head"), network.host("gpu-7")
    network.cable(head, gpu, subnet="fd00:77::/64")
    assert (head.address, gpu.address) == ("fd00:77::1", "fd00:77::2")
    server = listening(head, "::")
    try:
        assert reaches(gpu, "head")
    finally:
        end(server)


def test_hosts_see_neither_the_folders_nor_the_shared_memory_of_others(network: Network, tmp_path: Path) -> None:
    head, gpu = network.host("head", tmp_path / "head"), network.host("gpu-7", tmp_path / "gpu-7")
    (head.folder / "secret").touch()
    words = gpu.inside("sh", "-c", f"hostname; ls {head.folder} /dev/shm | grep -c secret")
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["gpu-7", "0"]
    with network.cable(head, gpu).pulled():
        assert not reaches(gpu, "head", within_s=0.3)


def test_nothing_is_left_of_hosts_after_the_block() -> None:
    with Network() as network:
        space = network.host("head").space
        assert space in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert space not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not (Path("/etc/netns") / space).exists()
