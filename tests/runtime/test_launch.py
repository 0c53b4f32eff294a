"""The launch seam refuses what a GPU would take and turn into garbage, before anything runs."""

import numpy as np
import pytest

import gpu_layers as gl
import gpu_layers.kernels  # declares them
from gpu_layers.runtime.kernel import Kernel, KernelTemplate, all_kernels, combinations, parse_parameters
from gpu_layers.runtime.launch import launch

RELU = next(kernel for kernel in all_kernels() if kernel.name == "relu_forward<float>")


def start(x=None, y=None, n=4, *, kernel=RELU, grid=1, block=256, **options):
    x = np.array([-1, 2, -3, 4], np.float32) if x is None else x
    y = np.zeros(4, np.float32) if y is None else y
    with gl.use_backend("emulated"):
        launch(kernel, grid, block, (x, y, np.empty(1, np.uint8), n), **options)
    return y


def test_it_launches():
    np.testing.assert_array_equal(start(), [0, 2, 0, 4])
    np.testing.assert_array_equal(start(n=np.int32(4), grid=(1, 1), block=[256]), [0, 2, 0, 4])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": np.zeros(4)}, TypeError, r"argument x \(const float\*\) needs an array of float32, got float64"),
        ({"x": [1.0, 2.0]}, TypeError, "argument x .* needs an array, got list"),
        ({"x": 3.0}, TypeError, "argument x .* needs an array, got float"),
        ({"x": np.zeros(8, np.float32)[::2]}, ValueError, "argument x .* needs an array that is C-contiguous"),
        ({"y": np.zeros(4, np.float16)}, TypeError, r"argument y \(float\*\) needs an array of float32, got float16"),
        ({"n": 4.0}, TypeError, r"argument n \(long long\) needs an integer, got float"),
        ({"n": np.zeros(2, np.int64)}, TypeError, "argument n .* needs a scalar, got an array"),
        ({"n": 2**63}, ValueError, "argument n .* is out of range, got 9223372036854775808"),
        ({"block": 1025}, ValueError, r"block must be in 1 .. .*, got \(1025, 1, 1\)"),
        ({"block": (64, 32)}, ValueError, "at most 1024 threads, got"),
        ({"block": (1, 1, 65)}, ValueError, "block must be in 1 .. .*, got"),
        ({"block": 0}, ValueError, "block must be in 1 .. .*, got"),
        ({"grid": 0}, ValueError, "grid must be in .*, got"),
        ({"grid": 2**31}, ValueError, "grid must be in .*, got"),
        ({"grid": (1, 65536)}, ValueError, "grid must be in .*, got"),
        ({"shared_bytes": 227 * 1024 + 1}, ValueError, "shared_bytes must be in .*, got"),
        ({"shared_bytes": -1}, ValueError, "shared_bytes must be in .*, got"),
    ],
)
def test_what_it_refuses(options, error, message):
    y = options.pop("y", np.full(4, 7, np.float32))
    before = y.copy()
    with pytest.raises(error, match=message):
        start(y=y, **options)
    np.testing.assert_array_equal(y, before)


def test_a_read_only_result():
    y = np.zeros(4, np.float32)
    y.flags.writeable = False
    with pytest.raises(ValueError, match=r"argument y .* is read-only"):
        start(y=y)


def test_the_number_of_arguments():
    with gl.use_backend("emulated"), pytest.raises(TypeError, match="takes 4 arguments, got 2"):
        launch(RELU, 1, 32, (np.zeros(1, np.float32), np.zeros(1, np.float32)))


def test_numpy_arrays_outside_of_the_emulated_backend():
    with pytest.raises(RuntimeError, match='only within use_backend\\("emulated"\\)'):
        launch(RELU, 1, 32, (np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.uint8), 1))


def test_parameters_are_read_as_written():
    point = np.dtype([("x", np.float32), ("y", np.float32)], align=True)
    parameters = parse_parameters(
        "const T* x, A *y, unsigned long long seed, Point<A> point",
        {"T": "__half", "A": "float"},
        {"Point<float>": point},
    )
    assert [parameter.name for parameter in parameters] == ["x", "y", "seed", "point"]
    assert [parameter.c_type for parameter in parameters] == [
        "const __half*",
        "float*",
        "unsigned long long",
        "Point<float>",
    ]
    assert [parameter.dtype for parameter in parameters] == [np.float16, np.float32, np.uint64, point]
    assert [parameter.is_pointer for parameter in parameters] == [True, True, False, False]
    assert [parameter.is_const for parameter in parameters] == [True, False, False, False]


def test_templates_know_their_instantiations(monkeypatch, tmp_path):
    monkeypatch.setattr("gpu_layers.runtime.kernel._templates", [])
    monkeypatch.setattr("gpu_layers.runtime.kernel.source_folder", lambda: tmp_path)
    (tmp_path / "a.cu").write_text(
        "template <typename T, int Width>\n__global__ void __launch_bounds__(256, sizeof(T) == 8 ? 1 : 2)\n"
        "    first(T* x) {}\n"
        "template <typename T, int Width>\n__global__ void __launch_bounds__(256)\n"
        "    f(const T* x,  // what is read (and never written)\n      accumulate_t<T> y) {\n    first(x);\n}\n"
    )
    template = KernelTemplate("a.cu", "f", combinations(T=("__half", "double"), Width=("1", "4")), None, ("x", "z"))
    assert [kernel.name for kernel in template.kernels] == [
        "f<__half, 1>", "f<__half, 4>", "f<double, 1>", "f<double, 4>"
    ]  # fmt: skip
    kernel = template(T="double", Width="4")
    assert isinstance(kernel, Kernel)
    assert [parameter.name for parameter in kernel.parameters] == ["x", "y"]
    assert kernel.parameters[0].is_const
    assert kernel.parameters[1].dtype == np.float64
    assert kernel.initialised == ("x",)
    with pytest.raises(ValueError, match=r"a\.cu has no __global__ function g"):
        KernelTemplate("a.cu", "g", combinations(T=("float",))).kernels  # noqa: B018
    with pytest.raises(KeyError):
        template(T="float", Width="4")
