#!/usr/bin/env bash
# Pretraining, or fine-tuning, on the GPUs (or cores) of one machine:
#   launch/torchrun.sh configs/345m.yaml [section.key=value ...]
#   MODULE=finetune launch/torchrun.sh configs/finetune/sst-2.yaml [section.key=value ...]
# NPROC sets the number of processes: by default one a GPU, or one a core without GPUs.
# MAX_RESTARTS (0): how often torchrun starts all processes anew after a failure; they resume.
# SHUTDOWN_SECONDS (180): how long a run that is told to stop may take to save, before it is killed.
# PYTHON (python): the interpreter.
# SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP (a closed terminal) stop the run after its step, with a checkpoint;
# a second Ctrl-C, or SIGQUIT, ends it at once.
# Exits with the code of the run: 0 when it is finished, 75 when it was stopped (docs/reliability.md lists all).
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: [NPROC=N] launch/torchrun.sh CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi

default=cpu
if nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then default=gpu; fi
processes=${NPROC:-$default}
python=${PYTHON:-python}
module=${MODULE:-pretrain}
if [[ $module != pretrain && $module != finetune ]]; then
  echo "MODULE is $module; it must be pretrain or finetune" >&2
  exit 2
fi

# Bad settings end here, before any process is started. The mark tells an old exit.json from a new one.
mark=$("$python" -m megatron_bert_tp.outcome --mark --processes="$processes" "$@")

# The processes meet in a folder of this user, and their store listens on the loopback interface (docs/security.md):
# the store of `torchrun --standalone` listens on all interfaces and knows no password.
meeting=$(mktemp -d)
trap 'rm -rf "$meeting"' EXIT
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# The first signal goes to torchrun, which hands it on to the ranks and waits for them. Later ones go to the ranks
# themselves: at a second torchrun would begin to wait anew, and at a third leave its processes alone.
stopped=
interrupted=
pass_on() {
  interrupted=1
  if [[ -z ${!:-} ]]; then
    exit 75 # nothing has been started
  elif [[ -z $stopped ]]; then
    stopped=1
    kill -s "$1" "$!" 2>/dev/null || true
  else
    # shellcheck disable=SC2046  # a word for each process
    kill -s "$1" $(cat "/proc/$!/task/$!/children" 2>/dev/null) 2>/dev/null || true
  fi
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT
trap 'pass_on USR1' USR1
trap 'pass_on QUIT' QUIT

# Job control gives torchrun a process group of its own: else Ctrl-C would reach it twice.
set -m
"$python" -m torch.distributed.run \
  --rdzv-backend=c10d \
  --rdzv-conf=store_type=file \
  --rdzv-endpoint="$meeting/rendezvous" \
  --local-addr=127.0.0.1 \
  --nnodes=1 \
  --nproc-per-node="$processes" \
  --max-restarts="${MAX_RESTARTS:-0}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --shutdown-timeout="${SHUTDOWN_SECONDS:-180}" \
  -m "megatron_bert_tp.$module" "$@" &
set +m

# A signal ends the waiting before the launcher has ended.
while
  interrupted=
  code=0
  wait "$!" || code=$?
  [[ -n $interrupted ]] && kill -0 "$!" 2>/dev/null
do :; done

# torchrun turns the exit code of a rank into 1; what the ranks wrote themselves counts.
known=0
"$python" -m megatron_bert_tp.outcome --since="$mark" "$@" || known=$?
if [[ $known -eq 1 && $code -ne 0 ]]; then exit "$code"; fi
exit "$known"
