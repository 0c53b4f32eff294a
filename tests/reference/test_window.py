"""Where pooling windows lie: output sizes against PyTorch's shape inference, divisors against counting."""

import itertools

import numpy as np
import pytest
import torch

from gpu_layers.core.argmax import argmax_dtype
from gpu_layers.core.window import sliding_window


def window_of(size, kernel, stride, padding, dilation, ceil_mode):
    return sliding_window((kernel,), (stride,), (dilation,), (padding,), (padding,), ceil_mode, (size,))


def configurations(sizes, kernels, strides, dilations):
    for size, kernel, stride, dilation in itertools.product(sizes, kernels, strides, dilations):
        for padding in range(kernel // 2 + 1):
            yield size, kernel, stride, padding, dilation


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_output_sizes_are_torchs(ceil_mode):
    refused = 0
    for configuration in configurations(range(1, 12), range(1, 6), (1, 2, 3, 5, 7), (1, 2, 3)):
        size, kernel, stride, padding, dilation = configuration
        arguments = (torch.zeros(1, 1, size, 1), (kernel, 1), (stride, 1), (padding, 0), (dilation, 1), ceil_mode)
        try:
            window = window_of(*configuration, ceil_mode)
        except ValueError:
            refused += 1
            with pytest.raises(RuntimeError, match="Output size is too small"):
                torch.nn.functional.max_pool2d(*arguments)
        else:
            outputs = torch.nn.functional.max_pool2d(*arguments).shape[2]
            assert window.output_shape == (outputs,), configuration
    assert refused > 100


def test_a_window_that_does_not_fit_is_refused_in_torchs_words():
    with pytest.raises(
        ValueError, match=r"^Given input size: \(4x2\)\. Calculated output size: \(2x0\)\. Output size is "
    ):
        sliding_window((3, 3), (1, 1), (1, 1), (0, 0), (0, 0), False, (4, 2))


@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_divisors_are_the_taps_within_the_extent(ceil_mode, count_include_pad):
    for size, kernel, stride, padding, dilation in configurations(range(4, 9), range(1, 5), (1, 2, 3), (1, 2)):
        if dilation * (kernel - 1) + 1 > size + 2 * padding:
            continue
        window = window_of(size, kernel, stride, padding, dilation, ceil_mode)
        extent = range(-padding, size + padding) if count_include_pad else range(size)
        counted = [
            sum(i * stride - padding + k * dilation in extent for k in range(kernel))
            for i in range(window.output_shape[0])
        ]
        assert window.divisor_counts(0, count_include_pad).tolist() == counted


def test_padding_may_differ_at_the_two_ends():
    window = sliding_window((3,), (2,), (1,), (2,), (1,), False, (6,))
    assert window.output_shape == (4,)
    assert window.divisor_counts(0, False).tolist() == [1, 3, 3, 2]
    assert window.divisor_counts(0, True).tolist() == [3, 3, 3, 3]


def test_a_window_in_ceil_mode_starts_inside_the_input_or_its_leading_padding():
    for size, kernel, stride, padding, dilation in configurations(range(1, 12), range(1, 5), (1, 2, 3, 5), (1, 2)):
        if dilation * (kernel - 1) + 1 > size + 2 * padding:
            continue
        outputs = window_of(size, kernel, stride, padding, dilation, True).output_shape[0]
        assert (outputs - 1) * stride < size + padding
        assert outputs * stride + dilation * (kernel - 1) >= size + 2 * padding or outputs * stride >= size + padding


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [((1, 1), np.uint8), ((16, 16), np.uint8), ((257,), np.uint16), ((256, 256), np.uint16), ((65537,), np.uint32)],
)
def test_taps_take_the_fewest_bytes(kernel, dtype):
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    window = sliding_window(kernel, ones, ones, zeros, zeros, False, kernel)
    assert argmax_dtype(window) == dtype
