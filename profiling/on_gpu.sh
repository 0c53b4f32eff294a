#!/usr/bin/env bash
# Proves every kernel on this machine's GPU and measures it against the best, from a plain source tree.
#
#   profiling/on_gpu.sh [OUT_DIR]       OUT_DIR: profiling/results/DATE-GPU-COMMIT by default
#
# Needs Python with NumPy and CuPy. Uses what else it finds (pytest, PyTorch, JAX, matplotlib, compute-sanitizer, g++),
# installs nothing and needs no network. Each step has seconds of its own, and goes on after the failure of others:
#
#   compile     every kernel, on all processors
#   verify      every kernel against the NumPy reference
#   tests       the tests that need a GPU
#   bits        results against the reference's and the emulator's, bit by bit
#   bench       times against PyTorch, torch.compile, JAX, CuPy's expressions and a plain copy
#   memcheck, racecheck, initcheck, synccheck     compute-sanitizer over a small run of every kernel, side by side
#
# OUT_DIR then holds steps.json, log.txt, bits.json, bench.json, bench.csv, bars.png, roofline.png. The last lines say
# how every step ended. Exit status: 0 all steps passed; 1 a step failed (the last line names them); 2 no GPU, or bad
# usage; 3 none failed, but something is missing here and its step could not run.
#
# PYTHON names another interpreter than python3. BUDGET_bench=300 gives a step (here: bench) other seconds.

set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Where toolkits put compute-sanitizer.
PATH="$PATH:/usr/local/cuda/bin"
steps=(compile verify tests bits bench memcheck racecheck initcheck synccheck)
declare -A seconds=(
    [compile]=75 [verify]=45 [tests]=60 [bits]=40 [bench]=160
    [memcheck]=90 [racecheck]=90 [initcheck]=90 [synccheck]=90
)
# Bytes of each step's log that are kept: its end says what went wrong.
log_bytes=300000

if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
    echo "usage: profiling/on_gpu.sh [OUT_DIR]" >&2
    exit 2
fi
if ! command -v "$python" >/dev/null; then
    echo "$python was not found: name an interpreter, PYTHON=/path/to/python3" >&2
    exit 2
fi
cd "$root" || exit 2
if ! name=$("$python" -m profiling.environment); then
    echo "profiling/on_gpu.sh needs a GPU and CuPy; nothing was run." >&2
    exit 2
fi
out=${1:-$root/profiling/results/$name}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT

# Ends a step: name, outcome (passed, failed, missing), what there is to say, seconds.
ended() {
    printf '%s\t%s\t%s\n' "$2" "$4" "$3" >"$work/$1.ended"
    printf '%-10s %-8s %4s s  %s\n' "$1" "$2" "$4" "$3"
}

# Runs a step: name, command. Its output goes to its log.
step() {
    local name=$1 budget_name=BUDGET_$1 begin=$SECONDS status
    shift
    local budget=${!budget_name:-${seconds[$name]}}
    timeout -k 5 "$budget" "$@" >"$work/$name.log" 2>&1
    status=$?
    local last
    last=$(grep -v '^[[:space:]]*$' "$work/$name.log" | tail -n 1 | tr -d '\t"\\' | tr -c '[:print:]\n' ' ' | cut -c 1-150)
    case $status in
        0) ended "$name" passed "$last" $((SECONDS - begin)) ;;
        124 | 137) ended "$name" failed "not done after $budget s; $last" $((SECONDS - begin)) ;;
        *) ended "$name" failed "exit status $status; $last" $((SECONDS - begin)) ;;
    esac
}

sanitizer() {
    if command -v compute-sanitizer >/dev/null; then
        step "$1" compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 99 --print-limit 20 \
            "$python" -m profiling.small_run
    else
        ended "$1" missing "compute-sanitizer was not found" 0
    fi
}

echo "Writing to $out"
emulator=()
if command -v "${CXX:-g++}" >/dev/null; then emulator=(--emulator); fi
step compile "$python" -m profiling.precompile "${emulator[@]}"
step verify "$python" -m gpu_layers verify --backend cuda
if "$python" -c "import pytest" 2>/dev/null; then
    # Without the options of pyproject.toml, which may name plugins that are not here; and only the files that have
    # such tests, so that a package which another file imports may be missing.
    mapfile -t files < <(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests | sort)
    step tests "$python" -m pytest -o addopts= -p no:cacheprovider -q -m gpu "${files[@]}"
else
    ended tests missing "pytest is not installed; the step verify compares every kernel with the reference" 0
fi
step bits "$python" -m profiling.bit_equality --json "$out/bits.json"
charts=()
if "$python" -c "import matplotlib" 2>/dev/null; then charts=(--plot "$out"); fi
step bench "$python" -m profiling.bench --quick --budget 110 --json "$out/bench.json" --csv "$out/bench.csv" "${charts[@]}"
for tool in memcheck racecheck initcheck synccheck; do sanitizer "$tool" & done
wait

for name in "${steps[@]}"; do
    if [ -f "$work/$name.log" ]; then
        printf '\n===== %s =====\n' "$name"
        tail -c "$log_bytes" "$work/$name.log"
    fi
done >"$out/log.txt"
{
    printf '[\n'
    separator=
    for name in "${steps[@]}"; do
        IFS=$'\t' read -r outcome took text <"$work/$name.ended"
        printf '%s {"step": "%s", "outcome": "%s", "seconds": %s, "text": "%s"}' \
            "$separator" "$name" "$outcome" "$took" "$text"
        separator=$',\n'
    done
    printf '\n]\n'
} >"$out/steps.json"

if [ -f "$work/bench.log" ]; then
    echo
    grep -v 'left  ' "$work/bench.log" | tail -n 120
fi
echo
failed=() missing=()
for name in "${steps[@]}"; do
    IFS=$'\t' read -r outcome took text <"$work/$name.ended"
    printf '%-10s %-8s %4s s  %s\n' "$name" "$outcome" "$took" "$text"
    case $outcome in
        failed) failed+=("$name") ;;
        missing) missing+=("$name") ;;
    esac
done
echo "$SECONDS s in all, results in $out"
if [ ${#missing[@]} -gt 0 ]; then echo "NOT RUN: ${missing[*]}"; fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
if [ ${#missing[@]} -gt 0 ]; then exit 3; fi
echo "PASSED: every step"
