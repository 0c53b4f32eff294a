"""What every op takes for an array, and what it refuses before it computes."""

import cupy
import numpy as np
import pytest
import torch

import gpu_layers as gl

ONES = np.ones(2, np.float32)
FORWARDS = {
    "dropout": lambda x: gl.ops.dropout_forward(x, 0.5, 1, 2),
    "channel dropout": lambda x: gl.ops.dropout_forward(x, 0.5, 1, 2, mask_axes=2),
    "shared dropout": lambda x: gl.ops.dropout_forward(x, 0.5, 1, 2, shared_axes=(1,)),
    "dropout_add": lambda x: gl.ops.dropout_add_forward(x, x, 0.1, 1, 2, activation="gelu"),
    "dropout by samples": lambda x: gl.ops.dropout_forward(x, 0.5, 1, 2, sample_ids=np.arange(2)),
    "alpha_dropout": lambda x: gl.ops.alpha_dropout_forward(x, 0.5, 1, 2),
    "activation_dropout": lambda x: gl.ops.activation_dropout_forward(x, "gelu", 0.1, 1, 2),
    "relu": gl.ops.relu_forward,
    "batch_norm": lambda x: gl.ops.batch_norm_forward(x, None, None),
    "batch_norm_inference": lambda x: gl.ops.batch_norm_inference(x, ONES, ONES, None, None),
    "max_pool": lambda x: gl.ops.max_pool_forward(x, (2, 2)),
    "avg_pool": lambda x: gl.ops.avg_pool_forward(x, (2, 2)),
    "adaptive_max_pool": lambda x: gl.ops.adaptive_max_pool_forward(x, (3, 3)),
    "adaptive_avg_pool": lambda x: gl.ops.adaptive_avg_pool_forward(x, (3, 3)),
    "lp_pool": lambda x: gl.ops.lp_pool_forward(x, 3, (2, 2)),
}
LAYERS = {
    "Dropout": gl.Dropout(),
    "Dropout in evaluation": gl.Dropout().eval(),
    "Dropout of Srivastava in evaluation": gl.Dropout(scaling="inference").eval(),
    "Dropout2d": gl.Dropout2d(),
    "Dropout2d in evaluation": gl.Dropout2d().eval(),
    "DropPath": gl.DropPath(0.5, generator=gl.Generator(1)),
    "AlphaDropout": gl.AlphaDropout(),
    "FeatureAlphaDropout": gl.FeatureAlphaDropout(0.2, generator=gl.Generator(1)),
    "ActivationDropout": gl.ActivationDropout("silu", 0.1, generator=gl.Generator(1)),
    "ActivationDropout in evaluation": gl.ActivationDropout("relu").eval(),
    "ReLU": gl.ReLU(),
    "BatchNorm2d": gl.BatchNorm2d(2),
    "BatchNorm2d in evaluation": gl.BatchNorm2d(2).eval(),
    "BatchNorm1d": gl.BatchNorm1d(2),
    "MaxPool2d": gl.MaxPool2d(2),
    "AvgPool2d": gl.AvgPool2d(2),
    "LPPool2d": gl.LPPool2d(2, 2),
}
CALLS = FORWARDS | LAYERS
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


class Subclass(np.ndarray):
    pass


X = np.ones((2, 2, 4, 4), np.float32)
NO_ARRAYS = {
    "list": X.tolist(),
    "float": 1.0,
    "NumPy scalar": np.float32(1),
    "None": None,
    "string": "x",
    "torch tensor": torch.ones(2, 2, 4, 4),
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
OF_WHOLE_NUMBERS = {"max_pool", "adaptive_max_pool", "MaxPool2d"}


OTHER_DTYPES = [np.int32, np.int64, np.uint8, bool, np.complex64, np.longdouble, ">f4", object, "U3"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in (*FORWARDS, *LAYERS)
        for dtype in OTHER_DTYPES
        if name not in OF_WHOLE_NUMBERS or np.dtype(dtype).kind not in "iub"
    ],
)
def test_only_four_dtypes(name, dtype):
    call = (FORWARDS | LAYERS)[name]
    with pytest.raises(TypeError, match=r"^input must be float16, bfloat16, float32 or float64, got "):
        call(np.ones((2, 2, 4, 4)).astype(dtype))


@pytest.fixture
def on_a_gpu():
    """A CuPy array for those who only look at its type: it owns no memory, and needs no GPU."""
    memory = cupy.cuda.UnownedMemory(4096, X.nbytes, None, 0)
    return cupy.ndarray(X.shape, X.dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))


def test_arrays_of_two_kinds_are_refused(on_a_gpu):
    _, relu = gl.ops.relu_forward(X)
    _, dropout = gl.ops.dropout_forward(X, 0.5, 1, 2)
    _, pool = gl.ops.max_pool_forward(X, (1, 1))
    mixtures = [
        lambda: gl.ops.batch_norm_forward(on_a_gpu, ONES, None),
        lambda: gl.ops.batch_norm_inference(on_a_gpu, ONES, ONES, None, None),
        lambda: gl.BatchNorm2d(2)(on_a_gpu),
        lambda: gl.ops.dropout_forward(X, 0.5, 1, 2, out=on_a_gpu),
        lambda: gl.ops.dropout_backward(X, dropout, out=on_a_gpu),
        lambda: gl.ops.relu_forward(X, out=on_a_gpu),
        lambda: gl.ops.relu_backward(on_a_gpu, relu),
        lambda: gl.ops.max_pool_backward(on_a_gpu, pool),
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
    with pytest.raises(TypeError, match="the reference backend takes no options, got order"):
        gl.use_backend("reference", order=1).__enter__()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_alarms_of_numpy_are_not_ours(call):
    # A caller who makes every floating-point event an error still gets infinities and NaN as values.
    # BatchNorm1d takes other ranks.
    if call is LAYERS["BatchNorm1d"]:
        x = np.array([[np.nan, -1e-40], [np.inf, 1e-40], [-np.inf, 3e38]], np.float32)
    else:
        x = np.resize(np.array([np.nan, np.inf, -np.inf, 1e-40, -1e-40, 3e38, -3e38], np.float32), (2, 2, 4, 4))
    with np.errstate(all="raise"):
        y = call(x)
        y = y[0] if isinstance(y, tuple) else y
        if isinstance(call, gl.Layer):
            call.backward(y)
    assert np.isnan(y).any()
