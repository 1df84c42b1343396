#!/usr/bin/env bash
# On a machine with a GPU: its tests, then what the benchmarks have pending for one, for MINUTES (10) in all.
#   bash launch/gpu.sh [MINUTES]      PYTHON names the interpreter, which has blpipe and its test tools
# Every benchmark writes into its own results folder; those of accuracy and memory go on with the next call.
# Exit codes: that of the tests, 2 without a GPU or with a wrong argument, 130 interrupted.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if ! [[ "${1:-10}" =~ ^[0-9]+$ ]]; then
    echo "gpu.sh: $1: must be a number of minutes" >&2
    exit 2
fi
end=$((SECONDS + 60 * ${1:-10}))

gpus=$("$python" -c "import torch; print(torch.cuda.device_count())") || exit 2
if [ "$gpus" -eq 0 ]; then
    echo "gpu.sh: torch sees no GPU here" >&2
    exit 2
fi

within() {  # SECONDS COMMAND…: at most so long, and not beyond the end
    local left=$((end - SECONDS))
    local limit=$(($1 < left ? $1 : left))
    shift
    echo "== $*"
    if [ "$limit" -lt 10 ]; then echo "no time left"; return 0; fi
    timeout --foreground --signal=INT --kill-after=30 "$limit" "$@"
    local code=$?
    [ "$code" -eq 0 ] || echo "exit code $code"
    [ "$code" -ne 130 ] || exit 130
    return "$code"
}

within 380 "$python" -m pytest tests/test_gpu.py
tested=$?
within 120 "$python" -m benchmarks.ablation benchmarks/ablation/gpu.yaml
within 90 "$python" -m benchmarks.memory --device cuda --precision tf32 --channels-last
if [ "$gpus" -ge 2 ]; then
    within 150 "$python" -m benchmarks.throughput benchmarks/throughput/gpu.yaml --device cuda --stages $((gpus < 4 ? 2 : 4))
fi
minutes=$(((end - SECONDS) / 60))
[ "$minutes" -lt 1 ] || within 3600 "$python" -m benchmarks.accuracy benchmarks/accuracy/gpu.yaml --minutes "$minutes"
exit "$tested"
