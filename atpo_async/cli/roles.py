"""``atpo buffer``, ``atpo learner``, ``atpo actor``: one role by hand, in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from atpo_async.api import machine
from atpo_async.api.policy import ensure_policy
from atpo_async.cli.common import LAYERS, Asked, note
from atpo_async.config import Config, as_options, load
from atpo_async.core.errors import SetupError
from atpo_async.links import addresses
from atpo_async.models.policy import is_there
from atpo_async.ops.orphans import end_orphans
from atpo_async.ops.role import hand_name, parse_address
from atpo_async.ops.specs import role_specs
from atpo_async.run import launch
from atpo_async.run.rundir import RunDir, joining


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument("config", metavar="CONFIG", nargs="+", help=LAYERS)
    address = "run folder, or HOST:PORT of its buffer" if command == "actor" else "run folder"
    parser.add_argument("--join", metavar="WHERE", help=f"{address}; the folder that CONFIG names where left out")
    parser.add_argument("--name", metavar="NAME", help="name of this process in logs and metrics")


def run(asked: Asked) -> NoReturn:
    """Replace this process by the role.  The buffer makes the run folder where there is none; the others join."""
    role, args = asked.command, asked.args
    config = load(args.config, asked.options)
    if role == "actor":
        machine.engine_of(config)
    folder = Path(args.join) if args.join else config.run.dir / config.run.name
    if args.join and not folder.is_dir() and not folder.is_file():
        argv, env = _by_address(asked, config)
    else:
        argv, env = _in_a_run(asked, config, folder)
    name = args.name or (hand_name(role) if role == "actor" else None)
    if name:
        argv += ["--name", name]
    if asked.debug:
        argv.append("--debug")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, env)


def _configuration(asked: Asked) -> list[str]:
    """Options for the role's process, which takes one file: settings of further files, then of the command line."""
    return [f"--{key}={text}" for key, text in {**as_options(asked.args.config[1:]), **asked.options}.items()]


def _by_address(asked: Asked, config: Config) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of an actor that joins a run of which no folder is here."""
    where = asked.args.join
    if asked.command != "actor":
        raise SetupError(f"--join {where} is no run folder here; a {asked.command} shares files with the run")
    address = parse_address(where).removeprefix("tcp://")
    if config.model.warm_start and not is_there(Path(config.model.path)):
        _say_if_nobody_listens(address)
    config = ensure_policy(config, Console(stderr=True))
    argv = [*launch.command("actors"), "--config", asked.args.config[0], "--join", address]
    return [*argv, f"--model.path={config.model.path}", *_configuration(asked)], dict(os.environ)


def _in_a_run(asked: Asked, config: Config, folder: Path) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of a role of a run whose folder is here, or is made by its buffer."""
    role = asked.command
    if role == "buffer" and not asked.args.join:
        machine.check_environment(config)
        machine.check_packages(config)
        machine.check_links(config)
        machine.check_model(config)
        if (folder / "run.json").is_file():
            config = joining(RunDir.open(folder), config)
        rundir = RunDir.create(ensure_policy(config, Console(stderr=True)))
    else:
        rundir = RunDir.open(folder)
        config = joining(rundir, config)
    if role == "actor":
        argv, env = [*launch.command("actors"), str(rundir.path)], dict(os.environ)
    else:
        _clear_the_way(rundir)
        # The learner may need a launcher, its ranks and its GPUs, as with `atpo train`.
        spec = next(s for s in role_specs(config, rundir.path, has_cuda=machine.has_cuda) if s.name == role)
        argv, env = list(spec.argv), {**os.environ, **spec.env}
    argv += ["--config", asked.args.config[0], f"--model.path={rundir.config.model.path}", *_configuration(asked)]
    return argv, env


def _say_if_nobody_listens(address: str) -> None:
    """Warn before a policy is made for a run that may not exist; an actor may also be started before its buffer."""
    try:
        socket.create_connection(addresses.split(address), timeout=2.0).close()
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or exc
        print(
            f"note: nothing listens at {address} yet ({why}); this actor goes on all the same, and makes the policy "
            "ready first; Ctrl-C ends it if the address is wrong",
            file=sys.stderr,
            flush=True,
        )


def _clear_the_way(rundir: RunDir) -> None:
    """End the processes that a killed supervisor of this run left; a living supervisor looks after its own."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(rundir.locked())
        except SetupError:
            return
        end_orphans(rundir, say=note)
