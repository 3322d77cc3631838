"""A complete sbatch script for a run: one allocation, a job step for each role, addresses found when it starts.

Nothing but Slurm is needed on the nodes beside the program itself: the configuration is in the script, keys and
configuration go to every node with ``sbcast``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atpo_async.config import Config
from atpo_async.core.errors import ConfigError
from atpo_async.ops.placing import payload
from atpo_async.ops.placing.placement import Placed, Placement, check_checkpoints, place
from atpo_async.ops.placing.slurm_script import BODY, END, IN_STEP, ROLE

SAVE_S = 180
"""Before the time limit: for the learner's checkpoint."""
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
_DIRECTIVE = re.compile(r"--?[A-Za-z][A-Za-z0-9-]*(=| )?[^\n]*")


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What the user asks of Slurm."""

    nodes: int = 1
    gpus_per_node: int = 0
    job_name: str = ""
    """Empty: the run's name."""
    partition: str = ""
    account: str = ""
    time: str = ""
    cpus_per_node: int = 0
    """0: whole nodes (``--exclusive``)."""
    sbatch: Sequence[str] = ()
    """Further directives, as they would follow ``#SBATCH``."""
    requeue: bool = True
    run_dir: str | None = None
    keys_dir: str | None = None
    """On the first node; None: a set of keys is made for each start of the job."""
    atpo: str = "atpo"
    """The program, as a command of the nodes' shell."""
    setup: Sequence[str] = ()
    """Lines of shell before anything else: modules, an environment."""


def script(config: Config, options: SlurmOptions) -> str:
    """The sbatch script.

    Raises:
        SetupError: the roles do not fit on the nodes.
        ConfigError: an option is none.
    """
    check(options)
    # The configuration of one machine has no say in where roles are placed.
    here = payload.for_nodes(config, run_dir=options.run_dir)
    placement = place(here, nodes=options.nodes, gpus=options.gpus_per_node)
    check_checkpoints(here, machines=len(placement.learner))
    parts = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {line}" for line in _directives(here, options)),
        "#",
        f"# Run {here.run.name}: {_described(placement)}.  Printed by `atpo launch slurm`; sbatch FILE starts it.",
        "set -euo pipefail",
        "umask 077",
        *options.setup,
        "",
        *_settings(here, options, payload.files_of(config)),
        BODY.rstrip("\n"),
        *_roles(here, placement),
        END.rstrip("\n"),
    ]
    return "\n".join(parts) + "\n"


def check(options: SlurmOptions) -> None:
    """Raises ConfigError for an option that Slurm, or a line of the script, does not take."""
    names = {"--job-name": options.job_name, "--partition": options.partition, "--account": options.account}
    for name, text in names.items():
        if text and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._,-]*", text):
            raise ConfigError(f"{name} {text!r}: letters, digits, '.', '_', ',' and '-' only")
    if options.time and not _TIME.fullmatch(options.time):
        raise ConfigError(f"--time {options.time!r} is no limit of Slurm's: MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
    for line in options.sbatch:
        if not _DIRECTIVE.fullmatch(line):
            raise ConfigError(f"--sbatch {line!r} is no directive; expected one option, as --sbatch=--qos=high")
    for line in options.setup:
        if "\n" in line:
            raise ConfigError("--setup takes one line; give it several times for several")
    if options.nodes < 1 or options.gpus_per_node < 0 or options.cpus_per_node < 0:
        raise ConfigError(
            f"--nodes {options.nodes}, --gpus-per-node {options.gpus_per_node}, --cpus-per-node "
            f"{options.cpus_per_node}: at least 1 node, and no negative numbers"
        )


def _directives(config: Config, options: SlurmOptions) -> list[str]:
    lines = [
        f"--job-name={options.job_name or config.run.name}",
        f"--nodes={options.nodes}",
        "--ntasks-per-node=1",
    ]
    # Whole nodes: --exclusive alone gives all processors and the default share of the memory.
    lines += [f"--cpus-per-task={options.cpus_per_node}"] if options.cpus_per_node else ["--exclusive", "--mem=0"]
    lines += [f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []
    for name in ("partition", "account", "time"):
        if text := getattr(options, name):
            lines.append(f"--{name}={text}")
    # A lost node costs the roles on it, not the job; the buffer's node is the batch script's own.
    lines += ["--no-kill", f"--signal=B:TERM@{SAVE_S}", "--open-mode=append"]
    lines += ["--requeue"] if options.requeue else ["--no-requeue"]
    return [*lines, *options.sbatch]


def _described(placement: Placement) -> str:
    ranks = len(placement.learner)
    idle = f", {placement.num_idle} node(s) without a role" if placement.num_idle else ""
    return (
        f"buffer on the first of {placement.nodes} node(s), learner on {ranks}, {len(placement.actors)} actor(s){idle}"
    )


def num_idle(config: Config, options: SlurmOptions) -> int:
    """Nodes of the allocation that get no role."""
    here = payload.for_nodes(config, run_dir=options.run_dir)
    return place(here, nodes=options.nodes, gpus=options.gpus_per_node).num_idle


def _settings(config: Config, options: SlurmOptions, files: Mapping[str, str]) -> list[str]:
    links = config.links
    return [
        "work=${ATPO_WORK:-/tmp}/atpo-$SLURM_JOB_ID    # on every node, its own",
        f"atpo=({options.atpo})",
        f"num_nodes={options.nodes}",
        f"cpus={options.cpus_per_node or ''}",
        f"actors_port={links.actors_port}",
        f"learner_port={links.learner_port}",
        f"keys_from={shlex.quote(options.keys_dir or '')}",
        f"requeue={int(options.requeue)}",
        f"files=({' '.join(['run.json', ROLE, *files])})",
        "write_files() {  # write_files FOLDER",
        *_heredoc("run.json", payload.as_text(config)),
        *_heredoc(ROLE, IN_STEP),
        *(line for name, text in files.items() for line in _heredoc(name, text)),
        "}",
        "options=()",
        *([f'options+=(--learner.accelerate_config "$work/{payload.ACCELERATE}")'] if files else []),
        "",
    ]


def _heredoc(name: str, text: str) -> list[str]:
    """Lines that write a file; no line of it ends the document."""
    end = "END_OF_FILE"
    while any(line == end for line in text.splitlines()):
        end += "_"
    return [f"cat >\"$1/{name}\" <<'{end}'", text.rstrip("\n"), end]


def _roles(config: Config, placement: Placement) -> list[str]:
    several = len(placement.learner) > 1
    # Its checkpoints outlast this start of the job: at the URL, or beside the run's folder.
    own = config.learner.checkpoint_url is not None
    files = '"$work/learner"' if own else shlex.quote(f"{config.run.dir / config.run.name}.learner")
    lines = ['start buffer "$head" "" "${atpo[@]}" train "$work/run.json" --on hosts "${options[@]}"']
    for number, ranks in enumerate(placement.learner):
        name = f"{ranks.role}-{number}" if several else ranks.role
        meeting = f' --machine "{number}/{len(placement.learner)}@$head:{payload.MEETING_PORT}"' if several else ""
        lines.append(
            f'start {name} {_node(ranks)} "${{atpo[@]}}" learner "$work/run.json" --join "$head:$learner_port" '
            f'--dir {files}{meeting} "${{options[@]}}"'
        )
    lines += [
        f'start {actor.role} {_node(actor)} "${{atpo[@]}}" actor "$work/run.json" --join "$head:$actors_port" '
        f'--name {actor.role} "${{options[@]}}"'
        for actor in placement.actors
    ]
    return lines


def _node(placed: Placed) -> str:
    gpus = ",".join(map(str, placed.gpus))
    return f'"${{nodes[{placed.node}]}}" "{gpus}"'
