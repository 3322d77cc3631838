"""Fuzz the sockets of a running buffer: ``python scripts/fuzz_sockets.py [--frames N | --seconds S] [--seed K]``.

A real buffer process on a run folder of its own; peers without manners at the actors' socket and at the learner's
(``scripts/fuzz_corpus.py`` has what they send); and beside them an honest actor and an honest learner over real links.
It fails (exit code 1, and says why) if the buffer ends, if an honest peer's message is refused or lost or its work
stalls, if the buffer's memory goes on growing after the warm-up, if its log does, or if it does not end cleanly.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import zmq  # noqa: E402

from atpo_async import config as configuration  # noqa: E402
from atpo_async.config import Config  # noqa: E402
from atpo_async.run.processes import die_with_parent  # noqa: E402
from atpo_async.run.rundir import RunDir  # noqa: E402
from scripts.fuzz_corpus import Corpus, Door  # noqa: E402
from scripts.fuzz_honest import HonestReport, hello_of, honest_process  # noqa: E402
from scripts.fuzz_peers import HABITS, Rude, knock  # noqa: E402

LIMIT_BYTES = 4 << 20
HEARTBEAT_S = 1.0
TREES_PER_BATCH = 4
START_S = 60.0
END_S = 60.0
GROWTH_BYTES = 64 << 20
"""The most that the last three eighths may use beyond the three before; the first quarter is the warm-up.  Queues are
full by then, but what the allocator keeps in fragments grows on for a while: a trim gives half of all that back."""
LOG_BYTES_PER_MESSAGE = 4.0
LOG_BYTES = 1 << 20


@dataclass
class Watched:
    """The buffer's process from outside: memory and log, sampled about once a second."""

    pid: int
    log: Path
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """(share of the work done, bytes of memory of its own, bytes of log)."""

    def sample(self, share: float) -> None:
        self.samples.append((share, self.memory_bytes(), self.log.stat().st_size))

    def memory_bytes(self) -> int:
        # Not what is mapped from the journal: the system takes that back when it wants to.
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
        return 1024 * int(found[1]) if found else 0

    def most_bytes(self, begin: float, end: float) -> int:
        return max((memory for share, memory, _ in self.samples if begin <= share <= end), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000, help="how many mutated messages (default 1,000,000)")
    parser.add_argument("--seconds", type=float, help="go on for this long instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="atpo-fuzz-") as folder:
        return fuzz(Path(folder), num_messages=args.frames, seconds=args.seconds, seed=args.seed)


def configured(folder: Path) -> Config:
    return configuration.build(
        {
            "run": {"name": "fuzz", "dir": str(folder), "seed": 1},
            "links": {"max_message_bytes": LIMIT_BYTES, "heartbeat_s": HEARTBEAT_S},
            "staleness": {"trees_per_batch": TREES_PER_BATCH, "max_lag": 2},
            "search": {"initial_rollouts": 4, "rounds": 0},
        }
    )


def fuzz(folder: Path, *, num_messages: int, seconds: float | None, seed: int) -> int:
    config = configured(folder)
    run = RunDir.create(config)
    log = run.path / "logs" / "buffer.0.log"
    with log.open("wb") as file:
        buffer = subprocess.Popen(
            [sys.executable, "-m", "buffer", str(run.path)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
    honest = None
    context = zmq.Context()
    faults: list[str] = []
    report: HonestReport | None = None
    try:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        hello = hello_of(config, run.run_id)
        wait_for_line(log, "actors at", buffer)
        endpoints = run.read_endpoints()
        doors: dict[Door, str] = {"actors": endpoints.actors, "learner": endpoints.learner}
        honest = multiprocessing.get_context("spawn").Process(
            target=honest_process, args=(run.run_id, doors, hello, TREES_PER_BATCH, HEARTBEAT_S, theirs), daemon=True
        )
        honest.start()
        theirs.close()
        watched, counts = Watched(buffer.pid, log), Counter[str]()
        rude = rude_peers(context, doors, run.run_id, seed, counts)
        begun = time.monotonic()
        sent = shoot(rude, doors, watched, buffer, num_messages=num_messages, seconds=seconds, stop=ours.poll)
        took_s = time.monotonic() - begun
        for peer in rude:
            peer.close()
        report = await_report(ours)
        if buffer.poll() is None:
            watched.sample(1.0)
        faults += judge(buffer, watched, report, sent)
        faults += end(buffer)
        show(watched, counts, report, sent=sent, answers=sum(peer.answers for peer in rude), took_s=took_s)
    finally:
        if honest is not None:
            honest.kill()
            honest.join()
        buffer.kill()
        buffer.wait()
        context.destroy(linger=0)
    if faults:
        # The reasons come last: where only the end of a long output is kept, they are in it.
        print(f"\nthe end of the buffer's log:\n{log.read_text(errors='replace')[-3000:]}")
        print("\nFAILED")
        for fault in faults:
            print(f"- {fault}")
        return 1
    print("\nall well: the buffer stayed up, and the honest peers noticed nothing")
    return 0


def await_report(pipe: Connection) -> HonestReport | None:
    """What the honest peers have to say, once asked to stop; None if they are gone or do not come to an end."""
    try:
        if not pipe.poll():
            pipe.send("stop")
        if pipe.poll(END_S):
            report: HonestReport = pipe.recv()
            return report
    except (EOFError, OSError):
        pass
    return None


def wait_for_line(log: Path, what: str, buffer: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while what not in log.read_text(errors="replace"):
        if buffer.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the buffer did not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.05)


def rude_peers(
    context: zmq.Context[zmq.Socket[bytes]], doors: dict[Door, str], run: str, seed: int, counts: Counter[str]
) -> list[Rude]:
    """Three quarters of them at the actors' door."""
    peers = []
    places: tuple[Door, ...] = ("actors", "actors", "actors", "learner")
    for number, door in enumerate(places):
        for index, habits in enumerate(HABITS):
            corpus = Corpus(run, door, seed=seed * 1000 + number * 100 + index, limit_bytes=LIMIT_BYTES)
            peers.append(Rude(context, doors[door], f"rude-{number}-{index}", corpus, habits, counts))
    return peers


def shoot(
    rude: list[Rude],
    doors: dict[Door, str],
    watched: Watched,
    buffer: subprocess.Popen[bytes],
    *,
    num_messages: int,
    seconds: float | None,
    stop: object,
) -> int:
    """Send until there is enough; the number of messages sent."""
    begun = sampled = said = time.monotonic()
    watched.sample(0.0)
    knocks = 0
    while True:
        fired = 0
        for peer in rude:
            # Those who send blindly would crowd out the rest, and little of theirs is looked at.
            for _ in range(32 if peer.habits.reads and peer.habits.moves_on else 2):
                if not peer.fire():
                    break
                fired += 1
            peer.listen()
        now = time.monotonic()
        sent = sum(peer.sent for peer in rude)
        share = (now - begun) / seconds if seconds else sent / num_messages
        if now - sampled > 0.5:
            sampled = now
            knocks += 1
            for door in doors.values():
                knock(door, knocks)
            if buffer.poll() is not None or (callable(stop) and stop()):
                return sent
            watched.sample(min(share, 1.0))
        if now - said > 10:
            said = now
            print(f"{sent:,} messages after {now - begun:.0f} s, buffer {watched.samples[-1][1] >> 20} MiB", flush=True)
        if share >= 1:
            return sent
        if not fired:
            time.sleep(0.002)


def judge(buffer: subprocess.Popen[bytes], watched: Watched, report: HonestReport | None, sent: int) -> list[str]:
    """What went wrong."""
    faults = []
    if (code := buffer.poll()) is not None:
        faults.append(f"the buffer ended with {code}")
    if report is None:
        faults.append("the honest peers did not come to an end")
    else:
        faults += [f"an honest peer noticed: {fault}" for fault in report.faults]
        if not report.batches:
            faults.append("the honest learner got no batch")
    before, after = watched.most_bytes(0.25, 0.625), watched.most_bytes(0.625, 1.0)
    if after - before > GROWTH_BYTES:
        faults.append(f"the buffer's memory grew from {before >> 20} to {after >> 20} MiB after the warm-up")
    size = watched.samples[-1][2]
    if size > LOG_BYTES + LOG_BYTES_PER_MESSAGE * sent:
        faults.append(f"the buffer's log has {size:,} bytes after {sent:,} messages")
    return faults


def end(buffer: subprocess.Popen[bytes]) -> list[str]:
    if buffer.poll() is not None:
        return []
    buffer.send_signal(signal.SIGTERM)
    try:
        code = buffer.wait(END_S)
    except subprocess.TimeoutExpired:
        return [f"the buffer did not end within {END_S:.0f} s of being asked to"]
    return [] if code == 128 + signal.SIGTERM else [f"the buffer ended with {code}; expected {128 + signal.SIGTERM}"]


def show(
    watched: Watched, counts: Counter[str], report: HonestReport | None, *, sent: int, answers: int, took_s: float
) -> None:
    print(f"\n{sent:,} messages in {took_s:.1f} s: {sent / took_s:,.0f}/s, from {len(HABITS) * 4} peers")
    for name, count in counts.most_common():
        print(f"  {count:>9,}  {name}")
    print(f"answers to them: {answers:,}; the buffer's log has {watched.samples[-1][2]:,} bytes")
    picked = watched.samples[:: max(1, len(watched.samples) // 12)]
    print("its memory in MiB: " + " ".join(f"{memory >> 20}" for _, memory, _ in picked))
    if report is not None:
        print(
            f"honest work meanwhile: {report.trees} trees of {report.turns} turns, {report.batches} batches of "
            f"{report.trees_trained} trees; the slowest answer took {report.slowest_s:.2f} s ({report.slowest})\n"
            f"bad messages that the buffer had counted at the last batch: {report.bad_messages:,}"
        )


if __name__ == "__main__":
    sys.exit(main())
