"""The variants of batch norm whose traffic is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from gpu_layers import ops
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.distributed.communicator import SingleProcess
from gpu_layers.kernels.batch_norm_plan import backward_plan, forward_plan
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d
from gpu_layers.verification import floors
from gpu_layers.verification.floors import BACKWARD, FORWARD, Sizes
from gpu_layers.verification.traffic_case import TrafficCase, in_layout


def batch_norm_variants(dtype: Any) -> Iterator[TrafficCase]:
    """Groups of samples with a smaller last one, padded batches, and the work of one of several processes."""
    for layout in ("NCHW", "NHWC"):
        yield from _ghost(dtype, (8, 32, 28, 28), layout, (0, 3, 6, 8))
        yield from _sync(dtype, (2, 16, 112, 112), layout)
        yield from _sync(dtype, (4, 32, 28, 28), layout)
        # Of planes of 28 columns half a row is no whole number of sectors.
        half = [28, 14] if layout == "NHWC" else [14, 28]
        yield from _padded(dtype, (4, 32, 28, 28), layout, [[28, 28], [14, 28], half, [28, 28]])
    yield from _ghost(dtype, (256, 512), "flat", (0, 100, 200, 256))
    yield from _sync(dtype, (64, 1000), "flat")
    yield from _padded(dtype, (16, 40, 256), "NCHW", [[256 - 8 * sample] for sample in range(16)])


def _reads(shape: tuple[int, ...], dtype: Any, channels_last: bool) -> tuple[int, int]:
    """How often the forward must read x, and the backward dy and x, for an input of this shape in memory."""
    plans = (plan(shape, np.dtype(dtype).itemsize, channels_last) for plan in (forward_plan, backward_plan))
    forward, backward = (1 if plan.keeps_all else 2 for plan in plans)
    return forward, backward


def _ghost(dtype: Any, shape: tuple[int, ...], layout: str, bounds: tuple[int, ...]) -> Iterator[TrafficCase]:
    last = layout == "NHWC"
    options: dict[str, Any] = {"bounds": bounds, "channels_last": last}

    def floor(x: np.ndarray, direction: str) -> int:
        groups = []
        for own in (x[start:stop] for start, stop in pairwise(bounds)):
            reads = _reads(own.shape, dtype, last)[direction == BACKWARD]
            groups.append((Sizes(own.size, own.size, own.itemsize, (len(own), *shape[1:])), reads))
        return floors.ghost_batch_norm(groups, direction)

    def run(x: Any) -> tuple[Any, Any]:
        return ops.ghost_batch_norm_forward(x, None, None, **options)

    def forward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        return lambda: run(x), floor(x, FORWARD)

    def backward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        _, saved = run(x)
        return lambda: ops.ghost_batch_norm_backward(x, saved), floor(x, BACKWARD)

    yield TrafficCase("ghost batch_norm forward", dtype, shape, layout, forward)
    yield TrafficCase("ghost batch_norm backward", dtype, shape, layout, backward)


def _sync(dtype: Any, shape: tuple[int, ...], layout: str) -> Iterator[TrafficCase]:
    sizes = Sizes(math.prod(shape), math.prod(shape), np.dtype(dtype).itemsize, shape)
    for name, inputs, fused in (("sync batch_norm", 1, {}), ("sync batch_norm sum relu", 2, {"activation": "relu"})):

        def run(x: Any, inputs: int = inputs, fused: Any = fused) -> tuple[Any, Any]:
            residual = in_layout(shape, dtype, layout, "residual") if inputs == 2 else None
            return ops.sync_batch_norm_forward(
                x, None, None, SingleProcess(), residual=residual, channels_last=layout == "NHWC", **fused
            )

        def forward(run: Any = run, inputs: int = inputs) -> tuple[Callable[[], Any], int]:
            x = in_layout(shape, dtype, layout)
            return lambda: run(x), floors.sync_batch_norm(sizes, FORWARD, residual=inputs == 2)

        def backward(run: Any = run, inputs: int = inputs) -> tuple[Callable[[], Any], int]:
            x = in_layout(shape, dtype, layout)
            _, saved = run(x)
            floor = floors.sync_batch_norm(sizes, BACKWARD, residual=inputs == 2)
            return lambda: ops.sync_batch_norm_backward(x, saved), floor

        yield TrafficCase(f"{name} forward", dtype, shape, layout, forward)
        yield TrafficCase(f"{name} backward", dtype, shape, layout, backward)


def _padded(dtype: Any, shape: tuple[int, ...], layout: str, lengths: list[list[int]]) -> Iterator[TrafficCase]:
    itemsize, kind = np.dtype(dtype).itemsize, BatchNorm2d if len(shape) == 4 else BatchNorm1d
    rows = sum(math.prod(own) for own in lengths)
    in_memory = (shape[0], *shape[2:], shape[1]) if layout == "NHWC" else shape
    reads, backward_reads = _reads(in_memory, dtype, layout == "NHWC")
    sizes = Sizes(math.prod(shape), math.prod(shape), itemsize, shape)
    forward_floor = floors.padded_batch_norm(sizes, FORWARD, rows * shape[1], reads=reads)
    backward_floor = floors.padded_batch_norm(sizes, BACKWARD, rows * shape[1], reads=backward_reads)

    def layer() -> Any:
        return kind(
            shape[1],
            affine=False,
            track_running_stats=False,
            channels_last=layout == "NHWC",
            dtype=accumulation_dtype(dtype),
        )

    def forward() -> tuple[Callable[[], Any], int]:
        x, made = in_layout(shape, dtype, layout), layer()
        return lambda: made(x, lengths=lengths), forward_floor

    def backward() -> tuple[Callable[[], Any], int]:
        x, made = in_layout(shape, dtype, layout), layer()
        made(x, lengths=lengths)
        return lambda: made.backward(x), backward_floor

    yield TrafficCase("padded batch_norm forward", dtype, shape, layout, forward)
    yield TrafficCase("padded batch_norm backward", dtype, shape, layout, backward)
