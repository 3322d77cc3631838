"""The part of an sbatch script that is the same for every run: nodes, files, starting roles again, the end."""

from __future__ import annotations

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

# keep ROLE CMD...: run a role; start it again after a crash, later each time; leave how it ended.
keep() {
  local role=$1 pause=1 began code child='' stop=''
  shift
  trap 'stop=1; if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi' TERM
  trap '' INT
  while :; do
    began=$SECONDS code=0
    "$@" >>"$logs/$role.log" 2>&1 &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
    # 0: its work is done; 2: only the user can mend it.
    if [[ -n $stop || $code == 0 || $code == 2 ]]; then break; fi
    if (( SECONDS - began > 300 )); then pause=1; fi
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
    env ATPO_PLACED=1 CUDA_VISIBLE_DEVICES="$gpus" "$@" &
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

# The run is over with the buffer; what only the user can mend, in whichever role, ends it too.
result=''
while [[ -z $result && -z $stopping ]]; do
  wait -n || true
  for role in "${!keeper[@]}"; do
    if [[ ! -e $logs/$role.ended ]]; then continue; fi
    code=$(<"$logs/$role.ended")
    unset "keeper[$role]"
    if [[ $role == buffer || $code == 2 ]]; then
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
