"""``gpu-layers train`` as a user runs it."""

import json
import os
import pty

import numpy as np
import pytest
import safetensors.numpy

import gpu_layers as gl
from gpu_layers.cli import main
from gpu_layers.training.checkpoint import load_arrays
from gpu_layers.training.network import image_classifier
from tests.cli.commands import environment, gpu_layers, started
from tests.training.images import image_arrays, write_images

OUTPUTS = {".lock", "checkpoint.safetensors", "curves.png", "metrics.json", "model.safetensors"}


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "images.npz")


def _train(data, out, *options):
    return main(
        [
            "train",
            "--device",
            "cpu",
            "--data",
            str(data),
            "--epochs",
            "3",
            "--batch-size",
            "8",
            "--out",
            str(out),
            *options,
        ]
    )


def test_outputs(data, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert _train(data, out, "--seed", "5", "--p", "0.25") == 0
    assert set(os.listdir(out)) == OUTPUTS
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["settings"] | {"seed": 5, "p": 0.25, "epochs": 3, "batch_size": 8} == metrics["settings"]
    assert [entry["epoch"] for entry in metrics["epochs"]] == [1, 2, 3]
    assert metrics["test_accuracy"] == metrics["epochs"][-1]["test_accuracy"]
    assert metrics["data"]["classes"] == [0, 1, 2]
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 + 2
    assert lines[3].startswith("epoch 3/3  loss ")
    assert f"test accuracy {100 * metrics['test_accuracy']:.2f} % after 3 epochs" in lines[4]


def test_the_saved_model_gives_the_reported_accuracy(data, tmp_path):
    assert _train(data, tmp_path / "run") == 0
    weights = safetensors.numpy.load_file(tmp_path / "run" / "model.safetensors")
    _, facts = load_arrays(tmp_path / "run" / "model.safetensors", "model")
    network = image_classifier((1, 6, 5), 3, p=0.1, placement="after", seed=99, dtype=np.dtype(np.float32))
    network.load_state_dict(weights)
    network.eval()
    arrays, preparation = image_arrays(), facts["preparation"]
    images = ((arrays["x_test"][:, None] - preparation["mean"]) / preparation["std"]).astype(np.float32)
    accuracy = (network(images).argmax(axis=1) == arrays["y_test"]).mean()
    assert accuracy == json.loads((tmp_path / "run" / "metrics.json").read_text())["test_accuracy"]


def test_same_seed_same_file(data, tmp_path):
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    assert _train(data, first) == 0
    # Neither the global generator nor the number of threads has a part in it.
    gl.manual_seed(123)
    arguments = ["train", "--data", data, "--epochs", "3", "--batch-size", "8", "--out", again]
    threads = 'import os; os.environ["OPENBLAS_NUM_THREADS"] = "1"'
    assert gpu_layers(*arguments, before=threads).returncode == 0
    assert _train(data, other, "--seed", "1") == 0
    model = "model.safetensors"
    assert (first / model).read_bytes() == (again / model).read_bytes()
    assert (first / model).read_bytes() != (other / model).read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_images_give_the_same_model(tmp_path, channels):
    arrays = image_arrays(shape=(channels, 9, 7))
    np.savez(tmp_path / "first.npz", **arrays)
    np.savez(tmp_path / "last.npz", **{k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in arrays.items()})
    runs = [("first", []), ("last", []), ("last", ["--layout", "nhwc"]), ("first", ["--layout", "nchw"])]
    for number, (name, options) in enumerate(runs):
        assert _train(tmp_path / f"{name}.npz", tmp_path / str(number), *options) == 0
    models = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(len(runs))]
    assert set(models) == {models[0]}


def test_an_unclear_layout_is_refused_before_anything_is_written(tmp_path, capsys):
    data = write_images(tmp_path / "images.npz", shape=(3, 8, 3))
    assert _train(data, tmp_path / "run") == 2
    assert "say which with --layout nchw or --layout nhwc" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_texts_as_labels(tmp_path):
    arrays = image_arrays()
    names = np.array(["cat", "dog", "été"])
    np.savez(tmp_path / "images.npz", **{k: names[v] if k.startswith("y") else v for k, v in arrays.items()})
    assert _train(tmp_path / "images.npz", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["classes"] == ["cat", "dog", "été"]
    _, facts = load_arrays(tmp_path / "run" / "model.safetensors", "model")
    assert facts["preparation"]["classes"] == ["cat", "dog", "été"]


def test_bar_on_a_terminal(data, tmp_path):
    ours, theirs = pty.openpty()
    options = {"stdout": theirs, "env": environment(TERM="xterm-256color")}
    with started("train", "--data", data, "--epochs", 2, "--out", tmp_path / "run", **options) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the terminal's other end is closed
                break
            if not chunk:
                break
            shown += chunk
        os.close(ours)
        assert (process.wait(timeout=60), process.stderr.read()) == (0, b"")
    text = shown.decode()
    assert "━" in text
    assert "images/s" in text
    assert "epoch 2/2  loss" in text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(data, tmp_path, dtype):
    assert _train(data, tmp_path / "run", "--dtype", dtype) == 0
    weights = safetensors.numpy.load_file(tmp_path / "run" / "model.safetensors")
    assert weights["0.weight"].dtype == (np.float64 if dtype == "float64" else np.float32)


def test_default_run_reaches_98_percent(tmp_path):
    assert main(["train", "--out", str(tmp_path), "--device", "cpu"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test_accuracy"] >= 0.98
    assert metrics["data"]["test"] == 360
