#!/usr/bin/env bash
# On a machine with a GPU: its tests, then what the benchmarks have pending for one, for MINUTES (10) in all.
#   bash launch/gpu.sh [MINUTES]      PYTHON names the interpreter, which has blpipe and its test tools
# Every benchmark writes into its own results folder. What has no time left is for the next call.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
end=$((SECONDS + 60 * ${1:-10}))

gpus=$("$python" -c "import torch; print(torch.cuda.device_count())") || exit 2
if [ "$gpus" -eq 0 ]; then
    echo "gpu.sh: torch sees no GPU here" >&2
    exit 2
fi

within() {  # SECONDS COMMAND…: at most so long, and not beyond the end; as if by Ctrl-C
    local left=$((end - SECONDS))
    local limit=$(($1 < left ? $1 : left))
    shift
    echo "== $*"
    if [ "$limit" -lt 10 ]; then echo "no time left"; return; fi
    timeout --signal=INT --kill-after=30 "$limit" "$@" || echo "exit code $?"
}

within 200 "$python" -m pytest tests/test_gpu.py
within 100 "$python" -m benchmarks.ablation benchmarks/ablation/gpu.yaml
within 120 "$python" -m benchmarks.memory --device cuda
if [ "$gpus" -ge 2 ]; then
    within 200 "$python" -m benchmarks.throughput --device cuda --stages $((gpus < 4 ? 2 : 4))
fi
minutes=$(((end - SECONDS) / 60))
[ "$minutes" -ge 1 ] && within 3600 "$python" -m benchmarks.accuracy benchmarks/accuracy/gpu.yaml --minutes "$minutes"
exit 0
