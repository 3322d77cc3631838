"""Versions over a thin link: a learner's publisher and an actor's fetcher on two hosts, whole and as differences.

The hosts are network namespaces of this machine (``scripts/namespaces.py``), each with its own process; this module is
both, told what to do over a pipe; each side imports what it needs, so that an actor does not wait for torch.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from actors.weights.fetcher import WeightsFetcher
from atpo_async.config import LinksConfig, WeightsConfig
from atpo_async.core.errors import SetupError
from atpo_async.links.announcements import Listener
from atpo_async.links.client import Client
from atpo_async.links.keys import CLIENT_KEY, SERVER_KEY, make_keys
from atpo_async.wire.messages import LearnerToActor
from scripts.namespaces import Host, Network, why_not

if TYPE_CHECKING:
    from benchmarks.learner_parts.tables import Table
    from benchmarks.weights_parts.trained import Versions

RUN = "benchmark-link"
NUM_VERSIONS = 3
"""The first one comes whole either way."""
TIMEOUT_S = 3600.0


def links(keys: Path) -> LinksConfig:
    return LinksConfig(keys_dir=keys, give_up_s=TIMEOUT_S)


def settings_of(*, max_chain: int) -> WeightsConfig:
    return WeightsConfig(fetch_timeout_s=TIMEOUT_S, max_chain=max_chain)


# --- the two hosts


async def learner(model: str, folder: str, keys: str, address: str) -> None:
    """Publishes the next version for each line that it reads."""
    from benchmarks.weights_parts.trained import Versions
    from learner.weights.publisher import Publisher
    from learner.weights.staging import Staged
    from learner.weights.store import WeightsStore

    versions = Versions(Path(folder), model)
    with tempfile.TemporaryDirectory() as scratch:
        store = WeightsStore(run=RUN, fallback=Path(scratch), settings=settings_of(max_chain=8))
        endpoint = f"tcp://{address}:0"
        async with Publisher(
            store, weights_endpoint=endpoint, announce_endpoint=endpoint, settings=links(Path(keys))
        ) as publisher:
            tell(weights=publisher.weights_endpoint, announce=publisher.announce_endpoint)
            for version in range(NUM_VERSIONS):
                await told()
                staged = Staged(versions.tensors("bfloat16", version), "bfloat16")
                announced = await asyncio.to_thread(
                    store.add, version, staged,
                    probe_tokens=np.zeros((1, 2), np.int32), probe_logprobs=np.zeros(1, np.float32),
                )  # fmt: skip
                await publisher.announce(announced)
                tell(version=version, total_bytes=announced.total_bytes)
            await told()
            tell(**{name: value for name, value in publisher.counters.items() if "differences" in name})


async def actor(keys: str, weights: str, announce: str) -> None:
    """For each line that it reads, fetches the newest version as an actor with or without differences does."""
    async with (
        Client(
            weights, peer="learner", identity="actor", receives=LearnerToActor, settings=links(Path(keys))
        ) as client,
        Listener(announce, receives=LearnerToActor, settings=links(Path(keys))) as listener,
    ):
        fetchers = {
            name: WeightsFetcher(
                run=f"{RUN}-{name}", client=Named(client), listener=listener, settings=settings_of(max_chain=chain)  # type: ignore[arg-type]
            )
            for name, chain in (("whole", 0), ("differences", 8))
        }  # fmt: skip
        while name := await told():
            fetcher = fetchers[name]
            announced = None
            while announced is None:
                announced = await fetcher.newest(timeout_s=30.0)
            began = time.monotonic()
            found = await fetcher.fetch(announced)
            took = time.monotonic() - began
            if found is None:
                raise AssertionError("it is the newest")
            fetcher.release(found)
            tell(seconds=took, verify_s=fetcher.verify_s, **fetcher.take_counts())
        for fetcher in fetchers.values():
            fetcher.close()


class Named:
    """A client whose requests are of the learner's run: the two fetchers share no folder on this host."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.endpoint = client.endpoint

    async def request(self, message: Any, *, timeout_s: float) -> Any:
        answer = await self._client.request(msgspec.structs.replace(message, run=RUN), timeout_s=timeout_s)
        return msgspec.structs.replace(answer, run=message.run) if hasattr(answer, "run") else answer


async def told() -> str:
    line: str = await asyncio.to_thread(sys.stdin.readline)
    return line.strip()


def tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


# --- from outside


class Side:
    """A process on a host, and what it says."""

    def __init__(self, host: Host, *words: object) -> None:
        self._name = host.name
        root = Path(__file__).resolve().parent.parent.parent
        self._popen = subprocess.Popen(
            host.inside(sys.executable, "-m", "benchmarks.weights_parts.link", *words),
            cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def said(self) -> dict[str, Any]:
        """Waits for its next line."""
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise SetupError(f"the {self._name} of the part link ended with code {self._popen.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def do(self, what: str = "") -> dict[str, Any]:
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{what}\n")
        self._popen.stdin.flush()
        return self.said()

    def end(self) -> None:
        self._popen.terminate()
        self._popen.wait()


def link(
    versions: Versions, *, rate_mbit: float, trees: int, over: Callable[[], bool], folder: Path
) -> tuple[Table, Any]:
    """Both ways in one run, in turns.  Raises SetupError where no namespaces can be made."""
    from benchmarks.learner_parts.tables import say

    if reason := why_not():
        raise SetupError(f"the part link needs network namespaces: {reason}")
    versions.need(trees=trees, over=over)
    keys = folder / "keys"
    make_keys(keys, SERVER_KEY)
    make_keys(keys, CLIENT_KEY)
    taken: dict[str, list[dict[str, Any]]] = {"whole": [], "differences": []}
    with Network() as network:
        head, far = network.host("learner"), network.host("actor")
        network.cable(head, far).limit(rate_mbit=rate_mbit)
        sides = [Side(head, "learner", versions.model, versions.folder.parent, keys, head.address)]
        try:
            ends = sides[0].said()
            sides.append(Side(far, "actor", keys, ends["weights"], ends["announce"]))
            for version in range(NUM_VERSIONS):
                total = sides[0].do()["total_bytes"]
                # The first version is whole for both; one of them shows it.
                names = ["differences"] if version == 0 else ["differences", "whole"]
                for name in names if version < NUM_VERSIONS - 1 else names[:1]:
                    found = sides[1].do(name)
                    say(f"version {version}, {name}: {found['seconds']:.2f} s {found}")
                    taken["whole" if version == 0 else name].append(found)
            made = sides[0].do()
        finally:
            for side in sides:
                side.end()
    return _table(versions.model, rate_mbit, total, taken, made)


def _table(
    model: str, rate_mbit: float, total: int, taken: dict[str, list[dict[str, Any]]], made: dict[str, float]
) -> tuple[Table, Any]:
    from benchmarks.learner_parts.tables import Table

    seconds = {name: statistics.median(each["seconds"] for each in found) for name, found in taken.items()}
    ratio = made["differences/made_bytes"] / made["differences/made_whole_bytes"]
    times, encode_s = seconds["whole"] / seconds["differences"], made["differences/encode_s"] / made["differences/made"]
    found = {
        "total_bytes": total, "seconds": seconds, "times": times, "ratio": ratio, "encode_s": encode_s, "taken": taken,
    }  # fmt: skip
    rows = [
        ("whole", f"{seconds['whole']:.1f}", f"{total / 1e6:.0f}", "1"),
        ("as a difference", f"{seconds['differences']:.1f}", f"{ratio * total / 1e6:.0f}", f"{times:.1f}"),
    ]
    about = (
        f"{rate_mbit:g} Mbit/s between two network namespaces; seconds until a version was there and verified, "
        f"the wait for the learner to make the difference ({encode_s:.1f} s) included"
    )
    return Table(f"link, {model}, bfloat16", about, ("a version", "s", "MB", "times as fast"), rows), found


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    asyncio.run(learner(*arguments) if role == "learner" else actor(*arguments))
