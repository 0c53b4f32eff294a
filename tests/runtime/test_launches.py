"""What a known call asks the GPU for, counted over all operations and layers: what docs/gpu.md says of launches.

Each entry is what reaches the device, in order: launches of ours in a row as their number, and by name a memset, a
copy, work of the array library, and what is read back. Who adds one says here what it is for.
"""

from functools import partial
from itertools import count

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import ops
from gpu_layers.catalogue import LAYERS, OPERATIONS
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.distributed import Communicator
from gpu_layers.runtime.limits import force_limits
from tests.inputs import BFLOAT16
from tests.runtime.idle_cupy import idle_cupy

FLOAT32 = np.dtype(np.float32)


@pytest.fixture
def cupy(monkeypatch):
    with idle_cupy(monkeypatch) as stand_in:
        yield stand_in


def assert_asks(cupy, call, expected, what=""):
    """After a first call, whatever that takes, each asks for the same. Its results are held, as what is valid is."""
    held = [call()]
    assert [cupy.steps(lambda: held.append(call())) for _ in range(2)] == [expected] * 2, what


# ---- Operations, on the first of their reference shapes: forward and backward ----------------------------------------

# In one read blocks count each other: a memset, and one kernel. The forward of three groups gives the statistics of
# each, and merges none. The exchange between processes is a copy by the array library here.
PLANES = {
    "dropout": ("1", "1"),
    "channel_dropout": ("1", "1"),
    "alpha_dropout": ("1", "1"),
    "sample_dropout": ("1", "1"),
    "shared_dropout": ("1", "1"),
    "drop_path": ("1", "1"),
    "feature_alpha_dropout": ("1", "1"),
    "dropout_moments": ("1", None),
    "activation_dropout": ("1", "1"),
    "relu_dropout": ("1", "1"),
    "dropout_activation": ("1", "1"),
    # The gradient of a bias over many rows: blocks add up parts of it, which another kernel adds.
    "dropout_add": ("1", "2"),
    "gelu_dropout_add": ("1", "2"),
    "relu": ("1", "1"),
    "batch_norm": ("memset, 1", "memset, 1"),
    "batch_norm_inference": ("1", None),
    "batch_norm_sum_relu": ("memset, 1", "memset, 1"),
    "batch_norm_double_backward": ("3", None),
    "batch_norm_relu_max_pool": ("memset, 1", "memset, 1"),
    "ghost_batch_norm": ("memset, 3", "memset, 4"),
    "sync_batch_norm": ("3, library, 2", "2, library, 2"),
    "padded_batch_norm": ("memset, 1", "memset, 1"),
    "max_pool": ("1", "1"),
    "halving_max_pool": ("1", "1"),
    "pyramid_max_pool": ("1", "1"),
    "max_pool_gather": ("1", None),
    "adaptive_max_pool": ("1", "1"),
    "avg_pool": ("1", "1"),
    "adaptive_avg_pool": ("1", "1"),
    "global_avg_pool": ("1", "1"),
    "fractional_max_pool": ("1", "1"),
    "lp_pool": ("1", "1"),
    "max_unpool": ("1", "1"),
}
# A batch of rows as large as that is not kept: batch norm reads twice. Of three groups the last has fewer samples,
# whose one operand is kept.
CHANNELS_LAST = {
    "batch_norm": ("3", "3"),
    "batch_norm_inference": ("1", None),
    "batch_norm_sum_relu": ("3", "3"),
    "batch_norm_double_backward": ("3", None),
    "batch_norm_relu_max_pool": ("3", "3"),
    "ghost_batch_norm": ("memset, 7", "10"),
    "sync_batch_norm": ("3, library, 2", "2, library, 2"),
    "padded_batch_norm": ("3", "3"),
    "max_pool": ("1", "1"),
    "halving_max_pool": ("1", "1"),
    "pyramid_max_pool": ("1", "1"),
    "adaptive_max_pool": ("1", "1"),
    "avg_pool": ("1", "1"),
    "adaptive_avg_pool": ("1", "1"),
    # Of planes so large there are few channels for the threads: blocks share them, and another kernel adds.
    "global_avg_pool": ("2", "1"),
    "fractional_max_pool": ("1", "1"),
    "lp_pool": ("1", "1"),
}
TABLES = {False: PLANES, True: CHANNELS_LAST}
# Whose inputs the host makes.
SMALLER = {"max_unpool": (8, 16, 28, 28), "max_pool_gather": (8, 16, 56, 56)}
# No group is kept.
OF_FLOAT32 = {("ghost_batch_norm", True): ("9", "10")}


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels last"])
def test_the_tables_have_every_operation(channels_last):
    assert list(TABLES[channels_last]) == [one.name for one in OPERATIONS if channels_last in one.layouts]


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize(
    ("operation", "channels_last"),
    [(operation, last) for operation in OPERATIONS for last in operation.layouts],
    ids=lambda value: value if isinstance(value, bool) else value.name,
)
def test_launches_of_an_operation(cupy, operation, channels_last, dtype):
    expected = TABLES[channels_last][operation.name]
    if dtype == FLOAT32:
        expected = OF_FLOAT32.get((operation.name, channels_last), expected)
    shape = SMALLER.get(operation.name, operation.shapes[0])
    placed = (shape[0], *shape[2:], shape[1]) if channels_last else shape
    given = {name: cupy.empty(placed, dtype) for name in ("x", *operation.like_x)} | {"start": 0}
    given |= {name: cupy.empty(shape[1], accumulation_dtype(dtype)) for name in operation.per_channel}
    forward, backward = expected
    assert_asks(cupy, lambda: operation.forward(given, channels_last), forward, "forward")
    assert (backward is None) == (operation.backward is None)
    if backward is not None:
        y, saved = operation.forward(given, channels_last)
        dy = cupy.empty(y.shape, y.dtype)
        assert_asks(cupy, lambda: operation.backward(dy, saved), backward, "backward")


# ---- Layers: a forward in training, its backward, and a forward in evaluation ----------------------------------------

# Nothing more than of their operations: the kernel that finds a batch's statistics folds them in, and the host counts
# the numbers of masks. There is a memset where blocks share a channel. Three groups are a kernel each, and one that
# merges.
OF_LAYERS = {
    "Dropout": ("1", "1", ""),
    "Dropout1d": ("1", "1", ""),
    "Dropout2d": ("1", "1", ""),
    "Dropout3d": ("1", "1", ""),
    "AlphaDropout": ("1", "1", ""),
    "DropPath": ("1", "1", ""),
    "FeatureAlphaDropout": ("1", "1", ""),
    "ActivationDropout": ("1", "1", "1"),
    "DropoutAdd": ("1", "1", "1"),
    "ReLU": ("1", "1", "1"),
    "BatchNorm1d": ("1", "1", "1"),
    "BatchNorm2d": ("memset, 1", "memset, 1", "1"),
    "BatchNorm3d": ("memset, 1", "memset, 1", "1"),
    "GhostBatchNorm1d": ("4", "4", "1"),
    "GhostBatchNorm2d": ("memset, 4", "memset, 4", "1"),
    "GhostBatchNorm3d": ("4", "4", "1"),
    "SyncBatchNorm": ("1", "1", "1"),
    "MaxPool1d": ("1", "1", "1"),
    "MaxPool2d": ("1", "1", "1"),
    "MaxPool3d": ("1", "1", "1"),
    "AdaptiveMaxPool1d": ("1", "1", "1"),
    "AdaptiveMaxPool2d": ("1", "1", "1"),
    "AdaptiveMaxPool3d": ("1", "1", "1"),
    "AvgPool1d": ("1", "1", "1"),
    "AvgPool2d": ("1", "1", "1"),
    "AvgPool3d": ("1", "1", "1"),
    "AdaptiveAvgPool1d": ("1", "1", "1"),
    "AdaptiveAvgPool2d": ("1", "1", "1"),
    "AdaptiveAvgPool3d": ("1", "1", "1"),
    "FractionalMaxPool2d": ("1", "1", "1"),
    "FractionalMaxPool3d": ("1", "1", "1"),
    # Of other powers than 1 and 2 the backward finds each window's largest and slope first.
    "LPPool1d": ("1", "2", "1"),
    "LPPool2d": ("1", "2", "1"),
    "LPPool3d": ("1", "2", "1"),
    # A flag, whether indices are twice there, is read back.
    "MaxUnpool1d": ("1, read back, 1", "1", "1, read back, 1"),
    "MaxUnpool2d": ("1, read back, 1", "1", "1, read back, 1"),
    "MaxUnpool3d": ("1, read back, 1", "1", "1, read back, 1"),
}
SHAPES = {2: (64, 4), 3: (6, 4, 48), 4: (6, 4, 48, 40), 5: (6, 4, 8, 8, 8)}


def test_the_table_has_every_layer():
    assert list(OF_LAYERS) == list(LAYERS)


@pytest.mark.parametrize("name", OF_LAYERS)
def test_launches_of_a_layer(cupy, name):
    training, backward, evaluation = OF_LAYERS[name]
    example = LAYERS[name]
    layer = example.make(FLOAT32, gl.Generator(1)).to("cuda")
    shape = SHAPES[example.axes]
    given = [cupy.empty(shape, FLOAT32) for _ in range(example.inputs)]
    if name.startswith("MaxUnpool"):
        given = [cupy.empty(shape, FLOAT32), cupy.empty(shape, np.int64)]
    assert_asks(cupy, lambda: layer(*given), training, "training")
    y = layer(*given)
    dy = cupy.empty(y.shape, y.dtype)
    assert_asks(cupy, lambda: layer.backward(dy), backward, "backward")
    layer.eval()
    assert_asks(cupy, lambda: layer(*given), evaluation, "evaluation")


# ---- The rest of the table of docs/gpu.md ----------------------------------------------------------------------------

IMAGES, FEW = (6, 8, 48, 40), (6, 300, 3, 5)  # blocks share a channel, and a block has channels alone


def _norm(cupy, shape=IMAGES, **options):
    """Batch norm, its forward and its backward; of the kind of layer that these options are for."""
    kind = options.pop("kind", gl.BatchNorm2d)
    attributes = {name: options.pop(name) for name in ("skip_nonfinite", "deferred") if name in options}
    layer = kind(shape[1], *options.pop("arguments", ()), **options).to("cuda")
    for name, value in attributes.items():
        setattr(layer, name, value)
    x = cupy.empty(shape, FLOAT32)
    return layer, lambda: layer(x), lambda: layer.backward(x)


def _passes(**options):
    return lambda cupy: _norm(cupy, **options)[1:]


def _in_evaluation(cupy):
    layer, forward, backward = _norm(cupy)
    layer.eval()
    return forward, backward


def _commit(cupy):
    layer, forward, _ = _norm(cupy, deferred=True)
    return (lambda: (forward(), layer.commit())), None


class TwoProcesses(Communicator):
    rank, size = 0, 2

    def __init__(self, cupy):
        self._cupy = cupy

    def gather(self, values):
        self._cupy.note("exchange")
        return self._cupy.empty((2, *values.shape), values.dtype)


def _synchronised(shape):
    def prepare(cupy):
        communicator = TwoProcesses(cupy)
        return _norm(cupy, shape, kind=gl.SyncBatchNorm, communicator=communicator)[1:]

    return prepare


def _padded(samples, is_known):
    """A layer with lengths: the same in each call, or others."""

    def prepare(cupy):
        layer, x = gl.BatchNorm2d(8).to("cuda"), cupy.empty((samples, 8, 48, 40), FLOAT32)
        calls = count()

        def forward():
            rows = 48 if is_known else 2 + next(calls)
            layer(x, lengths=np.array([[rows - sample % 2, 40] for sample in range(samples)]))

        return forward, lambda: layer.backward(x)

    return prepare


def _operation(forward, backward=None):
    """``forward(x, cupy)``, and ``backward(dy, saved)``."""

    def prepare(cupy):
        x = cupy.empty(IMAGES, FLOAT32)
        y, *saved = forward(x, cupy)
        dy = cupy.empty(y.shape, y.dtype)
        return lambda: forward(x, cupy), None if backward is None else lambda: backward(dy, saved[0])

    return prepare


def _pooled_norm(kernel_size, **options):
    def prepare(cupy):
        x, of_channels = cupy.empty(IMAGES, FLOAT32), cupy.empty(8, FLOAT32)
        forward = partial(ops.batch_norm_max_pool_forward, x, of_channels, of_channels, kernel_size, **options)
        y, saved = forward()
        return forward, lambda: ops.batch_norm_max_pool_backward(cupy.empty(y.shape, y.dtype), saved)

    return prepare


def _pooled_to_lengths(is_known):
    def prepare(cupy):
        x, calls = cupy.empty(IMAGES, FLOAT32), count()

        def forward():
            rows = 48 if is_known else 2 + next(calls)
            return ops.max_pool_forward(x, (2, 2), lengths=[[rows, 40]] * len(x))

        y, saved = forward()
        return forward, lambda: ops.max_pool_backward(cupy.empty(y.shape, y.dtype), saved)

    return prepare


def _double_backward(shape):
    def prepare(cupy):
        x, of_channels = cupy.empty(shape, FLOAT32), cupy.empty(shape[1], FLOAT32)
        saved = ops.batch_norm_forward(x, of_channels, of_channels)[1]
        return lambda: ops.batch_norm_double_backward(x, of_channels, of_channels, x, saved), None

    return prepare


def _by_samples(x, cupy, **options):
    return ops.dropout_forward(x, 0.5, 1, 2, sample_ids=cupy.empty(len(x), np.int64), **options)


def _unpooled(check):
    return lambda x, cupy: ops.max_unpool_forward(x, cupy.empty(x.shape, np.int64), (96, 80), check=check)


def _indices(cupy):
    saved = ops.max_pool_forward(cupy.empty(IMAGES, FLOAT32), (3, 3))[1]
    return lambda: ops.max_pool_indices(saved), None


def _inference(x, cupy):
    return ops.batch_norm_inference(x, *[cupy.empty(8, FLOAT32) for _ in range(4)])


TWO_READS = {"two_reads": True}
# What is called, forward and backward, and under which limits.
ROWS = {
    "one read": (_passes(), "memset, 1", "memset, 1", {}),
    "one read, of few values": (_passes(shape=FEW), "1", "1", {}),
    "two reads": (_passes(), "3", "3", TWO_READS),
    "two reads, of few values": (_passes(shape=FEW), "2", "2", TWO_READS),
    "an average of all batches": (_passes(momentum=None), "memset, 1", "memset, 1", {}),
    "an average of all batches, two reads": (_passes(momentum=None), "memset, 3", "3", TWO_READS),
    "finite batches": (_passes(skip_nonfinite=True), "memset, 1", "memset, 1", {}),
    "finite batches, of few values": (_passes(skip_nonfinite=True, shape=FEW), "memset, 1", "1", {}),
    "statistics that wait": (_passes(deferred=True), "memset, 1", "memset, 1", {}),
    "statistics that wait, and a commit": (_commit, "memset, 2", None, {}),
    "evaluation": (_in_evaluation, "1", "3", {}),
    "inference": (_operation(_inference, ops.batch_norm_inference_backward), "1", "3", {}),
    "groups": (_passes(kind=gl.GhostBatchNorm2d, arguments=(3,)), "memset, 3", "memset, 3", {}),
    "groups, two reads": (_passes(kind=gl.GhostBatchNorm2d, arguments=(3,)), "7", "7", TWO_READS),
    "one process": (_passes(kind=gl.SyncBatchNorm), "memset, 1", "memset, 1", {}),
    "two processes": (_synchronised(IMAGES), "3, exchange, 2", "2, exchange, 2", {}),
    "two processes, of few values": (_synchronised(FEW), "2, exchange, 2", "1, exchange, 2", {}),
    "known lengths": (_padded(6, True), "memset, 1", "memset, 1", {}),
    "other lengths": (_padded(6, False), "memset, 2", "memset, 1", {}),
    "other lengths, of many samples": (_padded(300, False), "copy, 1, memset, 1", "memset, 1", {}),
    "max pooling of batch norm, two reads": (_pooled_norm((2, 2)), "3", "3", TWO_READS),
    # Windows that have no kernel of their own: batch norm's statistics, what normalises and pools; max pooling's
    # backward and batch norm's.
    "max pooling of batch norm, other windows": (_pooled_norm((4, 5), stride=(3, 2)), "4", "memset, 2", {}),
    "pooling by known lengths": (_pooled_to_lengths(True), "1", "1", {}),
    "pooling by other lengths": (_pooled_to_lengths(False), "copy, 1", "1", {}),
    "second derivatives": (_double_backward(IMAGES), "3", None, {}),
    "second derivatives, of few values": (_double_backward(FEW), "2", None, {}),
    "dropout by samples": (_operation(_by_samples, ops.dropout_backward), "1", "1", {}),
    "dropout by samples into out=": (
        _operation(lambda x, cupy: _by_samples(x, cupy, out=cupy.empty(x.shape, x.dtype))),
        "copy, 1",
        None,
        {},
    ),
    "dropout and a residual": (
        _operation(lambda x, cupy: ops.dropout_forward(x, 0.5, 1, 2, residual=x), ops.dropout_backward),
        "1",
        "1",
        {},
    ),
    "LP pooling, p = 1": (
        _operation(lambda x, _: ops.lp_pool_forward(x, 1, (2, 2)), ops.lp_pool_backward),
        "1",
        "1",
        {},
    ),
    "LP pooling, the largest": (
        _operation(lambda x, _: ops.lp_pool_forward(x, np.inf, (2, 2)), ops.lp_pool_backward),
        "1",
        "1",
        {},
    ),
    # As of the layers.
    "LP pooling, another p": (
        _operation(lambda x, _: ops.lp_pool_forward(x, 3, (2, 2)), ops.lp_pool_backward),
        "1",
        "2",
        {},
    ),
    "max pooling of whole numbers": (
        _operation(lambda x, cupy: ops.max_pool_forward(cupy.empty(x.shape, np.int32), (3, 3))),
        "1",
        None,
        {},
    ),
    "indices of max pooling": (_indices, "1", None, {}),
    "unpooling by checked indices": (_operation(_unpooled(True), ops.max_unpool_backward), "1, read back, 1", "1", {}),
    "unpooling by others": (_operation(_unpooled(False), ops.max_unpool_backward), "1", "1", {}),
}


@pytest.mark.parametrize("name", ROWS)
def test_launches_of_a_row_of_the_documents(cupy, name):
    prepare, expected, of_backward, limits = ROWS[name]
    with force_limits(**limits):
        forward, backward = prepare(cupy)
        assert_asks(cupy, forward, expected, "forward")
        assert (backward is None) == (of_backward is None)
        if backward is not None:
            assert_asks(cupy, backward, of_backward, "backward")


def test_the_stand_in_notes_what_the_array_library_does(cupy):
    """What kernels cannot read is copied, and what they cannot write is delivered: else the tables show little."""
    x = cupy.empty((64, 1000), FLOAT32)
    off = cupy.ndarray((64, 1000), FLOAT32, cupy.cuda.alloc(4 + x.nbytes) + 4)
    assert cupy.steps(lambda: ops.relu_forward(x)) == "1"
    assert cupy.steps(lambda: ops.relu_forward(x[::-1])) == "library, 1"
    assert cupy.steps(lambda: ops.relu_forward(x.T)) == "library, 1"
    assert cupy.steps(lambda: ops.relu_forward(off)) == "copy, 1"
    assert cupy.steps(lambda: ops.relu_forward(x, out=cupy.empty((1000, 64), FLOAT32).T)) == "1, library"
    for work in (lambda: x + x, lambda: x.sum(), lambda: x.copy(), lambda: x.fill(1), lambda: cupy.concatenate([x, x])):
        assert cupy.steps(work) == "library"
    for work in (lambda: bool(x[0, 0] > 0), lambda: float(x.max()), lambda: x.any().tolist()):
        assert cupy.steps(work) == "library, read back"
    assert (
        cupy.steps(lambda: (x.reshape(-1), x[3], x.T, cupy.empty(3), cupy.empty_like(x), x.astype(FLOAT32, copy=False)))
        == ""
    )


def test_the_tables_are_of_the_main_kernels(cupy):
    """Groups of blocks that wait for each other, tiles and vectors; else the tables show little."""
    launched = set()
    for operation in OPERATIONS:
        if operation.name in ("dropout", "relu", "batch_norm", "max_pool", "avg_pool", "lp_pool", "shared_dropout"):
            x, of_channels = cupy.empty(operation.shapes[0], BFLOAT16), cupy.empty(operation.shapes[0][1], FLOAT32)
            given = {"x": x, "start": 0, "gamma": of_channels, "beta": of_channels}
            y, saved = operation.forward(given, False)
            cupy.steps(lambda: operation.backward(y, saved))  # noqa: B023
            launched |= cupy.kernels()
    tiled = {f"{one}_pool_backward_tiled" for one in ("max", "avg", "lp")}
    assert launched == tiled | {
        "dropout_apply",
        "dropout_apply_repeated",
        "relu_backward",
        "batch_norm_backward_persistent",
    }
