#!/usr/bin/env bash
# Train. On a fresh machine this installs everything into .venv first.
#
#   bash scripts/train.sh                                            the default job: small Llama3, UPipe
#   bash scripts/train.sh --context_parallel.method ulysses          any field of the job file
#   CONFIG_FILE=train_configs/x.toml NGPU=8 bash scripts/train.sh    another job, on 8 ranks
#   LOG_RANK=0,1                                                     the ranks whose output is shown
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

if has_gpu; then
  ranks=$(nvidia-smi -L | grep -c GPU)
  [ "$ranks" -lt 4 ] || ranks=4
  precision=()
else
  ranks=4
  precision=(--training.mixed_precision_param float32) # bfloat16 is slow on most CPUs
fi
NGPU="${NGPU:-$ranks}"
defaults=()
if [ -z "${CONFIG_FILE:-}" ]; then
  CONFIG_FILE=train_configs/llama3_debug.toml
  defaults=(--parallelism.context_parallel_degree "$NGPU" "${precision[@]}")
fi

export LOG_RANK="${LOG_RANK:-0}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec torchrun --nproc_per_node "$NGPU" --rdzv_backend c10d --rdzv_endpoint localhost:0 \
  --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
  -m torchtitan_upipe.train --job.config_file "$CONFIG_FILE" "${defaults[@]}" "$@"
