#!/usr/bin/env bash
# A small pretrained model's context grows from 128 to 1024 tokens on two ranks of this machine's CPU: what it retrieves
# before, with a stretched RoPE alone, and after two stages of training under UPipe. docs/extend.md has the results.
#
#   bash scripts/extend_demo.sh                heat maps, loss curve and figures in outputs/extend/report
#   bash scripts/extend_demo.sh docs/extend    there instead
set -euo pipefail
report="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../outputs/extend/report}")"
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" benchmarks

export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
run() { torchrun --standalone --nproc_per_node 2 --local-ranks-filter 0 --role rank --tee 3 -m "$@"; }

began=$SECONDS
rm -rf outputs/extend
python scripts/extend/documents.py outputs/extend/data
run torchtitan_upipe.evaluate --job.config_file scripts/extend/before.toml
run torchtitan_upipe.evaluate --job.config_file scripts/extend/before.toml \
  --model.rope_theta 1e4 --job.dump_folder outputs/extend/theta_alone
run torchtitan_upipe.extend --recipe scripts/extend/recipe.toml
python scripts/extend/report.py outputs/extend "$report"
echo "$((SECONDS - began)) s in all, load average $(cut -d' ' -f1 /proc/loadavg); see $report"
