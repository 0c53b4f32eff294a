"""AddressSanitizer and UndefinedBehaviorSanitizer see what kernels do, and nothing else."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from gpu_layers import emulator

SCRIPT = pathlib.Path(__file__).with_name("run_sanitized.py")


def run(mode: str, kernel: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.emulator.run_sanitized", mode, kernel],
        cwd=SCRIPT.parents[2],
        env=emulator.sanitizer_environment(mode),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("mode", ["asan", "ubsan"])
def test_a_correct_kernel_is_clean(mode):
    """Hundreds of fibre switches, an abandoned launch, and no report."""
    finished = run(mode, "block_sum")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["WarpError", "clean"]
    assert finished.stderr == ""


@pytest.mark.parametrize(
    ("mode", "kernel", "says"),
    [
        ("asan", "read_past_the_end", "heap-buffer-overflow"),
        ("asan", "write_before_the_start", "use-after-poison"),
        ("asan", "dynamic_shared_overrun", "heap-buffer-overflow"),
        ("asan", "local_overrun", "stack-buffer-overflow"),
        ("ubsan", "signed_overflow", "signed integer overflow"),
        ("ubsan", "wide_shift", "shift exponent 40 is too large"),
        ("ubsan", "overrun_in_a_struct", "index -1 out of bounds"),
    ],
)
def test_a_bug_ends_the_process_with_a_report(mode, kernel, says):
    finished = run(mode, kernel)
    assert finished.returncode != 0
    assert says in finished.stderr
    assert "sanitized.cu:" in finished.stderr
    assert "clean" not in finished.stdout


def test_asan_is_refused_in_a_process_that_cannot_hold_it():
    with pytest.raises(emulator.EmulationError, match="sanitizer_environment"):
        emulator.load(SCRIPT.parent / "kernels" / "sanitized.cu", ["block_sum"], mode="asan")


def test_an_unknown_sanitizer_is_refused():
    with pytest.raises(ValueError, match="'asan' or 'ubsan', got 'msan'"):
        emulator.sanitizer_environment("msan")
