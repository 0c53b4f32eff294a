#!/usr/bin/env bash
# What the hardware counters say of one operation's kernels: DRAM bytes, throughput, occupancy, stalls.
#
#   profiling/ncu.sh OP [OUT_DIR]        OP as in python -m profiling.one, e.g. max_pool or batch_norm/backward,
#                                        or headline: those that matter most
#
# Writes OUT_DIR/OP.ncu-raw.csv and the short OUT_DIR/OP.ncu.csv, and prints a table. Options of profiling.one go into
# ONE_OPTIONS ("--dtype float32 --channels-last"). The GPU's clocks are left as they are. PYTHON names another
# interpreter.

set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
if [ $# -lt 1 ] || [ $# -gt 2 ] || [[ "$1" == -* ]]; then
    echo "usage: profiling/ncu.sh OP [OUT_DIR]" >&2
    exit 2
fi
op=$1
out=${2:-.}
PATH="$PATH:/usr/local/cuda/bin"
if ! command -v ncu >/dev/null; then
    echo "ncu was not found: it comes with the CUDA toolkit and with Nsight Compute" >&2
    exit 2
fi
mkdir -p "$out"
raw="$out/${op//\//-}.ncu-raw.csv"
metrics=$("$python" -m profiling.ncu_table --metrics "${op%%/*}")
# The range begins after the first call, which compiles and warms up.
# shellcheck disable=SC2086 # several options
ncu --clock-control none --nvtx --nvtx-include profile/ --metrics "$metrics" \
    --page raw --csv --log-file "$raw" "$python" -m profiling.one "$op" ${ONE_OPTIONS:-}
"$python" -m profiling.ncu_table "$raw" --csv "${raw%-raw.csv}.csv"
