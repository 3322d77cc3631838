"""Programs that others wrote and the benchmarks compare with, each set in an environment of its own.

They ask for other versions of the same libraries, so nothing of them comes into the project's environment, and their
side of a measurement is a script that their own Python runs (``peer_reverb.py``, ``peer_priorities.py``).  An
environment is made once per folder; a peer that cannot be installed is named with the reason, and the benchmark goes
on with the reference that it carries.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INSTALL_TIMEOUT_S = 900.0
MARK = "installed.json"


@dataclass(frozen=True, kw_only=True)
class PeerSet:
    """What goes into one environment, and the script that measures it."""

    name: str
    packages: tuple[str, ...]
    script: Path


REVERB = PeerSet(
    name="reverb",
    packages=("dm-reverb==0.14.0", "tensorflow==2.15.1", "numpy==1.26.4"),
    script=HERE / "peer_reverb.py",
)
CPPRB = PeerSet(
    name="cpprb",
    packages=("cpprb==11.0.0", "numpy==2.3.5"),
    script=HERE / "peer_priorities.py",
)
# With the torch it was built against: beside another its native part does not load.  With CUDA's parts it takes 5.5 GB.
TORCHRL = PeerSet(
    name="torchrl",
    packages=("torch==2.14.1", "torchrl==0.14.1", "numpy==2.3.5"),
    script=HERE / "peer_priorities.py",
)


class PeerMissing(Exception):
    """A peer is not here: which, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An installed set."""

    python: Path
    script: Path

    def run(self, args: Sequence[str], *, timeout_s: float) -> dict[str, Any]:
        """The JSON object that the peer's script prints last.  Raises PeerMissing if it prints none."""
        # -I: the script's own folder has modules of the names of ours.
        command = [str(self.python), "-I", str(self.script), *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise PeerMissing(f"{self.script.name} {' '.join(args)} took more than {timeout_s:.0f} s") from None
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise PeerMissing(f"{self.script.name} {' '.join(args)} ended with {done.returncode}: {said}")
        found: dict[str, Any] = json.loads(lines[-1])
        return found


def installed(peer: PeerSet, folder: Path) -> Peer:
    """``peer`` in ``folder``, installed now if it is not.

    Raises:
        PeerMissing: pip could not install it.
    """
    place = folder / peer.name
    python = place / "bin" / "python"
    mark = place / MARK
    found = Peer(python=python, script=peer.script)
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == list(peer.packages):
        return found
    print(f"installing {', '.join(peer.packages)} into {place}", file=sys.stderr, flush=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise PeerMissing(f"peer {peer.name} could not be installed: {exc}") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no word from pip"]
            raise PeerMissing(
                f"peer {peer.name} could not be installed: {errors[-1]}; its packages are {', '.join(peer.packages)}, "
                "and pip's own settings say where it looks (PIP_EXTRA_INDEX_URL adds an index)"
            )
    mark.write_text(json.dumps(list(peer.packages)), encoding="utf-8")
    return found


def found_or_told(peer: PeerSet, folder: Path | None) -> Peer | None:
    """The peer, or None once it has been said why there is none."""
    if folder is None:
        print(f"peer {peer.name} left out: --peers DIR installs it there and measures it too", file=sys.stderr)
        return None
    try:
        return installed(peer, folder)
    except PeerMissing as exc:
        print(exc, file=sys.stderr)
        return None


def measured(peer: Peer | None, args: Sequence[str], *, timeout_s: float) -> dict[str, Any] | None:
    """What the peer's script found, or None once it has been said why it found nothing."""
    if peer is None:
        return None
    try:
        return peer.run(args, timeout_s=timeout_s)
    except PeerMissing as exc:
        print(exc, file=sys.stderr)
        return None
