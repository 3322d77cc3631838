"""A Ray cluster of several nodes in this machine, nodes that are lost, and runs that work on it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot
from atpo_async.status.snapshot import StatusSnapshot
from scripts.oracle_run import OPTIONS, ROOT, WORLD, toml

DEADLINE_S = 150.0
"""For one wait; far beyond what it takes."""
STORE_BYTES = 80_000_000
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # other programs of this machine may fill its memory
    "RAY_DEDUP_LOGS": "0",
}
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
"""A node whose processes are killed is known to be gone in a second; one that is slow has its time for each answer."""


class Nodes:
    """A cluster: a head that holds no role, and nodes by the one custom resource that each has."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        os.environ.update(QUIET)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES, "_system_config": HEALTH}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, resource: str) -> None:
        self._nodes[resource] = self._cluster.add_node(
            num_cpus=2, resources={resource: 1}, object_store_memory=STORE_BYTES
        )

    def lose(self, resource: str) -> None:
        """SIGKILL to everything on a node at once, roles included, as when the machine fails."""
        node = self._nodes.pop(resource)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)  # none may tell the others that it ends
        for process in [*raylet.children(recursive=True), raylet]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def end(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


class RayRun:
    """One run of the oracle's task on a cluster, and the commands that work on it.

    Args:
        folder: of the test.
        policy: model folder.
        address: of the cluster.
        num_tasks: after which the run ends; those from ``open_tasks`` on wait for ``open_gate``.
        options: dotted options besides.
    """

    def __init__(
        self,
        folder: Path,
        policy: Path,
        address: str,
        *,
        num_tasks: int,
        open_tasks: int,
        options: Mapping[str, object],
    ) -> None:
        self.folder = folder
        self.path = folder / "runs" / "run"
        self._gate = folder / "gate"
        self._drivers: list[subprocess.Popen[bytes]] = []
        fields = {
            **OPTIONS,
            **{f"environment.options.{name}": value for name, value in WORLD.items()},
            "environment.options.gate": str(self._gate),
            "environment.options.open_tasks": open_tasks,
            "run.name": "run",
            "run.dir": str(folder / "runs"),
            "run.max_tasks": num_tasks,
            "model.path": str(policy),
            "actor.engine": "transformers",
            "ray.address": address,
            **options,
        }
        self.config = folder / "run.toml"
        self.config.write_text("".join(f"{name} = {toml(value)}\n" for name, value in fields.items()))

    def train(self) -> subprocess.Popen[bytes]:
        """A driver in the foreground of a terminal of its own."""
        with (self.folder / f"output-{len(self._drivers)}.txt").open("wb") as output:
            driver = subprocess.Popen(
                [sys.executable, "-m", "atpo_async", "train", str(self.config), "--on", "ray"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        self._drivers.append(driver)
        return driver

    def said(self, driver: int = -1) -> str:
        """By the newest driver, or the one of this number."""
        number = driver % len(self._drivers)
        return (self.folder / f"output-{number}.txt").read_text(errors="replace")

    def open_gate(self) -> None:
        self._gate.touch()

    def steps(self) -> int:
        """Batches in the run's lineage so far."""
        lineage = self.path / "lineage.jsonl"
        return lineage.read_bytes().count(b"\n") if lineage.exists() else 0

    def status(self, role: str) -> StatusSnapshot | None:
        return snapshot.read(self.path / snapshot.FOLDER)[0].get(role)

    def attempts(self, role: str) -> int:
        return RunDir.open(self.path).next_attempt(role)

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.story()}"
            time.sleep(0.05)

    def exit_code(self, driver: subprocess.Popen[bytes]) -> int:
        """Waits for the end of a driver."""
        try:
            return driver.wait(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"waited in vain for the driver's end:\n{self.story()}") from None

    def story(self) -> str:
        """What a failure should show."""
        files = [*sorted(self.folder.glob("output-*.txt")), *sorted((self.path / "logs").glob("*.log"))]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def close(self) -> None:
        for driver in self._drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()


@contextlib.contextmanager
def run_on(folder: Path, policy: Path, address: str, **settings: Any) -> Iterator[RayRun]:
    """A run of which no driver is left afterwards; what runs on the cluster ends with that."""
    made = RayRun(folder, policy, address, **settings)
    try:
        yield made
    finally:
        made.close()
