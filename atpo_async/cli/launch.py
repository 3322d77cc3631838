"""``atpo launch slurm|kubernetes CONFIG``: prints a complete sbatch script, or manifests, for a run."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from atpo_async.cli.common import EXIT_DONE, LAYERS, Asked, note
from atpo_async.config import Config, load
from atpo_async.core.errors import ConfigError, SetupError

SLURM, KUBERNETES = "slurm", "kubernetes"
_SUBFOLDERS = ("learners", "followers", "relays")
"""Of ``links.keys_dir``: keys with rights of their own."""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    kinds = parser.add_subparsers(dest="kind", metavar="slurm|kubernetes", required=True)
    about = {
        SLURM: "print an sbatch script: the buffer and the learner on the first nodes, actors on the others",
        KUBERNETES: "print manifests: the buffer as a StatefulSet, the learner as a Job, actors as a Deployment",
    }
    for kind, text in about.items():
        each = kinds.add_parser(kind, help=text, description=text, allow_abbrev=False)
        each.add_argument("config", metavar="CONFIG", nargs="+", help=LAYERS)
        each.add_argument("--output", metavar="FILE", type=Path, help="write there, for this user alone; else print")
        (_slurm_arguments if kind == SLURM else _kubernetes_arguments)(each)


def _slurm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, help="of the allocation (1)")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="0: the run uses no GPU")
    parser.add_argument("--cpus-per-node", type=int, default=0, metavar="N", help="0: whole nodes (--exclusive)")
    for name, about in (
        ("--job-name", "the run's name if left out"), ("--partition", "Slurm's"), ("--account", "Slurm's"),
        ("--time", "limit, as 1-12:00:00; the run is saved before it and queued again"),
    ):  # fmt: skip
        parser.add_argument(name, default="", help=about)
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further directive, as --sbatch=--qos=high"
    )
    parser.add_argument("--no-requeue", action="store_true", help="do not queue the job again when it is stopped early")
    parser.add_argument("--run-dir", metavar="DIR", help="run.dir, where the first node of any later start finds it")
    parser.add_argument("--atpo", default="atpo", metavar="COMMAND", help="the program on the nodes (atpo)")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help="a line of shell to begin with")


def _kubernetes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, help="with this program, its engine and your task")
    parser.add_argument("--name", default="", help="of all objects; the run's name if left out")
    parser.add_argument("--namespace", default="", help="the one of kubectl's context if left out")
    parser.add_argument("--volume", default="50Gi", help="size of the buffer's volume: journal, checkpoints (50Gi)")
    parser.add_argument("--storage-class", default="", help="of that volume; the cluster's default if left out")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="no pod asks for more (8); 0: the run uses no GPU"
    )
    parser.add_argument("--gpu-resource", default="nvidia.com/gpu", metavar="NAME", help="of the cluster's GPUs")
    parser.add_argument("--cpus", default="", metavar="QUANTITY", help="requested by each learner and actor pod")
    parser.add_argument("--memory", default="", metavar="QUANTITY", help="requested by each learner and actor pod")


def run(asked: Asked) -> int:
    """Prints the script or the manifests, or writes them into a file that only this user can read."""
    args = asked.args
    config = load(args.config, asked.options)
    text = _slurm(config, args) if args.kind == SLURM else _kubernetes(config, args)
    if args.output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        _write(args.output, text)
        start = "sbatch" if args.kind == SLURM else "kubectl apply -f"
        note(f"wrote {args.output}; `{start} {args.output}` starts the run")
    return EXIT_DONE


def _slurm(config: Config, args: argparse.Namespace) -> str:
    from atpo_async.ops.placing.slurm import SlurmOptions, num_idle, script

    keys = config.links.keys_dir
    options = SlurmOptions(
        nodes=args.nodes, gpus_per_node=args.gpus_per_node, cpus_per_node=args.cpus_per_node,
        job_name=args.job_name, partition=args.partition, account=args.account, time=args.time,
        sbatch=tuple(args.sbatch), requeue=not args.no_requeue, run_dir=args.run_dir,
        keys_dir=None if keys is None else str(keys.absolute()), atpo=args.atpo, setup=tuple(args.setup),
    )  # fmt: skip
    text = script(config, options)
    if idle := num_idle(config, options):
        note(
            f"{idle} of {args.nodes} nodes get no role, and are held for the job all the same: raise actor.count "
            f"(it is {config.actor.count}), or lower --nodes"
        )
    return text


def _kubernetes(config: Config, args: argparse.Namespace) -> str:
    import yaml

    from atpo_async.ops.placing.kubernetes import KubernetesOptions, check, manifests

    options = KubernetesOptions(
        image=args.image, name=args.name, namespace=args.namespace, volume=args.volume,
        storage_class=args.storage_class, gpus_per_node=args.gpus_per_node, gpu_resource=args.gpu_resource,
        cpus=args.cpus, memory=args.memory,
    )  # fmt: skip
    check(config, options)
    documents = manifests(config, options, _keys(config))
    note("the manifests hold secret keys: keep them to yourself")
    head = "# Printed by `atpo launch kubernetes`.  It holds secret keys.\n"
    return head + str(yaml.safe_dump_all(documents, sort_keys=False, width=1000, allow_unicode=True))


def _keys(config: Config) -> dict[str, bytes]:
    """The keys of ``links.keys_dir``, or a set made for this run.  Raises SetupError where a file is missing."""
    from atpo_async.cli.setup.keys import new
    from atpo_async.ops.placing.kubernetes import check_keys

    folder = config.links.keys_dir
    if folder is not None:
        if not folder.is_dir():
            raise SetupError(f"links.keys_dir = '{folder}' is no folder; `atpo keys new --dir {folder}` makes it")
        found = _read(folder)
        check_keys(found, str(folder))
        return found
    with tempfile.TemporaryDirectory(prefix="atpo-keys-") as made:
        new(Path(made) / "keys", None)
        return _read(Path(made) / "keys")


def _read(folder: Path) -> dict[str, bytes]:
    """Path -> content.  Of other hosts the public keys: their secrets are theirs."""
    own = ("server.key", "server.key_secret", "client.key", "client.key_secret")
    found = {name: (folder / name).read_bytes() for name in own if (folder / name).is_file()}
    for sub in ("", *_SUBFOLDERS):
        for file in sorted((folder / sub).glob("*.key")):
            found.setdefault(f"{sub}/{file.name}" if sub else file.name, file.read_bytes())
    return found


def _write(file: Path, text: str) -> None:
    """For this user alone, from the first byte on."""
    try:
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as output:
            output.write(text)
    except OSError as exc:
        raise ConfigError(f"--output {file} cannot be written: {exc.strerror}") from None
