"""Rows of the poolings. Windows are numbers here, of which shapes follow by plain arithmetic: sizes may be symbols.

A ``kernel`` without numbers stands for adaptive windows: then the sizes of the output are given.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from gpu_layers.torch import arrays, registry
from gpu_layers.torch.arrays import statistics_dtype
from gpu_layers.torch.registry import define, through
from gpu_layers.window import Window, adaptive_window, sliding_window

_Tensor = Any
_WINDOW = "int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, SymInt[] output_size"
_LAST = "bool channels_last"


def output_sizes(
    spatial: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, output_size: Any
) -> list:
    """Spatial sizes of the output; may be symbols, or too small."""
    if not kernel:
        return list(output_size)
    sizes = []
    for size, k, s, pad, d in zip(spatial, kernel, stride, padding, dilation, strict=True):
        span = size + 2 * pad - d * (k - 1) - 1
        steps = span // s
        if ceil_mode:
            # The last window must start inside the input or the padding in front of it.
            steps = torch.sym_min(-(-span // s), (size + pad - 1) // s)
        sizes.append(steps + 1)
    return sizes


def _placed(
    spatial: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, output_size: Any
) -> Window:
    if not kernel:
        return adaptive_window(tuple(output_size), tuple(spatial))
    pads = tuple(padding)
    return sliding_window(tuple(kernel), tuple(stride), tuple(dilation), pads, pads, ceil_mode, tuple(spatial))


_cached_place = lru_cache(maxsize=1024)(_placed)


def _window(spatial: Any, numbers: Any) -> Window:
    """The window over an input of known sizes."""
    try:
        return _cached_place(spatial, *numbers)
    except TypeError:  # the dispatcher passes lists
        return _placed(spatial, *numbers)


def _batched(x: _Tensor, rank: int, channels_last: bool) -> Any:
    """The array of a batch: one sample gets its axis."""
    found = arrays.array(x, channels_last)
    return found if x.dim() == rank + 2 else found[None]


def _tensor(found: Any, like: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """What a floor found, of as many axes as the tensor that it was found for."""
    return arrays.tensor(found if found.ndim == like.dim() else found[0], channels_last)


def _tap_dtype(spatial: Any, numbers: Any) -> torch.dtype:
    """Smallest dtype that numbers the taps of a window, of ``reference.pool_taps.tap_dtype``."""
    taps: Any = 1
    kernel, *_, output_size = numbers
    if kernel:
        taps = math.prod(kernel)
    else:
        for size, outputs in zip(spatial, output_size, strict=True):
            taps = taps * _most_taps(size, outputs)
    if taps <= 2**8:
        return torch.uint8
    return torch.uint16 if taps <= 2**16 else torch.uint32


def _most_taps(size: Any, outputs: Any) -> Any:
    """Taps of the largest adaptive window along an axis: ``ceil((i + 1) L / o) - floor(i L / o)``."""
    if type(outputs) is not int:
        return 1  # as many windows as inputs: the only symbol that comes here
    most = 1
    for i in range(outputs):
        most = torch.sym_max(most, -(-(i + 1) * size // outputs) - i * size // outputs)
    return most


def _shape(x: _Tensor, spatial: Any) -> list:
    return [*x.shape[: x.dim() - len(spatial)], *spatial]


def _spatial(x: _Tensor, numbers: Any) -> tuple:
    return x.shape[-(len(numbers[0]) or len(numbers[5])) :]


# ---- the largest of each window


def _run_max(x: _Tensor, *rest: Any) -> tuple:
    *numbers, channels_last = rest
    window = _window(_spatial(x, numbers), numbers)
    if not (x.numel() and math.prod(window.output_shape)):
        return _fake_max(x, *rest)
    batch = _batched(x, window.rank, channels_last)
    y, taps = arrays.floor(x).max_pool_forward(batch, window, channels_last, None)
    return _tensor(y, x, channels_last), _tensor(taps, x, channels_last)


def _fake_max(x: _Tensor, *rest: Any) -> tuple:
    *numbers, channels_last = rest
    spatial = _spatial(x, numbers)
    shape = _shape(x, output_sizes(spatial, *numbers))
    return (
        arrays.empty(shape, x.dtype, x, channels_last),
        arrays.empty(shape, _tap_dtype(spatial, numbers), x, channels_last),
    )


def _setup_max(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *ctx.numbers = inputs
    taps = output[1]
    ctx.mark_non_differentiable(taps)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(taps)
    ctx.spatial = _spatial(x, ctx.numbers)


def _backward_max(ctx: Any, dy: torch.Tensor | None, _: Any) -> tuple:
    dx = None
    if dy is not None:
        dx = max_pool_backward(dy, *ctx.saved_tensors, ctx.spatial, *ctx.numbers)
    return (dx, *(None,) * 7)


max_pool = define(
    f"max_pool(Tensor input, {_WINDOW}, {_LAST}) -> (Tensor, Tensor)", _run_max, _fake_max, _setup_max, _backward_max
)


def _run_max_backward(dy: _Tensor, taps: _Tensor, spatial: list, *rest: Any) -> torch.Tensor:
    *numbers, channels_last = rest
    window = _window(spatial, numbers)
    if not dy.numel():
        return _fake_max_backward(dy, taps, spatial, *rest).zero_()
    batch, chosen = _batched(dy, window.rank, channels_last), _batched(taps, window.rank, channels_last)
    return _tensor(arrays.floor(dy).max_pool_backward(batch, chosen, window, channels_last, None), dy, channels_last)


def _fake_max_backward(dy: _Tensor, taps: _Tensor, spatial: list, *rest: Any) -> torch.Tensor:
    return arrays.empty(_shape(dy, spatial), dy.dtype, dy, rest[-1])


def _setup_max_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    _, taps, *ctx.rest = inputs
    ctx.save_for_backward(taps)


def _backward_max_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    return (max_pool_gather(gradient, *ctx.saved_tensors, *ctx.rest), *(None,) * 9)


max_pool_backward = define(
    f"max_pool_backward(Tensor grad, Tensor taps, SymInt[] spatial, {_WINDOW}, {_LAST}) -> Tensor",
    _run_max_backward,
    _fake_max_backward,
    _setup_max_backward,
    _backward_max_backward,
)


def _run_gather(x: _Tensor, taps: _Tensor, spatial: list, *rest: Any) -> torch.Tensor:
    channels_last = rest[-1]
    y = arrays.empty(_shape(x, taps.shape[-len(spatial) :]), x.dtype, x, channels_last)
    if not y.numel():
        return y
    indices = _run_indices(taps, spatial, *rest).flatten(-len(spatial))
    # A window with no tap inside the input has no value, and no gradient: index -1.
    found = x.flatten(-len(spatial)).gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, 0)
    return y.copy_(found.reshape(y.shape))


def _fake_gather(x: _Tensor, taps: _Tensor, spatial: list, *rest: Any) -> torch.Tensor:
    return arrays.empty(_shape(x, taps.shape[-len(spatial) :]), x.dtype, x, rest[-1])


def _backward_gather(ctx: Any, dy: torch.Tensor) -> tuple:
    return (max_pool_backward(dy, *ctx.saved_tensors, *ctx.rest), *(None,) * 9)


max_pool_gather = define(
    f"max_pool_gather(Tensor input, Tensor taps, SymInt[] spatial, {_WINDOW}, {_LAST}) -> Tensor",
    _run_gather,
    _fake_gather,
    _setup_max_backward,
    _backward_gather,
)


def _run_indices(taps: _Tensor, spatial: list, *rest: Any) -> torch.Tensor:
    *numbers, _ = rest
    found = _fake_indices(taps, spatial, *rest)
    if not taps.numel():
        return found
    window = _window(spatial, numbers)
    flat, inside, number, step = 0, True, taps.to(torch.int64), 1
    for axis in reversed(range(window.rank)):
        at = _origins(window, axis, taps) + number % window.kernel[axis] * window.dilation[axis]
        number = number // window.kernel[axis]
        inside = (at >= 0) & (at < window.input_shape[axis]) & inside
        flat = at * step + flat
        step *= window.input_shape[axis]
    # A window with no tap inside the input has no index.
    return found.copy_(torch.where(inside, flat, -1))


def _origins(window: Window, axis: int, like: _Tensor) -> torch.Tensor:
    """Position along an axis of each window's first tap, to be broadcast; ``Window.origins`` where the tensor is."""
    places = torch.arange(window.output_shape[axis], device=like.device)
    if window.adaptive:
        places = places * window.input_shape[axis] // window.output_shape[axis]
    else:
        places = places * window.stride[axis] - window.pad_before[axis]
    return places.reshape(-1, *(1,) * (window.rank - 1 - axis))


def _fake_indices(taps: _Tensor, spatial: list, *rest: Any) -> torch.Tensor:
    return arrays.empty(taps.shape, torch.int64, taps, rest[-1])


max_pool_indices = define(
    f"max_pool_indices(Tensor taps, SymInt[] spatial, {_WINDOW}, {_LAST}) -> Tensor", _run_indices, _fake_indices
)


# ---- the mean of each window; the sum of the linear map that it is, and of its transpose

_DIVISOR = "bool count_include_pad, int? divisor_override"


def _run_avg(x: _Tensor, *rest: Any) -> torch.Tensor:
    *numbers, count_include_pad, divisor_override, channels_last = rest
    window = _window(_spatial(x, numbers), numbers)
    if not (x.numel() and math.prod(window.output_shape)):
        return _fake_avg(x, *rest)
    batch = _batched(x, window.rank, channels_last)
    found = arrays.floor(x).avg_pool_forward(batch, window, channels_last, count_include_pad, divisor_override, None)
    return _tensor(found, x, channels_last)


def _fake_avg(x: _Tensor, *rest: Any) -> torch.Tensor:
    *numbers, _, _, channels_last = rest
    shape = _shape(x, output_sizes(_spatial(x, numbers), *numbers))
    return arrays.empty(shape, x.dtype, x, channels_last)


def _setup_avg(ctx: Any, inputs: tuple, output: Any) -> None:
    x, *ctx.rest = inputs
    ctx.spatial = _spatial(x, ctx.rest)


def _backward_avg(ctx: Any, dy: torch.Tensor) -> tuple:
    return (avg_pool_backward(dy, ctx.spatial, *ctx.rest), *(None,) * 9)


avg_pool = define(
    f"avg_pool(Tensor input, {_WINDOW}, {_DIVISOR}, {_LAST}) -> Tensor", _run_avg, _fake_avg, _setup_avg, _backward_avg
)


def _run_avg_backward(dy: _Tensor, spatial: list, *rest: Any) -> torch.Tensor:
    *numbers, count_include_pad, divisor_override, channels_last = rest
    window = _window(spatial, numbers)
    if not dy.numel():
        return _fake_avg_backward(dy, spatial, *rest).zero_()
    batch = _batched(dy, window.rank, channels_last)
    found = arrays.floor(dy).avg_pool_backward(batch, window, channels_last, count_include_pad, divisor_override, None)
    return _tensor(found, dy, channels_last)


def _fake_avg_backward(dy: _Tensor, spatial: list, *rest: Any) -> torch.Tensor:
    return arrays.empty(_shape(dy, spatial), dy.dtype, dy, rest[-1])


def _setup_avg_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, *ctx.rest = inputs


def _backward_avg_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    return (avg_pool(gradient, *ctx.rest), *(None,) * 10)


avg_pool_backward = define(
    f"avg_pool_backward(Tensor grad, SymInt[] spatial, {_WINDOW}, {_DIVISOR}, {_LAST}) -> Tensor",
    _run_avg_backward,
    _fake_avg_backward,
    _setup_avg_backward,
    _backward_avg_backward,
)


# ---- the norm of each window

_NORM = "float norm_type, int[] kernel, int[] stride, bool ceil_mode"


def _norm_numbers(kernel: list, stride: list, ceil_mode: bool) -> tuple:
    return kernel, stride, [0] * len(kernel), [1] * len(kernel), ceil_mode, []


def _of_window(x: _Tensor, kernel: list, stride: list, ceil_mode: bool) -> Window:
    numbers = _norm_numbers(kernel, stride, ceil_mode)
    return _window(_spatial(x, numbers), numbers)


def _run_lp(x: _Tensor, p: float, kernel: list, stride: list, ceil_mode: bool, channels_last: bool) -> tuple:
    window = _of_window(x, kernel, stride, ceil_mode)
    if not (x.numel() and math.prod(window.output_shape)):
        return _fake_lp(x, p, kernel, stride, ceil_mode, channels_last)
    batch = _batched(x, window.rank, channels_last)
    y, _, *kept = arrays.floor(x).lp_pool_forward(batch, window, p, channels_last)
    nothing = [arrays.empty((0,), dtype, x) for dtype in (x.dtype, statistics_dtype(x.dtype))]
    return _tensor(y, x, channels_last), *(nothing if p == 1 else (_tensor(one, x, channels_last) for one in kept))


def _fake_lp(x: _Tensor, p: float, kernel: list, stride: list, ceil_mode: bool, channels_last: bool) -> tuple:
    numbers = _norm_numbers(kernel, stride, ceil_mode)
    shape, wide = _shape(x, output_sizes(_spatial(x, numbers), *numbers)), statistics_dtype(x.dtype)
    y = arrays.empty(shape, x.dtype, x, channels_last)
    if p == 1:
        return y, arrays.empty((0,), x.dtype, x), arrays.empty((0,), wide, x)
    return y, arrays.empty(shape, x.dtype, x, channels_last), arrays.empty(shape, wide, x, channels_last)


def _setup_lp(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *ctx.rest = inputs
    _, largest, slopes = output
    ctx.mark_non_differentiable(largest, slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, largest, slopes)


def _backward_lp(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple:
    dx = None
    if dy is not None:
        x, largest, slopes = ctx.saved_tensors
        again = torch.is_grad_enabled()
        dx = _lp_gradient(dy, x, *ctx.rest) if again else lp_pool_backward(dy, x, largest, slopes, *ctx.rest)
    return (dx, *(None,) * 5)


lp_pool = define(
    f"lp_pool(Tensor input, {_NORM}, {_LAST}) -> (Tensor, Tensor, Tensor)", _run_lp, _fake_lp, _setup_lp, _backward_lp
)


def _run_lp_backward(
    dy: _Tensor,
    x: _Tensor,
    largest: _Tensor,
    slopes: _Tensor,
    p: float,
    kernel: list,
    stride: list,
    ceil_mode: bool,
    channels_last: bool,
) -> torch.Tensor:
    window = _of_window(x, kernel, stride, ceil_mode)
    if not dy.numel():
        return arrays.empty(x.shape, x.dtype, x, channels_last).zero_()
    gradient, batch = _batched(dy, window.rank, channels_last), _batched(x, window.rank, channels_last)
    first, second = (_batched(one, window.rank, channels_last) if one.numel() else None for one in (largest, slopes))
    found = arrays.floor(x).lp_pool_backward(gradient, batch, None, first, second, window, p, channels_last)
    return _tensor(found, x, channels_last)


def _fake_lp_backward(dy: _Tensor, x: _Tensor, largest: _Tensor, slopes: _Tensor, *rest: Any) -> torch.Tensor:
    return arrays.empty(x.shape, x.dtype, x, rest[-1])


def _lp_gradient(
    dy: _Tensor, x: _Tensor, p: float, kernel: list, stride: list, ceil_mode: bool, channels_last: bool
) -> torch.Tensor:
    """Gradient of x, of operations that are differentiable: ``sign(x) |x|^(p-1) sum(dy c y^(1-p))``."""
    # The transpose of an average with c = taps / taps inside before it: by 1 / taps inside, and by all taps.
    average = (*_norm_numbers(kernel, stride, ceil_mode), True, None, channels_last)
    wide = x.to(statistics_dtype(x.dtype))
    size, norm = wide.abs(), lp_pool(wide, p, kernel, stride, ceil_mode, channels_last)[0]
    # Without 0 to a negative power, whose derivative would be no number.
    norm = torch.where(norm == 0, 1.0, norm)
    weights = dy.to(wide.dtype) * norm ** (1 - p) * math.prod(kernel)
    spread = avg_pool_backward(weights, list(x.shape[-len(kernel) :]), *average)
    base = torch.where(size == 0, 1.0, size)
    power = torch.where(size == 0, 0.0, base ** (p - 1))
    return (wide.sign() * power * spread).to(x.dtype)


def _setup_lp_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    dy, x, _, _, *ctx.rest = inputs
    ctx.save_for_backward(dy, x)


def _backward_lp_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    def composite(dy: Any, x: Any) -> tuple:
        return (_lp_gradient(dy, x, *ctx.rest),)

    return (*through(composite, ctx.saved_tensors, ctx.needs_input_grad[:2], (gradient,)), *(None,) * 7)


lp_pool_backward = define(
    f"lp_pool_backward(Tensor grad, Tensor input, Tensor largest, Tensor slopes, {_NORM}, {_LAST}) -> Tensor",
    _run_lp_backward,
    _fake_lp_backward,
    _setup_lp_backward,
    _backward_lp_backward,
)


# ---- the inverse of max pooling


def _run_unpool(x: _Tensor, indices: _Tensor, output_size: list, channels_last: bool) -> torch.Tensor:
    rank = len(output_size)
    y = arrays.empty(_shape(x, output_size), x.dtype, x, channels_last)
    if not (x.numel() and y.numel()):
        return y.zero_()
    batch, at = (_batched(one, rank, False) for one in (x, indices))
    found = arrays.floor(x).max_unpool_forward(batch, at, tuple(output_size))
    return arrays.store(y, found.reshape(y.shape))


def _fake_unpool(x: _Tensor, indices: _Tensor, output_size: list, channels_last: bool) -> torch.Tensor:
    return arrays.empty(_shape(x, output_size), x.dtype, x, channels_last)


def _setup_unpool(ctx: Any, inputs: tuple, output: Any) -> None:
    _, indices, ctx.output_size, ctx.channels_last = inputs
    ctx.save_for_backward(indices)


def _backward_unpool(ctx: Any, dy: torch.Tensor) -> tuple:
    return max_unpool_backward(dy, *ctx.saved_tensors, len(ctx.output_size), ctx.channels_last), None, None, None


max_unpool = define(
    f"max_unpool(Tensor input, Tensor indices, SymInt[] output_size, {_LAST}) -> Tensor",
    _run_unpool,
    _fake_unpool,
    _setup_unpool,
    _backward_unpool,
)


def indices_are_valid(indices: torch.Tensor, sizes: Any) -> bool:
    """Whether all lie in the output's plane. True where only a graph is made: nothing is read back then."""
    if not (registry.is_eager(indices) and indices.numel()) or arrays.is_capturing(indices):
        return True
    _, outside = arrays.floor(indices).max_unpool_keep(arrays.array(indices), math.prod(sizes))
    return not bool(outside.any())


def _run_unpool_backward(dy: _Tensor, indices: _Tensor, rank: int, channels_last: bool) -> torch.Tensor:
    dx = arrays.empty(indices.shape, dy.dtype, dy, channels_last)
    if not (dx.numel() and dy.numel()):
        return dx.zero_()
    batch, at = (_batched(one, rank, False) for one in (dy, indices))
    return arrays.store(dx, arrays.floor(dy).max_unpool_backward(batch, at).reshape(dx.shape))


def _fake_unpool_backward(dy: _Tensor, indices: _Tensor, rank: int, channels_last: bool) -> torch.Tensor:
    return arrays.empty(indices.shape, dy.dtype, dy, channels_last)


def _setup_unpool_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    dy, indices, ctx.rank, _ = inputs
    ctx.save_for_backward(indices)
    ctx.shape = dy.shape


def _backward_unpool_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    (indices,) = ctx.saved_tensors
    # Of equal indices each has read the value: their gradients add up, which the forward's map does not do.
    flat, plane = indices.flatten(-ctx.rank), math.prod(ctx.shape[-ctx.rank :])
    inside = (flat >= 0) & (flat < plane)
    values = torch.where(inside, gradient.flatten(-ctx.rank), 0.0)
    zeros = gradient.new_zeros((*ctx.shape[: -ctx.rank], plane))
    return zeros.scatter_add(-1, torch.where(inside, flat, 0), values).reshape(ctx.shape), None, None, None


max_unpool_backward = define(
    f"max_unpool_backward(Tensor grad, Tensor indices, int rank, {_LAST}) -> Tensor",
    _run_unpool_backward,
    _fake_unpool_backward,
    _setup_unpool_backward,
    _backward_unpool_backward,
)
