"""How many bytes the kernels move, counted by the emulator over whole launches, against the fewest possible.

The floors are those of ``floors.py``. Of batch norm in training, which must know the statistics before it can
normalise, each input is read twice where its plan says that the values cannot be kept. The variants of batch norm:

- Groups of samples: each group is a batch of its own, and the floor the sum of theirs.
- Several processes: between the statistics and what they are for stands an exchange, before which a kernel ends, and
  what it kept is lost. So each input is read twice whatever its size: x forward, dy and x (and the residual) backward.
  The numbers of channels that are exchanged are not counted.
- Padded batches: of the inputs what is valid, as often as the plan says; of the outputs everything, for the padding is
  to be 0. The bits that say what is valid are not in the floor.

What is counted is the distinct 32-byte sectors that each launch touches: what the DRAM moves, as long as the caches
hold what neighbouring threads share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from gpu_layers import ops
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.emulator import Trace
from gpu_layers.kernels.batch_norm_plan import backward_plan, forward_plan
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.kernel import FLOAT_DTYPES, Kernel
from gpu_layers.verification import floors
from gpu_layers.verification.batch_norm_variants_traffic import batch_norm_variants
from gpu_layers.verification.floors import BACKWARD, FORWARD, Sizes
from gpu_layers.verification.inputs import normal
from gpu_layers.verification.selection import named_like
from gpu_layers.verification.traffic_case import SECTOR, TrafficCase, in_layout


@dataclass(frozen=True)
class TrafficRow:
    """What one pass moved.

    Attributes
    ----------
    case : TrafficCase
    launches : int
    floor, moved, requested : int
        Bytes: the fewest possible; of the distinct sectors of each launch; that threads asked for.
    sectors : int
        Sectors that warps asked for, one by one.
    widest : float
        Part of the bytes that was asked for 16 at a time.
    bank_conflicts : int
        Extra passes over the banks of shared memory.
    saved : int
        Of a forward: bytes of the arrays that it keeps for the backward.
    trace : Trace
        The same by source line.
    """

    case: TrafficCase
    launches: int
    floor: int
    moved: int
    requested: int
    sectors: int
    widest: float
    bank_conflicts: int
    saved: int
    trace: Trace

    @property
    def ratio(self) -> float:
        """Bytes moved, by the array library too, as a multiple of the floor."""
        return (self.moved + self.case.by_arrays) / self.floor

    @property
    def is_good(self) -> bool:
        """Whether it is within the limit."""
        return self.ratio <= self.case.limit


def traffic_cases() -> Iterator[TrafficCase]:
    """All passes, dtypes, layouts and (scaled down) reference shapes."""
    for dtype in FLOAT_DTYPES:
        yield from _dropout(dtype)
        yield from _activation_dropout(dtype, (16, 4096))
        yield from _dropout_add(dtype, (512, 256))
        yield from _relu(dtype, (64, 4096))
        for shape in ((2, 16, 112, 112), (4, 32, 56, 56), (8, 64, 7, 7), (64, 1000)):
            for layout in ("NCHW", "NHWC") if len(shape) == 4 else ("flat",):
                yield from _batch_norm(dtype, shape, layout)
        yield from batch_norm_variants(dtype)
        for shape in ((2, 16, 112, 112), (2, 16, 56, 56)):
            for layout in ("NCHW", "NHWC"):
                for size, stride, padding, limit in ((2, 2, 0, 1.05), (3, 2, 1, 1.10), (3, 1, 1, 1.10)):
                    yield from _pools(dtype, shape, layout, (size, stride, padding), limit)
        yield from _other_pools(dtype)
        for layout in ("NCHW", "NHWC"):
            yield from _fractional_pool(dtype, (2, 16, 64, 64), layout)
    for dtype in (np.dtype(np.uint8), np.dtype(np.int32)):
        for layout in ("NCHW", "NHWC"):
            yield _integer_pool(dtype, (2, 16, 112, 112), layout)


def _integer_pool(dtype: Any, shape: tuple[int, ...], layout: str) -> TrafficCase:
    def forward() -> tuple[Callable[[], Any], int]:
        x = np.abs(in_layout(shape, np.float64, layout) * 50).astype(dtype)
        options: dict[str, Any] = {"stride": 2, "padding": 1, "channels_last": layout == "NHWC"}
        y, saved = ops.max_pool_forward(x, (3, 3), **options)
        return lambda: ops.max_pool_forward(x, (3, 3), **options), _pool_floor(x, y, saved)

    return TrafficCase("max_pool 3x3 s2 of integers", dtype, shape, layout, forward)


def _fractional_pool(dtype: Any, shape: tuple[int, ...], layout: str) -> Iterator[TrafficCase]:
    """Windows of 3 x 3 that leave no gaps."""
    options: dict[str, Any] = {"channels_last": layout == "NHWC"}
    kernel, outputs = (3, 3), (32, 32)

    def floor(x: np.ndarray, y: np.ndarray, saved: Any, direction: str) -> int:
        return floors.fractional_max_pool(Sizes(x.size, y.size, x.itemsize), direction, saved.starts.nbytes)

    def forward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        y, saved = ops.fractional_max_pool_forward(x, kernel, outputs, 1, 2, **options)
        run = lambda: ops.fractional_max_pool_forward(x, kernel, outputs, 1, 2, **options)  # noqa: E731
        return run, floor(x, y, saved, FORWARD)

    def backward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        y, saved = ops.fractional_max_pool_forward(x, kernel, outputs, 1, 2, **options)
        return lambda: ops.fractional_max_pool_backward(y, saved), floor(x, y, saved, BACKWARD)

    yield TrafficCase("fractional max_pool forward", dtype, shape, layout, forward)
    yield TrafficCase("fractional max_pool backward", dtype, shape, layout, backward)


def _dropout(dtype: Any) -> Iterator[TrafficCase]:
    rows, images = (16, 4096), (4, 64, 256)
    elements, alpha = ops.dropout_forward, ops.alpha_dropout_forward
    yield from _dropout_passes(dtype, rows, "dropout", elements)
    yield from _dropout_passes(dtype, rows, "dropout of a shard", elements, start=2**33 + 3)
    yield from _dropout_passes(dtype, rows, "dropout by sample", elements, sample_ids=np.arange(16))
    yield from _dropout_passes(dtype, images, "channel dropout", elements, mask_axes=2)
    yield from _dropout_passes(dtype, (64, 1024), "drop path", elements, mask_axes=1)
    yield from _dropout_passes(dtype, (4, 16, 16, 64), "dropout, channels last", elements, channels_last=True)
    yield from _dropout_passes(dtype, images, "dropout of all steps", elements, shared_axes=(1,))
    yield from _dropout_passes(dtype, rows, "alpha dropout", alpha)
    yield from _dropout_passes(dtype, images, "feature alpha dropout", alpha, mask_axes=2)

    def moments() -> tuple[Callable[[], Any], int]:
        x = normal(rows, dtype)
        mean, _ = ops.dropout_moments(x, 0.5, 1, 2, passes=1)
        assert mean.itemsize == _elementwise(x).accumulated
        return lambda: ops.dropout_moments(x, 0.5, 1, 2, passes=3), floors.dropout_moments(_elementwise(x))

    def added() -> tuple[Callable[[], Any], int]:
        x = normal(rows, dtype)
        return lambda: ops.dropout_forward(x, 0.5, 1, 2, residual=x.copy()), _elementwise(x).elements(3)

    yield TrafficCase("dropout moments", dtype, rows, "flat", moments)
    yield TrafficCase("dropout add forward", dtype, rows, "flat", added)


def _elementwise(x: np.ndarray) -> Sizes:
    return Sizes(x.size, x.size, x.itemsize, x.shape)


def _dropout_passes(dtype, shape, name, op_forward, **options) -> Iterator[TrafficCase]:
    def floor(x: np.ndarray) -> int:
        axes = options.get("mask_axes")
        kept = 1.0 if axes is None else float(ops.dropout_mask(math.prod(shape[:axes]), 0.5, 1, 2).mean())
        return floors.dropout(_elementwise(x), kept)

    def forward() -> tuple[Callable[[], Any], int]:
        x = normal(shape, dtype)
        return lambda: op_forward(x, 0.5, 1, 2, **options), floor(x)

    def backward() -> tuple[Callable[[], Any], int]:
        x = normal(shape, dtype)
        _, saved = op_forward(x, 0.5, 1, 2, **options)
        return lambda: ops.dropout_backward(x, saved), floor(x)

    yield TrafficCase(f"{name} forward", dtype, shape, "flat", forward)
    yield TrafficCase(f"{name} backward", dtype, shape, "flat", backward)


def _activation_dropout(dtype: Any, shape: tuple[int, ...]) -> Iterator[TrafficCase]:
    for activation, order in (("relu", "after"), ("gelu", "after"), ("relu", "before"), ("gelu", "before")):
        yield from _activation_dropout_passes(dtype, shape, activation, order)


def _activation_dropout_passes(dtype, shape, activation, order) -> Iterator[TrafficCase]:
    def floor(x: np.ndarray, direction: str) -> int:
        return floors.activation_dropout(_elementwise(x), direction, saves_bits=activation == "relu")

    def forward() -> tuple[Callable[[], Any], int]:
        x = normal(shape, dtype)
        run = lambda: ops.activation_dropout_forward(x, activation, 0.5, 1, 2, order=order)  # noqa: E731
        return run, floor(x, FORWARD)

    def backward() -> tuple[Callable[[], Any], int]:
        x = normal(shape, dtype)
        _, saved = ops.activation_dropout_forward(x, activation, 0.5, 1, 2, order=order)
        return lambda: ops.activation_dropout_backward(x, saved), floor(x, BACKWARD)

    name = f"{activation} dropout" if order == "after" else f"dropout {activation}"
    yield TrafficCase(f"{name} forward", dtype, shape, "flat", forward)
    yield TrafficCase(f"{name} backward", dtype, shape, "flat", backward)


def _dropout_add(dtype: Any, shape: tuple[int, ...]) -> Iterator[TrafficCase]:
    for activation in (None, "relu", "gelu"):
        yield from _dropout_add_passes(dtype, shape, activation)


def _dropout_add_passes(dtype: Any, shape: tuple[int, ...], activation: str | None) -> Iterator[TrafficCase]:
    def called(direction: str) -> tuple[Callable[[], Any], np.ndarray, int]:
        x, residual = normal(shape, dtype), normal(shape, dtype, "residual")
        bias = normal(shape[-1:], accumulation_dtype(dtype))
        floor = floors.dropout_add(_elementwise(x), direction, activation, bias=True)
        return lambda: ops.dropout_add_forward(x, residual, 0.5, 1, 2, bias=bias, activation=activation), x, floor

    def forward() -> tuple[Callable[[], Any], int]:
        run, _, floor = called(FORWARD)
        return run, floor

    def backward() -> tuple[Callable[[], Any], int]:
        run, dy, floor = called(BACKWARD)
        _, saved = run()
        return lambda: ops.dropout_add_backward(dy, saved), floor

    name = f"bias {activation or ''} dropout add".replace("  ", " ")
    yield TrafficCase(f"{name} forward", dtype, shape, "flat", forward)
    yield TrafficCase(f"{name} backward", dtype, shape, "flat", backward)


def _relu(dtype: Any, shape: tuple[int, ...]) -> Iterator[TrafficCase]:
    def forward() -> tuple[Callable[[], Any], int]:
        x = normal(shape, dtype)
        return lambda: ops.relu_forward(x), floors.relu(_elementwise(x))

    def backward() -> tuple[Callable[[], Any], int]:
        x = normal(shape, dtype)
        _, saved = ops.relu_forward(x)
        return lambda: ops.relu_backward(x, saved), floors.relu(_elementwise(x))

    yield TrafficCase("relu forward", dtype, shape, "flat", forward)
    yield TrafficCase("relu backward", dtype, shape, "flat", backward)


def _batch_norm(dtype: Any, shape: tuple[int, ...], layout: str) -> Iterator[TrafficCase]:
    options: dict[str, Any] = {"channels_last": layout == "NHWC"}
    input_shape, itemsize = in_layout(shape, dtype, layout).shape, np.dtype(dtype).itemsize
    sizes = Sizes(math.prod(shape), math.prod(shape), itemsize, shape)
    assert sizes.accumulated == accumulation_dtype(dtype).itemsize
    last = options["channels_last"]
    # How often the forward reads x, and the backward x, dy and the residual.
    reads, backward_reads = (
        1 if plan(input_shape, itemsize, last).keeps_all else 2 for plan in (forward_plan, backward_plan)
    )

    def forward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        return lambda: ops.batch_norm_forward(x, None, None, **options), floors.batch_norm(sizes, FORWARD, reads=reads)

    def backward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        _, saved = ops.batch_norm_forward(x, None, None, **options)
        return lambda: ops.batch_norm_backward(x, saved), floors.batch_norm(sizes, BACKWARD, reads=backward_reads)

    def inference() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        _, saved = ops.batch_norm_forward(x, None, None, **options)
        return lambda: ops.batch_norm_inference(
            x, saved.mean, saved.var, None, None, **options
        ), floors.batch_norm_inference(sizes)

    yield TrafficCase("batch_norm forward", dtype, shape, layout, forward)
    yield TrafficCase("batch_norm backward", dtype, shape, layout, backward)

    def sum_forward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        fused = {"residual": in_layout(shape, dtype, layout), "activation": "relu", **options}
        floor = floors.batch_norm(sizes, FORWARD, reads=reads, residual=True)
        return lambda: ops.batch_norm_forward(x, None, None, **fused), floor

    def sum_backward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        fused = {"residual": in_layout(shape, dtype, layout), "activation": "relu", **options}
        _, saved = ops.batch_norm_forward(x, None, None, **fused)
        floor = floors.batch_norm(sizes, BACKWARD, reads=backward_reads, residual=True)
        return lambda: ops.batch_norm_backward(x, saved), floor

    def pooled_sizes(y: np.ndarray) -> Sizes:
        return replace(sizes, outputs=y.size)

    def pooled() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        y, saved = ops.batch_norm_max_pool_forward(x, None, None, (3, 3), 2, 1, activation="relu", **options)
        floor = floors.batch_norm_max_pool(pooled_sizes(y), FORWARD, taps=saved.pool.argmax.nbytes // y.size)
        return lambda: ops.batch_norm_max_pool_forward(x, None, None, (3, 3), 2, 1, activation="relu", **options), floor

    def pooled_backward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        y, saved = ops.batch_norm_max_pool_forward(x, None, None, (3, 3), 2, 1, activation="relu", **options)
        taps = saved.pool.argmax.nbytes // y.size
        floor = floors.batch_norm_max_pool(pooled_sizes(y), BACKWARD, taps=taps, reads=backward_reads)
        return lambda: ops.batch_norm_max_pool_backward(y, saved), floor

    def double_backward() -> tuple[Callable[[], Any], int]:
        x, ddx, dy = (in_layout(shape, dtype, layout, name) for name in ("x", "ddx", "dy"))
        _, saved = ops.batch_norm_forward(x, None, None, activation="relu", **options)
        run = lambda: ops.batch_norm_double_backward(ddx, saved.gamma, saved.beta, dy, saved)  # noqa: E731
        return run, floors.batch_norm_double_backward(sizes)

    # Of few values a channel the eleven numbers that lie between the two reads count.
    limit = 1.05 if len(shape) == 4 else 1.2
    yield TrafficCase("batch_norm inference", dtype, shape, layout, inference)
    yield TrafficCase("batch_norm double backward", dtype, shape, layout, double_backward, limit)
    if len(shape) == 4:
        yield TrafficCase("batch_norm max_pool forward", dtype, shape, layout, pooled, 1.1)
    if len(shape) == 4 and (layout == "NHWC" or shape[-1] % 8 == 0):
        # Of other planes it is two passes.
        yield TrafficCase("batch_norm max_pool backward", dtype, shape, layout, pooled_backward)
    yield TrafficCase("batch_norm sum relu forward", dtype, shape, layout, sum_forward)
    yield TrafficCase("batch_norm sum relu backward", dtype, shape, layout, sum_backward)


def _pool_floor(x: np.ndarray, y: np.ndarray, saved: Any, of_powers: str | None = None) -> int:
    """Of a pass of pooling; of one of powers, forward or backward."""
    argmax = getattr(saved, "argmax", None)
    sizes, argmax_bytes = Sizes(x.size, y.size, x.itemsize), 0 if argmax is None else argmax.nbytes // y.size
    return floors.lp_pool(sizes, of_powers, argmax_bytes) if of_powers else floors.pool(sizes, argmax_bytes)


def _pools(
    dtype: Any, shape: tuple[int, ...], layout: str, window: tuple[int, int, int], limit: float
) -> Iterator[TrafficCase]:
    size, stride, padding = window
    options: dict[str, Any] = {"stride": stride, "padding": padding, "channels_last": layout == "NHWC"}
    kernel = (size, size)
    name = f"{size}x{size} s{stride}"

    def max_forward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        y, saved = ops.max_pool_forward(x, kernel, **options)
        return lambda: ops.max_pool_forward(x, kernel, **options), _pool_floor(x, y, saved)

    def max_backward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        y, saved = ops.max_pool_forward(x, kernel, **options)
        return lambda: ops.max_pool_backward(y, saved), _pool_floor(x, y, saved)

    def gather() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        y, saved = ops.max_pool_forward(x, kernel, **options)
        indices, (samples, channels) = ops.max_pool_indices(saved), shape[:2]
        if layout == "NHWC":
            places = _places_of_channels_last(indices, math.prod(shape[2:]))
        else:
            first = np.arange(samples * channels).reshape(samples, channels, 1, 1) * math.prod(shape[2:])
            places = first + indices
        read = np.unique(places * x.itemsize // SECTOR).size * SECTOR
        floor = floors.max_unpool(Sizes(y.size, x.size, x.itemsize), BACKWARD, saved.argmax.itemsize, read)
        return lambda: ops.max_pool_gather(x, saved), floor

    def avg_forward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        y, saved = ops.avg_pool_forward(x, kernel, **options)
        return lambda: ops.avg_pool_forward(x, kernel, **options), _pool_floor(x, y, saved)

    def avg_backward() -> tuple[Callable[[], Any], int]:
        x = in_layout(shape, dtype, layout)
        y, saved = ops.avg_pool_forward(x, kernel, **options)
        return lambda: ops.avg_pool_backward(y, saved), _pool_floor(x, y, saved)

    outputs = shape[0] * shape[1] * ((shape[2] + 2 * padding - size) // stride + 1) ** 2
    kept = math.prod(shape) * dtype.itemsize
    yield TrafficCase(f"max_pool {name} forward", dtype, shape, layout, max_forward, limit, kept + 8 * outputs)
    yield TrafficCase(f"max_pool {name} backward", dtype, shape, layout, max_backward, limit)
    yield TrafficCase(f"max_pool {name} gather", dtype, shape, layout, gather, limit)
    yield TrafficCase(f"avg_pool {name} forward", dtype, shape, layout, avg_forward, limit, kept)
    yield TrafficCase(f"avg_pool {name} backward", dtype, shape, layout, avg_backward, limit)


def _other_pools(dtype: Any) -> Iterator[TrafficCase]:
    """Of one and three axes, of the whole plane, adaptive, of powers; and unpooling."""
    for rank, shape in ((1, (4, 16, 1024)), (3, (1, 16, 8, 16, 32))):
        for size, stride, padding, limit in ((2, 2, 0, 1.05), (3, 2, 1, 1.10)):
            for kind in ("max", "avg"):
                forward = ops.max_pool_forward if kind == "max" else ops.avg_pool_forward
                backward = ops.max_pool_backward if kind == "max" else ops.avg_pool_backward

                def run(x: Any, forward: Any = forward, window: Any = ((size,) * rank, stride, padding)) -> Any:
                    return forward(x, *window)

                name = f"{kind}_pool{rank}d {size} s{stride}"
                yield from _two_passes(name, dtype, shape, "NCHW", run, backward, limit, 8 if kind == "max" else 0)
    for layout in ("NCHW", "NHWC"):
        last = layout == "NHWC"
        for name, outputs, limit in (("global", (1, 1), 1.05), ("adaptive", (5, 6), 1.10)):

            def adaptive_max(x: Any, outputs: Any = outputs, last: bool = last) -> Any:
                return ops.adaptive_max_pool_forward(x, outputs, channels_last=last)

            def adaptive_avg(x: Any, outputs: Any = outputs, last: bool = last) -> Any:
                return ops.adaptive_avg_pool_forward(x, outputs, channels_last=last)

            images = (2, 32, 32, 32)
            yield from _two_passes(f"{name} max", dtype, images, layout, adaptive_max, ops.max_pool_backward, limit, 8)
            # PyTorch takes the mean of the whole plane as a sum, which needs nothing.
            kept = None if name == "global" else 0
            yield from _two_passes(
                f"{name} avg", dtype, images, layout, adaptive_avg, ops.avg_pool_backward, limit, kept
            )
    for p in (2.0, np.inf):

        def powers(x: Any, p: float = p) -> Any:
            return ops.lp_pool_forward(x, p, (3, 3), 2, 1)

        yield from _two_passes(f"lp_pool p={p:g}", dtype, (2, 4, 64, 64), "NCHW", powers, ops.lp_pool_backward, 1.10)
    for layout in ("NCHW", "NHWC"):
        yield from _unpool(dtype, (2, 16, 32, 32), layout)


def _two_passes(
    name: str,
    dtype: Any,
    shape: tuple[int, ...],
    layout: str,
    run: Any,
    op_backward: Any,
    limit: float,
    torch_saved: int | None = None,
) -> Iterator[TrafficCase]:
    # torch_saved: bytes an output beside the input, if PyTorch's operation is one.
    of_powers = op_backward is ops.lp_pool_backward

    def array() -> np.ndarray:
        return in_layout(shape, dtype, layout)

    def forward() -> tuple[Callable[[], Any], int]:
        x = array()
        y, saved = run(x)
        return lambda: run(x), _pool_floor(x, y, saved, FORWARD if of_powers else None)

    def backward() -> tuple[Callable[[], Any], int]:
        x = array()
        y, saved = run(x)
        return lambda: op_backward(y, saved), _pool_floor(x, y, saved, BACKWARD if of_powers else None)

    kept = None
    if torch_saved is not None:
        with use_backend("reference"):
            x = array()
            kept = x.nbytes + torch_saved * run(x)[0].size
    yield TrafficCase(f"{name} forward", dtype, shape, layout, forward, limit, kept)
    yield TrafficCase(f"{name} backward", dtype, shape, layout, backward, limit)


def _unpool(dtype: Any, shape: tuple[int, ...], layout: str) -> Iterator[TrafficCase]:
    size = tuple(2 * length for length in shape[2:])
    last = layout == "NHWC"
    samples, channels = shape[:2]
    values = math.prod(shape)
    sizes = Sizes(values, values * math.prod(size) // math.prod(shape[2:]), np.dtype(dtype).itemsize, shape)

    def arrays() -> tuple[np.ndarray, np.ndarray]:
        wide = (samples, *size, channels) if last else (samples, channels, *size)
        x, saved = ops.max_pool_forward(normal(wide, dtype), (2, 2), channels_last=last)
        return x, ops.max_pool_indices(saved)

    def forward() -> tuple[Callable[[], Any], int]:
        x, indices = arrays()
        options = {"check": False, "channels_last": last}
        return lambda: ops.max_unpool_forward(x, indices, size, **options), floors.max_unpool(sizes, FORWARD)

    def backward() -> tuple[Callable[[], Any], int]:
        x, indices = arrays()
        y, saved = ops.max_unpool_forward(x, indices, size, channels_last=last)
        # Of the gradient, the sectors that an index points into.
        if last:
            places = _places_of_channels_last(indices, math.prod(size))
        else:
            places = np.arange(samples * channels).reshape(samples, channels, 1, 1) * math.prod(size) + indices
        read = np.unique(places * x.itemsize // SECTOR).size * SECTOR
        return lambda: ops.max_unpool_backward(y, saved), floors.max_unpool(sizes, BACKWARD, touched=read)

    yield TrafficCase("max_unpool forward", dtype, shape, layout, forward, torch_saved=8 * math.prod(shape))
    yield TrafficCase("max_unpool backward", dtype, shape, layout, backward)


def _places_of_channels_last(indices: np.ndarray, plane: int) -> np.ndarray:
    """Places in the whole array of indices in a plane."""
    sample, channels = np.arange(len(indices)).reshape(-1, 1, 1, 1) * plane, indices.shape[-1]
    return (sample + indices) * channels + np.arange(channels)


def _saved_bytes(saved: Any) -> int:
    """Bytes of the arrays among the fields of what a forward saved."""
    if not is_dataclass(saved):
        return 0
    return sum(getattr(getattr(saved, field.name), "nbytes", 0) for field in fields(saved))


def count(case: TrafficCase) -> TrafficRow:
    """Run a pass emulated in checked mode, and add up what its launches moved."""
    with use_backend("reference"):
        measured, floor = case.prepare()
    traces: list[Trace] = []

    def record(kernel: Kernel, trace: Trace) -> None:
        traces.append(trace)

    with use_backend("emulated", check=True, record=record):
        result = measured()
    total = sum(traces, Trace())
    footprint = total.footprint
    asked, widths = total.total(), total.widths()
    return TrafficRow(
        case=case,
        launches=len(traces),
        floor=floor,
        moved=(footprint.sectors_loaded + footprint.sectors_stored) * SECTOR,
        requested=asked.bytes,
        sectors=asked.sectors,
        widest=16 * widths.get(16, 0) / max(asked.bytes, 1),
        bank_conflicts=total.bank_conflicts,
        saved=_saved_bytes(result[1]) if isinstance(result, tuple) else 0,
        trace=total,
    )


def count_all(
    only: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[TrafficRow]:
    """:func:`count` for all cases, or those whose name a regular expression finds.

    Raises
    ------
    ValueError
        If ``only`` is not a regular expression, or finds no case.
    """
    cases = named_like(traffic_cases(), only)
    rows = []
    for done, case in enumerate(cases, 1):
        rows.append(count(case))
        progress(done, len(cases))
    return rows


def traffic_table(rows: list[TrafficRow]) -> str:
    """The rows as aligned text."""
    lines = [
        f"{'pass':<35}{'dtype':<10}{'layout':<8}{'shape':<16}{'launches':>8}{'floor':>12}{'moved':>12}"
        f"{'arrays':>11}{'ratio':>8}{'limit':>7}{'asked':>8}{'by 16':>7}{'bank':>6}{'keeps':>11}{'torch':>11}"
    ]
    for row in rows:
        case = row.case
        lines.append(
            f"{case.op:<35}{case.dtype!s:<10}{case.layout:<8}{'x'.join(map(str, case.shape)):<16}{row.launches:>8}"
            f"{row.floor:>12,}{row.moved:>12,}{case.by_arrays or '':>11}{row.ratio:>8.3f}{case.limit:>7.2f}"
            f"{row.sectors * SECTOR / row.floor:>8.2f}{row.widest:>7.0%}{row.bank_conflicts:>6}"
            f"{'' if case.torch_saved is None else f'{row.saved:>11,}{case.torch_saved:>11,}'}"
            f"{'' if row.is_good else '  OVER THE LIMIT'}"
        )
    lines += [
        "",
        "floor, moved: bytes, the fewest possible and those of the distinct 32-byte sectors of each launch; arrays:",
        "bytes of the array library's operations, by the sizes of their arrays, not counted; ratio: moved and arrays",
        "over the floor; asked: sectors that warps asked for, over the floor, of which caches absorb what is above 1;",
        "by 16: part of the bytes asked for in 16-byte accesses; bank: conflicts in shared memory; keeps, torch:",
        "bytes that a pooling keeps for its backward, and those that PyTorch's keeps alive, of its input too.",
        "Counted, not timed.",
    ]
    return "\n".join(lines)
