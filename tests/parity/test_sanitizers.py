"""Every kernel under the compiler's sanitizers, in processes of their own."""

import subprocess
import sys

import pytest

from gpu_layers.cli import main


@pytest.mark.parametrize("sanitizer", ["asan", "ubsan"])
def test_verify_is_clean(sanitizer):
    command = [sys.executable, "-m", "gpu_layers", "verify", "--sanitizer", sanitizer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all right" in done.stdout


def test_an_error_found_by_a_sanitizer_is_exit_status_1(monkeypatch, capsys):
    """AddressSanitizer ends the process with 99; a difference and a crash count the same."""
    monkeypatch.setattr(
        "gpu_layers.cli.verify.subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], returncode=99)
    )
    assert main(["verify", "--sanitizer", "asan"]) == 1
    assert "asan ended the process with status 99" in capsys.readouterr().err
