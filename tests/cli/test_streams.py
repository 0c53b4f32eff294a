"""Streams that are closed, or that cannot hold what is printed: nothing lost, no traceback."""

import os
import subprocess
import sys

import pytest

from tests.cli.commands import environment, gpu_layers
from tests.training.images import write_images

FILES = {"checkpoint.safetensors", "curves.png", "metrics.json", "model.safetensors"}


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "images.npz")


def _in_a_shell(redirection, *arguments):
    """``gpu-layers arguments >&-``, as a shell starts it."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "gpu_layers", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment())


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed(data, redirection):
    finished = _in_a_shell(redirection, "info")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert bool(finished.stdout) == (not redirection.count(" >&-") and not redirection.startswith(">&-"))
    out = data.parent / "run"
    finished = _in_a_shell(redirection, "train", "--data", data, "--out", out, "--epochs", 2)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert {name for name in os.listdir(out) if name != ".lock"} == FILES
    # The numbers of the closed streams are given to no file, which would then hold what is printed.
    assert not any(b"epoch 1/2" in (out / name).read_bytes() for name in os.listdir(out))


def test_an_error_with_nobody_to_tell(data):
    assert _in_a_shell("2>&-", "train", "--p", 7).returncode == 2
    assert _in_a_shell("2>/dev/full", "train", "--p", 7).returncode == 2


def test_closed_output_of_a_study_and_of_verification():
    finished = _in_a_shell(">&-", "study", "pooling", "--quick", "--jobs", 2)
    assert (finished.returncode, finished.stderr) == (0, "")
    finished = _in_a_shell(">&-", "verify", "--backend", "emulated", "--only", "^relu.* float32")
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, rb"donn\xe9es \u6570\u636e"),
        ({"PYTHONIOENCODING": "latin-1"}, b"donn\xe9es " + rb"\u6570\u636e"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "données 数据".encode()),
        ({"PYTHONIOENCODING": "utf-8"}, "données 数据".encode()),
    ],
)
def test_letters_that_the_output_lacks(data, settings, shown):
    out = data.parent / "données 数据"
    finished = gpu_layers(
        "train", "--device", "cpu", "--data", data, "--out", out, "--epochs", 1, env=environment(**settings), text=False
    )
    assert (finished.returncode, finished.stderr) == (0, b"")
    assert finished.stdout.splitlines()[-1] == b"wrote model.safetensors, metrics.json, curves.png in %s/%s" % (
        os.fsencode(data.parent),
        shown,
    )
    assert {name for name in os.listdir(out) if name != ".lock"} == FILES


@pytest.mark.parametrize(("errors", "shown"), [("strict", rb"caf\udce9"), ("surrogateescape", b"caf\xe9")])
def test_file_names_that_are_no_text(tmp_path, errors, shown):
    folder = os.fsencode(tmp_path)
    data, out = folder + b"/\xff $x_y$ \n.npz", folder + b"/caf\xe9"
    write_images(os.fsdecode(data))
    arguments = ["train", "--device", "cpu", "--data", data, "--out", out, "--epochs", 1]
    finished = gpu_layers(*arguments, env=environment(PYTHONIOENCODING=f"utf-8:{errors}"), text=False)
    assert (finished.returncode, finished.stderr) == (0, b"")
    lines = finished.stdout.splitlines()
    assert lines[0].startswith(rb"\udcff $x_y$ \n.npz: 42 training and 9 test images"), "one line, and nothing raw"
    assert lines[-1].endswith(shown)
    assert {name for name in os.listdir(out) if name != b".lock"} == {os.fsencode(name) for name in FILES}
