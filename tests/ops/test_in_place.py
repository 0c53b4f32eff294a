"""Results in the place of what they are computed from: where each element needs that element alone; else refused."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import ops
from gpu_layers.distributed import SingleProcess
from gpu_layers.kernels.batch_norm_plan import backward_plan
from gpu_layers.runtime.limits import force_limits
from tests.inputs import (
    LAYOUTS,
    WRITABLE_LAYOUTS,
    assert_all_same_bits,
    assert_same_bits,
    assert_same_values,
    each_backend,
    each_dtype,
    normal,
    unchanged,
    with_specials,
)
from tests.ops.out_cases import (
    APART,
    CURVED,
    ELEMENTWISE,
    MAY_BE_DY,
    NORMS,
    ONES,
    TwoAlike,
    X,
    batch_norm,
    each,
    inference,
    listed,
    norm_pool_cases,
    second,
)


@each(MAY_BE_DY)
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
@each_backend
def test_a_gradient_may_take_the_place_of_the_one_it_is_of(x, forward, backward, layout, backend):
    with gl.use_backend(backend):
        y, saved = forward(x)
        expected = listed(backward(y, saved))
        dy = LAYOUTS[layout](y)
        found = listed(backward(dy, saved, out=dy))
        assert found[0] is dy
        assert_all_same_bits([np.ascontiguousarray(dy), *found[1:]], expected)
        # Of memory that begins an element later each element is read before it is written.
        memory = np.append(y, y.dtype.type(0))
        dy, out = memory[:-1].reshape(y.shape), memory[1:].reshape(y.shape)
        found = listed(backward(dy, saved, out=out))
        assert found[0] is out
        assert_all_same_bits(found, expected)
        # What was saved is as it was.
        assert_all_same_bits(listed(backward(y, saved)), expected)


@each(MAY_BE_DY)
def test_threads_that_write_in_place_do_not_race(x, forward, backward):
    for two_reads in (False, True):
        with gl.use_backend("emulated", check=True), force_limits(two_reads=two_reads):
            y, saved = forward(x)
            expected = listed(backward(y, saved))
            assert_all_same_bits(listed(backward(y, saved, out=y)), expected)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("two_reads", [False, True])
def test_several_blocks_of_a_channel_write_in_place(last, activation, two_reads):
    shape = (64, 8, 8, 16) if last else (32, 2, 32, 32)
    assert backward_plan(shape, 4, last).blocks_per_group > 1
    x, dy = normal(shape, np.float32), normal(shape, np.float32, 1)
    for forward, backward in (
        (batch_norm, ops.batch_norm_backward),
        (inference, ops.batch_norm_inference_backward),
        (lambda x, **k: batch_norm(x, residual=True, **k), ops.batch_norm_backward),
    ):
        with gl.use_backend("emulated"), force_limits(two_reads=two_reads):
            _, saved = forward(x, last=last, activation=activation)
            expected, own = backward(dy, saved), dy.copy()
            assert_all_same_bits(backward(own, saved, out=own), expected)


@pytest.mark.parametrize("argument", ["ddx", "ddresidual"])
@each_backend
def test_second_derivatives_may_take_the_place_of_any_of_their_inputs(argument, backend):
    with gl.use_backend(backend):
        _, saved = batch_norm(X, residual=True, activation="relu")
        given = {name: normal(X.shape, np.float32, seed) for seed, name in enumerate(("ddx", "ddresidual", "dy"))}
        others = {"ddgamma": None, "ddbeta": ONES, "saved": saved}
        expected = ops.batch_norm_double_backward(**given, **others)
        found = ops.batch_norm_double_backward(**given, **others, out=given[argument])
        assert found[0] is given[argument]
        assert_all_same_bits(found, expected)


@each_dtype
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
@pytest.mark.parametrize(("forward", "backward"), ELEMENTWISE.values(), ids=ELEMENTWISE)
@each_backend
def test_elementwise_it_may_be_the_input(forward, backward, layout, dtype, backend):
    values, dy = with_specials((4, 5), dtype), normal((4, 5), dtype)
    with gl.use_backend(backend, check=backend == "emulated"):
        expected, saved = forward(values)
        x = LAYOUTS[layout](values)
        y, saved_in_place = forward(x, out=x)
        assert y is x
        assert_same_values(y, expected)
        assert_same_bits(backward(dy, saved_in_place), backward(dy, saved))


@each_dtype
@pytest.mark.parametrize("forward", CURVED.values(), ids=CURVED)
@each_backend
def test_a_backward_that_needs_the_input_notices_that_it_was_overwritten(forward, dtype, backend):
    with gl.use_backend(backend):
        expected, _ = forward(X.astype(dtype))
        memory = np.append(X.astype(dtype), dtype.type(0))
        x = memory[:-1].reshape(X.shape)
        # Each element is read before it is written.
        for out in (x, memory[1:].reshape(X.shape)):
            x[...] = X.astype(dtype)
            y, saved = forward(x, out=out)
            assert y is out
            assert_same_bits(y, expected)
            with pytest.raises(RuntimeError, match="has been modified by an inplace operation: x"):
                ops.activation_dropout_backward(X.astype(dtype), saved)


def test_an_input_that_is_read_only_is_not_changed_in_place():
    dy = LAYOUTS["read_only"](X)
    for forward, backward in (*ELEMENTWISE.values(), (batch_norm, ops.batch_norm_backward)):
        _, saved = forward(X.copy())
        with unchanged(dy), pytest.raises(ValueError, match="the input is read-only, and cannot be changed in place"):
            backward(dy, saved, out=dy)


@each([*NORMS, *norm_pool_cases(), *[case for case in MAY_BE_DY if case[0] in CURVED]])
def test_what_a_backward_reads_again_is_not_overwritten(x, forward, backward):
    memory = np.append(x, np.float32(0))
    x = memory[:-1].reshape(x.shape)
    y, saved = forward(x)
    dy, before = normal(y.shape, np.float32, 3), memory.copy()
    for out in (x, memory[1:].reshape(x.shape)):
        with pytest.raises(ValueError, match="out must not overlap an input"):
            backward(dy, saved, out=out)
    assert_same_bits(memory, before)
    backward(dy, saved)


def test_a_residual_is_not_overwritten_by_a_backward():
    residual = X[::-1].copy()
    for forward, backward in (
        (lambda **k: ops.batch_norm_forward(X, ONES, None, **k), ops.batch_norm_backward),
        (lambda **k: ops.batch_norm_inference(X, ONES, ONES, ONES, None, **k), ops.batch_norm_inference_backward),
        (lambda **k: ops.ghost_batch_norm_forward(X, ONES, None, bounds=(0, 1, 2), **k), ops.ghost_batch_norm_backward),
        (lambda **k: ops.sync_batch_norm_forward(X, ONES, None, TwoAlike(), **k), ops.sync_batch_norm_backward),
        (lambda **k: ops.batch_norm_forward(X, ONES, None, **k), second),
    ):
        _, saved = forward(residual=residual, activation="relu")
        with unchanged(residual), pytest.raises(ValueError, match="out must not overlap an input"):
            backward(X.copy(), saved, out=residual)
        with unchanged(residual), pytest.raises(ValueError, match="out must not overlap an input"):
            forward(residual=residual, out=residual)


@each(APART)
def test_a_gradient_that_is_still_needed_is_not_overwritten(x, forward, backward):
    """Of pooling each is read for several elements; that of a sum is the residual's too."""
    y, saved = forward(x)
    memory = np.empty(max(x.size, y.size) + 1, np.float32)
    dy = memory[: y.size].reshape(y.shape)
    dy[...] = y
    for start in (0, 1):
        with unchanged(memory), pytest.raises(ValueError, match="out must not overlap an input"):
            backward(dy, saved, out=memory[start : start + x.size].reshape(x.shape))


def test_out_must_be_apart_from_what_is_read():
    memory = np.arange(2 * X.size, dtype=np.float32)
    x = memory[: X.size].reshape(X.shape)
    before = memory.copy()
    for forward in (
        lambda out: ops.batch_norm_forward(x, None, None, out=out),
        lambda out: ops.batch_norm_inference(x, ONES, ONES, None, None, out=out),
        lambda out: ops.avg_pool_forward(x, (1, 1), out=out),
        lambda out: ops.max_pool_forward(x, (1, 1), out=out),
        lambda out: ops.batch_norm_max_pool_forward(x, ONES, None, (1, 1), out=out),
        lambda out: ops.batch_norm_max_pool_inference(x, ONES, ONES, None, None, (1, 1), out=out),
        lambda out: ops.ghost_batch_norm_forward(x, None, None, bounds=(0, 1, 2), out=out),
        lambda out: ops.sync_batch_norm_forward(x, None, None, SingleProcess(), out=out),
        lambda out: ops.sync_batch_norm_forward(x, None, None, TwoAlike(), out=out),
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
