#!/usr/bin/env bash
# Start a job on this node, one rank per GPU, with torchrun from the active environment; installs nothing.
#
#   bash scripts/launch.sh train_configs/llama3_8b_1m.toml                              one node
#   bash scripts/launch.sh train_configs/x.toml --context_parallel.method ulysses ...   any field of the job file
#   bash scripts/launch.sh --check train_configs/x.toml ...                             try the job first (docs/check.md)
#
# On several nodes run it once on each:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node bash scripts/launch.sh train_configs/llama3_8b_8m_16gpus.toml
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=first-node bash scripts/launch.sh train_configs/llama3_8b_8m_16gpus.toml
#
#   NGPU       ranks per node (default 8)        MASTER_PORT   port of the first node (default 29500)
#   MODULE     what to run (default torchtitan_upipe.train); torchtitan_upipe.extend takes a recipe for the job file
#   LOG_RANK   the local ranks whose output is shown (default 0)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

module="${MODULE:-torchtitan_upipe.train}"
if [ "${1:-}" = --check ]; then
  module=torchtitan_upipe.check
  shift
fi
config="${1:?the job file comes first, e.g. train_configs/llama3_8b_1m.toml}"
shift

option=--job.config_file
[ "$module" != torchtitan_upipe.extend ] || option=--recipe

if [ "${NNODES:-1}" -gt 1 ]; then
  nodes=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK, 0 to NNODES - 1}"
    --master_addr "${MASTER_ADDR:?set MASTER_ADDR, the name of the first node}" --master_port "${MASTER_PORT:-29500}")
else
  nodes=(--standalone)
fi

export LOG_RANK="${LOG_RANK:-0}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}" # long sequences fragment fixed segments
# SIGTERM and SIGUSR1 to this script go to the ranks, which save and end (docs/running.md). torchrun, which would end them
# after 30 seconds and fail, ignores both.
export PET_SIGNALS_TO_HANDLE="SIGINT,SIGHUP,SIGQUIT"
(
  trap '' TERM USR1
  exec torchrun "${nodes[@]}" --nproc_per_node "${NGPU:-8}" --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    -m "$module" "$option" "$config" "$@"
) &
torchrun=$!
trap 'pkill -USR1 -P "$torchrun" || true' TERM USR1
status=0
wait "$torchrun" || status=$?
while kill -0 "$torchrun" 2> /dev/null; do # a signal has ended the wait alone
  status=0
  wait "$torchrun" || status=$?
done
exit "$status"
