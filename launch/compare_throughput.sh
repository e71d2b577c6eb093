#!/usr/bin/env bash
# Compare one GPU with all GPUs of this machine (or one CPU process with several): weak and strong scaling, efficiency,
# where the time of a step goes, and how evenly tokens are divided. Nothing is downloaded: weights are random, features
# have the lengths of SQuAD.
#
#   bash launch/compare_throughput.sh --output_dir outputs/throughput
#
# MODEL chooses bert-base (default with GPUs), bert-large or minilm-l6 (default without); PYTHON the interpreter. Other
# arguments go to qa_dist.bench: --quick, --repeats 5, --num_processes 1 4 8, --global_batch_size 32 (of one process), ...
set -euo pipefail

root=$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)")
[ ! -f "$root/qa_dist/__init__.py" ] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
model=${MODEL:-$("$python" -c 'import torch; print("bert-base" if torch.cuda.is_available() else "minilm-l6")')}
exec "$python" -m qa_dist.bench scaling --model_config "$model" "$@"
