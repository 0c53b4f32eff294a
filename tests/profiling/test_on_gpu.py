"""The script for a machine with a GPU, with stubs in place of Python and compute-sanitizer."""

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "profiling" / "on_gpu.sh"
STEPS = ["compile", "verify", "tests", "bits", "bench", "memcheck", "racecheck", "initcheck", "synccheck"]

# Does what the file called after the module says, in the folder of the stubs; "true" if there is none.
PYTHON = """#!/bin/bash
folder=$(dirname "$0")
case "$*" in
    "-m profiling.environment") name=environment; echo 2026-01-02-made-up-gpu-0123abc ;;
    "-c import pytest") name=has_pytest ;;
    "-c import matplotlib") name=has_matplotlib ;;
    "-m pytest"*) name=tests ;;
    "-m gpu_layers verify"*) name=verify ;;
    "-m profiling.precompile"*) name=compile ;;
    "-m profiling.bit_equality"*) name=bits ;;
    "-m profiling.bench"*) name=bench ;;
    "-m profiling.small_run"*) name=small_run ;;
    *) echo "unexpected: $*"; exit 55 ;;
esac
echo "$*" >>"$folder/calls"
if [ -f "$folder/$name.does" ]; then . "$folder/$name.does"; fi
"""
SANITIZER = """#!/bin/bash
folder=$(dirname "$0")
[ "$1" = --tool ] || exit 55
if [ -f "$folder/$2.does" ]; then . "$folder/$2.does"; fi
echo "ERROR SUMMARY: 0 errors of $2"
"""


@pytest.fixture
def stubs(tmp_path):
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run(stubs, *arguments, path=None, **environment):
    variables = {"PATH": f"{stubs}:{path or os.environ['PATH']}", "PYTHON": str(stubs / "python")}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables | environment, timeout=60)


def steps(folder):
    return {entry["step"]: entry for entry in json.loads((folder / "steps.json").read_text())}


def test_all_is_well(stubs, tmp_path):
    (stubs / "bench.does").write_text('echo "[==] 3/9  0:10 left  relu"; echo "the table"; touch "${@: -1}/bars.png"')
    done = run(stubs, tmp_path / "out folder")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "PASSED: every step"
    assert "the table" in done.stdout
    found = steps(tmp_path / "out folder")
    assert list(found) == STEPS
    assert {entry["outcome"] for entry in found.values()} == {"passed"}
    assert found["racecheck"]["text"] == "ERROR SUMMARY: 0 errors of racecheck"
    log = (tmp_path / "out folder" / "log.txt").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("=====")] == STEPS
    calls = (stubs / "calls").read_text().splitlines()
    assert f"-m profiling.bit_equality --json {tmp_path}/out folder/bits.json" in calls
    assert any(call.startswith("-m profiling.bench --quick --budget 110 --json") for call in calls)


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


def test_a_step_that_takes_too_long_is_ended(stubs, tmp_path):
    (stubs / "verify.does").write_text("echo working; sleep 30")
    done = run(stubs, tmp_path, BUDGET_verify="1")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "FAILED: verify"
    assert steps(tmp_path)["verify"]["text"] == "not done after 1 s; working"
    assert steps(tmp_path)["bench"]["outcome"] == "passed"


def test_budgets_add_up_to_less_than_eight_minutes():
    import re

    budgets = dict(re.findall(r"\[(\w+)\]=(\d+)", SCRIPT.read_text()))
    assert list(budgets) == STEPS
    beside_each_other = STEPS[-4:]
    total = sum(int(budgets[name]) for name in STEPS if name not in beside_each_other)
    assert total + max(int(budgets[name]) for name in beside_each_other) <= 8 * 60 - 10


def test_without_pytest_verify_is_what_ran(stubs, tmp_path):
    (stubs / "has_pytest.does").write_text("exit 1")
    done = run(stubs, tmp_path)
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "NOT RUN: tests"
    assert steps(tmp_path)["tests"]["text"].startswith("pytest is not installed; the step verify")
    assert steps(tmp_path)["verify"]["outcome"] == "passed"


def test_without_compute_sanitizer(stubs, tmp_path):
    (stubs / "compute-sanitizer").unlink()
    done = run(stubs, tmp_path, path="/usr/bin:/bin")
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "NOT RUN: memcheck racecheck initcheck synccheck"
    assert steps(tmp_path)["memcheck"]["text"] == "compute-sanitizer was not found"


def test_without_matplotlib_there_are_no_pictures(stubs, tmp_path):
    (stubs / "has_matplotlib.does").write_text("exit 1")
    assert run(stubs, tmp_path).returncode == 0
    (bench,) = (c for c in (stubs / "calls").read_text().splitlines() if "profiling.bench" in c)
    assert "--plot" not in bench


def test_without_a_gpu(stubs, tmp_path):
    (stubs / "environment.does").write_text('echo "no usable GPU" >&2; exit 2')
    done = run(stubs, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "no usable GPU",
        "profiling/on_gpu.sh needs a GPU and CuPy; nothing was run.",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("one", "two"), ("--help",)])
def test_bad_usage(stubs, arguments):
    done = run(stubs, *arguments)
    assert done.returncode == 2
    assert done.stderr == "usage: profiling/on_gpu.sh [OUT_DIR]\n"


def test_no_such_interpreter(stubs, tmp_path):
    done = run(stubs, tmp_path, PYTHON="/nowhere/python3")
    assert done.returncode == 2
    assert "/nowhere/python3 was not found" in done.stderr


def test_long_logs_are_cut(stubs, tmp_path):
    (stubs / "compile.does").write_text("yes 0123456789 | head -c 2000000; echo the end")
    assert run(stubs, tmp_path).returncode == 0
    assert (tmp_path / "log.txt").stat().st_size < 400_000
    assert "the end" in (tmp_path / "log.txt").read_text()
    assert len(list(tmp_path.iterdir())) <= 8 + 1  # the stubs' folder is here too
