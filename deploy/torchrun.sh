#!/usr/bin/env bash
# A run over several machines with torchrun. Start it on each of them, at about the same time:
#   HEAD=10.0.0.1 MACHINES=2 deploy/torchrun.sh recipe.yaml training.strategy=fsdp
# HEAD is the address of any one of them, the same everywhere. training.output_dir must be on a disk that all of them see.
# To go on after an interruption, give --resume as well; the number of processes must be that of the start.
# On SIGTERM each process gets 110 seconds to finish its step and save.
set -euo pipefail
: "${HEAD:?set HEAD to the address of the first machine}"
exec torchrun \
  --nnodes "${MACHINES:-1}" \
  --nproc-per-node "${PROCESSES:-gpu}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:${PORT:-29400}" \
  --rdzv-id "${RUN:-llmbot}" \
  --max-restarts 0 \
  --shutdown-timeout 110 \
  -m llmbot.app.cli train "$@"
