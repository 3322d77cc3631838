"""``atpo relay``: a process between far actors and the buffer, which fetches weights once and passes turns on."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from atpo_async.cli.common import EXIT_DONE, LAYERS, Asked
from atpo_async.config import load
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.links import ports
from atpo_async.links.keys import CLIENT_KEY, SERVER_KEY, UPSTREAM_KEY

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

ABOUT = """\
Actors join a relay as they join a buffer: atpo actor CONFIG --join RELAY:PORT.  It fetches each version of the weights
once, whatever the number of its actors, and acknowledges a turn once the buffer has.  docs/relays.md has the commands.
"""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    parser.add_argument("config", metavar="CONFIG", nargs="*", help=f"of links and weights; {LAYERS}; may be left out")
    parser.add_argument(
        "--join", metavar="HOST:PORT", required=True, help="the buffer's address for actors, or another relay's"
    )
    parser.add_argument(
        "--name", metavar="NAME", help="of this relay; where there are no keys, its actors' names begin so"
    )
    parser.add_argument("--dir", metavar="DIR", help="where versions lie; in memory, or with the temporary files")


def run(asked: Asked) -> int:
    """Serves until the run is over, SIGTERM or ctrl-C."""
    from atpo_async.ops.role import hand_name, parse_address
    from atpo_async.relay import process

    args = asked.args
    config = load(args.config, asked.options)
    name = args.name or re.sub(r"[^A-Za-z0-9._-]", "-", hand_name("relay"))[:64]
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"--name {name!r}: a relay's name has up to 64 letters, digits, '.', '-' and '_'")
    folder = None if args.dir is None else Path(args.dir)
    if folder is not None and not folder.is_dir():
        raise SetupError(f"--dir {folder} is no folder; make it, or name another")
    _check_keys(config.links.keys_dir)
    ports.check(config.links)
    process.run(config, join=parse_address(args.join), name=name, folder=folder)
    return EXIT_DONE


def _check_keys(folder: Path | None) -> None:
    """Raises SetupError where a relay's folder of keys lacks what only another host can give it."""
    if folder is None:
        return
    if not folder.is_dir():
        raise SetupError(
            f"links.keys_dir = {str(folder)!r} is no folder; `atpo keys new NAME --relay` on the buffer's host makes it"
        )
    if not (folder / f"{UPSTREAM_KEY}.key").is_file():
        raise SetupError(
            f"links.keys_dir = {str(folder)!r} has no {UPSTREAM_KEY}.key, the public key of the server that this relay "
            f"joins: there it is called {SERVER_KEY}.key, and `atpo keys new NAME --relay` puts it beside the relay's "
            "own key (docs/keys.md)"
        )
    for name in (SERVER_KEY, CLIENT_KEY):
        if not (folder / f"{name}.key_secret").is_file():
            raise SetupError(
                f"links.keys_dir = {str(folder)!r} has no {name}.key_secret; `atpo keys new --dir {folder}` makes it"
            )
