"""Batch norm and max pooling in one kernel: cases on numbers for which every result is exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_layers import ops
from gpu_layers.catalogue.batch_norm import COUNTED, KEPT, READ, batch_norm_torch, reads_of
from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.catalogue.inputs import normal
from gpu_layers.catalogue.operation import FORWARD, IMAGES, Called, Operation, Sizes, per_pass
from gpu_layers.catalogue.pooling import MAX_WINDOW, argmax_bytes, pooled
from gpu_layers.catalogue.traffic import TrafficCase, passes
from gpu_layers.core.array import Options
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.kernels.batch_norm_max_pool import strips_of
from gpu_layers.runtime.kernel import FLOAT_DTYPES

#: The page of the documents that has these operations.
PAGE = "batch_norm"

# 1 / sqrt(var + eps) is then 1/2 or 1/4, without rounding.
_EPS = 2.0**-10
_WINDOWS: tuple[tuple[tuple[int, ...], Options], ...] = (
    ((2, 2), {"stride": 2}),
    ((3, 3), {"stride": 2, "padding": 1}),
    ((2, 3), {"dilation": (2, 1), "ceil_mode": True}),
    ((1, 4), {}),  # side by side, and not by tiles
)


def batch_norm_max_pool_cases() -> Iterator[Case]:
    """Both layouts; channels that do and do not make vectors; activations that are straight on either side of 0."""
    for dtype in FLOAT_DTYPES:
        for activation in ("relu", "leaky_relu", None):
            yield _case(dtype, (3, 5, 9, 11), activation, False)
            yield _case(dtype, (2, 3, 9, 16), activation, False)  # whole vectors, whose gradient is gathered
            yield _case(dtype, (2, 8, 7, 16), activation, True)
            yield _case(dtype, (2, 8, 7, 5), activation, True)
        yield _case(dtype, (36, 8, 5, 16), "relu", False)  # whole planes of several blocks


def _case(dtype: np.dtype, shape: tuple[int, ...], activation: str | None, channels_last: bool) -> Case:
    channels = shape[-1] if channels_last else shape[1]
    parameters = accumulation_dtype(dtype)

    def inputs() -> Arrays:
        # Eighths below 8, with equal ones in many a window.
        numbers = {name: np.round(normal(shape, np.float32, name) * 8) / 8 for name in ("x", "dy")}
        arrays = {name: np.clip(values, -8, 8).astype(dtype) for name, values in numbers.items()}
        per_channel = {name: np.round(normal((channels,), np.float32, name) * 2) / 2 for name in ("mean", "beta")}
        gamma = np.where(np.arange(channels) % 2, -2.0, 1.0)
        var = np.where(np.arange(channels) % 3, 4.0, 16.0) - _EPS
        arrays.update({name: values.astype(parameters) for name, values in per_channel.items()})
        return arrays | {"gamma": gamma.astype(parameters), "var": var.astype(parameters)}

    def run(arrays: Arrays) -> Arrays:
        results = {}
        statistics = (arrays["mean"], arrays["var"], arrays["gamma"], arrays["beta"])
        for kernel, window in _WINDOWS:
            options = {"eps": _EPS, "activation": activation, "channels_last": channels_last, **window}
            y, saved = ops.batch_norm_max_pool_inference(arrays["x"], *statistics, kernel, **options)
            results[f"y {kernel}"], results[f"argmax {kernel}"] = y, saved.pool.argmax
            trained, saved_by_training = ops.batch_norm_max_pool_forward(
                arrays["x"], arrays["gamma"], arrays["beta"], kernel, **options
            )
            # The batch's own statistics are not exact: what is, is that the two in a row give the same.
            normalised, saved_norm = ops.batch_norm_forward(
                arrays["x"],
                arrays["gamma"],
                arrays["beta"],
                eps=_EPS,
                activation=activation,
                channels_last=channels_last,
            )
            pooled, saved_by_pool = ops.max_pool_forward(normalised, kernel, channels_last=channels_last, **window)
            results[f"equal {kernel}"] = trained == pooled
            results[f"equal argmax {kernel}"] = saved_by_training.pool.argmax == saved_by_pool.argmax
            dy = arrays["dy"].reshape(-1)[: y.size].reshape(y.shape)
            one = ops.batch_norm_max_pool_backward(dy, saved_by_training)
            two = ops.batch_norm_backward(ops.max_pool_backward(dy, saved_by_pool), saved_norm)
            for name, ours, theirs in zip(("dx", "dgamma", "dbeta"), one, two, strict=True):
                results[f"equal {name} {kernel}"] = ours == theirs
            if activation != "leaky_relu":
                results[f"dx {kernel}"], *_ = ops.batch_norm_max_pool_inference_backward(dy, saved)
        return results

    layout = ", channels_last" if channels_last else ""
    return Case("batch_norm_max_pool", dtype, f"{list(shape)} {activation}{layout}", inputs, run)


# ---- what is timed, and whose bytes are counted ----------------------------------------------------------------------


def _floor(s: Sizes, direction: str, *, taps: int = 1, reads: int = 1, affine: bool = True) -> int:
    """``taps``: bytes of a maximum's place."""
    of_outputs = s.elements(0, 1) + taps * s.outputs
    if direction == FORWARD:
        return s.elements(reads) + of_outputs + (KEPT + 2 * affine) * s.statistic
    return reads * (s.elements(1) + of_outputs) + s.elements(1) + (READ + 2) * s.statistic


def _forward(a: Arrays, channels_last: bool) -> Called:
    kernel, stride, padding = MAX_WINDOW
    options: Options = {"eps": 1e-5, "activation": "relu", "channels_last": channels_last}
    return ops.batch_norm_max_pool_forward(
        a["x"], a.get("gamma"), a.get("beta"), (kernel, kernel), stride, padding, **options
    )


def _by_plan(s: Sizes, direction: str, saved: Any) -> int:
    reads = reads_of(s, direction)
    if direction == FORWARD:
        norm = saved.norm
        of_planes = strips_of(saved.pool.window, norm.x.shape, s.itemsize, norm.channels_last, norm.activation)
        reads = 2 if of_planes is None else 1
    return _floor(s, direction, taps=argmax_bytes(saved.pool), reads=reads, affine=False)


def _traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    for shape, layout in COUNTED:
        forward, backward = passes(operation, "batch_norm max_pool", dtype, shape, layout, floor=_by_plan)
        yield replace(forward, limit=1.1)
        if layout == "NHWC" or shape[-1] % 8 == 0:
            # Of other planes it is two passes.
            yield backward


BATCH_NORM_RELU_MAX_POOL = Operation(
    name="batch_norm_relu_max_pool",
    shapes=IMAGES[:4],
    forward=_forward,
    backward=ops.batch_norm_max_pool_backward,
    floor=_floor,
    # Batch norm 3 forward and 5 backward, ReLU 2 and 3, and the pooling.
    torch_bytes=per_pass(lambda s: s.elements(6, 1) + 8 * s.outputs, lambda s: s.elements(9, 1) + 8 * s.outputs),
    cases=(batch_norm_max_pool_cases,),
    traffic=_traffic,
    takes_maximum=True,
    rounds_gradient=True,
    torch=lambda F, t: F.max_pool2d(F.relu(batch_norm_torch(F, t)), *MAX_WINDOW),  # noqa: N803
    output_shape=pooled(MAX_WINDOW),
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)
