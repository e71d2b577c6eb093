#!/usr/bin/env bash
# Train, or answer files of questions, on this machine: one process per GPU, or two CPU processes where there is none.
#
#   bash launch/local.sh --config squad_bert_base --output_dir outputs/run
#   MODULE=qa_dist.predict bash launch/local.sh --model outputs/run --input_file questions --output_file answers.jsonl
#
# Arguments go to MODULE: qa_dist.train unless set, or qa_dist.predict. NUM_PROCESSES sets the number of processes, PYTHON
# the interpreter.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python}

fail() {
  echo "launch/local.sh: error: $*" >&2
  exit 2
}

module=${MODULE:-qa_dist.train}
case $module in
  qa_dist.train | qa_dist.predict) ;;
  *) fail "MODULE is $module; use qa_dist.train or qa_dist.predict" ;;
esac

# The file of this name: beside this script, in the folder above as in the repository, or in the installed package.
shipped() {
  for folder in "$here" "$root"; do
    [ ! -f "$folder/$1" ] || { echo "$folder/$1"; return; }
  done
  "$python" -m qa_dist.recipe_command path "$1"
}

count=${NUM_PROCESSES:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "NUM_PROCESSES is $count; give it a number of processes, 1 or more"

# One process may use every core; several share them.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > count ? cores / count : 1))}
[[ $OMP_NUM_THREADS =~ ^[1-9][0-9]{0,3}$ ]] ||
  fail "OMP_NUM_THREADS is $OMP_NUM_THREADS; give it a number of threads, from 1 to 9999"

config=ddp
[ "$count" -eq 1 ] && config=single
config=$(shipped "accelerate_configs/$config.yaml")
exec "$python" -m accelerate.commands.launch --config_file "$config" --num_processes "$count" -m "$module" "$@"
