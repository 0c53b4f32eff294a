#!/usr/bin/env bash
# A time line of one operation, or of any Python program, with a range around every layer's forward and backward.
#
#   profiling/nsys.sh OP [OUT]                    OP as in python -m profiling.one, e.g. batch_norm/backward
#   profiling/nsys.sh OUT -- python3 train.py     any other program
#
# Writes OUT.nsys-rep, for Nsight Systems, and prints the time in each kernel. PYTHON names another interpreter.

set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" GPU_LAYERS_PROFILE_RANGES=1
if [ $# -ge 3 ] && [ "$2" = -- ]; then
    out=$1
    shift 2
    command=("$@")
elif [ $# -ge 1 ] && [ $# -le 2 ] && [[ "$1" != -* ]]; then
    out=${2:-${1//\//-}}
    command=("${PYTHON:-python3}" -m profiling.one "$1" --calls 10)
else
    echo "usage: profiling/nsys.sh OP [OUT], or profiling/nsys.sh OUT -- COMMAND ..." >&2
    exit 2
fi
if ! command -v nsys >/dev/null; then
    echo "nsys was not found: it comes with the CUDA toolkit and with Nsight Systems" >&2
    exit 2
fi
nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --force-overwrite=true --output="$out" "${command[@]}"
nsys stats --report cuda_gpu_kern_sum,nvtx_sum "$out.nsys-rep"
