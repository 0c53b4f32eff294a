"""``mpirun -n 2 gpu-layers train``: the run of one process, shared."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gpu_layers.training.loss import softmax_cross_entropy
from tests.distributed.processes import run_processes
from tests.inputs import assert_same_bits, normal

COMMAND = ("-m", "gpu_layers", "train", "--device", "cpu", "--dtype", "float64", "--batch-size", "8", "--p", "0.3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three kinds of images with noise. 34 are for training: the last batch has 2, fewer than the most processes."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    labels = np.arange(34) % 3
    images = normal((34, 6, 7), np.float32) * 0.5 + np.eye(6, 7, dtype=np.float32) * labels[:, None, None]
    np.savez(path, x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    return path


def results(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    command = [sys.executable, *COMMAND, "--data", str(data), "--out", str(folder), "--epochs", "3"]
    subprocess.run(command, check=True, capture_output=True)
    return results(folder)["epochs"]


def assert_same_curve(epochs, expected):
    assert len(epochs) == len(expected)
    for one, other in zip(epochs, expected, strict=True):
        for name in ("train_loss", "test_loss"):
            # Sums in another order: 1e-16 each, which fifteen steps of training magnify.
            assert abs(one[name] - other[name]) < 1e-9 * abs(other[name]), name
        for name in ("train_accuracy", "test_accuracy"):
            assert one[name] == other[name]


def test_the_loss_curve_is_that_of_one_process(data, single, tmp_path):
    done = run_processes(2, *COMMAND, "--data", data, "--out", tmp_path, "--epochs", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout
    assert done.stdout.count("wrote model.safetensors") == 1
    assert_same_curve(results(tmp_path)["epochs"], single)


def test_a_run_that_was_stopped_goes_on(data, single, tmp_path):
    """One process begins, four go on: the checkpoint is the same. The last batch has samples for two of them."""
    command = [sys.executable, *COMMAND, "--data", str(data), "--out", str(tmp_path), "--epochs", "3"]
    code = (
        "import sys, gpu_layers.training.trainer as t; from gpu_layers.cli import main\n"
        "epoch = t.Trainer.train_epoch\n"
        "def once(self, *a):\n"
        "    if self.epoch == 1: raise KeyboardInterrupt\n"
        "    return epoch(self, *a)\n"
        "t.Trainer.train_epoch = once; sys.exit(main(sys.argv[1:]))"
    )
    stopped = subprocess.run([sys.executable, "-c", code, *command[3:]], check=False, capture_output=True)
    assert stopped.returncode == 130
    done = run_processes(4, *COMMAND, "--data", data, "--out", tmp_path, "--epochs", "3", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing after epoch 1 of 3" in done.stdout
    assert_same_curve(results(tmp_path)["epochs"], single)


# Every process is asked to end, as by mpirun that was asked; the first one answers for all.
ASK = """
import os, signal, sys, gpu_layers.training.trainer as t
from gpu_layers.cli import command
step, calls = t.Trainer._step, 0
def asking(*arguments):
    global calls
    calls += 1
    if calls == 8: os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
t.Trainer._step = asking; command()
"""


def test_processes_that_are_asked_to_end_leave_a_checkpoint(data, single, tmp_path):
    """Written in the middle of an epoch, by the first of two; one goes on."""
    options = (*COMMAND[2:], "--data", data, "--out", tmp_path, "--epochs", "3")
    done = run_processes(2, "-c", ASK, *options)
    assert done.returncode != 0
    assert "terminated after epoch 1 and 3 batches of the next, of 3" in done.stderr
    command = [sys.executable, *COMMAND[:2], *map(str, options), "--resume"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "continuing after epoch 1 and 3 batches of the next, of 3" in done.stdout
    assert_same_curve(results(tmp_path)["epochs"], single)


def test_an_earlier_run_is_not_lost_by_mistake(data, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier run")
    done = run_processes(2, *COMMAND, "--data", data, "--out", tmp_path, "--epochs", "1")
    assert done.returncode != 0
    assert "train anew with --overwrite" in done.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == b"of an earlier run"


def test_an_error_of_one_process_ends_all(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run_processes(2, *COMMAND, "--data", data, "--out", tmp_path / "file", "--epochs", "1")
    assert done.returncode != 0
    assert "process 0 of 2:" in done.stderr


def test_the_loss_of_a_part():
    logits, labels = normal((5, 3)), np.array([0, 2, 1, 1, 0])
    loss, gradient = softmax_cross_entropy(logits, labels)
    parts = [softmax_cross_entropy(logits[part], labels[part], samples=5) for part in (slice(2), slice(2, 5))]
    assert abs(sum(one for one, _ in parts) - loss) < 1e-15
    assert_same_bits(np.concatenate([one for _, one in parts]), gradient)
    nothing, empty = softmax_cross_entropy(logits[:0], labels[:0], samples=5)
    assert nothing == 0.0
    assert_same_bits(empty, logits[:0])
