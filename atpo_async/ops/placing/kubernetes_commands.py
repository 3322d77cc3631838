"""What the containers of a run's pods do: shell that copies the keys, runs one role, and passes signals on to it."""

from __future__ import annotations

import shlex

from atpo_async.config import Config
from atpo_async.ops.exits import ERROR_FILE, EXIT_USER, PLACED, STATUS_FOLDER
from atpo_async.ops.placing.asking import ASK
from atpo_async.ops.placing.payload import MEETING_PORT

__all__ = ["EXIT_USER"]

CONFIG, KEYS, RUNS, SCRATCH = "/etc/atpo/config", "/etc/atpo/keys", "/var/lib/atpo/runs", "/var/lib/atpo/scratch"
"""Where the ConfigMap, the Secret, the buffer's volume and a pod's own disk are mounted."""
LEARNER = "/var/lib/atpo/learner"
"""Where the learner's own volume is, which it has without ``learner.checkpoint_url``: for its checkpoints."""
CONFIG_FILE = "run.json"
JOINING = ("client.key", "client.key_secret", "server.key")
"""What actors have of a set of keys: they only connect."""
POD_NAME = "POD_NAME"

STATUS_MINUTES = 2
"""A status is written once a second."""


def role_alive(folder: str = SCRATCH) -> str:
    """Whether a role has written its status lately: the learner in its replica of the run's folder, an actor in a
    folder of its own."""
    return f'[ -n "$(find {folder} -path "*/status/*.json" -mmin -{STATUS_MINUTES})" ]'


def environment(role: str) -> dict[str, str]:
    """Variables of a role's container."""
    found = {"PYTHONUNBUFFERED": "1", PLACED: "1"}
    return found | ({STATUS_FOLDER: f"{SCRATCH}/status"} if role == "actor" else {})


# The files of a Secret belong to another user, or have a group where the pod has one: of the copy neither is so.
_BEGIN = f"""set -eu
umask 077
rm -rf {SCRATCH}/keys
mkdir -p {SCRATCH}/keys {SCRATCH}/status
for folder in . learners followers relays; do
  for file in {KEYS}/$folder/*.key {KEYS}/$folder/*.key_secret; do
    if [ -f "$file" ]; then
      mkdir -p "{SCRATCH}/keys/$folder"
      cat "$file" >"{SCRATCH}/keys/$folder/${{file##*/}}"
    fi
  done
done
"""
_OPTIONS = f"{CONFIG}/{CONFIG_FILE}"
_KEYS_OPTION = f"--links.keys_dir {SCRATCH}/keys"

# The shell is process 1: it gets the signals, and has to pass them on.
_WAIT = f"""role=$!
{ASK}trap ask TERM INT
code=0
wait "$role" || code=$?
while kill -0 "$role" 2>/dev/null; do code=0; wait "$role" || code=$?; done
"""
_STAY = """if [ "$code" -eq 0 ]; then
  echo 'the run is over; its folder is on this volume (kubectl cp), and this pod waits to be deleted'
  trap 'exit 0' TERM INT
  : >{scratch}/over
  while [ -n "${{ATPO_STAY-1}}" ]; do sleep 5 & wait $! || true; done
fi
exit "$code"
"""


def buffer(config: Config) -> str:
    """The buffer under its supervisor.  It stays when the run is over: a StatefulSet would start it again."""
    return f"{_BEGIN}rm -f {SCRATCH}/over\natpo train {_OPTIONS} --on hosts {_KEYS_OPTION} &\n{_WAIT}" + _STAY.format(
        scratch=SCRATCH
    )


def buffer_alive(config: Config) -> str:
    """Whether the buffer has written its status lately, or its run is over."""
    folder = shlex.quote(f"{RUNS}/{config.run.name}/status")
    return f'[ -e {SCRATCH}/over ] || [ -n "$(find {folder} -name buffer.json -mmin -{STATUS_MINUTES})" ]'


def learner(config: Config, *, join: str, folder: str, count: int, meeting: str) -> str:
    """The learner, or with several pods its share of the ranks.

    Args:
        config: of the run.
        join: host of the buffer.
        folder: of its files.
        count: pods.
        meeting: host of the first one, where ranks meet.
    """
    machine = f' --machine "$JOB_COMPLETION_INDEX/{count}@{meeting}:{MEETING_PORT}"' if count > 1 else ""
    # The launcher of several ranks ends with a code of its own.
    found = f"""if [ "$code" -ne 0 ] && grep -qs '^{{"code": {EXIT_USER},' "${ERROR_FILE}"; then code={EXIT_USER}; fi"""
    return (
        f"{_BEGIN}export {ERROR_FILE}={SCRATCH}/error\nrm -f {SCRATCH}/error\n"
        f"atpo learner {_OPTIONS} --join {join}:{config.links.learner_port} --dir {folder}"
        f'{machine} {_KEYS_OPTION} &\n{_WAIT}{found}\nexit "$code"\n'
    )


def actor(config: Config, *, join: str) -> str:
    """One actor, called after its pod."""
    return (
        f"{_BEGIN}atpo actor {_OPTIONS} --join {join}:{config.links.actors_port} "
        f'--name "${POD_NAME}" {_KEYS_OPTION} &\n'
        f'{_WAIT}exit "$code"\n'
    )
