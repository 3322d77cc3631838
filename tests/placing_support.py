"""A cluster on this machine: commands as Slurm has them, mounts as Kubernetes makes them, and a run small enough."""

from __future__ import annotations

import base64
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atpo_async.ops.placing import kubernetes_commands as commands
from scripts.oracle_run import toml
from tests.e2e_support import BASE, ROOT, WORLD
from tests.links_support import reserved_port

SRUN = r"""#!/usr/bin/env bash
# Runs its command here, once for each task; a role's place is noted.  As Slurm's, it kills a step by SIGKILL when it
# gets SIGTERM, and passes SIGUSR1 on to all processes of the step.
tasks=1 node=
while [[ $1 == -* ]]; do
  case $1 in
    --ntasks=*) tasks=${1#*=} ;;
    --nodelist=*) node=${1#*=} ;;
  esac
  shift
done
if [[ -n $node ]]; then echo "$node $*" >>"$FAKE_SLURM/placed"; fi
if (( tasks == 1 )); then
  step= code=0
  trap '[[ -n $step ]] && kill -KILL -- "-$step"' TERM
  trap '[[ -n $step ]] && kill -USR1 -- "-$step"' USR1
  CUDA_VISIBLE_DEVICES=${FAKE_GPUS-} setsid "$@" &
  step=$!
  while :; do
    code=0
    wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || exit "$code"
  done
fi
for (( i = 0; i < tasks; i++ )); do "$@" || exit; done
"""
SCONTROL = r"""#!/usr/bin/env bash
case $1 in
  show) printf '%s\n' $FAKE_NODES ;;
  requeue) echo "$2" >>"$FAKE_SLURM/requeued" ;;
esac
"""
SBCAST = r"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
cp -p "$1" "$2"
"""
ATPO = f"""#!/usr/bin/env bash
exec "{sys.executable}" -m atpo_async "$@"
"""


def put(folder: Path, **scripts: str) -> Path:
    """Executable files in a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def environment(commands_in: Path, **more: str) -> dict[str, str]:
    """Of a process on the cluster."""
    return {
        **os.environ,
        "PATH": f"{commands_in}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def small_run(file: Path, policy: Path, *, steps: int = 2, actors: int = 1, **fields: object) -> Path:
    """The configuration of a run of some seconds, with ports of its own."""
    everything = {
        **BASE,
        **{f"environment.options.{name}": value for name, value in WORLD.items()},
        "environment.name": "hopqa",
        "learner.minibatches": 1,
        "learner.checkpoint_every": 100,
        "eval.at_start": False,
        "eval.at_end": False,
        "model.path": str(policy),
        "run.name": "small",
        "run.steps": steps,
        "actor.count": actors,
        "links.actors_port": reserved_port(),
        "links.learner_port": reserved_port(),
        **fields,
    }
    file.write_text("".join(f"{name} = {toml(value)}\n" for name, value in everything.items()))
    return file


def mounted(document: Mapping[str, Any], objects: Sequence[Mapping[str, Any]], root: Path) -> list[str]:
    """The command of a document's container, with the mounts of its pod as folders under ``root``."""
    pod = document["spec"]["template"]["spec"]
    made = {each["metadata"]["name"]: each for each in objects if each["kind"] in ("ConfigMap", "Secret")}
    for volume in pod["volumes"]:
        if "configMap" in volume:
            folder = root / commands.CONFIG.lstrip("/")
            folder.mkdir(parents=True)
            for name, text in made[volume["configMap"]["name"]]["data"].items():
                (folder / name).write_text(moved(text, root))
        elif "secret" in volume:
            _mount_secret(volume["secret"], made[volume["secret"]["secretName"]], root / commands.KEYS.lstrip("/"))
    (root / commands.SCRATCH.lstrip("/")).mkdir(parents=True)
    (root / commands.RUNS.lstrip("/")).mkdir(parents=True)
    (root / commands.LEARNER.lstrip("/")).mkdir(parents=True)
    command: list[str] = pod["containers"][0]["command"]
    return [moved(word, root) for word in command]


def moved(text: str, root: Path) -> str:
    """A command with the paths of its mounts under ``root``."""
    for path in (commands.CONFIG, commands.KEYS, commands.RUNS, commands.SCRATCH, commands.LEARNER):
        text = text.replace(path, f"{root}{path}")
    return text


def _mount_secret(volume: Mapping[str, Any], secret: Mapping[str, Any], folder: Path) -> None:
    """As the kubelet does it: files in a folder that is renamed as a whole, links to them, one mode for all."""
    data = folder / "..2026"
    for item in volume["items"]:
        file = data / item["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(secret["data"][item["key"]]))
        file.chmod(volume["defaultMode"])
        assert stat.S_IMODE(file.stat().st_mode) == 0o400
    (folder / "..data").symlink_to("..2026")
    for entry in data.iterdir():
        (folder / entry.name).symlink_to(Path("..data") / entry.name)


class Pods:
    """Processes of pods, ended with the test."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder, self._env = folder, dict(env)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, env=self._env | dict(env), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def story(self) -> str:
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in sorted(self._folder.glob("*.log"))
        )

    def close(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
