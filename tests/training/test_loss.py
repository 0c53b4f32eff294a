"""Softmax cross-entropy against PyTorch."""

import numpy as np
import pytest
import torch

from gpu_layers.training import softmax_cross_entropy
from tests.inputs import DTYPES, LAYOUTS, UNIT_ROUNDOFF, accumulation_dtype, assert_within, normal, unchanged


def _expected(logits, labels):
    exact = torch.from_numpy(logits.astype(np.float64)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, torch.from_numpy(labels))
    loss.backward()
    return float(loss.detach()), exact.grad.numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch(dtype, layout):
    logits = LAYOUTS[layout]((4 * normal((9, 5))).astype(dtype))
    labels = np.arange(9) % 5
    with unchanged(logits, labels):
        loss, gradient = softmax_cross_entropy(logits, labels)
    expected_loss, expected_gradient = _expected(logits, labels)
    # Logits up to 16, their differences up to 32: a rounding of a logarithm that size, and a few of exp and of sums.
    computed = UNIT_ROUNDOFF[accumulation_dtype(dtype)] * (32 + 16)
    assert abs(loss - expected_loss) <= computed
    assert gradient.dtype == dtype
    # Half types have no less than 2**-24 (float16): that is the other part of the rounding.
    assert_within(gradient, expected_gradient, computed + UNIT_ROUNDOFF[dtype] * np.abs(expected_gradient) + 2.0**-25)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_logits_do_not_overflow(dtype):
    logits = np.array([[1e30, -1e30, 0], [-1e30, -1e30, -1e30]], dtype)
    loss, gradient = softmax_cross_entropy(logits, np.array([0, 2]))
    # First sample certain and right: no loss. Second: a third each, log 3.
    assert loss == pytest.approx(np.log(3) / 2, rel=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [1 / 6, 1 / 6, -1 / 3]], rtol=0, atol=1e-7)


def test_gradient_sums_to_zero_per_sample():
    _, gradient = softmax_cross_entropy(normal((6, 4)), np.zeros(6, np.int32))
    # Softmax sums to 1 within a few roundings of 1.
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-15)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), ValueError, r"labels must be in 0 .. 2, got 3"),
        (np.zeros((2, 3)), np.array([-1, 0]), ValueError, r"labels must be in 0 .. 2, got -1"),
        (np.zeros((2, 3)), np.array([0.0, 1.0]), TypeError, "labels must be integers, got float64"),
        (np.zeros((2, 3)), np.array([True, False]), TypeError, "labels must be integers, got bool"),
        (np.zeros((2, 3)), np.array([0, 1, 1]), ValueError, "expected logits of shape"),
        (np.zeros((2, 3)), np.array([[0], [1]]), ValueError, "expected logits of shape"),
        (np.zeros(3), np.array([0, 1, 1]), ValueError, "expected logits of shape"),
        (np.zeros((0, 3)), np.zeros(0, int), ValueError, "mean loss of an empty batch"),
        (np.zeros((2, 3), int), np.array([0, 1]), TypeError, "logits must be float16"),
        ([[0.0]], np.array([0]), TypeError, "expected a numpy.ndarray"),
    ],
)
def test_bad_input(logits, labels, error, message):
    with pytest.raises(error, match=message):
        softmax_cross_entropy(logits, labels)
