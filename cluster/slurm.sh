#!/usr/bin/env bash
# A command of odedit on a Ray cluster of its own, inside one Slurm allocation:
#
#     sbatch cluster/slurm.sh edit --config run.yaml
#
# from a shell in which `python -m odedit` works on every node (an environment on shared storage) and which has the
# secrets in its environment; sbatch hands both on. Every node edits; the first one also leads. Ends with the exit code
# of odedit, and ends what it started. The same command again goes on where the time ran out.
#
#SBATCH --job-name=odedit
#SBATCH --output=odedit-%j.log
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
# Two minutes before the end, to close the run.
#SBATCH --signal=B:TERM@120
set -euo pipefail

if (($# == 0)); then
  echo "Say what to run, such as: sbatch slurm.sh edit --config run.yaml" >&2
  exit 2
fi

# Ray's ports are open to the network: who comes in has to know a secret, which is this job's own.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Its metrics ports would demand no secret, so there are none.
export RAY_enable_metrics_collection=0 AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1
# When nodes are told to end, the run has ended: there is nothing to wait for.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# This script runs on the first node. ODEDIT_HEAD_IP names another of its network cards.
ip=${ODEDIT_HEAD_IP:-$(python -c 'import ray; print(ray.util.get_node_ip_address())')}
port=$((20000 + SLURM_JOB_ID % 10000))
# Where Ray works on each node. Ray opens its own folders to everyone, so they lie in one that is the user's alone.
folder=/tmp/ray-$SLURM_JOB_ID

steps=()
# shellcheck disable=SC2329  # the trap calls it
finish() {
  trap - EXIT
  if ((${#steps[@]})); then
    kill "${steps[@]}" 2>/dev/null || true
    wait "${steps[@]}" || true
    srun --overlap --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" rm -rf -- "$folder" || true
  fi
}
trap finish EXIT

# A step for each kind of node; --overlap: beside this script, which has the whole allocation.
step() {
  local names=$1 number=$2
  shift 2
  # shellcheck disable=SC2016  # expanded on the node
  srun --overlap --nodes="$number" --ntasks="$number" --nodelist="$names" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c 'mkdir -p -m 700 "$0" && [[ -O $0 && ! -L $0 ]] && chmod 700 "$0" && exec ray start "$@"' "$folder" \
    --block --num-cpus="$SLURM_CPUS_PER_TASK" --temp-dir="$folder/ray" "$@" &
  steps+=($!)
}
step "${nodes[0]}" 1 --head --node-ip-address="$ip" --port="$port" --include-dashboard=false
if ((${#nodes[@]} > 1)); then
  step "$(IFS=,; echo "${nodes[*]:1}")" $((${#nodes[@]} - 1)) --address="$ip:$port"
fi

# How many have joined; nothing while the first does not answer.
joined() {
  python - "$ip:$port" 2>/dev/null <<'END'
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
END
}
deadline=$((SECONDS + 600))
until number=$(joined) && ((number >= ${#nodes[@]})); do
  for pid in "${steps[@]}"; do
    if ! kill -0 "$pid" 2>/dev/null || ((SECONDS > deadline)); then
      echo "Ray: ${number:-0} of ${#nodes[@]} nodes have joined, and the others ended or took too long." >&2
      exit 1
    fi
  done
  sleep 2
done
echo "Ray: $number of ${#nodes[@]} nodes have joined." >&2

RAY_ADDRESS=$ip:$port python -m odedit "$@" &
run=$!
trap 'kill -TERM "$run" 2>/dev/null || true' TERM INT
code=0
wait "$run" || code=$?
# A signal that was handed on ends the wait, not the run.
while kill -0 "$run" 2>/dev/null; do
  code=0
  wait "$run" || code=$?
done
exit "$code"
