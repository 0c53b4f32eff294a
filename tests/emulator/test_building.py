"""Modules are built once, safely, and what is missing is named."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gpu_layers.runtime import emulator, headers
from gpu_layers.runtime.cache import cache_folder
from gpu_layers.runtime.emulator import errors, toolchain

from .conftest import KERNELS

ROOT = pathlib.Path(__file__).parents[2]

SOURCE = """\
#include "factor.cuh"
__global__ void scale(const float* x, float* y) { y[threadIdx.x] = kFactor * x[threadIdx.x]; }
"""


@pytest.fixture(scope="session")
def compiled_runtimes() -> list[pathlib.Path]:
    """What every module is linked with takes seconds to compile: once is enough."""
    emulator.load(KERNELS / "launches.cu", ["scale"])
    return list((cache_folder() / "emulator").glob("runtime-*"))


@pytest.fixture
def project(compiled_runtimes, tmp_path, monkeypatch):
    """A .cu file with a header, and a cache without modules."""
    (tmp_path / "cache" / "emulator").mkdir(parents=True)
    for runtime in compiled_runtimes:
        (tmp_path / "cache" / "emulator" / runtime.name).symlink_to(runtime)
    monkeypatch.setenv("GPU_LAYERS_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "scale.cu").write_text(SOURCE)
    (folder / "factor.cuh").write_text("constexpr float kFactor = 2.0f;\n")
    return folder


def scaled(project: pathlib.Path) -> float:
    y = np.zeros(4, np.float32)
    emulator.load(project / "scale.cu", ["scale"]).launch("scale", (1,), (4,), [np.ones(4, np.float32), y])
    return float(y[0])


def modules(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return sorted((tmp_path / "cache" / "emulator").glob("scale-*/module.so"))


def test_a_module_is_built_once_and_again_when_a_header_changes(project, tmp_path):
    assert scaled(project) == 2
    (first,) = modules(tmp_path)
    built = first.stat().st_mtime_ns
    assert scaled(project) == 2
    assert first.stat().st_mtime_ns == built
    (project / "factor.cuh").write_text("constexpr float kFactor = 3.0f;\n")
    assert scaled(project) == 3
    assert len(modules(tmp_path)) == 2
    assert not list((tmp_path / "cache" / "emulator").glob("building-*"))


def test_two_processes_that_build_at_once_both_succeed(project, tmp_path):
    script = (
        "import sys, numpy as np; from gpu_layers.runtime import emulator\n"
        "y = np.zeros(4, np.float32)\n"
        "module = emulator.load(sys.argv[1], ['scale'])\n"
        "module.launch('scale', (1,), (4,), [np.ones(4, np.float32), y]); print(y[0])"
    )
    command = [sys.executable, "-c", script, str(project / "scale.cu")]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == ["2.0\n"] * 3
    assert len(modules(tmp_path)) == 1


def test_a_half_built_module_is_never_used(project, tmp_path):
    """A build that was killed leaves a scratch folder behind, not a module."""
    scratch = tmp_path / "cache" / "emulator" / "building-killed"
    scratch.mkdir()
    (scratch / "module.so").write_bytes(b"half of it")
    assert scaled(project) == 2


def test_a_compile_error_shows_the_file_and_line(project):
    (project / "scale.cu").write_text(SOURCE.replace("kFactor *", "kFaktor *"))
    with pytest.raises(errors.CompilationError) as caught:
        scaled(project)
    assert re.search(rf"{re.escape(str(project / 'scale.cu'))}:2:\d+: error: .*kFaktor", str(caught.value))


def test_an_unknown_name_expression_is_a_compile_error(project):
    with pytest.raises(errors.CompilationError, match="halve"):
        emulator.load(project / "scale.cu", ["halve<float>"])


def test_a_missing_source_is_an_error(project):
    with pytest.raises(FileNotFoundError, match=r"none\.cu"):
        emulator.load(project / "none.cu", ["scale"])


def test_include_dirs_are_searched_and_hashed(project, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(project / "factor.cuh", elsewhere / "factor.cuh")
    with pytest.raises(errors.CompilationError, match=r"factor\.cuh"):
        scaled(project)
    for factor in (5, 6):
        (elsewhere / "factor.cuh").write_text(f"constexpr float kFactor = {factor};\n")
        y = np.zeros(4, np.float32)
        module = emulator.load(project / "scale.cu", ["scale"], include_dirs=[elsewhere])
        module.launch("scale", (1,), (4,), [np.ones(4, np.float32), y])
        assert y[0] == factor


def test_two_modules_with_the_same_kernel_keep_apart(project, tmp_path):
    """Symbols of one shared object must never satisfy another's."""
    other = tmp_path / "other"
    shutil.copytree(project, other)
    (other / "factor.cuh").write_text("constexpr float kFactor = 7.0f;\n")
    assert [scaled(project), scaled(other), scaled(project)] == [2, 7, 2]


def test_without_a_compiler_the_package_to_install_is_named(project, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(errors.ToolchainError, match=r"apt-get install g\+\+"):
        scaled(project)


def test_a_wrong_cxx_is_named(project, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(errors.ToolchainError, match="CXX=no-such-compiler was not found"):
        scaled(project)


def test_without_the_cuda_headers_the_package_to_install_is_named(project, monkeypatch):
    monkeypatch.setattr(toolchain, "cuda_header_folders", list)
    monkeypatch.setenv("CUDA_PATH", "/nonexistent")
    with pytest.raises(errors.ToolchainError, match="pip install nvidia-cuda-runtime"):
        scaled(project)


@pytest.mark.parametrize("mode", ["trace", "asan", "ubsan"])
def test_all_but_the_fast_mode_ask_for_gcc(project, monkeypatch, tmp_path, mode):
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\necho 'Debian clang version 14.0.6'\n")
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    with pytest.raises(errors.ToolchainError, match=rf"mode '{mode}' needs g\+\+"):
        toolchain.compile_flags(mode, toolchain.find_compiler())


def test_an_unknown_mode_is_refused(project):
    with pytest.raises(ValueError, match="one of fast, trace, asan, ubsan, but got 'slow'"):
        emulator.load(project / "scale.cu", ["scale"], mode="slow")


def test_many_kernels_are_compiled_in_parts(project, tmp_path):
    """Every part holds the file's plain functions and variables: the module has one of each."""
    (project / "scale.cu").write_text(
        "__device__ int calls = 0;\n"
        "__device__ int next() { return ++calls; }\n"
        "template <int k> __global__ void add(int* y) { *y = k + 1000 * next(); }\n"
    )
    names = [f"add<{k}>" for k in range(40)]
    module = emulator.load(project / "scale.cu", names)
    y = np.zeros(1, np.int32)
    for turn, k in enumerate((0, 1, 38, 39), start=1):
        module.launch(f"add<{k}>", (1,), (1,), [y])
        assert y[0] == k + 1000 * turn


def test_the_portable_context_switch_gives_the_same_results(project, monkeypatch):
    """Other processors than x86-64 switch stacks with the C library."""
    (project / "scale.cu").write_text(
        "__global__ void scan(int* y) {\n"
        "    __shared__ int sums[128];\n"
        "    sums[threadIdx.x] = 1;\n"
        "    __syncthreads();\n"
        "    for (unsigned step = 1; step < 128; step *= 2) {\n"
        "        int left = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;\n"
        "        __syncthreads();\n"
        "        sums[threadIdx.x] += __shfl_sync(0xffffffffu, left, threadIdx.x % 32);\n"
        "        __syncthreads();\n"
        "    }\n"
        "    y[threadIdx.x] = sums[threadIdx.x];\n"
        "}\n"
    )
    monkeypatch.setenv("GPU_LAYERS_EMULATOR_UCONTEXT", "1")
    module = emulator.load(project / "scale.cu", ["scan"])
    for schedule in emulator.ALL_SCHEDULES:
        y = np.zeros(128, np.int32)
        module.launch("scan", (1,), (128,), [y], schedule=schedule)
        np.testing.assert_array_equal(y, np.arange(1, 129))


def test_headers_come_from_the_wheels():
    """The cache key holds their content: another CUDA version is another module."""
    folder = toolchain.find_cuda_headers()
    assert folder == headers.cuda_header_folders()[0]
    assert (folder / "cuda_fp16.h").is_file()
    assert re.fullmatch("[0-9a-f]{64}", toolchain.headers_digest(folder))
    assert os.path.isabs(folder)
