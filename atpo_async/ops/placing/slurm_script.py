"""The part of an sbatch script that is the same for every run: nodes, files, starting roles again, the end."""

from __future__ import annotations

from atpo_async.ops.exits import ERROR_FILE, EXIT_USER, PLACED
from atpo_async.ops.placing.asking import ASK

ROLE = "role.sh"
"""File on every node: what runs one role inside its job step."""

# srun takes SIGTERM as an order to kill its step with SIGKILL, so that nothing could be saved; SIGUSR1 it passes on, to
# every process of the step.
IN_STEP = rf"""# role.sh GPUS CMD...: run a role with those of the GPUs that its step has; SIGUSR1 asks it to end.
set -uo pipefail
gpus=$1 role='' asked='' code=0 given=() own=()
shift
IFS=, read -ra given <<<"${{CUDA_VISIBLE_DEVICES:-}}" || true
for number in ${{gpus//,/ }}; do own+=("${{given[number]:-$number}}"); done
export CUDA_VISIBLE_DEVICES {PLACED}=1 {ERROR_FILE}
CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${{own[*]:-}}")
{ERROR_FILE}=$(mktemp "${{0%/*}}/error-XXXXXX")
{ASK}trap 'asked=1; if [[ -n $role ]]; then ask; fi' USR1
trap : TERM    # from Slurm itself: the role has it too
(trap '' USR1; exec "$@") &
role=$!
if [[ -n $asked ]]; then ask; fi
wait "$role" || code=$?
while kill -0 "$role" 2>/dev/null; do code=0; wait "$role" || code=$?; done
# The launcher of several ranks ends with a code of its own.
if [[ $code != 0 ]] && grep -q '^{{"code": {EXIT_USER},' "${ERROR_FILE}"; then code={EXIT_USER}; fi
rm -f "${ERROR_FILE}"
exit "$code"
"""

BODY = r"""
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if (( ${#nodes[@]} < num_nodes )); then
  echo "error: the allocation has ${#nodes[@]} nodes, this script was printed for $num_nodes" >&2
  exit 2
fi
head=${nodes[0]}
logs=$PWD/atpo-$SLURM_JOB_ID                  # of the roles, and how each ended
mkdir -p "$logs"
rm -f "$logs"/*.ended
staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT

# The configuration and the keys, to every node.  The server's secret stays on the first one, where the buffer
# and the learner's first rank serve.
write_files "$staging"
mkdir "$staging/keys"
if [[ -n $keys_from ]]; then
  cp -R -- "$keys_from/." "$staging/keys/"
else
  "${atpo[@]}" keys new --dir "$staging/keys" >/dev/null
fi
srun --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --overlap \
  bash -c 'umask 077; rm -rf "$1" && mkdir -p "$1/keys"' bash "$work"
for file in "${files[@]}" keys/client.key keys/client.key_secret keys/server.key; do
  sbcast --force --preserve "$staging/$file" "$work/$file"
done
# The batch script runs on the first node.
cp -R -- "$staging/keys/." "$work/keys/"
options+=(--links.keys_dir "$work/keys")

# keep ROLE CMD...: run a role; start it again after a crash, later each time; leave how it ended.  The run cannot do
# without the buffer and the learner: they are given up after so many short lives in a row.
most_short=${ATPO_MOST_SHORT:-12}
keep() {
  local role=$1 pause=1 short=0 began code child='' stop=''
  shift
  # SIGTERM would have srun kill the role.
  trap 'stop=1; if [[ -n $child ]]; then kill -USR1 "$child" 2>/dev/null || true; fi' TERM
  trap '' INT
  while :; do
    began=$SECONDS code=0
    "$@" >>"$logs/$role.log" 2>&1 &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
    # 0: its work is done; 2: only the user can mend it; 126, 127: there is no such program on the node.
    if [[ -n $stop || $code == 0 || $code == 2 || $code == 126 || $code == 127 ]]; then break; fi
    if (( SECONDS - began > 300 )); then pause=1 short=0; fi
    short=$(( short + 1 ))
    if [[ $role != actor-* ]] && (( short >= most_short )); then
      echo "$role has ended $short times within minutes of its start; it is given up"
      break
    fi
    echo "$role ended with $code; it is started again in $pause s ($logs/$role.log)"
    child=''
    sleep "$pause" &
    wait $! || true
    if [[ -n $stop ]]; then break; fi
    pause=$(( pause < 30 ? 2 * pause : 60 ))
  done
  echo "$code" >"$logs/$role.ended"
}

# start ROLE NODE GPUS CMD...: on that node, with those of its GPUs.
declare -A keeper=()
start() {
  local role=$1 node=$2 gpus=$3
  shift 3
  keep "$role" srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --cpu-bind=none --mem=0 \
    ${cpus:+"--cpus-per-task=$cpus"} \
    bash "$work/role.sh" "$gpus" "$@" &
  keeper[$role]=$!
}

stopping=''
trap 'stopping=1' TERM INT
"""

END = r"""
# stop ROLE...: ask them to end, and wait until they have.
stop() {
  local role
  for role in "$@"; do
    if [[ -n ${keeper[$role]:-} ]]; then kill -TERM "${keeper[$role]}" 2>/dev/null || true; fi
  done
  for role in "$@"; do
    if [[ -z ${keeper[$role]:-} ]]; then continue; fi
    while kill -0 "${keeper[$role]}" 2>/dev/null; do wait "${keeper[$role]}" || true; done
  done
}

# The run is over with the buffer; a role that is not started again, whichever it is, ends it too.
result=''
while [[ -z $result && -z $stopping ]]; do
  wait -n || true
  for role in "${!keeper[@]}"; do
    if [[ ! -e $logs/$role.ended ]]; then continue; fi
    code=$(<"$logs/$role.ended")
    unset "keeper[$role]"
    if [[ -z $result && ( $role == buffer || $code != 0 ) ]]; then
      result=$code
      if [[ $code != 0 ]]; then
        echo "error: $role ended with $code; the last of $logs/$role.log:" >&2
        tail -n 5 "$logs/$role.log" >&2
      fi
    fi
  done
done
if [[ $result == 0 ]]; then
  # The others learn from the buffer that the run is over, and end by themselves.
  for (( i = 0; i < 60; i++ )); do
    if [[ -n $stopping || -z $(jobs -rp) ]]; then break; fi
    sleep 1
  done
fi
others=()
for role in "${!keeper[@]}"; do
  if [[ $role != buffer ]]; then others+=("$role"); fi
done
if (( ${#others[@]} )); then stop "${others[@]}"; fi
stop buffer
srun --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --overlap rm -rf "$work" || true
if [[ -n $stopping && -z $result ]]; then
  echo "stopped before the run's end; the same script goes on with it"
  if (( requeue )); then scontrol requeue "$SLURM_JOB_ID"; fi
  exit 0
fi
exit "$result"
"""
