"""Modules are built once, safely, and what is missing is named."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gpu_layers import emulator
from gpu_layers.core import headers
from gpu_layers.core.cache import cache_folder
from gpu_layers.emulator import defaults, errors, toolchain
from gpu_layers.emulator.build import is_whole

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
    return [path for path in (cache_folder() / "emulator").glob("runtime-*") if path.is_dir()]


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


def scaled(project: pathlib.Path, **options) -> float:
    y = np.zeros(4, np.float32)
    emulator.load(project / "scale.cu", ["scale"], **options).launch("scale", (1,), (4,), [np.ones(4, np.float32), y])
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
    command = [sys.executable, "-c", LAUNCH, str(project / "scale.cu")]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == ["2.0\n"] * 3
    assert len(modules(tmp_path)) == 1


LAUNCH = (
    "import sys, numpy as np; from gpu_layers import emulator\n"
    "y = np.zeros(4, np.float32)\n"
    "module = emulator.load(sys.argv[1], ['scale'])\n"
    "module.launch('scale', (1,), (4,), [np.ones(4, np.float32), y]); print(y[0])"
)


def scaled_elsewhere(project: pathlib.Path, before: str = "", **options) -> subprocess.CompletedProcess:
    """The same in a process of its own, which has nothing loaded yet."""
    command = [sys.executable, "-c", f"{before}\n{LAUNCH}", str(project / "scale.cu")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


KILLED = """
import os, signal, subprocess
run = subprocess.run
def killing(command, **options):
    if "-shared" in command:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(command, **options)
subprocess.run = killing
"""


def test_a_killed_build_is_neither_used_nor_kept(project, tmp_path):
    folder = tmp_path / "cache" / "emulator"
    assert scaled_elsewhere(project, KILLED).returncode == -9
    assert len(list(folder.glob("building-scale-fast-*.*"))) == 1
    (folder / "building-of-an-older-version").mkdir()
    (folder / "building-of-an-older-version" / "module.so").write_bytes(b"half of it")
    assert scaled_elsewhere(project).stdout == "2.0\n"
    assert not list(folder.glob("building-*"))


def test_a_build_under_way_is_left_alone(project, tmp_path):
    folder = tmp_path / "cache" / "emulator"
    scratch = folder / "building-other-fast-0123.abcd"
    scratch.mkdir()
    with (folder / "other-fast-0123.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert scaled(project) == 2
        assert scratch.exists()
    (project / "factor.cuh").write_text("constexpr float kFactor = 3.0f;\n")
    assert scaled(project) == 3
    assert not scratch.exists()


def _empty(path):
    path.write_bytes(b"")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _zeroed(path):  # as after a power cut: the size is right
    path.write_bytes(bytes(path.stat().st_size))


def _flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = pytest.mark.parametrize("damage", [pathlib.Path.unlink, _empty, _cut, _zeroed, _flipped])


@DAMAGES
def test_a_damaged_module_is_built_again(project, tmp_path, damage):
    assert scaled_elsewhere(project).stdout == "2.0\n"  # this process must not have mapped what is damaged
    (module,) = modules(tmp_path)
    whole = module.stat().st_size
    damage(module)
    assert (scaled_elsewhere(project).stdout, scaled_elsewhere(project).stderr) == ("2.0\n", "")
    assert module.stat().st_size == whole
    assert not list((tmp_path / "cache" / "emulator").glob("building-*"))


@pytest.mark.parametrize("content", ["", "[]", "{}x", '{"module.so": 3}', None])
def test_a_damaged_manifest_is_a_damaged_module(project, tmp_path, content):
    assert scaled(project) == 2
    (module,) = modules(tmp_path)
    manifest = module.with_name("manifest.json")
    good = manifest.read_text()
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    assert scaled(project) == 2
    assert json.loads(manifest.read_text()).keys() == json.loads(good).keys()


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, _empty, _flipped])
def test_a_damaged_object_of_the_runtime_is_built_again(project, tmp_path, compiled_runtimes, damage):
    folder = tmp_path / "cache" / "emulator"
    for runtime in compiled_runtimes:  # a copy of one's own
        (folder / runtime.name).unlink()
        shutil.copytree(runtime, folder / runtime.name)
    copies = [path for path in folder.glob("runtime-*") if path.is_dir()]
    for copy in copies:  # of other modes too: which one a module takes is not told
        damage(min(copy.glob("*.o")))
    assert not any(is_whole(copy) for copy in copies)
    done = scaled_elsewhere(project)
    assert (done.stdout, done.stderr) == ("2.0\n", "")
    assert [is_whole(copy) for copy in copies].count(True) == 1


def test_the_folder_may_begin_with_a_tilde(project, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPU_LAYERS_CACHE_DIR", "~/kernels")
    assert cache_folder() == tmp_path / "home" / "kernels"
    monkeypatch.delenv("GPU_LAYERS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/other")
    assert cache_folder() == tmp_path / "home" / "other" / "gpu_layers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "gpu_layers"
    assert not (tmp_path / "~").exists()


def test_without_a_home_the_variable_that_helps_is_named(project):
    nobody = "import os, pwd\ndef unknown(user): raise KeyError(user)\npwd.getpwuid = unknown"
    bare = {"PATH": os.environ["PATH"]}
    done = scaled_elsewhere(project, nobody, env=bare)
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: no folder for compiled kernels (")
    assert "set GPU_LAYERS_CACHE_DIR" in done.stderr
    done = scaled_elsewhere(project, env={**bare, "HOME": "/proc/nonexistent"})
    assert "compiled kernels cannot be kept in /proc/nonexistent/.cache/gpu_layers/emulator" in done.stderr
    assert "set GPU_LAYERS_CACHE_DIR" in done.stderr


def test_a_read_only_cache_that_has_the_module_is_enough(project, tmp_path, monkeypatch):
    assert scaled(project) == 2
    # Root may write to folders without that permission, so what would be written is what is looked at.
    before = sorted(path.name for path in (tmp_path / "cache").rglob("*"))
    module = sys.modules["gpu_layers.emulator.build"]  # the package calls a function of it by that name
    monkeypatch.setattr(module, "_make_writable", lambda folder: pytest.fail("something was to be written"))
    assert scaled(project) == 2
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*")) == before


def test_folders_may_be_named(project, tmp_path, compiled_runtimes):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for runtime in compiled_runtimes:
        (elsewhere / runtime.name).symlink_to(runtime)
    assert scaled(project, cache_dir=elsewhere, header_dir=defaults.cuda_headers()) == 2
    assert [path.name for path in elsewhere.glob("scale-fast-*") if path.is_dir()]
    assert not modules(tmp_path)
    with pytest.raises(errors.CacheError, match=r"cannot be kept in /proc/nonexistent \("):
        scaled(project, cache_dir="/proc/nonexistent")


def test_the_compiler_may_have_a_launcher_and_flags(project, tmp_path, monkeypatch):
    launcher = tmp_path / "my launcher"
    launcher.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\nexec "$@"\n')
    launcher.chmod(0o755)
    (project / "scale.cu").write_text(SOURCE.replace("kFactor *", "kFactor * TIMES *"))
    monkeypatch.setenv("CXX", f"'{launcher}' g++ -DTIMES=3")
    assert scaled(project) == 6
    assert "g++ -DTIMES=3" in (tmp_path / "calls").read_text()
    # Flags are a part of what was built.
    monkeypatch.setenv("CXX", "g++ -DTIMES=4")
    assert scaled(project) == 8
    # A path with spaces is one word, as it always was.
    compiler = tmp_path / "my g++"
    compiler.write_text('#!/bin/sh\nexec g++ -DTIMES=5 "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert toolchain.find_compiler().command == (str(compiler),)
    for wrong in ("'g++", "no-such-compiler -O2", "'' g++"):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(errors.ToolchainError, match="was not found"):
            toolchain.find_compiler()


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
        assert scaled(project, include_dirs=[elsewhere]) == factor


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
    monkeypatch.setattr(defaults, "cuda_header_folders", list)
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
    with pytest.raises(ValueError, match="one of fast, trace, asan, ubsan, got 'slow'"):
        scaled(project, mode="slow")


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
    folder = defaults.cuda_headers()
    assert folder == headers.cuda_header_folders()[0]
    assert (folder / "cuda_fp16.h").is_file()
    assert re.fullmatch("[0-9a-f]{64}", toolchain.headers_digest(folder))
    assert folder.is_absolute()
