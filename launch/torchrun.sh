#!/usr/bin/env bash
# Train, or answer files of questions, on one machine or several without Slurm: run the same command on each of them.
#
#   bash launch/torchrun.sh --config squad_bert_base --output_dir outputs/run
#   NNODES=2 RDZV_ENDPOINT=host1:29500 bash launch/torchrun.sh --config squad_bert_base --output_dir outputs/run
#   MODULE=qa_dist.predict bash launch/torchrun.sh --model outputs/run --input_file questions --output_file answers.jsonl
#
# Arguments go to MODULE, in the environment are:
#   MODULE           qa_dist.train unless set, or qa_dist.predict; qa-dist sweep --launcher slurm sets qa_dist.sweep
#   NNODES           number of machines, 1 unless set; 1:4 starts with any number from one to four and goes on, from the
#                    last checkpoint, whenever one joins or is lost, as long as that of RDZV_ENDPOINT stays; the output
#                    folder must be one that all machines share
#   RDZV_ENDPOINT    name or address of one of them and a free port there, the same on all; needed with several machines
#   RDZV_ID          name of the run, the same on all; two runs at one endpoint need two names
#   NPROC_PER_NODE   processes on this machine; else one per GPU, or one that uses all cores where there is no GPU
#   MAX_RESTARTS     how often the processes start again after a failure, from where they were; 0 unless set. Where
#                    NNODES is a range, a lost machine counts as a failure of the others, and it is 10 unless set
#   LOG_DIR          folder for a log per process, beside what is shown; no logs unless set
#   DS_CONFIG        file of ds_configs/, for DeepSpeed's ZeRO; plain data parallelism unless set
#   OMP_NUM_THREADS  threads of a process; else this machine's cores shared evenly
#   PYTHON           the interpreter
# CUDA_VISIBLE_DEVICES, HF_HUB_OFFLINE, NCCL_* and all else reach every process as they are. torchrun reads its other
# options from PET_<OPTION>, such as PET_LOCAL_ADDR, the address of this machine, which is found by itself unless set.
set -euo pipefail

fail() {
  echo "launch/torchrun.sh: error on $(hostname): $*" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python}

module=${MODULE:-qa_dist.train}
case $module in
  qa_dist.train | qa_dist.predict | qa_dist.sweep) ;;
  *) fail "MODULE is $module; use qa_dist.train, qa_dist.predict or qa_dist.sweep" ;;
esac

# The file of this name: beside this script, in the folder above as in the repository, or in the installed package.
shipped() {
  for folder in "$here" "$root"; do
    [ ! -f "$folder/$1" ] || { echo "$folder/$1"; return; }
  done
  "$python" -m qa_dist.recipe_command path "$1"
}

processes=${NPROC_PER_NODE:-}
if [ -z "$processes" ]; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  [ "$gpus" -ge "${SLURM_GPUS_ON_NODE:-0}" ] ||
    fail "torch sees $gpus of $SLURM_GPUS_ON_NODE GPUs that Slurm gave; mend torch or the driver, or set NPROC_PER_NODE"
  processes=$((gpus > 0 ? gpus : 1))
fi

[[ $processes =~ ^[1-9][0-9]{0,3}$ ]] || fail "NPROC_PER_NODE is $processes; give it a number of processes, from 1 to 9999"

machines=${NNODES:-1}
[[ $machines =~ ^[1-9][0-9]{0,3}(:[1-9][0-9]{0,3})?$ ]] && ((${machines#*:} >= ${machines%:*})) ||
  fail "NNODES is $machines; give it a number of machines, or the least and the most of them as 1:4"
restarts=0
if [[ $machines = *:* ]]; then
  restarts=10
  # A store of its own for each start: torchrun does not notice when the one that machines share is on one that is lost.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
restarts=${MAX_RESTARTS:-$restarts}
[[ $restarts =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS is $restarts; give it a number, 0 for none"
options=(--nproc-per-node "$processes" --max-restarts "$restarts")
if [ "$machines" = 1 ]; then
  options+=(--standalone)
else
  [ -n "${RDZV_ENDPOINT:-}" ] ||
    fail "NNODES is $machines but RDZV_ENDPOINT is not set; give it the host and port of one machine"
  options+=(--nnodes "$machines" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-qa_dist}")
  if [ -z "${PET_LOCAL_ADDR:-}" ]; then
    # Left alone, torchrun and gloo take the address of the machine's own name, which many systems map to the loopback
    # interface. What counts is the address that the route to the endpoint starts from.
    endpoint=$(getent ahosts "${RDZV_ENDPOINT%:*}" | awk 'NR == 1 { print $1 }') ||
      fail "the host of RDZV_ENDPOINT=$RDZV_ENDPOINT has no address; use a name or an address that this machine knows"
    PET_LOCAL_ADDR=$(ip -oneline route get "$endpoint" | sed -nE 's/.* src ([^ ]+).*/\1/p') ||
      fail "there is no route to $endpoint, or no command ip (iproute2) to ask for it; set PET_LOCAL_ADDR instead"
    case $PET_LOCAL_ADDR in
      127.* | ::1) fail "RDZV_ENDPOINT=$RDZV_ENDPOINT is the loopback interface; give an address that others reach" ;;
    esac
    interface=$(ip -oneline address show to "$PET_LOCAL_ADDR" | awk 'NR == 1 { print $2 }')
    [ "$PET_LOCAL_ADDR" = "$endpoint" ] && is_host=true || is_host=false
    # The machines may be started some minutes apart.
    export PET_LOCAL_ADDR PET_RDZV_CONF=${PET_RDZV_CONF:-is_host=$is_host,read_timeout=600}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
  fi
fi
if [ -n "${DS_CONFIG:-}" ]; then
  file=$DS_CONFIG
  [ -f "$file" ] || file=$(shipped "$DS_CONFIG" 2>/dev/null) ||
    fail "there is no file DS_CONFIG=$DS_CONFIG; name one of ds_configs/, which qa-dist recipes ls lists"
  export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=$file
fi
if [ -n "${LOG_DIR:-}" ]; then
  mkdir -p -- "$LOG_DIR" 2>/dev/null && [ -w "$LOG_DIR" ] ||
    fail "LOG_DIR is $LOG_DIR, where no folder can be made or written to; name another folder"
  options+=(--log-dir "$LOG_DIR" --tee 3)
fi

cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
[[ $OMP_NUM_THREADS =~ ^[1-9][0-9]{0,3}$ ]] ||
  fail "OMP_NUM_THREADS is $OMP_NUM_THREADS; give it a number of threads, from 1 to 9999"
# What a process says is shown, and in its log, at once and with its rank.
# shellcheck disable=SC2016  # torchrun fills in the rank
export PYTHONUNBUFFERED=1 TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
[ ! -f "$root/qa_dist/__init__.py" ] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m torch.distributed.run "${options[@]}" -m "$module" "$@"
