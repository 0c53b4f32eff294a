"""``--device auto``: whatever is wrong with CuPy, the CPU is used, and one line says why."""

import json

import pytest

from tests.cli.commands import assert_one_line_error, environment, gpu_layers
from tests.training.images import write_images

#: A CuPy that does not load, by what its import raises; in a folder that comes first on the path.
BROKEN = {
    "FileNotFoundError: /proc/x": "import os; raise FileNotFoundError('/proc/x')",
    "AttributeError: _ARRAY_API not found": "raise AttributeError('_ARRAY_API not found')",
    "libcublas.so.12: cannot open": "raise ImportError('libcublas.so.12: cannot open')",
    "SystemError: wrong\\n ABI": "raise SystemError('wrong\\n ABI')",
    "cupy/__init__.py is another cupy": "",
}


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path):
    (tmp_path / "path" / "cupy").mkdir(parents=True)
    (tmp_path / "path" / "cupy" / "__init__.py").write_text(BROKEN[request.param])
    before = f"sys.path.insert(0, {str(tmp_path / 'path')!r})"
    return before, " ".join(request.param.replace("\\n", " ").split())


def _one_line_with(text, reason):
    (line,) = [line for line in text.splitlines() if line.startswith("No GPU here (")]
    assert reason in line
    return line


def test_train(broken, tmp_path):
    before, reason = broken
    data = write_images(tmp_path / "images.npz")
    arguments = ["train", "--data", data, "--out", tmp_path / "run", "--epochs", 1]
    finished = gpu_layers(*arguments, before=before)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert _one_line_with(finished.stdout, reason).endswith("): on the CPU.")
    assert "NumPy reference" in finished.stdout
    refused = gpu_layers(*arguments, "--overwrite", "--device", "cuda", before=before)
    assert_one_line_error(refused, reason)
    # Who asks for the CPU is told nothing.
    finished = gpu_layers(*arguments, "--overwrite", "--device", "cpu", before=before)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "GPU" not in finished.stdout


def test_study_and_verification(broken):
    before, reason = broken
    finished = gpu_layers("study", "pooling", "--quick", "--jobs", 1, before=before)
    assert (finished.returncode, finished.stderr) == (0, "")
    _one_line_with(finished.stdout, reason)
    finished = gpu_layers("verify", "--only", "^relu.* float32", before=before)
    assert (finished.returncode, finished.stderr) == (0, "")
    _one_line_with(finished.stdout, reason)
    for command in (["study", "pooling", "--device", "cuda"], ["verify", "--backend", "cuda"]):
        assert_one_line_error(gpu_layers(*command, before=before), reason)


def test_info(broken):
    before, reason = broken
    finished = gpu_layers("info", "--json", before=before)
    assert (finished.returncode, finished.stderr) == (0, "")
    cuda = json.loads(finished.stdout)["backends"]["cuda"]
    assert cuda["available"] is False
    assert reason in cuda["reason"]


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    """With the real CuPy, whose import makes it."""
    data = write_images(tmp_path / "images.npz")
    finished = gpu_layers(
        "train", "--data", data, "--out", tmp_path / "run", "--epochs", 1, env=environment(CUPY_CACHE_DIR="/proc/x")
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "'/proc/x'" in _one_line_with(finished.stdout, "the CUDA backend needs CuPy, which does not load")
    finished = gpu_layers("info", env=environment(CUPY_CACHE_DIR="/proc/x"))
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "Problems" in finished.stdout
