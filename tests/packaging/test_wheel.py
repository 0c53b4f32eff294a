"""What users install: the built wheel, used where the checkout cannot be seen."""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_IN_THE_TREE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
CORE_DEPENDENCIES = ("numpy", "ml_dtypes")


def run(*command, **options):
    """Run to the end; a failure shows what the command printed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(tree, out, *kinds):
    """Build without an environment of its own: no network."""
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", out, tree)
    return out


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, which the build may litter."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "gpu_layers", ignore=NOT_IN_THE_TREE)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    (path,) = build(tree, tmp_path_factory.mktemp("wheel"), "--wheel").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist_and_its_wheel(tree, tmp_path_factory):
    """Without a kind, ``build`` makes an sdist and then a wheel from that."""
    folder = build(tree, tmp_path_factory.mktemp("sdist"))
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment that holds the installed wheel, NumPy and ml_dtypes, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    dependencies = folder / "dependencies"
    dependencies.mkdir()
    for name in CORE_DEPENDENCIES:
        distribution = importlib.metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            (dependencies / entry).symlink_to(distribution.locate_file(entry))
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return environment


def in_environment(environment, code, folder):
    """Run Python code, with neither the current folder nor PYTHONPATH on the module path."""
    return run(environment / "bin" / "python", "-I", "-c", textwrap.dedent(code), cwd=folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def digests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_wheel_holds_every_file_of_the_tree(wheel, tree):
    """A new package or data file that pyproject.toml does not list fails here."""
    expected = {f"gpu_layers/cuda_src/{path.name}" for path in (tree / "cuda_src").iterdir()}
    expected |= {str(path.relative_to(tree)) for path in (tree / "gpu_layers").rglob("*") if path.is_file()}
    assert {name for name in digests(wheel) if ".dist-info/" not in name} == expected
    assert "gpu_layers/py.typed" in expected


def test_sdist_builds_the_same_wheel(wheel, sdist_and_its_wheel):
    _, from_sdist = sdist_and_its_wheel
    assert digests(from_sdist) == digests(wheel)


def test_sdist_holds_tests_and_documents(sdist_and_its_wheel, tree):
    with tarfile.open(sdist_and_its_wheel[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"Makefile", "README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"}
    expected |= {"CITATION.cff", "RELEASING.md", "SECURITY.md", "mkdocs.yml"}
    for folder in ("tests", "examples", "docs"):
        expected |= {str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()}
    assert expected <= names


def test_finds_its_cuda_sources(environment, tree, tmp_path):
    code = "from gpu_layers.runtime.sources import source_folder; print(source_folder())"
    folder = Path(in_environment(environment, code, tmp_path).strip())
    assert environment in folder.parents
    assert contents(folder) == contents(tree / "cuda_src")


def test_every_module_imports_with_the_core_dependencies(environment, tmp_path):
    printed = in_environment(
        environment,
        """
        import importlib, pkgutil, sys
        import gpu_layers
        for module in pkgutil.walk_packages(gpu_layers.__path__, "gpu_layers."):
            if not module.name.endswith("__main__") and not module.name.startswith("gpu_layers.torch"):
                importlib.import_module(module.name)
                print(module.name)
        """,
        tmp_path,
    )
    assert {"gpu_layers.layers", "gpu_layers.kernels", "gpu_layers.training"} <= set(printed.split())


def test_without_torch_its_package_says_what_to_install(environment, tmp_path):
    in_environment(
        environment,
        """
        try:
            import gpu_layers.torch
        except ImportError as error:
            assert "pip install torch" in str(error), error
        else:
            raise AssertionError("no error")
        """,
        tmp_path,
    )


def test_works_without_the_checkout(environment, tmp_path):
    in_environment(
        environment,
        """
        import numpy as np
        import gpu_layers as gl
        layer = gl.Dropout(0.5, generator=gl.Generator(seed=1))
        kept = layer(np.ones(1000, np.float32)) != 0
        assert (kept == gl.ops.dropout_mask(1000, 0.5, seed=1, offset=0)).all()
        """,
        tmp_path,
    )


def test_command_reports_the_installation(environment, tmp_path, monkeypatch):
    # A cache that no other test writes to meanwhile: its size is printed.
    monkeypatch.setenv("GPU_LAYERS_CACHE_DIR", str(tmp_path / "cache"))
    printed = run(environment / "bin" / "gpu-layers", "info", cwd=tmp_path)
    assert importlib.metadata.version("gpu-layers") in printed
    assert run(environment / "bin" / "python", "-I", "-m", "gpu_layers", "info", cwd=tmp_path) == printed


def test_training_without_its_extra_says_what_to_install(environment, tmp_path):
    done = subprocess.run(
        [environment / "bin" / "gpu-layers", "train"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "gpu-layers[train]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_core_requires_numpy_and_ml_dtypes_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    required = [
        line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert [name.split(">=")[0] for name in required] == list(CORE_DEPENDENCIES)
    assert "License-Expression: Apache-2.0" in lines
