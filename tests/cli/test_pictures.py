"""The picture of a run is the same whatever the user's settings are, and none is worth a model."""

import os
import subprocess
import sys

import pytest

from tests.cli.commands import environment, gpu_layers
from tests.training.images import write_images

OPTIONS = ("train", "--device", "cpu", "--epochs", 2, "--batch-size", 8)


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "images.npz")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The picture where nobody has set anything."""
    folder = tmp_path_factory.mktemp("plain")
    bare = environment()
    for name in ("MPLBACKEND", "MATPLOTLIBRC"):
        bare.pop(name, None)
    finished = gpu_layers(*OPTIONS, "--data", write_images(folder / "images.npz"), "--out", folder / "run", env=bare)
    assert (finished.returncode, finished.stderr) == (0, "")
    return (folder / "run" / "curves.png").read_bytes()


@pytest.mark.parametrize(
    ("variables", "settings"),
    [
        ({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, None),  # a notebook's
        ({"MPLBACKEND": "no_such_backend"}, None),
        ({"MPLBACKEND": "qtagg"}, None),
        ({}, b"text.usetex: True\n"),
        ({}, b"axes.facecolor: red\nfigure.dpi: 30\nlines.linewidth: 9\nfont.size: 30\nsavefig.bbox: tight\n"),
        ({}, b"font.family: No Such Font\naxes.formatter.use_mathtext: True\n"),
        ({"MPLBACKEND": "no_such_backend"}, b"text.usetex: True\n"),
    ],
)
def test_settings_of_the_user(data, plain, variables, settings):
    if settings is not None:
        (data.parent / "matplotlibrc").write_bytes(settings)
        variables = {**variables, "MATPLOTLIBRC": str(data.parent / "matplotlibrc")}
    out = data.parent / "run"
    finished = gpu_layers(*OPTIONS, "--data", data, "--out", out, env=environment(**variables))
    assert (finished.returncode, finished.stderr) == (0, "")
    assert (out / "curves.png").read_bytes() == plain


def test_a_file_of_settings_that_is_no_text(data, plain):
    (data.parent / "matplotlibrc").write_bytes(b"text.usetex: \xff\xfe\n")
    out, variables = data.parent / "run", {"MATPLOTLIBRC": str(data.parent / "matplotlibrc")}
    finished = gpu_layers(*OPTIONS, "--data", data, "--out", out, env=environment(**variables))
    assert finished.returncode == 0
    assert "Traceback" not in finished.stderr
    assert (out / "curves.png").read_bytes() == plain


@pytest.mark.parametrize("name", ["a$b.npz", "$x_1^{2$.npz", "数据集.npz", "\\frac.npz", "100%.npz"])
def test_names_are_drawn_as_they_are(data, plain, name):
    data = data.rename(data.with_name(name))
    out = data.parent / "run"
    finished = gpu_layers(*OPTIONS, "--data", data, "--out", out)
    assert (finished.returncode, finished.stderr) == (0, "")
    picture = (out / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture != plain, "the title is another"


def test_a_picture_that_fails_is_a_warning(data):
    fails = """
import matplotlib.figure
def fail(*arguments, **options): raise RuntimeError("no such\\nfont")
matplotlib.figure.Figure.savefig = fail
"""
    out = data.parent / "run"
    for choice in ([], ["--overwrite"]):
        finished = gpu_layers(*OPTIONS, "--data", data, "--out", out, *choice, before=fails)
        assert finished.returncode == 0
        assert finished.stderr == "gpu-layers: warning: curves.png is not drawn: no such font\n"
        assert finished.stdout.splitlines()[-1] == f"wrote model.safetensors, metrics.json in {out}"
        # Nor is there that of another run.
        assert not (out / "curves.png").exists()
        (out / "curves.png").write_bytes(b"of an earlier run")
    finished = gpu_layers(*OPTIONS, "--data", data, "--out", out, "--resume")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_a_study_that_fails_is_a_warning(tmp_path):
    fails = """
import matplotlib.figure
def fail(*arguments, **options): raise RuntimeError("no such\\nfont <b>")
matplotlib.figure.Figure.savefig = fail
"""
    arguments = ["study", "pooling", "--quick", "--device", "cpu", "--jobs", 1, "--out", tmp_path / "page"]
    finished = gpu_layers(*arguments, before=fails)
    assert finished.returncode == 0
    warnings = finished.stderr.splitlines()
    assert warnings
    for line in warnings:
        assert line.startswith("gpu-layers: warning: figure ")
        assert line.endswith(" of pooling is not drawn: RuntimeError: no such font <b>")
    assert finished.stdout.splitlines()[-2:] == [f"wrote {tmp_path / 'page' / 'index.html'}", "7 checks, all hold."]
    assert (tmp_path / "page" / "results.json").exists()
    figures = list((tmp_path / "page" / "figures").iterdir())
    assert len(figures) == len(warnings)
    assert all("no such font &lt;b&gt;" in path.read_text() for path in figures)


def test_the_users_program_keeps_its_settings():
    program = """
import matplotlib
matplotlib.rcParams["lines.linewidth"] = 9
before = dict(matplotlib.rcParams)
from gpu_layers.training.curves import curves_png
entry = dict(epoch=1, train_loss=1.0, test_loss=1.0, train_accuracy=0.5, test_accuracy=0.5)
curves_png([entry], "title")
assert dict(matplotlib.rcParams) == before
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(MPLBACKEND="svg"))


@pytest.mark.parametrize("variables", [{"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, {}])
def test_a_study(tmp_path, variables):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nmathtext.fontset: custom\nsvg.fonttype: path\n")
    pages = []
    for name, changed in (("plain", {}), ("run", {**variables, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})):
        arguments = ["study", "pooling", "--quick", "--device", "cpu", "--jobs", 2, "--out", tmp_path / name]
        finished = gpu_layers(*arguments, env=environment(**changed))
        assert (finished.returncode, finished.stderr) == (0, "")
        pages.append({path.name: path.read_bytes() for path in (tmp_path / name / "figures").iterdir()})
    assert pages[0]
    assert pages[0] == pages[1]
    assert sorted(os.listdir(tmp_path / "run")) == ["figures", "index.html", "results.json"]
