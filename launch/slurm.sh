#!/usr/bin/env bash
# Train, or answer files of questions, on the nodes of a Slurm job: one launcher (torchrun) per node, which starts one
# process per GPU.
#
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-task 64 launch/slurm.sh --config squad_bert_base --output_dir out
#   MODULE=qa_dist.predict sbatch launch/slurm.sh --model out --input_file questions --output_file answers.jsonl
#
# Options of sbatch stand before the script; arguments behind it go to MODULE (qa_dist.train unless set). Paths are those
# of the folder that sbatch was called in, which the nodes share. Without GPUs a node runs one process that uses all its
# CPUs.
#
# The job's exit status is the run's: 0 done, 1 failed, 2 a mistake in the arguments or the data, 85 stopped with a
# checkpoint, or all answers so far, written. Two minutes before its time limit, or when preempted, the run writes these,
# the job goes back into the queue, and its next start goes on from there. `scancel` ends it for good.
#
# The environment of sbatch reaches every process, HF_HUB_OFFLINE and HF_DATASETS_OFFLINE included. Slurm sets
# CUDA_VISIBLE_DEVICES. MODULE, NPROC_PER_NODE, DS_CONFIG, OMP_NUM_THREADS and PYTHON are described in
# launch/torchrun.sh; and
#   LOG_DIR          folder for a log per process; slurm-<job id> beside the job's own output unless set
#   MAX_REQUEUES     how often the job may put itself back into the queue, 100 unless set
#
#SBATCH --job-name=qa_dist
#SBATCH --nodes=1
# One launcher per node; it starts the processes.
#SBATCH --ntasks-per-node=1
# Every process that Slurm started gets USR1 two minutes before the time limit: time to write a checkpoint.
#SBATCH --signal=USR1@120
# A preempted job, or one that lost a node, may start again and adds to its output.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

fail() {
  echo "launch/slurm.sh: error: $*" >&2
  exit 2
}

module=${MODULE:-qa_dist.train}
case $module in
  qa_dist.train) kept="a checkpoint is written" again=" with --resume_from_checkpoint auto" ;;
  qa_dist.sweep) kept="a checkpoint is written" again="" ;;
  qa_dist.predict) kept="all answers so far are written" again="" ;;
  *) fail "MODULE is $module; use qa_dist.train, qa_dist.predict or qa_dist.sweep" ;;
esac
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no Slurm job; use sbatch launch/slurm.sh, or launch/torchrun.sh elsewhere"
most_requeues=${MAX_REQUEUES:-100}
[[ $most_requeues =~ ^[0-9]+$ ]] || fail "MAX_REQUEUES is $most_requeues; give it a number, 0 for none"
# One task of an array has the number of the whole array as its own.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

torchrun=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/torchrun.sh
if [ ! -f "$torchrun" ]; then
  # sbatch runs a copy of this file; the job's record says where the original is.
  command=$(scontrol show job "$job" | sed -n 's/^ *Command=//p')
  command=${command%%.sh *}
  command=${command%.sh}
  torchrun=${command%/*}/torchrun.sh
  python=${PYTHON:-python}
  [ -f "$torchrun" ] || torchrun=$("$python" -m qa_dist.recipe_command path launch/torchrun.sh) ||
    fail "there is no torchrun.sh beside $command.sh, and $python has no qa_dist to take it from"
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${#nodes[@]}" -gt 0 ] || fail "Slurm names no node in SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
restarts=${SLURM_RESTART_COUNT:-0}
export NNODES=${#nodes[@]} QA_DIST_NODES=${nodes[*]}
# A port below those that systems hand out by themselves, and another one for the next job.
export RDZV_ENDPOINT=${nodes[0]}:$((10000 + SLURM_JOB_ID % 20000)) RDZV_ID=$SLURM_JOB_ID.$restarts
# Slurm tells every process that it is to stop, some of them twice. Launchers must not act on it, or they would end
# processes that are writing a checkpoint. After a stop it is this script that starts the run again.
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT MAX_RESTARTS=0
trap '' TERM USR1

# Nobody watches the progress bar; a line of it now and then is enough.
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30}

export LOG_DIR=${LOG_DIR:-$PWD/slurm-$SLURM_JOB_ID}
mkdir -p "$LOG_DIR"
# torchrun ends with 1 whatever a process ended with; rank 0 leaves its exit code here.
export QA_DIST_EXIT_FILE=$LOG_DIR/exit_code.$SLURM_JOB_ID
rm -f "$QA_DIST_EXIT_FILE"

# Predictions, and trials of a sweep, go on by themselves.
[ "$restarts" -eq 0 ] || [ "$module" != qa_dist.train ] || set -- "$@" --resume_from_checkpoint auto
echo "job $job, start $((restarts + 1)): ${nodes[*]}; a log per process is in $LOG_DIR"

# shellcheck disable=SC2016  # the variables are those of each node
on_each_node='
  trap "" TERM USR1
  export LOG_DIR=$LOG_DIR/$SLURMD_NODENAME PET_LOCAL_ADDR=$SLURMD_NODENAME
  # Left alone, gloo listens on what the name of this machine stands for, which may be the loopback interface.
  for peer in $QA_DIST_NODES; do [ "$peer" = "$SLURMD_NODENAME" ] || break; done
  if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && [ "$peer" != "$SLURMD_NODENAME" ] && command -v ip >/dev/null; then
    route=$(ip -oneline route get "$(getent ahosts "$peer" | sed -n "1s/ .*//p")" 2>/dev/null) || route=
    interface=$(sed -nE "s/.* dev ([^ ]+).*/\1/p" <<<"$route")
    [ -z "$interface" ] || export GLOO_SOCKET_IFNAME=$interface
  fi
  [ "$SLURMD_NODENAME" = "${RDZV_ENDPOINT%:*}" ] && is_host=true || is_host=false
  export PET_RDZV_CONF=is_host=$is_host,read_timeout=600
  exec bash "$0" "$@"'
status=0
# A launcher gets all CPUs of the job on its node (no binding). When one has ended the others have a minute to end too:
# processes may hang that wait for those of a lost node.
srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --cpu-bind=none --export=ALL \
  --kill-on-bad-exit=0 --wait=60 bash -c "$on_each_node" "$torchrun" "$@" || status=$?

if [ "$status" -ne 0 ] && [ -s "$QA_DIST_EXIT_FILE" ]; then
  noted=$(<"$QA_DIST_EXIT_FILE")
  [ "$noted" -eq 0 ] || status=$noted
fi
if [ "$status" -eq 85 ]; then
  # A job that was cancelled, or whose time is over, is no longer running; nor is one that is in the queue already.
  state=$(squeue --noheader --jobs "$job" --format %T) || state="in a state that squeue does not tell"
  if [ "$state" != RUNNING ]; then
    echo "the job is $state; unless it starts again by itself, submit it$again to go on"
  elif [ "$restarts" -ge "$most_requeues" ]; then
    echo "the job has started $((restarts + 1)) times, as often as MAX_REQUEUES allows, and is not queued again"
  elif scontrol requeue "$job"; then
    echo "$kept; the job is in the queue again"
  fi
fi
exit "$status"
