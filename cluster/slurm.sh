#!/usr/bin/env bash
# Runs a command of odedit on a temporary Ray cluster inside one Slurm allocation:
#
#     sbatch cluster/slurm.sh edit --config run.yaml
#
# Submit it from a shell in which `python -m odedit` works on every node (an environment on shared storage) and that has
# the secrets in its environment; sbatch passes both on. Every node runs workers; the first is also the head. Exits with
# odedit's exit code and stops all processes. After a timeout, the same command continues the run.
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
# Two minutes before the time limit, so that the run can end cleanly.
#SBATCH --signal=B:TERM@120
set -euo pipefail

if (($# == 0)); then
  echo "Say what to run, such as: sbatch slurm.sh edit --config run.yaml" >&2
  exit 2
fi

# Ray's ports are open to the network; a token of this job protects them.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# The metrics ports demand no token, so they stay closed.
export RAY_enable_metrics_collection=0 AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1
# Nodes are stopped after the run has ended, so they have no work to finish.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# This script runs on the first node. ODEDIT_HEAD_IP selects another of its network interfaces.
ip=${ODEDIT_HEAD_IP:-$(python -c 'import ray; print(ray.util.get_node_ip_address())')}
port=$((20000 + SLURM_JOB_ID % 10000))
# Ray's working folder on each node. Ray makes its folders readable for all users, so they lie in a private one.
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

# One step for the head, one for the workers; --overlap: this script already holds the whole allocation.
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

# Number of nodes that have joined; empty while the head does not answer.
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
# A forwarded signal interrupts `wait`, but the run is still ending.
while kill -0 "$run" 2>/dev/null; do
  code=0
  wait "$run" || code=$?
done
exit "$code"
