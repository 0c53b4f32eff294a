"""``gpu-layers compile``: fills the cache with what first launches would compile, without a GPU."""

import sys

import numpy as np
import pytest

from gpu_layers.cli import compile as command
from gpu_layers.cli import main, progress
from gpu_layers.runtime.kernel import BFLOAT16, all_kernels
from gpu_layers.runtime.nvrtc import Architecture, cached_module, compiled_module
from tests.cli.commands import assert_one_line_error, gpu_layers


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    pytest.importorskip("cupy")
    monkeypatch.setenv("GPU_LAYERS_CACHE_DIR", str(tmp_path / "cache"))


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_a_first_launch_finds_what_was_compiled(capsys, tmp_path):
    arguments = ["compile", "--arch", "90", "80", "90", "--only", "^relu_forward", "--dtype", "float32", "bfloat16"]
    assert main(arguments) == 0
    first = last_line(capsys)
    assert first.startswith(
        "2 kernels for compute capability 9.0, compute capability 8.0: 4 compiled, 0 were there, 0 failed; "
    )
    assert first.endswith(str(tmp_path / "cache"))
    (kernel,) = (kernel for kernel in all_kernels() if kernel.name == "relu_forward<float>")
    found = cached_module(kernel.source, (kernel.name,), Architecture(80))
    assert found is not None
    assert found == compiled_module.__wrapped__(kernel.source, (kernel.name,), Architecture(80))
    assert found.path.read_bytes()[:4] == b"\x7fELF"
    assert cached_module(kernel.source, (kernel.name,), Architecture(75)) is None
    assert main(arguments) == 0
    assert "0 compiled, 4 were there, 0 failed" in last_line(capsys)


def test_a_gpu_newer_than_the_compiler_gets_what_its_launches_take(capsys, tmp_path):
    assert main(["compile", "--arch", "999", "--only", "^relu_forward<float>$"]) == 0
    assert "1 kernels for PTX for compute capability " in last_line(capsys)
    assert [path.suffix for path in sorted((tmp_path / "cache/cubin").iterdir())] == [".json", ".ptx"]


def test_what_does_not_compile_is_named_and_the_rest_is_compiled(capsys, monkeypatch):
    (good,) = (kernel for kernel in all_kernels() if kernel.name == "relu_forward<float>")
    broken = type(good)(good.source, "no_such_kernel<float>", good.parameters)
    monkeypatch.setattr(command, "all_kernels", lambda dtypes: [broken, good])
    assert main(["compile", "--arch", "90", "--jobs", "1"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED no_such_kernel<float> (compute capability 9.0): RuntimeError: activation.cu does not" in printed
    assert "1 compiled, 0 were there, 1 failed" in printed.splitlines()[-1]


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float64)])
def test_a_dtype_leaves_out_what_its_arrays_do_not_need(dtype):
    names = {kernel.name for kernel in all_kernels([dtype])}
    own, computed_in = {"float16": ("__half", "float"), "bfloat16": ("__nv_bfloat16", "float")}.get(
        str(dtype), ("double", "double")
    )
    assert f"relu_forward<{own}>" in names
    assert "relu_forward<float>" not in names
    assert f"batch_norm_merge_statistics<{computed_in}>" in names
    assert {"max_unpool_keep<unsigned char>", "advance_rng_state<unsigned long long>"} <= names  # of no element type
    assert {kernel.name for kernel in all_kernels()} > names


def test_every_dtype_needs_every_kernel():
    dtypes = [command._DTYPES[name] for name in ("float16", "bfloat16", "float32", "float64")]
    assert all_kernels(dtypes) == all_kernels()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--arch", "90", "--only", "lstm"], "no kernel is named like 'lstm'"),
        (["--arch", "90", "--only", "("], "is not a regular expression"),
        (["--arch", "9"], "must be in 10 .. 999, got 9"),
        (["--arch", "20"], "does not support compute capability 2.0"),
        (["--arch", "90", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--arch", "90", "--jobs", "0"], "must be in 1 .. 1024, got 0"),
    ],
)
def test_bad_usage_is_one_line(arguments, part):
    assert_one_line_error(gpu_layers("compile", *arguments), part)


def test_without_a_gpu_it_says_what_to_name(capsys, monkeypatch):
    def none():
        raise RuntimeError("no usable GPU: none")

    monkeypatch.setattr(command, "require_gpu", none)
    assert main(["compile"]) == 2
    assert "name it: --arch 90" in capsys.readouterr().err


class Terminal:
    def __init__(self, stream):
        self._stream = stream

    def isatty(self):
        return True

    def __getattr__(self, name):
        return getattr(self._stream, name)


def test_counts_in_place_on_a_terminal_and_in_lines_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_A_LINE", 0)
    for terminal, printed in ((False, "1 of 2 kernels\n2 of 2 kernels\n"), (True, "1 of 2 kernels\r2 of 2 kernels\r")):
        if terminal:
            monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr))
        count = progress.Count("kernels")
        count(1, 2)
        count(2, 2)
        assert capsys.readouterr().err.rstrip(" \r") == printed.rstrip("\r")
