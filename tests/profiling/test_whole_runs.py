"""The programs that the script for a GPU machine calls, with the emulator as their device."""

import json

import pytest

from gpu_layers.runtime.kernel import all_kernels
from gpu_layers.runtime.nvrtc import Architecture, compiled_module
from gpu_layers.verification import all_cases, emulated_backend
from profiling import bit_equality, environment, precompile, small_run
from profiling.covering import covering, kernels_of, with_index64


def cases(text):
    return [case for case in all_cases() if text in str(case)]


def test_the_cover_launches_whatever_any_case_does():
    every = cases("relu float16") + cases("dropout float32")
    chosen, names = covering(every)
    assert names == set().union(*(kernels_of(case) for case in every))
    assert len(chosen) < len(every)
    assert {"relu_forward<__half>", "relu_backward<__half>"} <= names


def test_all_cases_launch_every_kernel():
    assert covering(all_cases())[1] == {kernel.name for kernel in all_kernels()}


def test_64_bit_indices_are_covered_too():
    (case, *_) = cases("avg_pool float32")
    assert any("long long" in name for name in kernels_of(with_index64(case)))
    assert not any("long long" in name for name in kernels_of(case))


def test_small_run(capsys):
    assert small_run.main(["--backend", "emulated", "--only", "relu float32"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("1 cases launched 2 kernels; ")
    assert f"not launched: {all_kernels()[0].name}" in others


def test_bits_of_the_emulator(tmp_path, capsys):
    path = tmp_path / "bits.json"
    assert bit_equality.main(["--backend", "emulated", "--only", "dropout float16", "--json", str(path)]) == 0
    assert "differ that must not" in capsys.readouterr().out
    entries = json.loads(path.read_text())["results"]
    assert entries
    assert all(entry["equals_reference"] and entry["equals_emulator"] for entry in entries)


def test_a_wrong_bit_is_found(capsys):
    (case,) = cases("relu float32 n=37")

    def off_by_a_bit(array):
        return (array.view("u4") ^ 1).view(array.dtype)

    backend = emulated_backend()
    wrong = type(backend)("wrong", off_by_a_bit, backend.activate)
    entries = bit_equality.check(case, wrong, backend)
    assert not entries[0]["equals_reference"]
    assert not entries[0]["equals_emulator"]
    assert f"WRONG {case}: y: " in bit_equality.summary(entries)


def test_precompile(capsys, monkeypatch, tmp_path):
    pytest.importorskip("cupy")
    monkeypatch.setenv("GPU_LAYERS_CACHE_DIR", str(tmp_path))
    assert precompile.main(["--capability", "90", "--only", "relu_forward<float>"]) == 0
    assert capsys.readouterr().out.startswith("1 builds, 0 failed")
    assert [path.suffix for path in (tmp_path / "cubin").iterdir() if path.suffix == ".cubin"] == [".cubin"]


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"half of it"])
def test_damaged_machine_code_is_compiled_again(monkeypatch, tmp_path, suffix, content):
    monkeypatch.setenv("GPU_LAYERS_CACHE_DIR", str(tmp_path))
    (kernel,) = (kernel for kernel in all_kernels() if kernel.name == "relu_forward<float>")
    compiled = compiled_module.__wrapped__  # what is kept in the process is not what is looked at
    module = compiled(kernel.source, (kernel.name,), Architecture(90))
    code = module.path.read_bytes()
    damaged = module.path.with_suffix(suffix)
    damaged.unlink() if content is None else damaged.write_bytes(content)
    assert compiled(kernel.source, (kernel.name,), Architecture(90)) == module
    assert module.path.read_bytes() == code
    assert compiled(kernel.source, (kernel.name,), Architecture(90)) == module


def test_precompile_says_what_does_not_compile():
    pytest.importorskip("cupy")
    (kernel, *_) = all_kernels()
    broken = type(kernel)(kernel.source, "no_such_kernel<float>", kernel.parameters)
    assert "no_such_kernel" in precompile.compile_for_gpu(broken, 90)
    assert precompile.build_for_emulator(kernel) is None


@pytest.mark.parametrize("module", [precompile, small_run, bit_equality, environment])
def test_without_a_gpu(module, capsys):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("GPU: there is one")
    assert module.main([]) == 2
    assert "no usable GPU" in capsys.readouterr().err


def test_folder_name():
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05Z", "commit": "0123abc+"}
    assert environment.folder_name(facts) == "2026-01-02T030405Z-nvidia-h100-80gb-hbm3-0123abc"


def test_commit_of_a_tree_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("GPU_LAYERS_COMMIT", "0123abc")
    assert environment.commit() == "0123abc"
