"""Max pooling: values, indices and gradients against PyTorch, exactly."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.inputs import (
    assert_same_bits,
    assert_same_values,
    each_dtype,
    each_rank,
    integers,
    normal,
    tie_free,
    with_specials,
)
from tests.ops.pool_cases import SHAPES, TORCH_MAX_POOL, configurations, taps_inside, window_of
from tests.torch_bridge import from_torch, to_torch


def torch_max_pool(x, options, dy=None):
    """Values, indices and, where dy is given, the gradient."""
    leaf = to_torch(x).requires_grad_()
    y, indices = TORCH_MAX_POOL[len(options["kernel_size"])](leaf, **options, return_indices=True)
    if dy is not None:
        y.backward(to_torch(dy(tuple(y.shape))))
    return from_torch(y), indices.numpy(), None if dy is None else from_torch(leaf.grad)


def our_max_pool(x, options, dy=None):
    y, saved = gl.ops.max_pool_forward(x, **options)
    dx = None if dy is None else gl.ops.max_pool_backward(dy(y.shape), saved)
    return y, gl.ops.max_pool_indices(saved), dx


def small_integers(dtype):
    # Sums of a few of these are exact in every dtype: the order of the additions does not matter.
    return lambda shape: integers(shape, dtype, seed=1)


def check_against_torch(x, options, message):
    """Exact equality; False if the window does not fit, which both must say."""
    try:
        window = window_of(x.shape, options)
    except ValueError:
        for refused, call in ((RuntimeError, torch_max_pool), (ValueError, our_max_pool)):
            with pytest.raises(refused, match="Output size is too small"):
                call(x, options)
        return False
    touching = taps_inside(window) > 0
    # For a (dilated) window that touches no element, torch names one outside and its backward writes there.
    dy = small_integers(x.dtype) if touching.all() else None
    expected_y, expected_indices, expected_dx = torch_max_pool(x, options, dy)
    y, indices, dx = our_max_pool(x, options, dy)
    assert_same_values(y, expected_y, message)
    touching = np.broadcast_to(touching, y.shape)
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(indices[touching], expected_indices[touching], err_msg=message)
    assert (indices[~touching] == -1).all()
    assert np.isneginf(y[~touching].astype(np.float64)).all()
    if dy is not None:
        assert_same_values(dx, expected_dx, message)
    return True


@each_rank
def test_every_configuration_is_torchs(rank):
    fitting = 0
    for shape in SHAPES[rank]:
        x = tie_free(shape)
        for options in configurations(rank):
            fitting += check_against_torch(x, options, f"{shape} {options}")
    assert fitting > 100


@each_rank
@each_dtype
def test_ties_nan_and_infinities_are_resolved_as_torch_does(rank, dtype):
    # With nine values there are ties in nearly every window, and several NaN in many: the last NaN is taken.
    for seed, options in enumerate(list(configurations(rank))[::7]):
        shape = SHAPES[rank][0]
        check_against_torch(with_specials(shape, dtype, seed), options, f"{seed} {options}")
        check_against_torch(integers(shape, dtype, seed=seed), options, f"{seed} {options}")


@each_rank
def test_padding_up_to_half_of_a_dilated_window_is_minus_infinity(rank):
    # Torch's CPU kernels measure padding against the window before dilation: there, pad by hand.
    options = {"kernel_size": (3,) * rank, "stride": 2, "dilation": 3}
    for padding in (2, 3):
        x = tie_free((2, 3, *(3, 5, 4)[:rank]))
        leaf = to_torch(x).requires_grad_()
        padded = torch.nn.functional.pad(leaf, (padding,) * 2 * rank, value=-np.inf)
        expected = TORCH_MAX_POOL[rank](padded, **options)
        y, saved = gl.ops.max_pool_forward(x, **options, padding=padding)
        assert_same_bits(y, from_torch(expected))
        dy = integers(y.shape)
        expected.backward(to_torch(dy))
        assert_same_values(gl.ops.max_pool_backward(dy, saved), from_torch(leaf.grad))


@each_rank
@pytest.mark.parametrize("channels_last", [False, True])
def test_unbatched_is_a_batch_of_one(rank, channels_last):
    options = {"kernel_size": (2,) * rank, "stride": 1, "padding": 1, "channels_last": channels_last}
    x = tie_free(SHAPES[rank][0][1:])
    x = np.ascontiguousarray(np.moveaxis(x, 0, -1)) if channels_last else x
    results = our_max_pool(x, options, small_integers(np.float64))
    batched = our_max_pool(x[None], options, small_integers(np.float64))
    for one, many in zip(results, batched, strict=True):
        assert_same_bits(one, many[0])


@each_rank
def test_unbatched_is_torchs(rank):
    options = {"kernel_size": (2,) * rank, "stride": 1, "padding": 1, "dilation": 1, "ceil_mode": False}
    x = tie_free(SHAPES[rank][0][1:])
    for ours, torchs in zip(
        our_max_pool(x, options, small_integers(np.float64)),
        torch_max_pool(x, options, small_integers(np.float64)),
        strict=True,
    ):
        assert_same_bits(ours, torchs)


@each_dtype
def test_in_a_window_of_minus_infinity_the_first_tap_inside_wins(dtype):
    x = np.full((1, 1, 3, 3), -np.inf, dtype)
    y, saved = gl.ops.max_pool_forward(x, (2, 2), 2, 1)
    assert_same_bits(y, np.full((1, 1, 2, 2), -np.inf, dtype))
    assert gl.ops.max_pool_indices(saved).tolist() == [[[[0, 1], [3, 4]]]]
    dy = np.array([[[[1, 2], [3, 4]]]], dtype)
    expected = np.array([[[[1, 2, 0], [3, 4, 0], [0, 0, 0]]]], dtype)
    assert_same_bits(gl.ops.max_pool_backward(dy, saved), expected)


@each_dtype
def test_a_window_with_no_tap_inside_has_no_index_and_no_gradient(dtype):
    # One element, taps one before and one after it.
    x = np.array([[[5]]], dtype)
    y, saved = gl.ops.max_pool_forward(x, (2,), 1, 1, 2)
    assert_same_bits(y, np.array([[[-np.inf]]], dtype))
    assert gl.ops.max_pool_indices(saved).tolist() == [[[-1]]]
    assert_same_bits(gl.ops.max_pool_backward(np.array([[[7]]], dtype), saved), np.zeros((1, 1, 1), dtype))


@each_dtype
def test_nan_wins_and_the_last_one_is_taken(dtype):
    x = np.array([[[np.nan, np.inf, np.nan, 3]]], dtype)
    y, saved = gl.ops.max_pool_forward(x, (3,), 1)
    assert np.isnan(y.astype(np.float64)).all()
    assert gl.ops.max_pool_indices(saved).tolist() == [[[2, 2]]]
    assert_same_bits(gl.ops.max_pool_backward(np.array([[[1, 2]]], dtype), saved), np.array([[[0, 0, 3, 0]]], dtype))


@each_dtype
def test_the_first_of_two_zeros_wins_whatever_its_sign(dtype):
    x = np.array([[[-0.0, 0.0, 0.0, -0.0]]], dtype)
    y, saved = gl.ops.max_pool_forward(x, (2,))
    assert_same_bits(y, np.array([[[-0.0, 0.0]]], dtype))
    assert gl.ops.max_pool_indices(saved).tolist() == [[[0, 2]]]


@each_dtype
@each_rank
def test_the_sum_of_gradients_is_preserved(rank, dtype):
    for shape in SHAPES[rank]:
        x = with_specials(shape, dtype)
        for options in configurations(rank):
            try:
                window = window_of(shape, options)
            except ValueError:
                continue  # does not fit; tested above
            y, saved = gl.ops.max_pool_forward(x, **options)
            dy = integers(y.shape, dtype, 0, 3)
            sent = dy.astype(np.float64)[np.broadcast_to(taps_inside(window) > 0, y.shape)].sum()
            # At most 36 gradients of at most 3 meet at an element: exact even in bfloat16.
            assert gl.ops.max_pool_backward(dy, saved).astype(np.float64).sum() == sent, f"{shape} {options}"


@each_dtype
def test_gradients_that_meet_are_added_in_the_accumulation_dtype(dtype):
    x = np.zeros((1, 1, 3), dtype)
    x[0, 0, 1] = 1
    _, saved = gl.ops.max_pool_forward(x, (2,), 1)
    dx = gl.ops.max_pool_backward(np.array([[[0.1, 0.2]]], dtype), saved)
    wide = np.float64 if dtype == np.float64 else np.float32
    expected = (np.array(0.1, dtype).astype(wide) + np.array(0.2, dtype).astype(wide)).astype(dtype)
    assert_same_bits(dx, np.array([[[0, expected, 0]]], dtype))


def test_infinite_gradients_cancel_to_nan_without_a_warning():
    _, saved = gl.ops.max_pool_forward(np.array([[[0.0, 1.0, 0.0]]]), (2,), 1)
    dx = gl.ops.max_pool_backward(np.array([[[np.inf, -np.inf]]]), saved)
    np.testing.assert_array_equal(dx, [[[0, np.nan, 0]]])


@pytest.mark.parametrize(("kernel", "dtype"), [((2, 3), np.uint8), ((16, 16), np.uint8), ((17, 17), np.uint16)])
def test_what_is_saved_is_the_number_of_the_winning_tap(kernel, dtype):
    x = np.zeros((1, 1, *kernel), np.float32)
    x[..., -1, -1] = 1
    _, saved = gl.ops.max_pool_forward(x, kernel)
    assert saved.argmax.dtype == dtype
    assert saved.argmax.item() == kernel[0] * kernel[1] - 1
    assert gl.ops.max_pool_indices(saved).item() == kernel[0] * kernel[1] - 1


def test_nothing_is_saved_of_the_input():
    x = normal((1, 1, 4, 4))
    _, saved = gl.ops.max_pool_forward(x, (2, 2))
    before = gl.ops.max_pool_indices(saved)
    x[...] = -x
    np.testing.assert_array_equal(gl.ops.max_pool_indices(saved), before)
