"""Killed at any moment and started again: exactly the weights of a run that was never killed."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from gpu_layers.cli import main
from tests.cli.commands import assert_one_line_error, environment, gpu_layers
from tests.training.images import write_images

OPTIONS = ["--epochs", "5", "--batch-size", "8", "--p", "0.3", "--seed", "7"]
CHECKPOINT, MODEL = "checkpoint.safetensors", "model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images.npz", train=41)


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """The folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert main(["train", "--data", str(data), "--out", str(out), *OPTIONS]) == 0
    return out


def _arguments(data, out, *more):
    return ["train", "--data", str(data), "--out", str(out), *OPTIONS, *more]


def _assert_resumes_to(whole_run, data, out):
    assert main(_arguments(data, out, "--resume")) == 0
    assert (out / MODEL).read_bytes() == (whole_run / MODEL).read_bytes()
    # Seconds aside, the history is the same too.
    histories = [json.loads((folder / "metrics.json").read_text())["epochs"] for folder in (whole_run, out)]
    for first, second in zip(*histories, strict=True):
        assert {k: v for k, v in first.items() if "second" not in k} == {
            k: v for k, v in second.items() if "second" not in k
        }
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole_run)), "nothing half written is left"


@pytest.mark.parametrize("lines", [1, 2, 4])
def test_killed_between_lines(data, whole_run, tmp_path, lines):
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_layers", *_arguments(data, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    for _ in range(lines):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    _assert_resumes_to(whole_run, data, tmp_path)


# The process kills itself at the n-th time that a function of the operating system is called. Each file is written
# with fsync, replace, fsync of the folder; files in order: six checkpoints, model, metrics, curves.
_KILL = """
import os, signal
original, calls = os.{function}, 0
def killing(*arguments, **options):
    global calls
    calls += 1
    if calls == {number} and {after}:
        original(*arguments, **options)
    if calls == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
os.{function} = killing
"""


@pytest.mark.parametrize(
    ("function", "number", "after"),
    [
        ("fsync", 1, False),  # the first checkpoint is written, but has no name yet
        ("replace", 1, True),  # there is one, of no epoch
        ("fsync", 5, False),  # in the middle of the third checkpoint
        ("replace", 3, False),
        ("replace", 3, True),
        ("replace", 6, True),  # after the last epoch, before any output
        ("replace", 7, True),  # model written, metrics not
        ("fsync", 17, False),  # in the middle of the curves
    ],
)
def test_killed_while_writing(data, whole_run, tmp_path, function, number, after):
    killed = gpu_layers(*_arguments(data, tmp_path), before=_KILL.format(function=function, number=number, after=after))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "curves.png").exists()
    _assert_resumes_to(whole_run, data, tmp_path)


def test_killed_twice(data, whole_run, tmp_path):
    for number, more in ((3, []), (2, ["--resume"])):
        before = _KILL.format(function="replace", number=number, after=True)
        assert gpu_layers(*_arguments(data, tmp_path, *more), before=before).returncode == -signal.SIGKILL
    _assert_resumes_to(whole_run, data, tmp_path)


def test_resuming_a_finished_run_changes_nothing(data, whole_run, tmp_path):
    assert main(_arguments(data, tmp_path)) == 0
    for name in ("metrics.json", "curves.png", MODEL):
        (tmp_path / name).unlink()
    _assert_resumes_to(whole_run, data, tmp_path)


def test_nothing_to_resume(data, whole_run, tmp_path, capsys):
    _assert_resumes_to(whole_run, data, tmp_path / "new")
    assert "no checkpoint in" in capsys.readouterr().out


def test_other_settings(data, whole_run, capsys):
    before = (whole_run / CHECKPOINT).read_bytes()
    status = main(_arguments(data, whole_run, "--resume", "--epochs", "6", "--lr", "0.5"))
    errors = capsys.readouterr().err.splitlines()
    assert (status, len(errors)) == (2, 1)
    assert "epochs 5 instead of 6, lr 0.01 instead of 0.5" in errors[0]
    assert (whole_run / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "model"])
def test_bad_checkpoint(data, whole_run, tmp_path, capsys, damage):
    content = (whole_run / CHECKPOINT).read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1
    bad = {
        "truncated": content[:-100],
        "flipped": bytes(flipped),
        "empty": b"",
        "foreign": b"PK\x03\x04" + bytes(100),
        "model": (whole_run / MODEL).read_bytes(),
    }[damage]
    (tmp_path / CHECKPOINT).write_bytes(bad)
    status = main(_arguments(data, tmp_path, "--resume"))
    errors = capsys.readouterr().err.splitlines()
    assert (status, len(errors)) == (2, 1)
    assert f"cannot resume from {tmp_path / CHECKPOINT}" in errors[0]
    assert (tmp_path / CHECKPOINT).read_bytes() == bad, "left as it was"


def test_disk_full_at_the_third_checkpoint(data, whole_run, tmp_path):
    full = """
import os
original, calls = os.fsync, 0
def fsync(handle):
    global calls
    calls += 1
    if calls == 5:
        raise OSError(28, "No space left on device")
    return original(handle)
os.fsync = fsync
"""
    finished = gpu_layers(*_arguments(data, tmp_path), before=full)
    assert_one_line_error(finished, "No space left on device")
    assert os.listdir(tmp_path) == [CHECKPOINT]
    _assert_resumes_to(whole_run, data, tmp_path)


def test_no_room_for_a_file_of_that_size(data, whole_run, tmp_path):
    before = (whole_run / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(before)

    def limit():
        # The system itself then refuses the write, halfway through the file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)

    finished = gpu_layers(*_arguments(data, tmp_path), preexec_fn=limit)
    assert_one_line_error(finished, "File too large")
    assert os.listdir(tmp_path) == [CHECKPOINT]
    assert (tmp_path / CHECKPOINT).read_bytes() == before
