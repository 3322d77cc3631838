"""Fleets of simulated actors on a real buffer process, over real links.

  pool      one buffer under 10, 100, 1,000 actors: turns and bytes a second, processor time a turn, memory, how long a
            lease takes; as fast as the buffer takes them, or at an offered rate (``--rates``).
  shards    the same pool on one buffer and on ``--shards``: processor time a turn of each process.
  unlike    four actors of speeds 1 : 2 : 4 : 8, one that joins late, one that leaves, one that is killed: how busy each
            is, what it does and how old its turns are, as the buffer shares the work out and in equal shares.

    .venv/bin/python benchmarks/fleet_actors.py [--part pool shards unlike] [--actors 10 100 1000] [--rates 2000 8000]
        [--shards 2] [--curve]

Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A script's own folder comes first on the path, and there `buffer.py` would be taken for the package `buffer`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fleet_parts.pool import pool
from benchmarks.fleet_parts.shards import shards
from benchmarks.fleet_parts.unlike import unlike
from benchmarks.script import BYTES, machine, options, say, scratch

PARTS = {"pool": pool, "shards": shards, "unlike": unlike}
MODES = ("buffer", "equal")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--no-sync", action="store_true", help="buffer.journal_sync = false")
    parser.add_argument("--processes", type=int, default=2, help="that the actors are spread over")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--warm-seconds", type=float, default=3.0, help="before each measurement")
    parser.add_argument("--bytes", type=int, default=4096, help=BYTES)
    parser.add_argument("--turns", type=int, default=20, help="of a tree")
    parser.add_argument("--slots", type=int, default=4, help="trees that an actor grows at once")
    parser.add_argument("--actors", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--shards", type=int, nargs="+", default=[2], help="of part shards, beside one process")
    parser.add_argument("--shard-rate", type=float, default=6000.0, help="turns/s of all actors, for each shard")
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="turns/s of all actors; none: full speed")
    parser.add_argument("--restart", action="store_true", help="kill the buffer at the end, and time the way back")
    parser.add_argument("--curve", action="store_true", help="encrypted links")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="unlike: who shares the work out"
    )
    parser.add_argument("--tasks", type=int, default=240, help="unlike: of the run")
    parser.add_argument("--speed", type=float, default=10.0, help="unlike: turns/s of the slowest actor")
    parser.add_argument("--step-seconds", type=float, default=0.2, help="unlike: of the learner")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    say({"machine": machine()})
    with scratch(args.dir) as folder:
        for part in args.part:
            PARTS[part](args, folder)


if __name__ == "__main__":
    main()
