"""``python -m buffer follow …``: a follower as a process; ``--promote`` makes its copy the run's journal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from atpo_async import config as configuration
from atpo_async.config import Config
from atpo_async.core import texts
from atpo_async.core.errors import AtpoError, ConfigError
from atpo_async.links import addresses
from atpo_async.ops.exits import ERROR_PREFIX, EXIT_DONE, EXIT_USER
from atpo_async.ops.lifeline import Signals, is_supervised, tie_to_supervisor
from atpo_async.ops.role import hand_name, parse_address
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot
from atpo_async.status.facts import publish_facts
from atpo_async.status.reporter import Reporter
from buffer.following.client import FollowerClient
from buffer.following.folder import FollowerFolder
from buffer.following.promotion import Promoted, promote

log = logging.getLogger("atpo.follower")

NAME = "follower"


def main(argv: list[str]) -> int:
    """Follows until it is stopped or the run is over; exit code 2 and one line for what a user can mend."""
    rest, options = configuration.split_options(argv)
    args = _parser().parse_args(rest)
    try:
        if args.promote:
            print("\n".join(_lines(promote(Path(args.dir), into=args.into, certain=args.certain))), flush=True)
            return EXIT_DONE
        if not args.join:
            raise ConfigError("a follower needs --join HOST:PORT, the buffer's address for followers (it logs it)")
        config = configuration.load(args.config, options) if args.config or options else Config()
        return asyncio.run(_follow(Path(args.dir), config, join=args.join, name=args.name or hand_name(NAME)))
    except AtpoError as exc:
        if args.debug:
            raise
        print(f"{ERROR_PREFIX}{exc}", file=sys.stderr, flush=True)
        return EXIT_USER


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m buffer follow")
    parser.add_argument("--config", nargs="*", default=[])
    parser.add_argument("--join", default=None)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--name", default=None)
    parser.add_argument("--promote", action="store_true")
    parser.add_argument("--into", type=Path, default=None)
    parser.add_argument("--certain", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser


async def _follow(path: Path, config: Config, *, join: str, name: str) -> int:
    """Waits for: the run's end, or a signal."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(texts.BoundedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    endpoint, locate = _where(join)
    stopping = asyncio.Event()
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signals = Signals(stopping, cancel=task.cancel, log=log)
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, signals.received, signum)
    if is_supervised():
        tie_to_supervisor(loop, signals.supervisor_gone, grace_s=config.supervisor.stop_grace_s, saving_s=0.0)
    folder = FollowerFolder(path, sync=config.buffer.journal_sync)
    try:
        client = FollowerClient(
            folder, endpoint=endpoint, name=name, settings=config.links, stopping=stopping, locate=locate
        )
        with Reporter(name, folder=path / snapshot.FOLDER, log=log, on_signal=True) as reporter:
            reporter.attach()
            publish_facts(NAME, client.facts)
            over = await client.follow()
    finally:
        folder.close()
    log.info("ends: %s; %s holds the journal", "the run is over" if over else "asked to stop", path)
    return EXIT_DONE if signals.first is None else 128 + signals.first


def _where(join: str) -> tuple[str, Callable[[], str] | None]:
    """The buffer's endpoint, and how to find it again where a run's folder is named."""
    if not Path(join).is_dir():
        return parse_address(join), None
    listening = RunDir.open(join).listening

    def look() -> str:
        with contextlib.suppress(AtpoError, OSError):
            if found := listening.now().follower:
                return addresses.reached_from_here(found)
        return ""

    return "", look


def _lines(done: Promoted) -> list[str]:
    """What a user needs to know of a promotion."""
    path = done.run.path
    place = f"--run.dir {shlex.quote(str(path.parent))} --run.name {shlex.quote(path.name)}"
    lines = [
        f"{path} holds run {done.run.run_id} as of commit {done.position}; its next version is {done.version}",
        f"a learner may go on from a checkpoint of step {done.step} or an earlier one",
        *(f"put aside, as the journal knows less: {aside}" for aside in done.aside),
        f"the run goes on with:  atpo train CONFIG {place}",
    ]
    if (journal_dir := done.run.config.buffer.journal_dir) is None:
        lines[-1] += " --buffer.journal_dir none"
    else:
        lines.append(f"its journal is in {journal_dir}, as before")
    return lines
