"""The examples run, and show what they say."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpu_layers.emulator.errors import RaceError

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def run(name, *arguments):
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="example")["main"](*arguments)


def test_train_digits_numpy(capsys):
    # A linear classifier of these digits is right for some 95 %.
    assert run("train_digits_numpy", ["--epochs", "4"]) > 0.95
    losses = [float(line.split()[3].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)


def test_own_network(capsys):
    expected, resumed = run("own_network_cupy")
    assert resumed == expected
    before = float(capsys.readouterr().out.split("loss after 20 steps: ")[1].split()[0])
    assert expected < before < np.log(4)


def test_resnet_block(capsys):
    # float32, and sums of 144 products: both ways take the same steps, with the same roundings on the CPU.
    error, derror = run("resnet_block_cupy")
    assert max(error, derror) < 1e-5
    assert "BatchNormMaxPool" in capsys.readouterr().out


def test_mc_dropout():
    inside, outside = run("mc_dropout")
    assert 0 < 2 * inside < outside


def test_emulate_my_kernel(capsys):
    found, sums = run("emulate_my_kernel")
    assert isinstance(found, RaceError)
    assert "the shared array 'values'" in str(found)
    assert sums.tolist() == [sum(range(256 * block, 256 * block + 256)) for block in range(4)]
    assert "x: 4096 bytes read, 4096 of them distinct" in capsys.readouterr().out


@pytest.mark.gpu
def test_cuda_graph():
    first, second, called, replayed = run("cuda_graph")
    assert (first != second).any()
    assert (first != called).any()
    assert (called == replayed).all()


def test_cuda_graph_without_a_gpu():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, FOLDER / "cuda_graph.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("CUDA graphs need a GPU: ")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_each_is_short_and_tested(name):
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80
    # Those of PyTorch modules have tests in tests/torch.
    tests = FOLDER.parent / "tests/torch/test_examples.py" if name.startswith("torch_") else Path(__file__)
    assert f'("{name}"' in tests.read_text(encoding="utf-8")
