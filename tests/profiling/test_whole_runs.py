"""The programs that the script for a GPU machine calls, with the emulator as their device."""

import json

import numpy as np
import pytest

from gpu_layers.runtime.kernel import BFLOAT16, all_kernels
from gpu_layers.runtime.nvrtc import Architecture, compiled_module
from gpu_layers.verification import all_cases, emulated_backend
from profiling import devices, probe, small_run
from profiling.small_run import covering, kernels_of, with_index64


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
    *others, last = capsys.readouterr().out.splitlines()
    assert last == "1 cases launched 2 kernels; 0 cases raised an error"
    assert f"not launched: {all_kernels()[0].name}" in others
    assert len(others) == len(all_kernels()) - 2


@pytest.mark.parametrize("lost", [False, True])
def test_a_small_run_names_the_case_that_fails_and_goes_on_unless_the_device_is_gone(monkeypatch, capsys, lost):
    chosen = covering(cases("relu float"))[0]
    whole, count = emulated_backend(), iter(range(10))

    def place(array):
        if next(count) == 0:
            raise RuntimeError("an illegal\nmemory access")
        return array

    backend = type(whole)("broken", place, whole.activate, lambda: lost)
    monkeypatch.setattr(small_run, "emulated_backend", lambda: backend)
    assert small_run.main(["--backend", "emulated", "--only", "relu float"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"FAILED {chosen[0]}: RuntimeError: an illegal memory access"
    stopped = f"STOPPED: the device stopped responding after case {chosen[0]} (1 of {len(chosen)})"
    assert (lines[1] == stopped) == lost
    assert lines[-1].startswith(f"{len(chosen)} cases launched")
    assert lines[-1].endswith("; 1 cases raised an error")


def test_bits_of_the_emulator(tmp_path, capsys):
    path = tmp_path / "bits.json"
    assert small_run.main(["--backend", "emulated", "--only", "dropout float16", "--bits", str(path)]) == 0
    assert "0 differ that must not" in capsys.readouterr().out
    entries = json.loads(path.read_text())["results"]
    assert entries
    assert all(entry["equals_reference"] for entry in entries)


def test_digests_of_two_runs_are_compared(tmp_path, capsys):
    path = tmp_path / "other.json"
    arguments = ["--backend", "emulated", "--only", "relu float", "--bits"]
    assert small_run.main([*arguments, str(path)]) == 0
    data = json.loads(path.read_text())
    count = len(data["results"])
    assert count >= 6
    data["results"][0]["digest"] = "0"
    gone = data["results"].pop()
    path.write_text(json.dumps(data))
    arguments += [str(tmp_path / "bits.json"), "--against", str(path)]
    capsys.readouterr()
    assert small_run.main(arguments) == 0
    printed = capsys.readouterr().out
    changed = data["results"][0]
    assert f"other bits: {changed['case']}: {changed['result']}" in printed
    assert gone["case"] not in printed
    assert f"{count - 2} results have the bits of {path}, 1 others, 1 not there" in printed
    for text, message in (("{}", "holds no bits of profiling.small_run"), (None, "cannot be read")):
        path.unlink() if text is None else path.write_text(text)
        assert small_run.main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        small_run.main(["--against", str(path)])


def test_bits_are_written_while_it_runs(tmp_path, monkeypatch):
    path = tmp_path / "bits.json"
    right, count = small_run.check, iter(range(10))

    def ended(*arguments):
        if next(count) == 1:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(small_run, "check", ended)
    monkeypatch.setattr(small_run, "_SECONDS_A_FILE", 0)
    with pytest.raises(KeyboardInterrupt):
        small_run.main(["--backend", "emulated", "--only", "relu float", "--bits", str(path)])
    first, *_ = covering(cases("relu float"))[0]
    assert {entry["case"] for entry in json.loads(path.read_text())["results"]} == {str(first)}


def test_a_digest_is_of_the_bits_but_for_the_payload_of_nan():
    x = np.array([[1.0, -0.0], [np.nan, 2.0]], np.float32)
    other_nan = x.copy()
    other_nan.view(np.uint32)[1, 0] = 0xFFC00001
    assert small_run.digest(other_nan) == small_run.digest(x)
    assert small_run.digest(x.T.copy().T) == small_run.digest(x)
    for changed in (np.abs(x), x.reshape(4), x.astype(np.float64)):
        assert small_run.digest(changed) != small_run.digest(x)
    assert small_run.digest(x.astype(BFLOAT16)) == small_run.digest(other_nan.astype(BFLOAT16))


def test_the_bits_of_the_cases_after_one_that_raises(tmp_path, monkeypatch, capsys):
    first, *others = covering(cases("relu float"))[0]
    right = small_run.check

    def check(case, backend):
        if str(case) == str(first):
            raise RuntimeError("out\nof memory")
        return right(case, backend)

    monkeypatch.setattr(small_run, "check", check)
    path = tmp_path / "bits.json"
    assert small_run.main(["--backend", "emulated", "--only", "relu float", "--bits", str(path)]) == 1
    printed = capsys.readouterr().out
    assert f"FAILED {first}: RuntimeError: out of memory" in printed
    assert {entry["case"] for entry in json.loads(path.read_text())["results"]} == set(map(str, others))


def test_a_wrong_bit_is_found(capsys):
    (case,) = cases("relu float32 n=37")

    def off_by_a_bit(array):
        return (array.view("u4") ^ 1).view(array.dtype)

    backend = emulated_backend()
    wrong = type(backend)("wrong", off_by_a_bit, backend.activate)
    entries = small_run.check(case, wrong)
    assert not entries[0]["equals_reference"]
    assert f"WRONG {case}: y: " in small_run.summary(entries)


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


@pytest.mark.parametrize("module", [small_run, devices])
def test_without_a_gpu(module, capsys):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("GPU: there is one")
    assert module.main([]) == 2
    assert "no usable GPU" in capsys.readouterr().err


class Driver:
    """Notes what is asked of a driver; one of its functions may fail."""

    def __init__(self, failing=None):
        self.asked, self.failing = [], failing

    def __getattr__(self, name):
        def function(*arguments):
            self.asked.append(name)
            return 999 if name == self.failing else 0

        return function


def test_the_probe_starts_a_kernel_and_names_what_fails(monkeypatch, capsys):
    driver = Driver()
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: driver)
    assert probe.main() == 0
    assert capsys.readouterr().out == "the probe ran\n"
    assert driver.asked[0] == "cuInit"
    assert driver.asked[-2:] == ["cuLaunchKernel", "cuCtxSynchronize"]
    driver = Driver("cuDevicePrimaryCtxRetain")
    assert probe.main() == 2
    assert "cuDevicePrimaryCtxRetain failed with error 999" in capsys.readouterr().err
    assert "cuLaunchKernel" not in driver.asked


@pytest.mark.gpu
def test_the_probe_runs(capsys):
    assert probe.main() == 0


def test_folder_name():
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05Z", "commit": "0123abc+"}
    assert devices.folder_name(facts) == "2026-01-02T030405Z-nvidia-h100-80gb-hbm3-0123abc"


def test_commit_of_a_tree_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_ROOT", tmp_path)
    assert devices.commit() == "unknown"
    monkeypatch.setenv("GPU_LAYERS_COMMIT", "0123abc")
    assert devices.commit() == "0123abc"
