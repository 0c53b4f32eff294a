"""Cases of dropout and ReLU: every bit must be the reference's."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_layers import ops
from gpu_layers.runtime.kernel import FLOAT_DTYPES
from gpu_layers.verification.comparison import Arrays, Case
from gpu_layers.verification.inputs import normal, with_special_values

# One element; less than a vector; vectors and a rest; more than the 4,096 elements of a half-type block.
_SIZES = (1, 3, 37, 9001)
_SEED, _OFFSET = 0x0123456789ABCDEF, 0xFEDCBA9876543210


def dropout_cases() -> Iterator[Case]:
    """Sizes, probabilities, shards and views."""
    for dtype in FLOAT_DTYPES:
        for size in _SIZES:
            yield _dropout(dtype, f"n={size}", (size,), 0.3)
        for p in (0.0, 2.0**-32, 0.999999999, 1.0):
            yield _dropout(dtype, f"p={p}", (301,), p)
        # A shard may start at any element: at a multiple of 4 (one Philox block), or within a block.
        for start in (4, 2**34 - 8, 2**33 + 1, 2**63 + 3):
            yield _dropout(dtype, f"start={start}", (301,), 0.5, start=start)
        yield _dropout(dtype, "non-contiguous", (7, 9, 11), 0.5, view=lambda x: x[::-1, :, ::2])
        yield _dropout(dtype, "transposed", (5, 70), 0.5, view=lambda x: x.T)
        yield _dropout(dtype, "misaligned", (131,), 0.5, view=lambda x: x[1:])
        yield _dropout(dtype, "0-d", (), 0.5)
        yield _dropout(dtype, "empty", (0, 5), 0.5)


def _dropout(dtype, label, shape, p, *, start=0, view=lambda x: x) -> Case:
    def inputs() -> Arrays:
        return {"x": with_special_values(normal(shape, dtype)), "dy": normal(shape, dtype, "dy")}

    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.dropout_forward(view(arrays["x"]), p, _SEED, _OFFSET, start=start)
        dx = ops.dropout_backward(view(arrays["dy"]), saved)
        in_place = view(arrays["x"].copy())
        ops.dropout_forward(in_place, p, _SEED, _OFFSET, start=start, out=in_place)
        return {"y": y, "dx": dx, "in place": in_place.copy()}

    return Case("dropout", dtype, label, inputs, run)


def relu_cases() -> Iterator[Case]:
    """Sizes and views."""
    for dtype in FLOAT_DTYPES:
        for size in _SIZES:
            yield _relu(dtype, f"n={size}", (size,))
        yield _relu(dtype, "non-contiguous", (7, 9, 11), view=lambda x: x[::-1, :, ::2])
        yield _relu(dtype, "0-d", ())
        yield _relu(dtype, "empty", (3, 0))


def _relu(dtype, label, shape, view=lambda x: x) -> Case:
    def inputs() -> Arrays:
        return {"x": with_special_values(normal(shape, dtype)), "dy": normal(shape, dtype, "dy")}

    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.relu_forward(view(arrays["x"]))
        return {"y": y, "dx": ops.relu_backward(view(arrays["dy"]), saved)}

    return Case("relu", dtype, label, inputs, run)
