#!/usr/bin/env bash
# Proves every kernel on this machine's GPU and measures it against the best, from a plain source tree.
#
#   profiling/on_gpu.sh [--only STEP,...] [OUT_DIR]     OUT_DIR: profiling/results/DATE-GPU-COMMIT by default
#   profiling/on_gpu.sh --list                          the steps, their seconds, and what they do
#
# Needs Python with NumPy and CuPy. Uses what else it finds (pytest, PyTorch, compute-sanitizer, ncu), installs nothing
# and needs no network. Everything ends by a deadline, DEADLINE=420 seconds from the start. The most valuable steps come
# first; each has the smaller of its own seconds and of what is left, and goes on after the failure of others. What is
# found is in OUT_DIR as soon as it is known, so that a run that is killed leaves it:
#
#   steps.json      how each step ended, or that it runs, or was not reached
#   log.txt         what the steps say
#   bits.json, bench.json, bench.csv, overhead.json, headline.ncu-raw.csv, headline.ncu.csv      results
#
# A later call with the same OUT_DIR goes on with the benchmark in it. The last lines say how every step ended. Exit
# status: 0 all steps passed; 1 a step failed (the last line names them); 2 no GPU, or bad usage; 3 none failed, but the
# deadline cut one short or left it no time, or something is missing here and its step could not run.
#
# PYTHON names another interpreter than python3. BUDGET_bench=300 gives a step (here: bench) other seconds.

set -u

usage='usage: profiling/on_gpu.sh [--list] [--only STEP,...] [OUT_DIR]'
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
deadline=${DEADLINE:-420}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Where toolkits put compute-sanitizer and ncu.
PATH="$PATH:/usr/local/cuda/bin"

# Most valuable first. What says whether results are right runs side by side; what is timed runs alone. The seconds of
# the steps up to overhead, of those side by side the longest, are together no more than the deadline: each of them
# begins, however long those before it take. What they leave is for the others.
names=(compile verify bits tests memcheck racecheck initcheck synccheck bench compiled reads overhead ncu more)
# Only where --only names them.
asked=(others)
beside_each_other=' verify bits tests memcheck racecheck initcheck synccheck '
declare -A seconds=(
    [compile]=54 [verify]=100 [bits]=100 [tests]=100 [memcheck]=100 [racecheck]=100 [initcheck]=100 [synccheck]=100
    [bench]=115 [compiled]=76 [reads]=30 [overhead]=30 [ncu]=90 [more]=240 [others]=240
)
declare -A what=(
    [compile]="every kernel into the cache, on all processors"
    [verify]="every kernel against the NumPy reference"
    [bits]="results bit by bit against the reference's, and a digest of each"
    [bench]="bfloat16, the first shape of each operation: against PyTorch and a plain copy"
    [compiled]="the operations that matter most against torch.compile"
    [reads]="batch norm: one read against two"
    [overhead]="what a call costs the host, against PyTorch's and an addition"
    [tests]="the tests that need a GPU"
    [memcheck]="compute-sanitizer over a small run of every kernel: accesses (these side by side, from verify on)"
    [racecheck]="the same: shared memory"
    [initcheck]="the same: memory never written"
    [synccheck]="the same: barriers"
    [ncu]="hardware counters of the operations that matter most"
    [more]="more shapes, and float32: against PyTorch and a plain copy"
    [others]="only if asked for: the operations that matter most against JAX and CuPy's expressions"
)
# No step begins with less than this, and so much is kept for the end.
least=10 reserve=5
# A benchmark begins no case so shortly before its end.
margin=20
# Of each step's log so much is kept: its end says what went wrong.
log_bytes=300000

only=
list=
while [ $# -gt 0 ]; do
    case $1 in
        --list) list=yes ;;
        --only)
            [ $# -ge 2 ] || { echo "$usage" >&2; exit 2; }
            only=$2
            shift
            ;;
        -*) echo "$usage" >&2; exit 2 ;;
        *) break ;;
    esac
    shift
done
if [ $# -gt 1 ]; then
    echo "$usage" >&2
    exit 2
fi
if [[ ! $deadline =~ ^[1-9][0-9]{0,5}$ ]]; then
    echo "DEADLINE must be a number of seconds, got '$deadline'" >&2
    exit 2
fi
if [ -n "$list" ]; then
    for name in "${names[@]}" "${asked[@]}"; do printf '%-10s %4s s  %s\n' "$name" "${seconds[$name]}" "${what[$name]}"; done
    exit 0
fi
steps=("${names[@]}")
if [ -n "$only" ]; then
    for name in ${only//,/ }; do
        if [ -z "${seconds[$name]:-}" ]; then
            echo "there is no step '$name': the steps are ${names[*]} ${asked[*]}" >&2
            exit 2
        fi
    done
    # In the order of their value, however they are named.
    steps=()
    for name in "${names[@]}" "${asked[@]}"; do
        if [[ ",$only," == *",$name,"* ]]; then steps+=("$name"); fi
    done
fi
for name in "${steps[@]}"; do
    budget=BUDGET_$name
    budget=${!budget:-${seconds[$name]}}
    if [[ ! $budget =~ ^[1-9][0-9]{0,5}$ ]]; then
        echo "BUDGET_$name must be a number of seconds, got '$budget'" >&2
        exit 2
    fi
    seconds[$name]=$budget
done
if ! command -v "$python" >/dev/null; then
    echo "$python was not found: name an interpreter, PYTHON=/path/to/python3" >&2
    exit 2
fi

now() { date +%s; }
begin=$(now)
left() { echo $((deadline - reserve - ($(now) - begin))); }

# Where it was said, not where the steps run.
out=${1:+$(realpath -m -- "$1")}
cd "$root" || exit 2
if ! run=$(timeout -k 5 60 "$python" -m profiling.devices); then
    echo "profiling/on_gpu.sh needs a GPU and CuPy; nothing was run." >&2
    exit 2
fi
out=${out:-$root/profiling/results/$run}
mkdir -p "$out" || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
log=$out/log.txt
echo "##### $run" >>"$log" || exit 2

declare -A outcome took text
for name in "${steps[@]}"; do outcome[$name]='not reached' took[$name]=0 text[$name]=; done

# Writes steps.json, all or nothing.
write_table() {
    local name separator=
    {
        printf '[\n'
        for name in "${steps[@]}"; do
            printf '%s {"step": "%s", "outcome": "%s", "seconds": %s, "text": "%s"}' \
                "$separator" "$name" "${outcome[$name]}" "${took[$name]}" "${text[$name]}"
            separator=$',\n'
        done
        printf '\n]\n'
    } >"$work/steps.json" && cp "$work/steps.json" "$out/steps.json.partial" && mv "$out/steps.json.partial" "$out/steps.json"
}

say() { printf '%-10s %-12s %4s s  %s\n' "$1" "${outcome[$1]}" "${took[$1]}" "${text[$1]}"; }

# Notes how a step ended: name, outcome, seconds, what there is to say.
ended() {
    outcome[$1]=$2 took[$1]=$3 text[$1]=$4
    say "$1" | tee -a "$log"
    write_table
}

# The last line of a log, as it fits into the table.
last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | tr -d '\t"\\' | tr -c '[:print:]\n' ' ' | cut -c 1-150; }

# Notes how a step ended by its exit status: name, status, seconds it took, seconds it had, its log.
judge() {
    local last end=failed
    last=$(last_line "$5")
    # Not all that it was to have: the deadline ended it, which says nothing against it.
    if [ "$4" -lt "${seconds[$1]}" ]; then end='cut short'; fi
    case $2 in
        0) ended "$1" passed "$3" "$last" ;;
        124 | 137) ended "$1" "$end" "$3" "not done after $4 s; $last" ;;
        *) ended "$1" failed "$3" "exit status $2; $last" ;;
    esac
}

# Sets the seconds a step has (limit), no more than are left: name. Fails if they are too few to begin.
granted() {
    limit=$(left)
    if [ "$limit" -lt "$least" ]; then
        text[$1]="no time left"
        say "$1" | tee -a "$log"
        write_table
        return 1
    fi
    if [ "${seconds[$1]}" -lt "$limit" ]; then limit=${seconds[$1]}; fi
}

# Whether a tool is here and can attach to a program on the GPU, asked once: name of the step, what shows that it did,
# the tool and its options. Notes if not.
declare -A probed
attaches() {
    local name=$1 shown=$2 tool=$3 start spent=0
    shift 2
    if ! command -v "$tool" >/dev/null; then
        ended "$name" missing 0 "$tool was not found"
        return 1
    fi
    if [ -z "${probed[$tool]:-}" ]; then
        start=$(now)
        timeout -k 1 5 "$@" "$python" -m profiling.probe >"$work/$tool.probe" 2>&1 && grep -q "$shown" "$work/$tool.probe"
        probed[$tool]=$?
        spent=$(($(now) - start))
    fi
    if [ "${probed[$tool]}" != 0 ]; then
        ended "$name" missing "$spent" "$tool cannot attach here; $(last_line "$work/$tool.probe")"
        return 1
    fi
}

sanitizer=(compute-sanitizer --report-api-errors no --error-exitcode 99 --print-limit 20 --tool)

# Sets the command of a step: name, seconds. Fails, with a note, where something is missing.
prepare() {
    local name=$1 until=$(($2 > margin + 5 ? $2 - margin : 5))
    local bench=("$python" -m profiling.bench --quick --resume --budget "$until" --json "$out/bench.json" --csv "$out/bench.csv")
    case $name in
        compile) command=("$python" -m gpu_layers compile) ;;
        verify) command=("$python" -m gpu_layers verify --backend cuda) ;;
        bits) command=("$python" -m profiling.small_run --bits "$out/bits.json") ;;
        bench) command=("${bench[@]}" --first --dtypes bfloat16 --peers '^(copy|torch)$') ;;
        compiled) command=("${bench[@]}" --first --headline --dtypes bfloat16 --peers '^(copy|torch|torch\.compile)$') ;;
        reads) command=("${bench[@]}" --only '^batch_norm ' --peers '^(copy|torch|two reads)$') ;;
        more) command=("${bench[@]}" --peers '^(copy|torch)$') ;;
        others) command=("${bench[@]}" --first --headline --dtypes bfloat16 --peers '^(copy|torch|jax|cupy)$') ;;
        overhead) command=("$python" -m profiling.overhead --graphs --json "$out/overhead.json") ;;
        tests)
            if ! "$python" -c "import pytest" 2>/dev/null; then
                ended tests missing 0 "pytest is not installed; the step verify compares every kernel with the reference"
                return 1
            fi
            # Without the options of pyproject.toml, which may name plugins that are not here; and only the files that
            # have such tests, so that a package which another file imports may be missing. Those of parity are what
            # the step verify does.
            local files
            mapfile -t files < <(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests | grep -v parity/ | sort)
            command=("$python" -m pytest -o addopts= -p no:cacheprovider -v --tb=short -m gpu "${files[@]}")
            if "$python" -c "import xdist" 2>/dev/null; then command+=(-n 4); fi
            ;;
        memcheck | racecheck | initcheck | synccheck)
            attaches "$name" 'the probe ran' "${sanitizer[@]}" "$name" || return 1
            command=("${sanitizer[@]}" "$name" "$python" -m profiling.small_run)
            ;;
        ncu)
            attaches ncu gpu_layers_probe ncu --clock-control none --metrics gpu__time_duration.sum || return 1
            command=("$python" -m profiling.nsight ncu headline "$out")
            ;;
    esac
}

begun() {
    outcome[$1]=running text[$1]=
    write_table
    printf '\n===== %s, at most %s s =====\n' "$1" "$2" >>"$log"
}

# Runs a step: name. Its output goes to the log at once; of a long one the end is kept.
step() {
    local name=$1 limit start before status
    granted "$name" || return
    local command=()
    # Once more after it: a probe takes seconds, too.
    prepare "$name" "$limit" && granted "$name" || return
    begun "$name" "$limit"
    start=$(now) before=$(stat -c %s "$log")
    timeout -k 5 "$limit" "${command[@]}" >>"$log" 2>&1
    status=$?
    tail -c +$((before + 1)) "$log" | tail -c "$log_bytes" >"$work/$name.log"
    if [ $(($(stat -c %s "$log") - before)) -gt "$log_bytes" ]; then
        truncate -s "$before" "$log"
        cat "$work/$name.log" >>"$log"
    fi
    judge "$name" "$status" $(($(now) - start)) "$limit" "$work/$name.log"
}

# Runs steps side by side: names. Each line of their output goes to the log with the step's name before it.
steps_beside_each_other() {
    local name limit start status spent command=() running=()
    local -A limits
    for name in "$@"; do
        granted "$name" && prepare "$name" "$limit" && granted "$name" && running+=("$name") limits[$name]=$limit
    done
    for name in "${running[@]}"; do begun "$name" "${limits[$name]}"; done
    for name in "${running[@]}"; do
        limit=${limits[$name]}
        prepare "$name" "$limit"
        {
            start=$(now)
            timeout -k 5 "$limit" "${command[@]}" 2>&1 | tee "$work/$name.log" | sed -u "s/^/$name: /" >>"$log"
            echo "${PIPESTATUS[0]} $(($(now) - start)) $limit" >"$work/$name.ended"
        } &
    done
    wait
    for name in "${running[@]}"; do
        read -r status spent limit <"$work/$name.ended"
        judge "$name" "$status" "$spent" "$limit" "$work/$name.log"
    done
}

echo "Writing to $out, for $deadline s at most"
write_table
together=()
for name in "${steps[@]}"; do
    if [[ $beside_each_other == *" $name "* ]]; then together+=("$name"); fi
done
for name in "${steps[@]}"; do
    if [[ $beside_each_other != *" $name "* ]]; then
        step "$name"
    elif [ "$name" = "${together[0]}" ]; then
        steps_beside_each_other "${together[@]}"
    fi
done

echo
failed=() not_run=()
for name in "${steps[@]}"; do
    say "$name"
    case ${outcome[$name]} in
        failed) failed+=("$name") ;;
        missing | 'not reached' | 'cut short') not_run+=("$name") ;;
    esac
done
echo "$(($(now) - begin)) s in all, results in $out"
if [ ${#not_run[@]} -gt 0 ]; then echo "NOT RUN: ${not_run[*]}"; fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
if [ ${#not_run[@]} -gt 0 ]; then exit 3; fi
echo "PASSED: every step"
