"""ReLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gpu_layers import layers, ops
from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.catalogue.inputs import ELEMENTWISE_SIZES, normal, with_special_values
from gpu_layers.catalogue.operation import (
    LARGE_IMAGES,
    LARGE_ROWS,
    SINGLE_IMAGE,
    SMALL_IMAGES,
    SMALL_ROWS,
    LayerExample,
    Operation,
    per_pass,
)
from gpu_layers.catalogue.traffic import passes
from gpu_layers.core.array import Array
from gpu_layers.runtime.kernel import FLOAT_DTYPES

#: The page of the documents that has these operations.
PAGE = "networks"


def relu_cases() -> Iterator[Case]:
    """Sizes and views. Every bit must be the reference's."""
    for dtype in FLOAT_DTYPES:
        for size in ELEMENTWISE_SIZES:
            yield _relu(dtype, f"n={size}", (size,))
        yield _relu(dtype, "non-contiguous", (7, 9, 11), view=lambda x: x[::-1, :, ::2])
        yield _relu(dtype, "0-d", ())
        yield _relu(dtype, "empty", (3, 0))


def _relu(dtype: np.dtype, label: str, shape: tuple[int, ...], view: Callable[[Array], Array] = lambda x: x) -> Case:
    def inputs() -> Arrays:
        return {"x": with_special_values(normal(shape, dtype)), "dy": normal(shape, dtype, "dy")}

    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.relu_forward(view(arrays["x"]))
        return {"y": y, "dx": ops.relu_backward(view(arrays["dy"]), saved)}

    return Case("relu", dtype, label, inputs, run)


RELU = Operation(
    name="relu",
    shapes=(*LARGE_ROWS, *LARGE_IMAGES, *SMALL_IMAGES, *SMALL_ROWS, *SINGLE_IMAGE),
    forward=lambda a, last: ops.relu_forward(a["x"]),
    backward=ops.relu_backward,
    # One bit an element is all that the backward needs besides dy.
    floor=lambda s, direction: s.elements(2) + s.inputs // 8,
    torch_bytes=per_pass(lambda s: s.elements(2), lambda s: s.elements(3)),
    cases=(relu_cases,),
    traffic=lambda operation, dtype: passes(operation, "relu", dtype, (64, 4096)),
    layers=(LayerExample(layers.ReLU),),
    torch=lambda F, t: F.relu(t["x"]),  # noqa: N803
    expression=lambda xp, a, last: xp.maximum(a["x"], 0),
    gradient=lambda xp, a, last: xp.where(a["x"] > 0, a["dy"], 0),
    jax=lambda jax, a, last: jax.nn.relu(a["x"]),
    independent="elements",
)
