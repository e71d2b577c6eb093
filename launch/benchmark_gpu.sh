#!/usr/bin/env bash
# The tables of docs/benchmarks.md on a CUDA machine, in bf16 on a model of BERT base's size: the tutorials' recipe and
# the best Trainer against qa_dist, all paths with the device's measured rate of matrix products, scaling over all GPUs,
# and evaluation on synthetic questions. Meant to end within ten minutes on one data-centre GPU; TIME_LIMIT=600 (seconds)
# is shared by the commands, most important first, and what did not fit is left out.
#
#   bash launch/benchmark_gpu.sh outputs/gpu [options of qa_dist.bench]
#   python -m qa_dist.bench report outputs/gpu/bench.json --output docs/benchmarks.md
set -euo pipefail

root=$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)")
output=${1:?name the folder for the results}
shift
[ ! -f "$root/qa_dist/__init__.py" ] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
python=${PYTHON:-python}
limit=${TIME_LIMIT:-600}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "launch/benchmark_gpu.sh needs a CUDA device; without one use: qa-dist bench all --quick" >&2; exit 2; }

for command in trainer paths evaluation scaling; do
  left=$((limit - SECONDS))
  [ "$left" -gt 30 ] || { echo "no time left for $command" >&2; continue; }
  timeout --signal=INT "$left" "$python" -m qa_dist.bench "$command" --output_dir "$output" --quick --repeats 2 \
    --model_config bert-base --precisions bf16 --global_batch_size 32 "$@" ||
    echo "$command did not finish" >&2
done
