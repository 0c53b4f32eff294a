"""Everything a user can get wrong: one line, the right exit status, no traceback."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpu_layers.cli import main
from tests.cli.commands import assert_one_line_error, environment, gpu_layers, started, without
from tests.training.images import image_arrays, write_images


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "images.npz")


def _main(capsys, *arguments):
    """Run in this process: exit status and lines on standard error."""
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["cook"], "invalid choice: 'cook'"),
        (["train", "--colour"], "unrecognized arguments: --colour"),
        (["train", "--p", "1.5"], "argument --p: dropout probability has to be between 0 and 1, but got 1.5"),
        (["train", "--p", "nan"], "argument --p: dropout probability has to be between 0 and 1"),
        (["train", "--p", "half"], "argument --p: must be a number, got 'half'"),
        (["train", "--epochs", "0"], "argument --epochs: must be in 1 .. 1000000, got 0"),
        (["train", "--epochs", "1.5"], "argument --epochs: must be a whole number"),
        (["train", "--batch-size", "1"], "argument --batch-size: must be in 2"),
        (["train", "--lr", "0"], "argument --lr: must be positive and finite"),
        (["train", "--lr", "inf"], "argument --lr: must be positive and finite"),
        (["train", "--seed", "-1"], "argument --seed: must be in 0"),
        (["train", "--seed", str(2**64)], "argument --seed: must be in 0"),
        (["train", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["train", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["train", "--placement", "inside"], "argument --placement: invalid choice: 'inside'"),
        (["train", "--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion'"),
        (["train", "--layout", "chwn"], "argument --layout: invalid choice: 'chwn'"),
        (["train", "--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume"),
        (["train", "--epo", "3"], "unrecognized arguments: --epo"),
        (["train", "--data", "/nowhere/images.npz"], "No such file or directory: /nowhere/images.npz"),
        (["train", "--data", "/"], "Is a directory: /"),
        (["info", "extra"], "unrecognized arguments: extra"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(capsys, arguments, message):
    status, errors = _main(capsys, *arguments)
    assert status == 2
    assert len(errors) == 1
    assert errors[0].startswith("gpu-layers: error: ")
    assert message in errors[0]


def test_bad_arguments_of_a_real_process():
    assert_one_line_error(gpu_layers("train", "--p", "2"), "error: argument --p: dropout probability")


def test_help_and_version(capsys):
    for arguments in (["--help"], ["train", "--help"], ["info", "--help"], ["--version"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith(("usage: gpu-layers", "gpu-layers "))


def test_damaged_data(capsys, data):
    data.write_bytes(data.read_bytes()[:-300])
    status, errors = _main(capsys, "train", "--data", data, "--out", data.parent / "run")
    assert status == 2
    assert len(errors) == 1
    assert f"{data} is damaged or not an .npz file" in errors[0]
    assert not (data.parent / "run").exists()


def test_data_without_labels(capsys, tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, x_train=image_arrays()["x_train"])
    status, errors = _main(capsys, "train", "--data", path)
    assert (status, len(errors)) == (2, 1)
    assert "has no y_train, x_test, y_test" in errors[0]


def test_no_gpu():
    # CUDA finds no device in an empty list, on a machine with GPUs too.
    finished = gpu_layers("train", "--device", "cuda", before='import os; os.environ["CUDA_VISIBLE_DEVICES"] = ""')
    assert_one_line_error(finished, "error: ")
    assert "no usable GPU" in finished.stderr or "pip install 'gpu-layers[cuda12]'" in finished.stderr


@pytest.mark.parametrize("package", ["sklearn", "rich", "matplotlib", "safetensors", "threadpoolctl", "filelock"])
def test_a_missing_extra_is_named_before_any_work(tmp_path, package):
    finished = gpu_layers("train", "--out", tmp_path / "run", before=without(package))
    assert_one_line_error(finished, f"training needs {package}", "pip install 'gpu-layers[train]'")
    assert not (tmp_path / "run").exists()


def test_out_is_a_file(capsys, data):
    out = data.parent / "file"
    out.write_bytes(b"mine")
    status, errors = _main(capsys, "train", "--data", data, "--epochs", 1, "--out", out)
    assert (status, len(errors)) == (2, 1)
    assert "File exists" in errors[0]
    assert out.read_bytes() == b"mine"


def test_out_cannot_be_made(capsys, data):
    status, errors = _main(capsys, "train", "--data", data, "--epochs", 1, "--out", "/proc/run")
    assert (status, len(errors)) == (2, 1)
    assert "/proc/run" in errors[0]


def test_diverged(data):
    # In a process of its own: NumPy's warnings would be lines on standard error too.
    finished = gpu_layers("train", "--data", data, "--out", data.parent / "run", "--lr", 1e30, "--dtype", "float16")
    assert_one_line_error(finished, "training diverged: the loss is nan in epoch 1")


def test_out_of_memory(capsys, data, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("Unable to allocate 1 EiB")

    monkeypatch.setattr("gpu_layers.cli.train.Trainer", fail)
    status, errors = _main(capsys, "train", "--data", data, "--out", data.parent / "run")
    assert (status, errors) == (2, ["gpu-layers: error: out of memory: Unable to allocate 1 EiB"])


def test_output_to_a_full_disk(data):
    with Path("/dev/full").open("w") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "gpu_layers", "info"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment(),
        )
    assert_one_line_error(finished, "No space left on device")


def test_reader_that_goes_away(data):
    with started("train", "--data", data, "--epochs", 500, "--out", data.parent / "run") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("option", ["--out", "--data"])
@pytest.mark.parametrize("command", ["train", "study"])
def test_an_empty_path_is_no_path(tmp_path, command, option):
    """As of an unset variable in a script; Python would take it for the working directory."""
    if (command, option) == ("study", "--data"):
        option = "--out"
    finished = gpu_layers(command, *(["pooling"] if command == "study" else []), option, "", cwd=tmp_path)
    assert_one_line_error(finished, f"argument {option}: must name a ")
    assert list(tmp_path.iterdir()) == []
