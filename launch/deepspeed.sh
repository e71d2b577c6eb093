#!/usr/bin/env bash
# Train with DeepSpeed's ZeRO on one machine or several: launch/torchrun.sh, with ranks that share what they hold.
#
#   bash launch/deepspeed.sh --config squad_bert_base --output_dir outputs/run
#   NNODES=2 RDZV_ENDPOINT=host1:29500 bash launch/deepspeed.sh --config squad_bert_base --output_dir outputs/run
#
# DS_CONFIG names what DeepSpeed is told, ds_configs/zero2.json unless set. Arguments go to qa_dist.train; all else is
# as in launch/torchrun.sh. In a Slurm job: DS_CONFIG=ds_configs/zero2.json sbatch launch/slurm.sh ...
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python}

# The file of this name: beside this script, in the folder above as in the repository, or in the installed package.
shipped() {
  for folder in "$here" "$root"; do
    [ ! -f "$folder/$1" ] || { echo "$folder/$1"; return; }
  done
  "$python" -m qa_dist.recipe_command path "$1"
}

export DS_CONFIG=${DS_CONFIG:-$(shipped ds_configs/zero2.json)}
torchrun=$(shipped torchrun.sh)
exec bash "$torchrun" "$@"
