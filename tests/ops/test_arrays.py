"""What every op takes for an array, and what it refuses before it computes."""

import cupy
import numpy as np
import pytest
import torch

import gpu_layers as gl
from gpu_layers import catalogue
from gpu_layers.catalogue import OPERATIONS
from gpu_layers.distributed import SingleProcess

ONES = np.ones(4, np.float32)


def call_of(operation):
    def call(x):
        others = dict.fromkeys(operation.per_channel, ONES) | dict.fromkeys(operation.like_x, x)
        return operation.forward({"x": x, "start": 0, **others}, False)

    return call


#: Those whose call in the catalogue looks at x before the operation does.
LOOKED_AT = {"sample_dropout", "ghost_batch_norm", "padded_batch_norm", "batch_norm_double_backward"}
LOOKED_AT |= {"max_pool_gather", "fractional_max_pool", "max_unpool"}
FORWARDS = {one.name: call_of(one) for one in OPERATIONS if one.name not in LOOKED_AT}
LAYERS = {
    f"{name}{' in evaluation' * evaluated}": example.make(np.float32, gl.Generator(1)).train(not evaluated)
    for name, example in catalogue.LAYERS.items()
    for evaluated in (False, True)
    if example.inputs == 1 and example.axes in (2, 4)
}
CALLS = FORWARDS | LAYERS
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


class Subclass(np.ndarray):
    pass


X = np.ones((2, 4, 4, 4), np.float32)
NO_ARRAYS = {
    "list": X.tolist(),
    "float": 1.0,
    "NumPy scalar": np.float32(1),
    "None": None,
    "string": "x",
    "torch tensor": torch.ones(2, 4, 4, 4),
    "masked array": np.ma.masked_array(X),
    "subclass": X.view(Subclass),
}


@each_call
@pytest.mark.parametrize("x", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_only_arrays_are_arrays(call, x):
    with pytest.raises(TypeError, match=r"^expected a numpy\.ndarray or cupy\.ndarray, got "):
        call(x)


def test_the_message_names_the_type_and_the_remedy():
    with pytest.raises(TypeError, match=r"got torch\.Tensor$"):
        gl.ops.relu_forward(NO_ARRAYS["torch tensor"])
    with pytest.raises(TypeError, match=r"got list$"):
        gl.ops.relu_forward([1.0])
    with pytest.raises(TypeError, match=r"got numpy\.ma\.MaskedArray, .* would drop its mask: .* x\.filled"):
        gl.ops.relu_forward(NO_ARRAYS["masked array"])


#: They take whole numbers too: tests/ops/test_integer_max_pool.py.
OF_WHOLE_NUMBERS = {
    "max_pool",
    "halving_max_pool",
    "pyramid_max_pool",
    "adaptive_max_pool",
    "MaxPool2d",
    "AdaptiveMaxPool2d",
}


OTHER_DTYPES = [np.int32, np.int64, np.uint8, bool, np.complex64, np.longdouble, ">f4", object, "U3"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in (*FORWARDS, *LAYERS)
        for dtype in OTHER_DTYPES
        if name.removesuffix(" in evaluation") not in OF_WHOLE_NUMBERS or np.dtype(dtype).kind not in "iub"
    ],
)
def test_only_four_dtypes(name, dtype):
    call = (FORWARDS | LAYERS)[name]
    with pytest.raises(TypeError, match=r"^input must be float16, bfloat16, float32 or float64, got "):
        call(np.ones((2, 4, 4, 4)).astype(dtype))


@pytest.fixture
def on_a_gpu():
    """A CuPy array for those who only look at its type: it owns no memory, and needs no GPU."""
    memory = cupy.cuda.UnownedMemory(4096, X.nbytes, None, 0)
    return cupy.ndarray(X.shape, X.dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))


def test_arrays_of_two_kinds_are_refused(on_a_gpu):
    _, relu = gl.ops.relu_forward(X)
    _, dropout = gl.ops.dropout_forward(X, 0.5, 1, 2)
    _, pool = gl.ops.max_pool_forward(X, (1, 1))
    _, norm = gl.ops.batch_norm_forward(X, None, None)
    _, ghost = gl.ops.ghost_batch_norm_forward(X, None, None, bounds=(0, 1, 2))
    _, gelu = gl.ops.activation_dropout_forward(X, "gelu", 0.5, 1, 2)
    _, added = gl.ops.dropout_add_forward(X, X, 0.5, 1, 2)
    _, normed_pool = gl.ops.batch_norm_max_pool_forward(X, None, None, (1, 1))
    _, sync = gl.ops.sync_batch_norm_forward(X, None, None, SingleProcess())
    mixtures = [
        lambda: gl.ops.batch_norm_forward(on_a_gpu, ONES, None),
        lambda: gl.ops.batch_norm_inference(on_a_gpu, ONES, ONES, None, None),
        lambda: gl.BatchNorm2d(4)(on_a_gpu),
        lambda: gl.ops.dropout_forward(X, 0.5, 1, 2, out=on_a_gpu),
        lambda: gl.ops.dropout_backward(X, dropout, out=on_a_gpu),
        lambda: gl.ops.relu_forward(X, out=on_a_gpu),
        lambda: gl.ops.relu_backward(on_a_gpu, relu),
        lambda: gl.ops.relu_backward(X, relu, out=on_a_gpu),
        lambda: gl.ops.max_pool_backward(on_a_gpu, pool),
        lambda: gl.ops.batch_norm_backward(X, norm, out=on_a_gpu),
        lambda: gl.ops.batch_norm_inference_backward(X, norm, out=on_a_gpu),
        lambda: gl.ops.batch_norm_double_backward(X, None, None, X, norm, out=on_a_gpu),
        lambda: gl.ops.ghost_batch_norm_forward(X, None, None, bounds=(0, 1, 2), out=on_a_gpu),
        lambda: gl.ops.ghost_batch_norm_backward(X, ghost, out=on_a_gpu),
        lambda: gl.ops.sync_batch_norm_forward(X, None, None, SingleProcess(), out=on_a_gpu),
        lambda: gl.ops.sync_batch_norm_backward(X, sync, out=on_a_gpu),
        lambda: gl.ops.activation_dropout_forward(X, "gelu", 0.5, 1, 2, out=on_a_gpu),
        lambda: gl.ops.activation_dropout_backward(X, gelu, out=on_a_gpu),
        lambda: gl.ops.dropout_add_backward(X, added, out=on_a_gpu),
        lambda: gl.ops.batch_norm_max_pool_forward(X, None, None, (1, 1), out=on_a_gpu),
        lambda: gl.ops.batch_norm_max_pool_inference(X, ONES, ONES, None, None, (1, 1), out=on_a_gpu),
        lambda: gl.ops.batch_norm_max_pool_backward(X, normed_pool, out=on_a_gpu),
        lambda: gl.ops.batch_norm_max_pool_inference_backward(X, normed_pool, out=on_a_gpu),
    ]
    for mixture in mixtures:
        with pytest.raises(TypeError, match="NumPy and CuPy arrays were mixed: move them to one place first"):
            mixture()


def test_a_forced_backend_takes_its_own_arrays_only(on_a_gpu):
    with gl.use_backend("reference"):
        y, _ = gl.ops.relu_forward(-X)
        np.testing.assert_array_equal(y, 0 * X)
        with pytest.raises(
            TypeError, match=r"the reference backend takes NumPy arrays, got CuPy arrays: use cupy\.asnumpy"
        ):
            gl.ops.relu_forward(on_a_gpu)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'emulated', 'cuda', got 'gpu'"):
        gl.use_backend("gpu").__enter__()
    with pytest.raises(TypeError, match="the reference backend takes no options, got check"):
        gl.use_backend("reference", check=True).__enter__()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_alarms_of_numpy_are_not_ours(call):
    # A caller who makes every floating-point event an error still gets infinities and NaN as values.
    x = np.resize(np.array([np.nan, np.inf, -np.inf, 1e-40, -1e-40, 3e38, -3e38], np.float32), X.shape)
    with np.errstate(all="raise"):
        y = call(x)
        y = y[0] if isinstance(y, tuple) else y
        if isinstance(call, gl.Layer):
            call.backward(y)
    assert np.isnan(y).any()
