"""A whole run with relays as docs/relays.md has it, over network namespaces of this machine.

    .venv/bin/python scripts/relays.py                 # Linux, as root; about a minute
    .venv/bin/python scripts/relays.py --rate-mbit 20  # of the cable between the head and the site

``head`` runs ``atpo train`` with the buffer, the learner and no actor.  A cable of limited rate leads to ``site``,
which runs a relay; behind that ``site-2`` runs another one.  ``gpu-7`` joins the first relay and could reach the head
too, ``far`` joins the second one and reaches nothing else.

In mid-run the first relay is killed: ``gpu-7`` has to go on by way of the head, the second relay waits, and its actor
with it, until the first one is started again.  The run has to come to its end with every task trained on exactly once
(scripts/oracle.py), and each version has to cross the limited cable once while the relays live.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.namespaces import Cable, Host, Network, Process, why_not  # noqa: E402
from scripts.oracle_run import judge, lineage  # noqa: E402
from scripts.oracle_task import make_policy  # noqa: E402
from scripts.two_machines import NUM_TASKS, PORT, Story, write_config  # noqa: E402

GATE = "gate"
OPEN_TASKS = 24
"""The others begin on a host once its gate is open: until then the run cannot end before all that is to happen has."""


@dataclass
class Machines:
    head: Host
    site: Host
    site_2: Host
    gpu: Host
    far: Host
    thin: Cable
    """Between head and site."""

    def __iter__(self) -> Iterator[Host]:
        return iter((self.head, self.site, self.site_2, self.gpu, self.far))


@contextlib.contextmanager
def machines(folder: Path, rate_mbit: float) -> Iterator[Machines]:
    with Network() as network:
        names = ("head", "site", "site-2", "gpu-7", "far")
        head, site, site_2, gpu, far = (network.host(name, folder / name) for name in names)
        thin = network.cable(head, site)
        thin.limit(rate_mbit=rate_mbit)
        for one, other in ((site, gpu), (head, gpu), (site, site_2), (site_2, far)):
            network.cable(one, other)
        yield Machines(head, site, site_2, gpu, far, thin)


def make_keys(on: Machines, story: Story) -> None:
    """The keys of a relay of relays, as docs/relays.md says."""

    def new(where: Host, name: str, *words: str, to: Host) -> None:
        code, said = where.run("keys", "new", name, *words)
        story.check(code == 0, f"atpo keys new {' '.join((name, *words))} on {where.name}", said)
        shutil.move(where.folder / "keys" / name, to.folder / "keys")

    new(on.head, "site", "--relay", to=on.site)
    new(on.site, "site-2", "--relay", to=on.site_2)
    new(on.site, "gpu-7", to=on.gpu)
    new(on.site_2, "far", to=on.far)
    # So that gpu-7 may go on without the relay.
    shutil.copyfile(on.site.folder / "keys" / "gpu-7.key", on.head.folder / "keys" / "gpu-7.key")


def the_run(on: Machines, story: Story) -> None:
    """From the making of the keys to the verdict."""
    path = on.head.folder / "runs" / "run"
    make_keys(on, story)
    listen = ("--links.host", "0.0.0.0", "--links.keys_dir", "keys", "--links.actors_port", PORT)
    # Where they were when they are started again.
    fixed = ("--links.weights_port", PORT + 1, "--links.announce_port", PORT + 2)
    with contextlib.ExitStack() as running:
        processes: list[Process] = []

        def start(machine: Host, *words: object) -> Process:
            process = machine.start(*words)
            running.callback(process.end)
            processes.append(process)
            return process

        def tell() -> str:
            logs = [*sorted((path / "logs").glob("*.log")), *(process.output for process in processes)]
            return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.exists())

        def relay(machine: Host, join: str) -> Process:
            return start(machine, "relay", "--join", f"{join}:{PORT}", "--name", machine.name, *listen, *fixed)

        trains = start(on.head, "train", "run.toml", *listen)
        first, second = relay(on.site, "head"), relay(on.site_2, "site")
        story.until(lambda: "joined run" in second.said(), "a relay joins a relay", tell=tell)
        near = start(on.gpu, "actor", "run.toml", "--join", f"site:{PORT}", "--links.keys_dir", "keys")
        far = start(on.far, "actor", "run.toml", "--join", f"site-2:{PORT}", "--links.keys_dir", "keys")
        story.until(
            lambda: "the buffer calls it site/site-2/far/" in second.said(), "an actor joins through two", tell=tell
        )
        story.until(
            lambda: grown_by(path, "site/gpu-7/") and grown_by(path, "site/site-2/far/"), "both grow trees", tell=tell
        )
        story.until(lambda: len(lineage(path)) >= 3, "three batches", tell=tell)
        story.check(relays_shown(on.head) == {"site", "site/site-2"}, "atpo status shows both relays", tell())
        crossed = on.thin.bytes_to(on.site)
        found = fetched(first)
        once = len(found) == len(set(found)) > 0
        story.check(once, f"{len(found)} versions in {crossed / 1e6:.1f} MB over the thin cable, each once", tell())

        first.kill()
        story.until(lambda: "the buffer calls it gpu-7/" in near.said(), "gpu-7 goes on by way of the head", tell=tell)
        steps = len(lineage(path))
        (on.gpu.folder / GATE).touch()
        story.until(lambda: len(lineage(path)) >= steps + 2, "the run goes on", tell=tell)
        (on.gpu.folder / GATE).unlink()  # work is left for far
        story.check(far.popen.poll() is None, "far waits", far.said())
        before = grown_by(path, "site/site-2/far/")
        relay(on.site, "head")
        (on.far.folder / GATE).touch()
        story.until(
            lambda: grown_by(path, "site/site-2/far/") > before, "the relay is back, and far grows trees", tell=tell
        )
        for machine in on:
            (machine.folder / GATE).touch()
        for process, what in (
            (trains, "atpo train"),
            (near, "gpu-7's actor"),
            (far, "far's actor"),
            (second, "site-2"),
        ):
            with contextlib.suppress(Exception):
                process.popen.wait(timeout=60.0)
            story.check(process.popen.poll() == 0, f"{what} ends with 0", tell())
    outcome = judge(path, num_tasks=NUM_TASKS, max_uses=1)
    what = (
        f"{NUM_TASKS} tasks trained on exactly once in {outcome.steps} steps, {outcome.lost_steps} lost and made up for"
    )
    story.check(not outcome.problems, what, "\n".join(outcome.problems))


def grown_by(path: Path, prefix: str) -> int:
    """Records of metrics of the actors whose names begin so, with turns in them."""
    if not (path / "metrics.jsonl").is_file():
        return 0
    lines = (path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return sum(r.get("source", "").startswith(prefix) and "actor/turns" in r.get("metrics", {}) for r in found)


def relays_shown(head: Host) -> set[str]:
    """The relays among the buffer's facts, without what each calls itself."""
    code, said = head.run("status", "runs/run", "--json")
    facts = json.loads(said)["roles"]["buffer"]["facts"] if code == 0 else {}
    shown: list[dict[str, str]] = [
        each["relays"] for each in facts.values() if isinstance(each, dict) and "relays" in each
    ]
    return {name.rpartition("/")[0] for found in shown for name in found}


def fetched(relay: Process) -> list[str]:
    """The versions that a relay fetched, as often as it did."""
    return re.findall(r"version (\d+): fetched in", relay.said())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A run with relays over network namespaces.")
    parser.add_argument("--rate-mbit", type=float, default=100.0, help="of the cable between the head and the site")
    parser.add_argument("--dir", type=Path, default=None, help="kept afterwards; a temporary folder where left out")
    args = parser.parse_args(argv)
    if reason := why_not():
        parser.error(reason)
    story = Story()
    with contextlib.ExitStack() as stack:
        folder = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relays-")))
        folder = folder.resolve()
        on = stack.enter_context(machines(folder, args.rate_mbit))
        make_policy(folder / "policy")
        for machine in on:
            write_config(machine.folder, folder / "policy", open_tasks=OPEN_TASKS)
        the_run(on, story)
    print("all as it should be" if not story.failed else f"{story.failed} things were WRONG")
    return 1 if story.failed else 0


if __name__ == "__main__":
    sys.exit(main())
