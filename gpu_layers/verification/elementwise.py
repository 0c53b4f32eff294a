"""Cases of ReLU: every bit must be the reference's."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_layers import ops
from gpu_layers.runtime.kernel import FLOAT_DTYPES
from gpu_layers.verification.comparison import Arrays, Case
from gpu_layers.verification.inputs import ELEMENTWISE_SIZES, normal, with_special_values


def relu_cases() -> Iterator[Case]:
    """Sizes and views."""
    for dtype in FLOAT_DTYPES:
        for size in ELEMENTWISE_SIZES:
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
