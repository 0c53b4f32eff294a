"""The verification finds what is wrong, and only that."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gpu_layers.cli import main
from gpu_layers.core.cuda import gpu_is_lost
from gpu_layers.runtime.emulation import Emulation, emulated_module
from gpu_layers.verification import emulated_backend
from gpu_layers.verification.comparison import compare
from gpu_layers.verification.report import DeviceLostError, verify


def values(*numbers, dtype=np.float32):
    return np.array(numbers, dtype)


def test_equal_bits():
    x = values(1, np.nan, np.inf, -0.0)
    assert compare("y", x.copy(), x, None).ratio == 0


def test_the_sign_of_zero_is_a_bit():
    difference = compare("y", values(0.0, 1.0), values(-0.0, 1.0), None)
    assert difference.ratio == np.inf
    assert "1 of 2 values differ; at (0,)" in difference.message


def test_the_payload_of_nan_is_free():
    other = np.array([0x7FC00001], np.uint32).view(np.float32)
    assert compare("y", other, values(np.nan), None).ratio == 0


def test_an_error_is_measured_by_its_bound():
    assert compare("y", values(1.5, 3), values(1, 3), 2.0).ratio == pytest.approx(0.25)
    assert compare("y", values(1, 9), values(1, 3), [1.0, 2.0]).ratio == pytest.approx(3.0)
    assert compare("y", values(1, 3), values(1, 3), 0.0).ratio == 0
    assert compare("y", values(1, 4), values(1, 3), 0.0).ratio == np.inf


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_not_finite_against_finite_is_wrong_whatever_the_bound(wrong):
    assert compare("y", values(wrong), values(1), 1e30).ratio == np.inf
    assert compare("y", values(1), values(wrong), 1e30).ratio == np.inf


def test_shape_and_dtype():
    assert "shape is (1, 2), must be (2,)" in compare("y", values([1, 2]), values(1, 2), 1.0).message
    assert "dtype is float64, must be float32" in compare("y", values(1, dtype=np.float64), values(1), 1.0).message


def changed_launches(monkeypatch, change):
    """Have kernels started with other arguments: ``change(kernel, values)`` gives these."""
    right = Emulation.launch

    def launch(self, kernel, grid, block, values, *rest):
        right(self, kernel, grid, block, change(kernel, list(values)), *rest)

    monkeypatch.setattr(Emulation, "launch", launch)


def place(kernel, name):
    return [parameter.name for parameter in kernel.parameters].index(name)


def test_a_wrong_seed_is_found(monkeypatch, capsys):
    def one_offset_late(kernel, values):
        at = place(kernel, "offset")
        values[at] = values[at] + np.uint64(1)
        return values

    changed_launches(monkeypatch, one_offset_late)
    assert main(["verify", "--backend", "emulated", "--only", r"^dropout float32 n=9001"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG dropout float32 n=9001: y: " in printed
    assert "values differ" in printed


def test_one_value_left_out_of_a_sum_is_found(monkeypatch):
    """The bounds are close enough to notice a single value among two thousand."""

    def shorter(kernel, values):
        if kernel.name.startswith("batch_norm_forward_persistent<float, NchwLayout"):
            x = values[0].copy()
            planes = x.reshape(x.shape[0], x.shape[1], -1)
            planes[0, :, 5] = planes[0, :, 6]
            values[0] = x
        return values

    changed_launches(monkeypatch, shorter)
    (row,) = verify(emulated_backend(), r"^batch_norm float32 \[1, 3, 61, 130\]$")
    assert any(": mean: " in failure for failure in row.failures)


def test_a_count_of_the_own_part_alone_is_found(monkeypatch):
    """One of two processes that divides by the values it has itself."""

    def of_the_own_part(kernel, values):
        if kernel.name.startswith("batch_norm_input_gradient"):
            x, at = values[place(kernel, "x")], place(kernel, "inv_count")
            values[at] = np.asarray(x.shape[-1] / x.size, values[at].dtype)
        return values

    changed_launches(monkeypatch, of_the_own_part)
    (row,) = verify(emulated_backend(), r"^sync_batch_norm float32 \[5, 9, 7, 3\]")
    assert {failure.split(": ")[1] for failure in row.failures} == {"dx 0", "dx 1"}


def test_a_value_that_belongs_to_the_next_group_is_found(monkeypatch):
    def mixed(kernel, values):
        if kernel.name.startswith("batch_norm_forward") and values[0].shape[0] == 3:
            values[0] = np.concatenate([values[0][:2], values[0][:1]])
        return values

    changed_launches(monkeypatch, mixed)
    (row,) = verify(emulated_backend(), r"^ghost_batch_norm float32 \[7, ")
    assert {failure.split(": ")[1] for failure in row.failures} >= {"y", "mean 0", "var 1"}


def raising(monkeypatch, numbers):
    """Launches of kernels that raise, by their number."""
    count = iter(range(100))

    def change(kernel, values):
        if next(count) in numbers:
            raise RuntimeError("an illegal\nmemory access")
        return values

    changed_launches(monkeypatch, change)


TWO = r"^dropout float(16|32) n=9001"


def test_a_case_that_raises_is_a_failure_and_the_others_are_run(monkeypatch, capsys):
    raising(monkeypatch, {0})
    assert main(["verify", "--backend", "emulated", "--only", TWO]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "WRONG dropout float16 n=9001: RuntimeError: an illegal memory access"
    assert printed[-1] == "2 cases, 1 wrong results."
    ends = {line.split()[1]: line.split()[-2:] for line in printed if line.startswith("dropout")}
    assert ends == {"float16": ["1", "WRONG"], "float32": ["bits", "ok"]}


def test_a_device_that_is_gone_ends_it_and_the_case_is_named(monkeypatch, capsys):
    raising(monkeypatch, {0, 1, 2, 3})
    whole = emulated_backend()
    lost = type(whole)("lost", whole.place, whole.activate, lambda: True)
    messages = []
    with pytest.raises(DeviceLostError, match=r"responding after case dropout float16 n=9001 \(1 of 2\)") as error:
        verify(lost, TWO, report=messages.append)
    assert [(row.dtype, row.cases, row.failures) for row in error.value.rows] == [("float16", 1, messages)]
    monkeypatch.setattr("gpu_layers.cli.verify.emulated_backend", lambda **options: lost)
    assert main(["verify", "--backend", "emulated", "--only", TWO]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"1 cases, 1 wrong results. STOPPED: {error.value}."


def test_without_a_compiler_it_is_one_message(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("gpu_layers.runtime.emulation.emulated_module", emulated_module.__wrapped__)
    assert main(["verify", "--backend", "emulated", "--only", TWO]) == 2
    error = capsys.readouterr().err
    assert "no-such-compiler was not found" in error
    assert error.count("\n") == 1


def test_a_gpu_is_lost_when_it_cannot_be_waited_for(monkeypatch):
    class CUDARuntimeError(RuntimeError):
        pass

    def synchronize():
        if broken:
            raise CUDARuntimeError("cudaErrorIllegalAddress")

    runtime = SimpleNamespace(CUDARuntimeError=CUDARuntimeError, deviceSynchronize=synchronize)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    broken = False
    assert not gpu_is_lost()
    broken = True
    assert gpu_is_lost()
    monkeypatch.delitem(sys.modules, "cupy")
    assert not gpu_is_lost()


def test_only_must_find_something(capsys):
    assert main(["verify", "--only", "no such case"]) == 2
    assert "no case is named like 'no such case'" in capsys.readouterr().err
    assert main(["verify", "--only", "("]) == 2
    assert "is not a regular expression" in capsys.readouterr().err


def test_cuda_without_a_gpu(monkeypatch, capsys):
    def none():
        raise RuntimeError("no usable GPU: none")

    monkeypatch.setattr("gpu_layers.cli.verify.require_gpu", none)
    assert main(["verify", "--backend", "cuda"]) == 2
    assert "no usable GPU" in capsys.readouterr().err
    assert main(["verify", "--only", r"^relu float32 n=1$"]) == 0
    printed = capsys.readouterr().out
    assert "CPU emulation of the source, not a GPU" in printed
    assert "1 cases, all right." in printed
