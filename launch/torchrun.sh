#!/usr/bin/env bash
# Pretraining on the GPUs (or cores) of one machine:
#   launch/torchrun.sh configs/345m.yaml [section.key=value ...]
# NPROC sets the number of processes: by default one a GPU, or one a core without GPUs.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: [NPROC=N] launch/torchrun.sh CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi

default=cpu
if nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then default=gpu; fi

# --standalone: a free port, so that two runs on one machine do not meet.
exec torchrun --standalone --nproc-per-node="${NPROC:-$default}" -m megatron_bert_tp.pretrain "$@"
