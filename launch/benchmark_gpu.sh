#!/usr/bin/env bash
# Is everything right on the GPUs of this machine, and how fast is it? The checks and measurements of docs/gpu.md on the
# first GPU, without a time limit, then scaling over all of them, in bf16 on a model of BERT base's size.
#
#   bash launch/benchmark_gpu.sh outputs/gpu [--squad DIR --model DIR] [other options of qa_dist.bench gpu]
#   python -m qa_dist.bench report outputs/gpu/bench.json --output docs/benchmarks.md
set -euo pipefail

root=$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)")
output=${1:?name the folder for the results}
shift
[ ! -f "$root/qa_dist/__init__.py" ] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
python=${PYTHON:-python}

code=0
"$python" -m qa_dist.bench gpu --output_dir "$output" "$@" || code=$?
# Code 1 says that a check failed, and scaling may be measured all the same; 2 that nothing ran.
[ "$code" -le 1 ] || exit "$code"
"$python" -m qa_dist.bench scaling --output_dir "$output" --repeats 2 --model_config bert-base --precisions bf16 \
  --global_batch_size 32 || code=$?
exit "$code"
