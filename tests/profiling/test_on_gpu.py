"""The script for a machine with a GPU, with stubs in place of Python, the tools, and, for the deadline, the clock."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from profiling.bench import main as bench

SCRIPT = Path(__file__).resolve().parents[2] / "profiling" / "on_gpu.sh"
SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
BESIDE = ["verify", "bits", "tests", *SANITIZERS]
TIMED = ["bench", "compiled", "reads", "overhead"]
STEPS = ["compile", *BESIDE, *TIMED, "ncu", "more"]

# Does what the file called after the step says, in the folder of the stubs; nothing if there is none. What a step takes
# of the clock of the stubs stands in NAME.takes.
PYTHON = r"""#!/bin/bash
folder=$(dirname "$0")
case "$*" in
    "-m profiling.devices") name=environment; echo 2026-01-02-made-up-gpu-0123abc ;;
    "-c import pytest") name=has_pytest ;;
    "-c import xdist") name=has_xdist ;;
    "-m pytest"*) name=tests ;;
    "-m gpu_layers verify"*) name=verify ;;
    "-m gpu_layers compile"*) name=compile ;;
    "-m profiling.small_run --bits"*) name=bits ;;
    "-m profiling.overhead"*) name=overhead ;;
    "-m profiling.bench"*"torch\.compile"*) name=compiled ;;
    "-m profiling.bench"*"two reads"*) name=reads ;;
    "-m profiling.bench"*"jax"*) name=others ;;
    "-m profiling.bench"*"--first"*) name=bench ;;
    "-m profiling.bench"*) name=more ;;
    "-m profiling.small_run"*) name=small_run ;;
    "-m profiling.probe"*) name=probe; echo "the probe ran" ;;
    "-m profiling.nsight ncu"*) name=ncu ;;
    *) echo "unexpected: $*"; exit 55 ;;
esac
echo "$*" >>"$folder/calls"
if [ -f "$folder/$name.takes" ] && [ -n "${TOOK:-}" ]; then cp "$folder/$name.takes" "$TOOK"; fi
if [ -f "$folder/$name.does" ]; then . "$folder/$name.does"; fi
"""
SANITIZER = """#!/bin/bash
folder=$(dirname "$0")
while [ "$1" != --tool ]; do shift; done
tool=$2
shift 2
if [[ "$*" == *probe* ]]; then
    if [ -f "$folder/refuses" ]; then echo "Device not supported"; exit 1; fi
    exec "$@"
fi
if [ -f "$folder/$tool.takes" ] && [ -n "${TOOK:-}" ]; then cp "$folder/$tool.takes" "$TOOK"; fi
if [ -f "$folder/$tool.does" ]; then . "$folder/$tool.does"; fi
echo "ERROR SUMMARY: 0 errors of $tool"
"""
NCU = """#!/bin/bash
folder=$(dirname "$0")
if [[ "$*" == *probe* ]]; then
    if [ -f "$folder/probe.takes" ] && [ -n "${TOOK:-}" ]; then cp "$folder/probe.takes" "$TOOK"; fi
    [ -f "$folder/ncu_refuses" ] && { echo "==ERROR== LibraryNotLoaded"; echo "the probe ran"; exit 0; }
    echo '==PROF== Profiling "gpu_layers_probe"'
    exit 0
fi
"""
# A clock that stands still but for what steps take; and a limit of time by it.
DATE = """#!/bin/bash
[ "$1" = +%s ] || exit 55
cat "$(dirname "$0")/clock"
"""
TIMEOUT = """#!/bin/bash
folder=$(dirname "$0")
limit=$3
shift 3
start=$(cat "$folder/clock")
export TOOK=$folder/took.$$
"$@"
status=$?
took=1
if [[ "$*" == *profiling.devices ]]; then took=0; fi
# So that those side by side have all begun before the clock moves on.
if [[ "$*" == *small_run* || "$*" == *verify* || "$*" == *"-m pytest"* ]]; then sleep 0.3; fi
if [ -f "$TOOK" ]; then took=$(cat "$TOOK"); fi
if [ "$took" -gt "$limit" ]; then took=$limit status=124; fi
# Side by side: the clock is where the last of them ends.
exec 9>"$folder/lock"
flock 9
if [ $((start + took)) -gt "$(cat "$folder/clock")" ]; then echo $((start + took)) >"$folder/clock"; fi
exit $status
"""
# One row a line; each costs the seconds of ROW, and none begins after the budget, as of the benchmark itself.
BENCH = """
rows=0 spent={start}
while [ $rows -lt {rows} ] && [ $((spent - {start})) -le "$(sed 's/.*--budget \\([0-9]*\\).*/\\1/' <<<"$*")" ]; do
    rows=$((rows + 1)) spent=$((spent + {row}))
done
echo $spent >"$TOOK"
echo "$rows of {rows} rows"
"""


def write(folder, name, text):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def stubs(tmp_path):
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER), ("ncu", NCU)):
        write(folder, name, text)
    return folder


@pytest.fixture
def clock(stubs):
    """The stubs with a clock of their own."""
    (stubs / "clock").write_text("1000\n")
    write(stubs, "date", DATE)
    write(stubs, "timeout", TIMEOUT)
    return stubs


def variables(stubs, path=None):
    return os.environ | {"PATH": f"{stubs}:{path or os.environ['PATH']}", "PYTHON": str(stubs / "python")}


def run(stubs, *arguments, path=None, folder=None, **environment):
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    with_stubs = variables(stubs, path) | environment
    return subprocess.run(command, capture_output=True, text=True, env=with_stubs, timeout=60, cwd=folder)


def steps(folder):
    return {entry["step"]: entry for entry in json.loads((folder / "steps.json").read_text())}


def outcomes(folder):
    return {name: entry["outcome"] for name, entry in steps(folder).items()}


def calls(stubs):
    return (stubs / "calls").read_text().splitlines()


def test_all_is_well(stubs, tmp_path):
    (stubs / "bench.does").write_text('echo "the table"')
    done = run(stubs, tmp_path / "out folder")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "PASSED: every step"
    found = steps(tmp_path / "out folder")
    assert list(found) == STEPS
    assert {entry["outcome"] for entry in found.values()} == {"passed"}
    assert found["racecheck"]["text"] == "ERROR SUMMARY: 0 errors of racecheck"
    assert found["bench"]["text"] == "the table"
    log = (tmp_path / "out folder" / "log.txt").read_text()
    assert [line.split()[1].rstrip(",") for line in log.splitlines() if line.startswith("=====")] == STEPS
    assert "racecheck: ERROR SUMMARY: 0 errors of racecheck" in log
    out = tmp_path / "out folder"
    assert f"-m profiling.small_run --bits {out}/bits.json" in calls(stubs)
    started = [call for call in calls(stubs) if "profiling.bench" in call]
    assert all("--quick --resume --budget " in call and f"--json {out}/bench.json" in call for call in started)
    assert not any("jax" in call for call in started)


def test_what_the_steps_ask_of_the_benchmark_is_taken(stubs, tmp_path, capsys):
    assert run(stubs, "--only", ",".join([*TIMED, "more", "others"]), tmp_path / "out").returncode == 0
    started = [call.split()[2:] for call in calls(stubs) if "profiling.bench" in call]
    assert len(started) == 5
    for call in started:
        arguments = re.sub(r"two reads", "two.reads", " ".join(call)).split()
        assert bench(["--list", *arguments]) == 0
    assert capsys.readouterr().err == ""


def test_a_failure_is_named_and_the_rest_goes_on(stubs, tmp_path):
    (stubs / "bits.does").write_text("echo 'WRONG \"y\"\\'; exit 1")
    (stubs / "racecheck.does").write_text('echo "RACECHECK SUMMARY: 3 hazards"; exit 99')
    done = run(stubs, tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "FAILED: bits racecheck"
    found = steps(tmp_path)
    assert found["bits"]["outcome"] == "failed"
    assert found["bits"]["text"] == "exit status 1; WRONG y"
    assert found["racecheck"]["text"] == "exit status 99; RACECHECK SUMMARY: 3 hazards"
    assert [name for name, entry in found.items() if entry["outcome"] == "passed"] == [
        name for name in STEPS if name not in ("bits", "racecheck")
    ]


@pytest.mark.parametrize(("slow", "other"), [("verify", "bits"), ("memcheck", "synccheck")])
def test_a_step_that_takes_too_long_is_ended(stubs, tmp_path, slow, other):
    (stubs / f"{slow}.does").write_text("echo working; sleep 30")
    done = run(stubs, "--only", f"{slow},{other}", tmp_path, **{f"BUDGET_{slow}": "1"})
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"FAILED: {slow}"
    assert steps(tmp_path)[slow]["text"] == "not done after 1 s; working"
    assert outcomes(tmp_path) == {slow: "failed", other: "passed"}


def budgets():
    return {name: int(number) for name, number in re.findall(r"\[(\w+)\]=(\d+)", SCRIPT.read_text())}


def test_what_is_measured_fits_into_the_deadline():
    assert list(budgets()) == [*STEPS, "others"]
    beside = max(budgets()[name] for name in BESIDE)
    assert budgets()["compile"] + beside + sum(budgets()[name] for name in TIMED) <= 420 - 5


def test_each_step_begins_however_long_those_before_it_take(clock, tmp_path):
    for name in STEPS:
        (clock / f"{name}.takes").write_text("9999")
    done = run(clock, tmp_path / "out")
    assert done.returncode == 1
    found = steps(tmp_path / "out")
    ended = {name: entry["outcome"] for name, entry in found.items() if entry["outcome"] != "not reached"}
    assert ended == dict.fromkeys(STEPS[:-2], "failed")
    assert done.stdout.splitlines()[-2] == "NOT RUN: ncu more"
    assert all(found[name]["seconds"] == budgets()[name] for name in STEPS[:-2])
    assert int(re.search(r"(\d+) s in all", done.stdout)[1]) <= 420 - 5


# What a row is expected to take: 0.4 s of samples and as much for inputs and checks, so 1; with torch.compile some 8.
# What comes before the first row is 10 s: imports, and PyTorch's first launch.
ROW, COMPILED_ROW, START = 1, 8, 10


def rows_of(*arguments):
    """How many rows the benchmark has for these."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert bench(["--quick", "--list", *arguments]) == 0
    return len(out.getvalue().splitlines())


def expect(stubs, rows):
    """The seconds that steps are expected to take."""
    for name, takes in {"compile": 25, "verify": 40, "bits": 20, "tests": 60, "overhead": 15, "ncu": 50}.items():
        (stubs / f"{name}.takes").write_text(str(takes))
    for name in SANITIZERS:
        (stubs / f"{name}.takes").write_text("60")
    for name, count in rows.items():
        row = COMPILED_ROW if name == "compiled" else ROW
        (stubs / f"{name}.does").write_text(BENCH.format(rows=count, row=row, start=START))


def test_what_is_reached_in_seven_minutes(clock, tmp_path):
    first = ("--first", "--dtypes", "bfloat16")
    rows = {
        "bench": rows_of(*first),
        "compiled": rows_of(*first, "--headline"),
        "reads": rows_of("--only", "^batch_norm "),
        "more": rows_of() - rows_of(*first),
    }
    expect(clock, rows)
    done = run(clock, tmp_path / "out")
    found = steps(tmp_path / "out")
    print(done.stdout)
    assert done.returncode == 0
    assert {name for name, entry in found.items() if entry["outcome"] == "passed"} >= {"compile", *BESIDE, *TIMED}
    reached = {name: int(found[name]["text"].split()[0]) for name in rows}
    # Every operation, pass and layout; the passes of the first six in one layout at least against torch.compile.
    assert reached["bench"] == rows["bench"] > 70
    assert reached["compiled"] >= 5
    assert reached["reads"] >= 5
    assert reached["more"] >= 15
    assert int((clock / "clock").read_text()) - 1000 <= 420


def test_less_time_ends_with_the_most_valuable(clock, tmp_path):
    expect(clock, {"bench": 73, "compiled": 20, "reads": 16, "more": 200})
    done = run(clock, tmp_path / "out", DEADLINE="150")
    assert done.returncode in (1, 3)
    found = outcomes(tmp_path / "out")
    assert [name for name, outcome in found.items() if outcome != "not reached"] == ["compile", *BESIDE, "bench"]
    assert steps(tmp_path / "out")["tests"]["seconds"] == 60
    assert int((clock / "clock").read_text()) - 1000 <= 150
    (bench_call,) = (call for call in calls(clock) if "profiling.bench" in call)
    # 150 less 86 of the steps before (with a probe of 1) and the reserve of 5; and 20 for the row under way.
    assert "--budget 39 " in bench_call


def test_a_run_that_is_killed_leaves_what_it_found(clock, tmp_path):
    """Killed within the first, one between, one of those side by side, and the last.

    Steps before it have ended, it runs, the others were not reached.
    """
    for step in ("compile", "bench", "racecheck", "ncu"):
        out = tmp_path / step
        for name in STEPS:
            (clock / f"{name}.does").write_text(f'echo "said by {name}"; touch "{out}/{name}.found"\n')
        (clock / f"{step}.does").write_text(
            f'echo "said by {step}"; touch "{out}/{step}.found"; echo >"{clock}/now"; sleep 30\n'
        )
        process = subprocess.Popen(
            ["bash", str(SCRIPT), str(out)],
            env=variables(clock),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + 30
        while not (clock / "now").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.2)  # what was said passes through a pipe
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (clock / "now").unlink()
        at = STEPS.index(step)
        beside = set(BESIDE) if step in BESIDE else set()
        found = outcomes(out)
        assert list(found) == STEPS
        before = {name for name in STEPS[:at] if name not in beside}
        assert {found[name] for name in before} <= {"passed"}
        assert found[step] == "running"
        assert {found[name] for name in STEPS[at + 1 :] if name not in beside} <= {"not reached"}
        log = (out / "log.txt").read_text()
        for name in (*before, step):
            assert f"said by {name}" in log
            assert (out / f"{name}.found").exists()


def test_only_some_steps_in_the_order_of_their_value(stubs, tmp_path):
    done = run(stubs, "--only", "synccheck,bench,verify,memcheck", tmp_path / "out")
    assert done.returncode == 0
    assert list(outcomes(tmp_path / "out")) == ["verify", "memcheck", "synccheck", "bench"]
    assert not any("compile" in call for call in calls(stubs))
    done = run(stubs, "--only", "verify,lstm", tmp_path / "other")
    assert done.returncode == 2
    assert done.stderr == f"there is no step 'lstm': the steps are {' '.join(STEPS)} others\n"
    assert not (tmp_path / "other").exists()


def test_the_folder_is_that_of_the_caller(stubs, tmp_path):
    assert run(stubs, "--only", "verify", "some/folder", folder=tmp_path).returncode == 0
    assert outcomes(tmp_path / "some/folder") == {"verify": "passed"}


def test_a_later_call_adds_to_the_log(stubs, tmp_path):
    for name in ("verify", "bits"):
        (stubs / f"{name}.does").write_text(f"echo said by {name}")
        assert run(stubs, "--only", name, tmp_path).returncode == 0
    log = (tmp_path / "log.txt").read_text()
    assert log.index("said by verify") < log.index("said by bits")
    assert list(outcomes(tmp_path)) == ["bits"]


def test_list_needs_no_gpu(stubs):
    (stubs / "environment.does").write_text("exit 2")
    done = run(stubs, "--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*STEPS, "others"]
    assert [int(line.split()[1]) for line in done.stdout.splitlines()] == list(budgets().values())


def test_without_pytest_verify_is_what_ran(stubs, tmp_path):
    (stubs / "has_pytest.does").write_text("exit 1")
    done = run(stubs, tmp_path)
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "NOT RUN: tests"
    assert steps(tmp_path)["tests"]["text"].startswith("pytest is not installed; the step verify")
    assert steps(tmp_path)["verify"]["outcome"] == "passed"


def test_tools_that_are_not_there(stubs, tmp_path):
    (stubs / "compute-sanitizer").unlink()
    (stubs / "ncu").unlink()
    done = run(stubs, tmp_path, path="/usr/bin:/bin")
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "NOT RUN: memcheck racecheck initcheck synccheck ncu"
    assert steps(tmp_path)["memcheck"]["text"] == "compute-sanitizer was not found"
    assert steps(tmp_path)["ncu"]["text"] == "ncu was not found"


def test_tools_that_cannot_attach_are_missing_not_failed(stubs, tmp_path):
    (stubs / "refuses").touch()
    (stubs / "ncu_refuses").touch()
    done = run(stubs, tmp_path)
    assert done.returncode == 3
    found = steps(tmp_path)
    assert {found[name]["outcome"] for name in (*SANITIZERS, "ncu")} == {"missing"}
    assert found["racecheck"]["text"] == "compute-sanitizer cannot attach here; Device not supported"
    assert found["ncu"]["text"].startswith("ncu cannot attach here; ")
    assert not any(call.endswith("small_run") for call in calls(stubs))


def test_a_probe_that_hangs_costs_seconds(clock, tmp_path):
    (clock / "probe.takes").write_text("9999")
    run(clock, "--only", "memcheck,verify", tmp_path)
    found = steps(tmp_path)["memcheck"]
    assert (found["outcome"], found["seconds"]) == ("missing", 5)


@pytest.mark.parametrize("step", ["memcheck", "ncu"])
def test_a_probe_that_leaves_no_time_is_all(clock, tmp_path, step):
    (clock / "probe.takes").write_text("5")
    assert run(clock, "--only", step, tmp_path / "short", DEADLINE="17").returncode == 3
    entry = steps(tmp_path / "short")[step]
    assert (entry["outcome"], entry["text"]) == ("not reached", "no time left")
    assert int((clock / "clock").read_text()) == 1005
    assert run(clock, "--only", step, tmp_path / "enough", DEADLINE="20").returncode == 0


def test_without_a_gpu(stubs, tmp_path):
    (stubs / "environment.does").write_text('echo "no usable GPU" >&2; exit 2')
    done = run(stubs, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["no usable GPU", "profiling/on_gpu.sh needs a GPU and CuPy; nothing was run."]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("one", "two"), ("--help",), ("--only",)])
def test_bad_usage(stubs, arguments):
    done = run(stubs, *arguments)
    assert done.returncode == 2
    assert done.stderr == "usage: profiling/on_gpu.sh [--list] [--only STEP,...] [OUT_DIR]\n"


@pytest.mark.parametrize("variable", ["DEADLINE", "BUDGET_verify"])
@pytest.mark.parametrize("value", ["soon", "-5", "0", "1.5"])
def test_seconds_that_are_none(stubs, tmp_path, variable, value):
    done = run(stubs, tmp_path / "out", **{variable: value})
    assert done.returncode == 2
    assert done.stderr == f"{variable} must be a number of seconds, got '{value}'\n"
    assert not (tmp_path / "out").exists()


def test_no_such_interpreter(stubs, tmp_path):
    done = run(stubs, tmp_path, PYTHON="/nowhere/python3")
    assert done.returncode == 2
    assert "/nowhere/python3 was not found" in done.stderr


def test_long_logs_are_cut_and_the_files_are_few(stubs, tmp_path):
    (stubs / "compile.does").write_text("echo the beginning; yes 0123456789 | head -c 2000000; echo the end")
    (stubs / "verify.does").write_text("echo all right")
    for name, file in {
        "bits": "bits.json",
        "bench": "bench.json",
        "more": "bench.csv",
        "overhead": "overhead.json",
    }.items():
        (stubs / f"{name}.does").write_text(f"touch {tmp_path}/out/{file}")
    (stubs / "ncu.does").write_text(f"touch {tmp_path}/out/headline.ncu-raw.csv {tmp_path}/out/headline.ncu.csv")
    assert run(stubs, tmp_path / "out").returncode == 0
    log = (tmp_path / "out/log.txt").read_text()
    assert len(log) < 400_000
    assert "the beginning" not in log
    assert log.index("the end") < log.index("all right")
    assert len(list((tmp_path / "out").iterdir())) == 8
