"""Every kernel under the compiler's sanitizers, in processes of their own."""

import subprocess
import sys

import pytest

from gpu_layers.cli import main

# Each width of vectors (float64, float32, half types) under one of the two at least, and each sanitizer over two: to
# compile takes most of the time, and types of one width have the same addresses.
RUNS = [
    ("asan", "float32"),
    ("ubsan", "bfloat16"),
    pytest.param("asan", "bfloat16", marks=pytest.mark.slow),
    pytest.param("ubsan", "float64", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sanitizer", "dtypes"), RUNS)
def test_verify_is_clean(sanitizer, dtypes):
    command = [sys.executable, "-m", "gpu_layers", "verify", "--sanitizer", sanitizer, "--only", f" ({dtypes}) "]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all right" in done.stdout


def test_an_error_found_by_a_sanitizer_is_exit_status_1(monkeypatch, tmp_path, capsys):
    """AddressSanitizer ends the process with 99; a difference and a crash count the same."""
    process = tmp_path / "python"
    process.write_text("#!/bin/sh\nexit 99\n")
    process.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(process))
    assert main(["verify", "--sanitizer", "asan"]) == 1
    assert "asan ended the process with status 99" in capsys.readouterr().err
