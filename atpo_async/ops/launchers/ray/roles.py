"""The commands of a run's roles on a cluster: the buffer in the run's folder, learner and actors by address.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.ops.specs import RoleSpec, role_specs
from atpo_async.run import accelerate_environment, launch

BUFFER, LEARNER = "buffer", "learner"
PYTHON, LAUNCH = "{python}", "{launch}"


def check(config: Config) -> None:
    """Raises SetupError for settings that only mean something on one machine."""
    for name in ("learner", "actor"):
        gpus = getattr(config, name).gpus
        if gpus:
            raise SetupError(
                f"{name}.gpus = {list(gpus)} numbers the GPUs of one machine, and on a cluster Ray allots them: leave "
                f"it out, and say how many with --ray.{name}.num_gpus"
            )
    if config.supervisor.launcher != "processes":
        raise SetupError(
            f"supervisor.launcher = {config.supervisor.launcher!r} and --on ray both say where roles run: leave one out"
        )
    if config.ray.learner.nodes > 1 and config.learner.checkpoint_url is None:
        raise SetupError(
            f"ray.learner.nodes = {config.ray.learner.nodes} needs learner.checkpoint_url, where the ranks of every "
            "node find the checkpoint to go on from"
        )
    if config.learner.accelerate_config and config.ray.learner.nodes > 1:
        raise SetupError(
            f"learner.accelerate_config = {config.learner.accelerate_config!r} says where the ranks are, and so does "
            f"ray.learner.nodes = {config.ray.learner.nodes}: leave one out"
        )


def cluster_specs(config: Config, rundir: Path, *, actors: int, gpus: bool) -> list[RoleSpec]:
    """The roles, with fields in braces that the host of each fills in (``messages.Order``).

    Args:
        actors: how many at most.
        gpus: whether the learner is allotted some.
    """
    many = config.model_copy(update={"actor": config.actor.model_copy(update={"count": actors})})
    specs = role_specs(many, rundir, has_cuda=lambda: gpus, python=PYTHON, environ={})
    over_nodes = config.ray.learner.nodes > 1
    return [
        replace(spec, argv=_argv(spec, config, str(rundir)), env=_without(spec.env) if over_nodes else spec.env)
        for spec in specs
    ]


def _without(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of ranks that are not on one machine."""
    return {name: text for name, text in env.items() if name not in accelerate_environment.ONE_MACHINE}


def _argv(spec: RoleSpec, config: Config, folder: str) -> tuple[str, ...]:
    words = [LAUNCH if word == launch.HERE else word for word in spec.argv]
    sockets = ["--links.host={host}", "--links.keys_dir={keys}"]
    if spec.name == BUFFER:
        return (*words, *sockets)
    words = [word for word in words if word != folder]
    if spec.name == LEARNER and config.ray.learner.nodes > 1:
        words = _over_nodes(words, config.ray.learner.nodes)
    folder_of_files = config.ray.learner.dir
    if spec.name != LEARNER:
        own: tuple[str, ...] = ("--name", spec.name)
    else:
        own = () if folder_of_files is None else ("--dir", str(folder_of_files))
    return (*words, "--config", "{config}", "--join", "{join}", *own, "--model.path={policy}", *sockets)


def _over_nodes(words: Sequence[str], nodes: int) -> list[str]:
    """Accelerate's options for ranks that meet at the first node."""
    changed = {"--num_machines": str(nodes), "--main_process_port": "{port}"}
    found: list[str] = []
    for before, word in zip(("", *words), words, strict=False):
        found.append(changed.get(before, word))
    at = found.index("--num_machines")
    return [*found[:at], "--machine_rank", "{rank}", "--main_process_ip", "{head}", *found[at:]]
