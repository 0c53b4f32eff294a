"""A checkout on a machine that likes other line ends: what shells read has the ones that they take."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("profiling/on_gpu.sh", ".ci/run", "Makefile", "cuda_src/philox.cuh", "pyproject.toml", "CHANGELOG.md")


@pytest.fixture
def checkout(tmp_path):
    """Some files of this tree, committed and checked out with CRLF asked for."""
    source = tmp_path / "source"
    for name in (".gitattributes", *FILES):
        if (ROOT / name).exists():  # .ci is not in a released archive
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    (source / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n text \n")

    def git(*arguments, cwd):
        settings = ["-c", "core.autocrlf=true", "-c", "core.eol=crlf", "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *settings, *arguments], cwd=cwd, check=True, capture_output=True)

    git("init", "-q", ".", cwd=source)
    git("add", ".", cwd=source)
    git("commit", "-q", "-m", "all", cwd=source)
    git("clone", "-q", str(source), str(tmp_path / "checkout"), cwd=tmp_path)
    return source, tmp_path / "checkout"


def test_line_ends(checkout):
    source, copy = checkout
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert len(names) >= 6
    for name in names:
        assert (copy / name).read_bytes() == (source / name).read_bytes(), name


def test_the_script_runs(checkout):
    _, copy = checkout
    done = subprocess.run(
        ["bash", "profiling/on_gpu.sh", "--help"], cwd=copy, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "usage: profiling/on_gpu.sh [--list] [--only STEP,...] [OUT_DIR]\n")
