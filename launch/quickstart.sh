#!/usr/bin/env bash
# Install blpipe into .venv and train configs/quickstart.yaml, four stages in four processes.
# Arguments are overrides: bash launch/quickstart.sh train.epochs=3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # what torchrun sets too, with a warning
torchrun --rdzv-backend=blpipe --rdzv-endpoint=localhost --nproc-per-node=4 \
    -m blpipe train configs/quickstart.yaml --overwrite "$@"
