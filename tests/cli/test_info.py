"""What ``gpu-layers info`` says, with everything there and with things missing."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gpu_layers import __version__
from gpu_layers.cli import info, main
from tests.cli.commands import gpu_layers


def _json(capsys):
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_facts(capsys):
    facts = _json(capsys)
    assert facts["versions"]["gpu-layers"] == __version__
    assert facts["versions"]["NumPy"] == np.__version__
    assert facts["backends"]["reference"] == {"available": True}
    assert set(facts["backends"]) == {"reference", "emulated", "cuda"}
    assert facts["backends"]["cuda"]["available"] == bool(facts["gpus"])


def test_text_says_the_same(capsys):
    facts = _json(capsys)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles == ["Versions", "Tools", "Cache", "Backends", "GPUs", "Missing"]
    for name, version in facts["versions"].items():
        assert [name, version or "-"] in [line.split() for line in lines]
    columns = {len(line) - len(line[2:].split("  ", 1)[1].lstrip()) for line in lines if "  " in line[2:]}
    assert len(columns) == 1, "aligned"


def test_cache_size_and_location(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GPU_LAYERS_CACHE_DIR", str(tmp_path / "cache"))
    assert _json(capsys)["cache"] == {"folder": str(tmp_path / "cache"), "bytes": 0, "kernels": 0}
    for name, size in (("cubin/a.cubin", 2**20), ("cubin/a.json", 100), ("cubin/b.ptx", 2**19), ("emulator/c.so", 30)):
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).write_bytes(bytes(size))
    assert _json(capsys)["cache"] == {"folder": str(tmp_path / "cache"), "bytes": 2**20 + 2**19 + 130, "kernels": 2}
    assert main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["size", "1.5", "MiB"] in lines
    assert ["compiled", "kernels", "2"] in lines


def test_a_compiler_of_another_cuda_than_cupys_is_said(capsys, monkeypatch):
    cupy = pytest.importorskip("cupy")
    own = cupy.cuda.runtime.runtimeGetVersion() // 1000
    monkeypatch.setattr(info, "nvrtc", lambda: SimpleNamespace(getVersion=lambda: (own, 2)))
    assert "NVRTC of CuPy's CUDA version" not in [entry["what"] for entry in _json(capsys)["missing"]]
    monkeypatch.setattr(info, "nvrtc", lambda: SimpleNamespace(getVersion=lambda: (own + 1, 0)))
    facts = _json(capsys)
    assert "NVRTC of CuPy's CUDA version" in [entry["what"] for entry in facts["missing"]]
    assert facts["versions"]["NVRTC"] == f"{own + 1}.0"


def test_missing_compiler_and_headers(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(info, "cuda_header_folders", lambda version: [])
    facts = _json(capsys)
    assert facts["tools"] == {"C++ compiler": None, "CUDA headers": None}
    assert "no-such-compiler" in facts["backends"]["emulated"]["reason"]
    advice = {entry["what"]: entry["advice"] for entry in facts["missing"]}
    assert "apt-get install g++" in advice["C++ compiler"]
    assert "pip install nvidia-cuda-runtime" in advice["CUDA headers"]


def test_missing_cupy(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    facts = _json(capsys)
    assert facts["versions"]["CuPy"] is None
    assert facts["versions"]["NVRTC"] is None
    assert facts["backends"]["cuda"]["available"] is False
    advice = {entry["what"]: entry["advice"] for entry in facts["missing"]}
    assert "pip install 'gpu-layers[cuda12]'" in advice["CuPy"]
    assert "NVRTC" not in advice, "it comes with CuPy"
    assert main(["info"]) == 0
    assert "  CuPy " in capsys.readouterr().out


def _installed(folder, *names):
    """Packages that are installed in a folder, as pip leaves them, without their files."""
    for name in names:
        path = folder / f"{name.replace('-', '_')}-14.0.0.dist-info"
        path.mkdir()
        (path / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 14.0.0\n")
    return folder


@pytest.mark.parametrize("more", [["cupy-cuda13x"], ["cupy-cuda13x", "cupy"], ["cupy-rocm-5-0"]])
def test_several_packages_of_cupy(tmp_path, more):
    """They overwrite each other's files; a package that only begins so is none."""
    path = _installed(tmp_path, *more, "cupy-cuda12x", "cupyx-helpers", "cupy-extension")
    before = f"sys.path.insert(0, {str(path)!r})"
    finished = gpu_layers("info", before=before)
    assert (finished.returncode, finished.stderr) == (0, "")
    names = sorted([*more, "cupy-cuda12x"])
    lines = finished.stdout.splitlines()
    (problem,) = lines[lines.index("Problems") + 1 :]
    assert problem.split("  ")[1] == f"{len(names)} packages of CuPy: {', '.join(names)}"
    assert f"pip uninstall {' '.join(names)}; then one of them: pip install 'gpu-layers[cuda12]' or" in problem
    facts = json.loads(gpu_layers("info", "--json", before=before).stdout)
    assert [entry["what"] for entry in facts["problems"]] == [f"{len(names)} packages of CuPy: {', '.join(names)}"]


def test_no_problem(capsys):
    assert _json(capsys)["problems"] == []


def test_missing_extra(capsys, monkeypatch):
    version = info._version
    monkeypatch.setattr(info, "_version", lambda package: None if package == "rich" else version(package))
    assert {"what": "rich", "advice": "pip install 'gpu-layers[train]'"} in _json(capsys)["missing"]


def test_a_broken_cupy_is_shown_not_raised(capsys, monkeypatch):
    def fail():
        raise OSError("libcuda.so.1:\n  wrong ELF class")

    monkeypatch.setattr(info, "require_gpu", fail)
    backend = _json(capsys)["backends"]["cuda"]
    assert backend == {"available": False, "reason": "libcuda.so.1: wrong ELF class"}


def test_gpus(capsys, monkeypatch):
    monkeypatch.setattr(info, "require_gpu", lambda: None)
    monkeypatch.setattr(
        info, "_gpus", lambda cupy: [{"name": "NVIDIA X", "compute_capability": "9.0", "memory_gib": 79.6}]
    )
    assert main(["info"]) == 0
    assert "NVIDIA X, compute capability 9.0, 79.6 GiB" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_real_gpu_is_named(capsys):
    gpu = _json(capsys)["gpus"][0]
    assert gpu["name"]
    assert float(gpu["compute_capability"]) >= 7
    assert gpu["memory_gib"] > 0


def test_plans(capsys):
    assert main(["info", "--plan", "256,64,112,112", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    reads = {(row["dtype"], row["layout"], row["pass"]): row["reads"] for row in rows}
    assert len(reads) == 16
    # A channel has 6.4 MB of bfloat16, which an H100 holds; 64 bytes of each row are 205 MB, which it does not.
    assert reads["bfloat16", "NCHW", "forward"] == reads["bfloat16", "NCHW", "backward"] == 1
    assert reads["bfloat16", "NHWC", "forward"] == 2
    assert main(["info", "--plan", "64x1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["float16", "rows", "forward"]
    assert len(lines) == 9


@pytest.mark.parametrize("shape", ["64", "64,0", "1,2,3,4,5,6", "a,b", "-1,3", ""])
def test_a_shape_that_is_none(capsys, shape):
    assert main(["info", f"--plan={shape}"]) == 2
    message = capsys.readouterr().err
    assert "a shape has 2 to 5 positive sizes" in message
    assert message.count("\n") == 1
