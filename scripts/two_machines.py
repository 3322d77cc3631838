"""A whole run over two machines as docs/keys.md has it: two network namespaces of this one, and a cable between them.

    .venv/bin/python scripts/two_machines.py                        # Linux, as root; a minute
    .venv/bin/python scripts/two_machines.py --host 10.77.0.1       # bound to the cable's address, not to every one

``head`` runs ``atpo train`` with the buffer, the learner and no actor; ``gpu-7`` runs actors by hand.  Each has its own
address, host name, shared memory and folder, and sees nothing of the other's: turns and weights go over the cable.

On the way there are: a run without keys, an actor without keys, one with a key that nobody knows (refused, counted,
logged; let in once its key lies there), the cable pulled for some seconds, and a key taken away in mid-run.  The run
has to come to its end all the same, with every task trained on exactly once (scripts/oracle.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.namespaces import Cable, Host, Network, Process, why_not  # noqa: E402
from scripts.oracle_run import OPTIONS, WORLD, judge, lineage, toml  # noqa: E402
from scripts.oracle_task import make_policy  # noqa: E402

PORT = 7000
WAIT_S = 120.0
CABLE_OUT_S = 6.0
"""Longer than a silent connection is kept (five heartbeats)."""
NUM_TASKS = 96
OPEN_TASKS = 48
"""The others begin when all that is to happen on the way has happened."""
GATE = "gate"
HEAD, GPU = "10.77.0.1", "10.77.0.2"


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Host, Host, Cable]]:
    """``head`` and ``gpu-7``, with a cable; nothing is left of them afterwards."""
    with Network() as network:
        head, gpu = network.host("head", folder / "head"), network.host("gpu-7", folder / "gpu-7")
        yield head, gpu, network.cable(head, gpu, addresses=(HEAD, GPU))


def write_config(folder: Path, policy: Path, *, open_tasks: int = OPEN_TASKS) -> None:
    """The same file on both; the policy too, for weights come as the run's versions, its tokenizer does not."""
    fields = {
        **OPTIONS,
        **{f"environment.options.{name}": value for name, value in WORLD.items()},
        "environment.options.pause_s": 0.05,
        "environment.options.gate": GATE,
        "environment.options.open_tasks": open_tasks,
        "run.name": "run",
        "run.dir": "runs",
        "run.max_tasks": NUM_TASKS,
        "model.path": "policy",
        "actor.engine": "transformers",
        "actor.count": 0,
        "links.give_up_s": 60.0,
    }
    (folder / "run.toml").write_text("".join(f"{name} = {toml(value)}\n" for name, value in fields.items()))
    shutil.copytree(policy, folder / "policy")


class Story:
    """What is checked, said line by line."""

    def __init__(self) -> None:
        self.failed = 0
        self._began = time.monotonic()

    def check(self, good: object, what: str, detail: str = "") -> None:
        self.failed += not good
        print(f"{time.monotonic() - self._began:5.1f} s  {'ok   ' if good else 'WRONG'}  {what}", flush=True)
        if detail and not good:
            print(detail, flush=True)

    def until(self, condition: Callable[[], object], what: str, *, tell: Callable[[], str]) -> None:
        """Wait for it; it is wrong when it does not come about."""
        deadline = time.monotonic() + WAIT_S
        while not (found := condition()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.check(found, what, tell())


def the_run(head: Host, gpu: Host, cable: Cable, story: Story, host: str) -> None:
    """From the making of the keys to the verdict."""
    path = head.folder / "runs" / "run"
    train = ("train", "run.toml", "--links.host", host, "--links.actors_port", PORT)
    join = ("actor", "run.toml", "--join", f"head:{PORT}")
    story.check(*_refused(*head.run(*train), "a run on the network without keys", "atpo keys new"))

    for name in ((), ("gpu-7",)):
        code, said = head.run("keys", "new", *name)
        story.check(code == 0, f"atpo keys {' '.join(('new', *name))}", said)
    shutil.move(head.folder / "keys" / "gpu-7", gpu.folder / "keys")  # scp -rp keys/gpu-7 gpu-7:keys && rm -r …
    # A secret that never travels: made there, and the public keys exchanged.
    code, said = gpu.run("keys", "new", "--dir", "own")
    story.check(code == 0, "atpo keys new on gpu-7", said)
    shutil.copyfile(head.folder / "keys" / "server.key", gpu.folder / "own" / "server.key")

    with contextlib.ExitStack() as running:

        def start(machine: Host, *words: object) -> Process:
            process = machine.start(*words)
            running.callback(process.end)
            return process

        trains = start(head, *train, "--links.keys_dir", "keys")

        def tell() -> str:
            logs = [*sorted((path / "logs").glob("*.log")), *sorted(gpu.folder.glob("output-*.txt"))]
            return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in logs) + (
                f"\n--- atpo train\n{trains.said()}"
            )

        def log_of(role: str) -> str:
            return "".join(file.read_text(errors="replace") for file in sorted((path / "logs").glob(f"{role}.*.log")))

        def grown_by(name: str) -> int:
            """Records of metrics of the actors whose key is called so, with turns in them."""
            lines = (path / "metrics.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines if line.startswith("{")]
            return sum(f"{name}/" in r.get("source", "") and "actor/turns" in r.get("metrics", {}) for r in found)

        story.check(*_refused(*gpu.run(*join), "an actor off loopback without keys", "atpo keys new"))
        stranger = start(gpu, *join, "--links.keys_dir", "own", "--name", "stranger")
        own = (gpu.folder / "own" / "client.key").read_text().split('public-key = "')[1][:40]
        story.until(
            lambda: own in log_of("buffer"), "an unknown key is refused, and the buffer's log has it", tell=tell
        )
        story.until(
            lambda: "must lie in its links.keys_dir" in stranger.said() or "docs/keys.md" in stranger.said(),
            "the refused actor says why",
            tell=stranger.said,
        )
        story.until(lambda: _refusals(head) > 0, "refused connections are counted in `atpo status`", tell=tell)
        first = start(gpu, *join, "--links.keys_dir", "keys")
        story.until(lambda: len(lineage(path)) >= 3, "three batches, all grown on gpu-7", tell=tell)
        story.check(stranger.popen.poll() is None, "the stranger tries on", stranger.said())
        steps = len(lineage(path))
        with cable.pulled():
            time.sleep(CABLE_OUT_S)
        story.until(lambda: len(lineage(path)) >= steps + 4, f"{CABLE_OUT_S:g} s without the cable, then on", tell=tell)
        shutil.copyfile(gpu.folder / "own" / "client.key", head.folder / "keys" / "gpu-8.key")
        story.until(lambda: " in use: " in stranger.said(), "its key there, the stranger is let in", tell=tell)
        (head.folder / "keys" / "gpu-7.key").unlink()
        story.until(
            lambda: "was taken out" in first.said(), "its key taken away, gpu-7's actor says so", tell=first.said
        )
        before = grown_by("gpu-7"), grown_by("gpu-8")
        (gpu.folder / GATE).touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            trains.popen.wait(timeout=WAIT_S)
        story.check(trains.popen.poll() == 0, "atpo train ends with 0", tell())
        with contextlib.suppress(subprocess.TimeoutExpired):
            stranger.popen.wait(timeout=30.0)
        story.check(stranger.popen.poll() == 0, "so does the actor that was let in", stranger.said())
        story.check(first.popen.poll() != 0, "the one whose key is gone does not")
        after = grown_by("gpu-7"), grown_by("gpu-8")
        story.check(after[0] == before[0], "nothing more was taken from gpu-7")
        story.check(after[1] > before[1], "gpu-8 did the rest")
    outcome = judge(path, num_tasks=NUM_TASKS, max_uses=1)
    what = (
        f"{NUM_TASKS} tasks trained on exactly once in {outcome.steps} steps, {outcome.lost_steps} lost and made up for"
    )
    story.check(not outcome.problems, what, "\n".join(outcome.problems))


def _refused(code: int, said: str, what: str, way_out: str) -> tuple[bool, str, str]:
    return code == 2 and way_out in said, f"{what} is refused: {said.strip()}", f"exit code {code}"


def _refusals(head: Host) -> int:
    """Of all links of the run, by ``atpo status``."""
    code, said = head.run("status", "runs/run", "--json")
    if code:
        return 0
    links = [link for role in json.loads(said)["roles"].values() for link in role["links"].values()]
    return sum(count for link in links for count in link.get("refused_connections", {}).values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A run over two machines with keys.")
    parser.add_argument("--host", default="0.0.0.0", choices=("0.0.0.0", HEAD), help="links.host of the run")
    parser.add_argument("--dir", type=Path, default=None, help="kept afterwards; a temporary folder where left out")
    args = parser.parse_args(argv)
    if reason := why_not():
        parser.error(reason)
    story = Story()
    with contextlib.ExitStack() as stack:
        folder = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="two-machines-")))
        folder = folder.resolve()
        head, gpu, cable = stack.enter_context(two_machines(folder))
        make_policy(folder / "policy")
        for machine in (head, gpu):
            write_config(machine.folder, folder / "policy")
        the_run(head, gpu, cable, story, args.host)
    print("all as it should be" if not story.failed else f"{story.failed} things were WRONG")
    return 1 if story.failed else 0


if __name__ == "__main__":
    sys.exit(main())
