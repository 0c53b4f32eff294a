"""Ctrl-C at any time: one line and status 130, from the first import on."""

import signal
import subprocess
import sys
import time

import pytest

from tests.cli.commands import ROOT, environment, gpu_layers, interrupt, started
from tests.training.images import write_images


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "images.npz")


def _train(data, *more):
    return "train", "--device", "cpu", "--data", data, "--out", data.parent / "run", "--epochs", 100_000, *more


def test_while_training(data):
    with started(*_train(data)) as process:
        for _ in range(4):
            assert process.stdout.readline()
        time.sleep(0.05)
        assert interrupt(process) == b"gpu-layers: interrupted\n"
        assert process.returncode == 130
    assert not list((data.parent / "run").glob("*.partial"))


# An interrupt at the moment when a module is looked for.
_AT_AN_IMPORT = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
"""


def _interrupted_import(folder, module, *command):
    """Run a command that is interrupted when it imports a module; Python runs sitecustomize first."""
    (folder / "sitecustomize.py").write_text(_AT_AN_IMPORT.format(module=module))
    return subprocess.run(
        [sys.executable, *command],
        env=environment(PYTHONPATH=f"{folder}:{ROOT}"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    "module", ["gpu_layers.distributed", "numpy", "gpu_layers.layers.dropout", "gpu_layers.cli", "gpu_layers.study"]
)
@pytest.mark.parametrize("way", ["module", "joined", "script"])
def test_while_importing(tmp_path, module, way):
    script = tmp_path / "gpu-layers"  # as pip writes it
    script.write_text(
        "import sys\nfrom gpu_layers.cli import command\nif __name__ == '__main__':\n    sys.exit(command())"
    )
    command = {"module": ["-X", "utf8", "-m", "gpu_layers"], "joined": ["-mgpu_layers"], "script": [str(script)]}[way]
    finished = _interrupted_import(tmp_path, module, *command, "info")
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "", "gpu-layers: interrupted\n")


@pytest.mark.parametrize("command", [["-c", "import gpu_layers"], ["-m", "gpu_layers_user"], ["user.py", "gpu-layers"]])
def test_the_library_leaves_interrupts_to_the_program(tmp_path, command):
    for name in ("gpu_layers_user.py", "user.py"):
        (tmp_path / name).write_text("import gpu_layers")
    command = [str(tmp_path / word) if word == "user.py" else word for word in command]
    finished = _interrupted_import(tmp_path, "numpy", *command)
    assert finished.stderr.endswith("KeyboardInterrupt\n")
    assert "gpu-layers: interrupted" not in finished.stderr


@pytest.mark.parametrize("module", ["sklearn.datasets", "filelock", "threadpoolctl"])
def test_while_importing_what_a_command_needs(tmp_path, module):
    command = ["-m", "gpu_layers", "train", "--device", "cpu", "--out", str(tmp_path / "run")]
    finished = _interrupted_import(tmp_path, module, *command)
    assert (finished.returncode, finished.stderr) == (130, "gpu-layers: interrupted\n")


def test_where_interrupts_are_ignored_they_stay_ignored(data):
    """A shell's background job: an interrupt of the terminal is not meant for it."""
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    interrupted = """
import os
from gpu_layers.training.trainer import Trainer
step = Trainer._step
Trainer._step = lambda *arguments: os.kill(os.getpid(), signal.SIGINT) or step(*arguments)
"""
    finished = gpu_layers(*_train(data, "--epochs", 2), before=ignored + interrupted)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "after 2 epochs" in finished.stdout
