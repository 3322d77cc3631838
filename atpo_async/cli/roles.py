"""``atpo buffer``, ``atpo learner``, ``atpo actor``: one role by hand, in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
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
from atpo_async.core.texts import counted
from atpo_async.links import addresses
from atpo_async.models.policy import is_there
from atpo_async.ops.orphans import end_orphans
from atpo_async.ops.role import hand_name, parse_address
from atpo_async.ops.specs import Machines, learner_spec, role_specs
from atpo_async.run import launch
from atpo_async.run.rundir import RunDir, joining
from atpo_async.status.run_view import look


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument("config", metavar="CONFIG", nargs="+", help=LAYERS)
    where = {"actor": "run folder, or HOST:PORT of its buffer", "learner": "run folder, or HOST:PORT of its buffer"}
    address = where.get(command, "run folder")
    parser.add_argument("--join", metavar="WHERE", help=f"{address}; the folder that CONFIG names where left out")
    if command == "learner":
        parser.add_argument(
            "--dir", metavar="FOLDER", type=Path, help="of its files, where it joins by HOST:PORT (the user's cache)"
        )
        parser.add_argument(
            "--machine",
            metavar="I/N@HOST:PORT",
            help="the I-th (from 0) of N machines of ranks that meet at HOST:PORT",
        )
    parser.add_argument("--name", metavar="NAME", help="name of this process in logs and metrics")


def run(asked: Asked) -> NoReturn:
    """Replace this process by the role.  The buffer makes the run folder where there is none; the others join."""
    role, args = asked.command, asked.args
    config = load(args.config, asked.options)
    if role == "actor":
        machine.engine_of(config)
    folder = Path(args.join) if args.join else config.run.dir / config.run.name
    for option in ("dir", "machine"):
        if (value := getattr(args, option, None)) is not None and (not args.join or folder.exists()):
            raise SetupError(f"--{option} {value} is for a learner that joins by address: give --join HOST:PORT")
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
    """(argv, environment) of an actor or a learner that joins a run of which no folder is here."""
    where, role = asked.args.join, asked.command
    if role == "buffer":
        raise SetupError(f"--join {where} is no run folder here; a buffer works in the run's folder")
    address = parse_address(where).removeprefix("tcp://")
    makes_policy = config.model.warm_start and not is_there(Path(config.model.path))
    does = "makes the policy ready first" if makes_policy else LOADS if role == "actor" else "waits"
    _say_if_nobody_listens(address, role, does=does, end="the address is wrong")
    config = ensure_policy(config, Console(stderr=True))
    words = ["--config", asked.args.config[0], "--join", address]
    argv, env = [*launch.command("actors"), *words], dict(os.environ)
    if role == "learner":
        if asked.args.dir is not None:
            words += ["--dir", str(asked.args.dir)]
        spec = learner_spec(config, words, has_cuda=machine.has_cuda, machines=_machines(asked.args.machine))
        argv, env = list(spec.argv), {**os.environ, **spec.env}
    return [*argv, f"--model.path={config.model.path}", *_configuration(asked)], env


def _machines(text: str | None) -> Machines | None:
    """Of ``--machine``.  Raises SetupError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)@(.+)", text)
    if found is None:
        raise SetupError(f"--machine {text}: expected I/N@HOST:PORT, as 0/2@head:29500 and 1/2@head:29500 of two")
    return Machines(index=int(found[1]), count=int(found[2]), meet_at=found[3])


def _in_a_run(asked: Asked, config: Config, folder: Path) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of a role of a run whose folder is here, or is made by its buffer."""
    role = asked.command
    if role == "buffer" and not asked.args.join:
        machine.check_environment(config)
        machine.check_packages(config)
        machine.check_links(config)
        machine.check_model(config)
        if (folder / "run.json").is_file():
            config = joining(RunDir.open(folder, to_begin=True), config)
        rundir = RunDir.create(ensure_policy(config, Console(stderr=True)))
    else:
        rundir = RunDir.open(folder)
        config = joining(rundir, config)
        if role == "actor":
            _check_there_is_a_run_to_join(rundir, folder)
    if role == "actor":
        argv, env = [*launch.command("actors"), str(rundir.path)], dict(os.environ)
    else:
        _clear_the_way(rundir)
        # The learner may need a launcher, its ranks and its GPUs, as with `atpo train`.
        spec = next(s for s in role_specs(config, rundir.path, has_cuda=machine.has_cuda) if s.name == role)
        argv, env = list(spec.argv), {**os.environ, **spec.env}
    argv += ["--config", asked.args.config[0], f"--model.path={rundir.config.model.path}", *_configuration(asked)]
    return argv, env


def _check_there_is_a_run_to_join(rundir: RunDir, folder: Path) -> None:
    """Raises SetupError for a run that is done; warns where its buffer listens no more."""
    view = look(rundir.path)
    if view.supervisor is None and not {"buffer", "learner"} & set(view.running_roles):
        steps = rundir.config.run.steps
        if view.steps >= steps and (rundir.path / "model").is_dir():
            raise SetupError(
                f"run {folder} has done its {counted(steps, 'step')}; there is nothing to join (`atpo train` with a "
                "higher --run.steps goes on with it)"
            )
    if endpoint := rundir.listening.now().actors:
        address = addresses.reached_from_here(endpoint).removeprefix("tcp://")
        _say_if_nobody_listens(address, "actor", does=LOADS, end=f"the buffer of {folder} is not to be started again")


LOADS = "loads its engine first"


def _say_if_nobody_listens(address: str, role: str, *, does: str, end: str) -> None:
    """Warn before an engine is loaded, or a policy is made, for a run that may not exist; a role may also be started
    before its buffer.

    Args:
        role: actor or learner.
        does: what it does next.
        end: when to end it.
    """
    try:
        socket.create_connection(addresses.split(address), timeout=2.0).close()
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or exc
        print(
            f"note: nothing listens at {address} yet ({why}); this {role} goes on all the same, and {does}; Ctrl-C "
            f"ends it if {end}",
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
