"""Results in arrays that the caller names: the same bits, in any layout; bad ones are refused, and left alone."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import ops
from gpu_layers.core.writes import check_unwritten, write_count
from gpu_layers.distributed import SingleProcess
from gpu_layers.ops.padding import valid_positions
from gpu_layers.runtime.backend import use_executor
from gpu_layers.runtime.limits import force_limits
from tests.inputs import (
    LAYOUTS,
    WRITABLE_LAYOUTS,
    assert_all_same_bits,
    assert_same_bits,
    each_backend,
    each_dtype,
    unchanged,
)
from tests.ops.out_cases import (
    APART,
    MAY_BE_DY,
    NORMS,
    ONES,
    TwoAlike,
    X,
    activated,
    added,
    batch_norm,
    each,
    each_case,
    ghost,
    inference,
    listed,
    norm_pool_cases,
    second,
    sync,
)


def is_noticed(since, array):
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        check_unwritten(since, array=array)
    return True


def assert_out_takes(x, forward, backward, layout):
    """The same bits with and without out; what is written is noticed, and nothing else is written."""
    expected, saved = forward(x)
    out, since = LAYOUTS[layout](np.full_like(expected, 7)), write_count()
    with unchanged(x):
        y, also_saved = forward(x, out=out)
    assert y is out
    assert is_noticed(since, out)
    assert_same_bits(np.ascontiguousarray(out), expected)
    gradients = listed(backward(expected, saved))
    target, since = LAYOUTS[layout](np.full_like(gradients[0], 7)), write_count()
    with unchanged(x, expected):
        found = listed(backward(expected, also_saved, out=target))
    assert found[0] is target
    assert is_noticed(since, target)
    assert_all_same_bits([np.ascontiguousarray(target), *found[1:]], gradients)


@each_case
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
@each_backend
def test_results_are_the_same_bits(x, forward, backward, layout, backend):
    with gl.use_backend(backend):
        assert_out_takes(x, forward, backward, layout)


@each([*MAY_BE_DY, *APART])
@each_dtype
@each_backend
def test_results_of_all_dtypes_are_the_same_bits(x, forward, backward, backend, dtype):
    with gl.use_backend(backend):
        for layout in ("contiguous", "every_other"):
            assert_out_takes(x.astype(dtype), forward, backward, layout)


@each([*NORMS, *norm_pool_cases()])
def test_what_is_read_twice_is_written_likewise(x, forward, backward):
    with gl.use_backend("emulated"), force_limits(two_reads=True, index64=True):
        assert_out_takes(x, forward, backward, "contiguous")


class Counted:
    """Launches nothing."""

    def __init__(self):
        self.count = 0

    def launch(self, *arguments):
        self.count += 1


@each_case
def test_a_contiguous_one_takes_no_more_launches(x, forward, backward):
    counts = []
    with use_executor(executor := Counted()):
        y, saved = forward(x)
        out, target = np.empty_like(y), np.empty_like(listed(backward(y, saved))[0])
        for options in ({}, {"out": out}):
            executor.count = 0
            forward(x, **options)
            counts.append(executor.count)
        for options in ({}, {"out": target}):
            executor.count = 0
            backward(y, saved, **options)
            counts.append(executor.count)
    assert counts[0] == counts[1] > 0
    assert counts[2] == counts[3] > 0


@each_case
def test_bad_ones_are_refused_and_left_alone(x, forward, backward):
    y, saved = forward(x)
    calls = [lambda out: forward(x, out=out), lambda out: backward(y, saved, out=out)]
    results = [y, listed(backward(y, saved))[0]]
    for call, result in zip(calls, results, strict=True):
        bad = {
            "result's dtype float32, got float64": (TypeError, np.full(result.shape, 7.0)),
            "result's shape": (ValueError, np.full((*result.shape, 1), 7, np.float32)),
            "out is read-only": (ValueError, LAYOUTS["read_only"](np.full_like(result, 7))),
            "refers to a single memory": (ValueError, np.broadcast_to(np.float32(7), result.shape).view()),
            "expected a numpy.ndarray or cupy.ndarray, got list": (TypeError, [7.0]),
        }
        for message, (error, out) in bad.items():
            since = write_count()
            with pytest.raises(error, match=message):
                call(out)
            assert np.all(np.asarray(out) == 7)
            assert write_count() == since


def test_nothing_is_exchanged_before_out_is_refused():
    class Silent(TwoAlike):
        def gather(self, values):
            raise AssertionError("asked")

    y, saved = sync(X, TwoAlike())
    saved.communicator = Silent()
    for call in (lambda out: sync(X, Silent(), out=out), lambda out: ops.sync_batch_norm_backward(y, saved, out=out)):
        with pytest.raises(TypeError, match="out must have the result's dtype"):
            call(np.empty(X.shape))


def nothing_valid(x):
    return valid_positions(x, [(0, 0)] * len(x), None, False)


EMPTY = np.empty((0, 3, 4, 4), np.float32)
OF_NOTHING = {
    "batch_norm": (EMPTY, batch_norm, ops.batch_norm_backward),
    "inference": (EMPTY, inference, ops.batch_norm_inference_backward),
    "second": (EMPTY, batch_norm, second),
    "ghost": (EMPTY, lambda x, **k: ghost(x, bounds=(0, 0), **k), ops.ghost_batch_norm_backward),
    "sync": (EMPTY, lambda x, **k: sync(x, TwoAlike(), **k), ops.sync_batch_norm_backward),
    "pool": (
        EMPTY,
        lambda x, **k: ops.batch_norm_max_pool_forward(x, ONES, None, (2, 2), **k),
        ops.batch_norm_max_pool_backward,
    ),
    "inference, pool": (
        EMPTY,
        lambda x, **k: ops.batch_norm_max_pool_inference(x, ONES, ONES, ONES, None, (2, 2), **k),
        ops.batch_norm_max_pool_inference_backward,
    ),
    "dropout_add": (EMPTY, lambda x, **k: added(x, "gelu", bias=True, **k), ops.dropout_add_backward),
    "relu": (EMPTY, ops.relu_forward, ops.relu_backward),
    "gelu, dropout": (EMPTY, lambda x, **k: activated(x, "gelu", **k), ops.activation_dropout_backward),
    "padded ghost": (X, lambda x, **k: ghost(x, valid=nothing_valid(x), **k), ops.ghost_batch_norm_backward),
    "padded sync": (X, lambda x, **k: sync(x, TwoAlike(), valid=nothing_valid(x), **k), ops.sync_batch_norm_backward),
}


@pytest.mark.parametrize(("x", "forward", "backward"), OF_NOTHING.values(), ids=OF_NOTHING)
@each_backend
def test_nothing_is_written_as_well(x, forward, backward, backend):
    with gl.use_backend(backend):
        for layout in ("contiguous", "every_other"):
            expected, saved = forward(x)
            out = LAYOUTS[layout](np.full_like(expected, 7))
            assert forward(x, out=out)[0] is out
            assert_same_bits(np.ascontiguousarray(out), expected)
            gradients = listed(backward(expected, saved))
            out = LAYOUTS[layout](np.full_like(x, 7))
            found = listed(backward(expected, saved, out=out))
            assert found[0] is out
            assert_all_same_bits([np.ascontiguousarray(out), *found[1:]], gradients)


def test_a_refused_batch_leaves_out_alone():
    """One value a channel: that is known before anything is written."""
    x, out = np.ones((1, 3, 1, 1), np.float32), np.full((1, 3, 1, 1), 7, np.float32)
    since = write_count()
    for call in (
        lambda: batch_norm(x, out=out),
        lambda: ghost(x, bounds=(0, 1), out=out),
        lambda: sync(x, SingleProcess(), out=out),
        lambda: ops.batch_norm_max_pool_forward(x, ONES, None, (1, 1), out=out),
    ):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            call()
    assert np.all(out == 7)
    assert write_count() == since
