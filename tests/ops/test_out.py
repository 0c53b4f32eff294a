"""Results in arrays that the caller names: the same bits, in any layout; bad ones are refused, and left alone."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import ops
from tests.inputs import (
    LAYOUTS,
    WRITABLE_LAYOUTS,
    assert_same_bits,
    assert_same_values,
    each_dtype,
    normal,
    with_specials,
)

X = normal((2, 3, 7, 6), np.float32)
ONES = np.ones(3, np.float32)


def pool_cases():
    for last in (False, True):
        x = np.ascontiguousarray(np.moveaxis(X, 1, -1)) if last else X
        options = {"channels_last": last}
        yield (
            "max_pool",
            x,
            lambda x, o=options, **k: ops.max_pool_forward(x, (3, 2), 2, 1, **o, **k),
            ops.max_pool_backward,
        )
        yield (
            "avg_pool",
            x,
            lambda x, o=options, **k: ops.avg_pool_forward(x, (2, 3), 1, **o, **k),
            ops.avg_pool_backward,
        )
        for p in (1.0, 2.5, float("inf")):
            yield (
                f"lp_pool {p}",
                x,
                lambda x, p=p, o=options, **k: ops.lp_pool_forward(x, p, (2, 3), 2, **o, **k),
                ops.lp_pool_backward,
            )
        yield (
            "adaptive_max_pool",
            x,
            lambda x, o=options, **k: ops.adaptive_max_pool_forward(x, (3, 4), **o, **k),
            ops.max_pool_backward,
        )
        yield (
            "global_avg_pool",
            x,
            lambda x, o=options, **k: ops.adaptive_avg_pool_forward(x, (1, 1), **o, **k),
            ops.avg_pool_backward,
        )
    yield "unbatched max_pool", X[0], lambda x, **k: ops.max_pool_forward(x, (2, 2), **k), ops.max_pool_backward
    yield "unbatched avg_pool", X[0], lambda x, **k: ops.avg_pool_forward(x, (2, 2), **k), ops.avg_pool_backward


def batch_norm_cases():
    yield "batch_norm", X, lambda x, **k: ops.batch_norm_forward(x, ONES, None, activation="relu", **k), None
    yield "inference", X, lambda x, **k: ops.batch_norm_inference(x, ONES, ONES, ONES, None, **k), None


ELEMENTWISE = {
    "relu": (ops.relu_forward, ops.relu_backward),
    "dropout": (lambda x, **k: ops.dropout_forward(x, 0.5, 1, 2, **k), ops.dropout_backward),
}
CASES = [*pool_cases(), *batch_norm_cases()]
CASES += [("relu", X, ops.relu_forward, None), ("dropout", X, *ELEMENTWISE["dropout"])]
each_case = pytest.mark.parametrize(
    ("x", "forward", "backward"),
    [case[1:] for case in CASES],
    ids=[f"{name} {'NHWC' if x.shape[-1] == 3 else 'NCHW'}" for name, x, *_ in CASES],
)


@each_case
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_results_are_the_same_bits(x, forward, backward, layout, backend):
    with gl.use_backend(backend):
        expected, saved = forward(x)
        out = LAYOUTS[layout](np.full_like(expected, 7))
        y, also_saved = forward(x, out=out)
        assert y is out
        assert_same_bits(np.ascontiguousarray(out), expected)
        if backward is None:
            return
        dx = backward(expected, saved)
        target = LAYOUTS[layout](np.full_like(dx, 7))
        assert backward(expected, also_saved, out=target) is target
        assert_same_bits(np.ascontiguousarray(target), dx)


@each_case
def test_bad_ones_are_refused_and_left_alone(x, forward, backward):
    y, saved = forward(x)
    calls = [lambda out: forward(x, out=out)]
    results = [y]
    if backward is not None:
        calls.append(lambda out: backward(y, saved, out=out))
        results.append(backward(y, saved))
    for call, result in zip(calls, results, strict=True):
        bad = {
            "result's dtype float32, got float64": (TypeError, np.full(result.shape, 7.0)),
            "result's shape": (ValueError, np.full((*result.shape, 1), 7, np.float32)),
            "out is read-only": (ValueError, LAYOUTS["read_only"](np.full_like(result, 7))),
            "refers to a single memory": (ValueError, np.broadcast_to(np.float32(7), result.shape).view()),
            "expected a numpy.ndarray or cupy.ndarray, got list": (TypeError, [7.0]),
        }
        for message, (error, out) in bad.items():
            with pytest.raises(error, match=message):
                call(out)
            assert np.all(np.asarray(out) == 7)


@each_dtype
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
@pytest.mark.parametrize(("forward", "backward"), ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_elementwise_it_may_be_the_input(forward, backward, layout, dtype):
    values, dy = with_specials((4, 5), dtype), normal((4, 5), dtype)
    expected, saved = forward(values)
    x = LAYOUTS[layout](values)
    y, saved_in_place = forward(x, out=x)
    assert y is x
    assert_same_values(y, expected)
    assert_same_bits(backward(dy, saved_in_place), backward(dy, saved))


def test_out_must_be_apart_from_what_is_read():
    memory = np.arange(2 * X.size, dtype=np.float32)
    x = memory[: X.size].reshape(X.shape)
    before = memory.copy()
    for forward in (
        lambda out: ops.batch_norm_forward(x, None, None, out=out),
        lambda out: ops.batch_norm_inference(x, ONES, ONES, None, None, out=out),
        lambda out: ops.avg_pool_forward(x, (1, 1), out=out),
        lambda out: ops.max_pool_forward(x, (1, 1), out=out),
    ):
        for out in (x, memory[1 : X.size + 1].reshape(X.shape)):
            with pytest.raises(ValueError, match="out must not overlap an input"):
                forward(out)
    assert_same_bits(memory, before)
    ops.max_pool_forward(x, (1, 1), out=memory[X.size :].reshape(X.shape))
    assert_same_bits(memory[X.size :], before[: X.size])


def test_what_was_saved_and_is_written_over_is_noticed():
    x = X.copy()
    _, saved = ops.batch_norm_forward(x, ONES, None)
    ops.max_pool_forward(normal(X.shape, np.float32, 3), (1, 1), out=x)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        ops.batch_norm_backward(X, saved)
