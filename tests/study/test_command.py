"""``gpu-layers study``: what it refuses, and that a library that is wrong makes it fail."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.cli import main
from gpu_layers.study import STUDIES
from tests.cli.commands import assert_one_line_error, gpu_layers, without


def study(capsys, *arguments):
    """Exit status and what was printed, on both streams."""
    status = main(["study", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_lists_the_studies(capsys):
    status, out, _ = study(capsys)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == [*STUDIES, "all"]


def test_prints_verdicts_without_a_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = study(capsys, "pooling", "--quick", "--jobs", 1)
    assert status == 0
    assert "  holds         worked-example: 0 == 0 (numbers that differ, of 40)" in out
    assert out.endswith("7 checks, all hold.\n")
    assert list(tmp_path.iterdir()) == []


def doubled(cls, method):
    original = getattr(cls, method)
    return lambda self, *arguments: 2 * original(self, *arguments)


@pytest.mark.parametrize(
    ("name", "cls", "method", "claim"),
    [
        ("pooling", gl.MaxPool2d, "backward", "gradients-land"),
        ("pooling", gl.AvgPool2d, "forward", "worked-example"),
        ("batch-norm", gl.BatchNorm1d, "backward", "gradient"),
        ("batch-norm", gl.BatchNorm1d, "forward", "training"),
    ],
)
def test_a_library_that_is_wrong_fails_the_study(capsys, monkeypatch, name, cls, method, claim):
    monkeypatch.setattr(cls, method, doubled(cls, method))
    status, out, _ = study(capsys, name, "--quick", "--jobs", 1)
    assert status == 1
    assert f"  FAILED        {claim}: " in out
    assert "failed." in out.splitlines()[-1]


def test_a_wrong_mask_fails_the_study(capsys, monkeypatch):
    forward = gl.Dropout.forward
    # A mask that depends on the dtype.
    monkeypatch.setattr(
        gl.Dropout, "forward", lambda self, x: forward(self, x)[::-1] if x.dtype == np.float16 else forward(self, x)
    )
    status, out, _ = study(capsys, "mask", "--quick", "--jobs", 1)
    assert status == 1
    assert "FAILED        one-mask: 2 == 1" in out


def test_unknown_study(capsys, tmp_path):
    status, _, err = study(capsys, "horoscope", "--out", tmp_path / "page")
    assert status == 2
    assert err.startswith("gpu-layers: error: unknown study 'horoscope': choose from scaling, evaluation,")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("jobs", ["0", "many"])
def test_bad_jobs(capsys, jobs):
    status, _, err = study(capsys, "pooling", "--jobs", jobs)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "argument --jobs: must be" in err


def test_out_is_a_file(capsys, tmp_path):
    out = tmp_path / "file"
    out.write_bytes(b"mine")
    status, printed, err = study(capsys, "pooling", "--out", out)
    assert (status, printed, len(err.splitlines())) == (2, "", 1)
    assert "File exists" in err
    assert out.read_bytes() == b"mine"


def test_out_cannot_be_written_to(capsys):
    # Nobody, root included, makes files there; it is told before any work.
    status, printed, err = study(capsys, "pooling", "--out", "/proc")
    assert (status, printed, len(err.splitlines())) == (2, "", 1)
    assert "/proc" in err


def test_no_gpu():
    finished = gpu_layers(
        "study", "pooling", "--device", "cuda", before='import os; os.environ["CUDA_VISIBLE_DEVICES"] = ""'
    )
    assert_one_line_error(finished, "error: ")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "rich", "sklearn", "threadpoolctl"])
def test_a_missing_extra_is_named_before_any_work(tmp_path, package):
    finished = gpu_layers("study", "all", "--out", tmp_path / "page", before=without(package))
    assert_one_line_error(finished, f"the study needs {package}", "pip install 'gpu-layers[study]'")
    assert not (tmp_path / "page").exists()
