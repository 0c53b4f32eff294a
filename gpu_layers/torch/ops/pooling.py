"""Rows of the poolings. Windows are numbers in schemas; shapes follow by plain arithmetic, of symbols too.

A ``kernel`` without numbers stands for adaptive windows: then the sizes of the output are given.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Any

import torch

from gpu_layers.core.window import Window, adaptive_window, sliding_window
from gpu_layers.torch import arrays, registry
from gpu_layers.torch.arrays import accumulation_dtype
from gpu_layers.torch.registry import define, first_result, through

_Tensor = Any
_WINDOW = "int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, SymInt[] output_size"
_LAST = "bool channels_last"
_NUMBERS = 6  # of _WINDOW


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


@lru_cache(maxsize=1024)
def _window(
    spatial: tuple, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil_mode: bool, output_size: tuple
) -> Window:
    if not kernel:
        return adaptive_window(output_size, spatial)
    return sliding_window(kernel, stride, dilation, padding, padding, ceil_mode, spatial)


class Placing:
    """Windows over an input; what follows from their numbers is computed once it is asked for.

    Parameters
    ----------
    spatial : sequence of int
        Sizes of the input.
    numbers : sequence
        Kernel, stride, padding, dilation, ceil_mode and output_size, as the schemas have them.
    """

    def __init__(self, spatial: Any, numbers: Any) -> None:
        self.spatial, self.numbers, self.rank = spatial, numbers, len(spatial)

    @cached_property
    def window(self) -> Window:
        """The window, where all sizes are known."""
        *given, ceil_mode, output_size = self.numbers
        return _window(tuple(self.spatial), *map(tuple, given), ceil_mode, tuple(output_size))

    @cached_property
    def outputs(self) -> list:
        """Spatial sizes of the output."""
        return output_sizes(self.spatial, *self.numbers)

    @cached_property
    def is_empty(self) -> bool:
        """Whether the output has no elements, whatever the batch."""
        return not math.prod(self.outputs)

    @cached_property
    def argmax_dtype(self) -> torch.dtype:
        """Smallest dtype that numbers the taps, of ``core.argmax.argmax_dtype``."""
        taps: Any = 1
        kernel, *_, output_size = self.numbers
        if kernel:
            taps = math.prod(kernel)
        else:
            for size, outputs in zip(self.spatial, output_size, strict=True):
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


def _packed(tensors: int, with_spatial: bool = False) -> dict[str, Any]:
    """How the numbers of a schema become a :class:`Placing`, behind so many tensors, and back.

    The sizes of the input are those of the first tensor, or stand before the numbers of the window.
    """
    first = tensors + with_spatial

    def pack(args: tuple) -> tuple:
        numbers = args[first : first + _NUMBERS]
        rank = len(numbers[0]) or len(numbers[-1])
        spatial = args[tensors] if with_spatial else args[0].shape[-rank:]
        return *args[:tensors], Placing(spatial, numbers), *args[first + _NUMBERS :]

    def flat(args: tuple) -> tuple:
        placing = args[tensors]
        spatial = (list(placing.spatial),) if with_spatial else ()
        return *args[:tensors], *spatial, *placing.numbers, *args[tensors + 1 :]

    return {"pack": pack, "flat": flat}


def _shape(x: _Tensor, spatial: Any) -> list:
    return [*x.shape[: x.dim() - len(spatial)], *spatial]


def _batched(place: Any, x: _Tensor, rank: int, channels_last: bool) -> Any:
    """The array of a batch: one sample gets its axis."""
    found = place.array(x, channels_last)
    return found if x.dim() == rank + 2 else found[None]


def _of_batch(place: Any, found: Any, x: _Tensor, rank: int, channels_last: bool) -> torch.Tensor:
    """The tensor of what a floor found for the batch of x."""
    return place.tensor(found if x.dim() == rank + 2 else found[0], channels_last)


# ---- the largest of each window


def _run_max(x: _Tensor, placing: Placing, channels_last: bool) -> tuple:
    if placing.is_empty or not x.numel():
        return _fake_max(x, placing, channels_last)
    place = arrays.here(x)
    batch = place.array(x, channels_last)
    if x.dim() > placing.rank + 1:
        y, argmax = place.floor.max_pool_forward(batch, placing.window, channels_last, None)
    else:
        (y,), (argmax,) = place.floor.max_pool_forward(batch[None], placing.window, channels_last, None)
    return place.tensor(y, channels_last), place.tensor(argmax, channels_last)


def _fake_max(x: _Tensor, placing: Placing, channels_last: bool) -> tuple:
    shape = _shape(x, placing.outputs)
    return (
        arrays.empty(shape, x.dtype, x, channels_last),
        arrays.empty(shape, placing.argmax_dtype, x, channels_last),
    )


def _setup_max(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, ctx.placing, ctx.channels_last = inputs
    ctx.save_for_backward(output[1])


def _backward_max(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple:
    if dy is None:
        return (None,)
    return (max_pool_backward.in_backward(dy, *ctx.saved_tensors, ctx.placing, ctx.channels_last),)


max_pool = define(
    f"max_pool(Tensor input, {_WINDOW}, {_LAST}) -> (Tensor, Tensor)",
    _run_max,
    _fake_max,
    _setup_max,
    _backward_max,
    first=first_result,
    **_packed(1),
)


def _run_max_backward(dy: _Tensor, argmax: _Tensor, placing: Placing, channels_last: bool) -> torch.Tensor:
    if not dy.numel():
        return _fake_max_backward(dy, argmax, placing, channels_last).zero_()
    place = arrays.here(dy)
    batch, chosen = place.array(dy, channels_last), place.array(argmax, channels_last)
    if dy.dim() > placing.rank + 1:
        found = place.floor.max_pool_backward(batch, chosen, placing.window, channels_last, None)
    else:
        (found,) = place.floor.max_pool_backward(batch[None], chosen[None], placing.window, channels_last, None)
    return place.tensor(found, channels_last)


def _fake_max_backward(dy: _Tensor, argmax: _Tensor, placing: Placing, channels_last: bool) -> torch.Tensor:
    return arrays.empty(_shape(dy, placing.spatial), dy.dtype, dy, channels_last)


def _setup_max_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    _, argmax, *ctx.rest = inputs
    ctx.save_for_backward(argmax)


def _backward_max_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    return (max_pool_gather(gradient, *ctx.saved_tensors, *ctx.rest),)


max_pool_backward = define(
    f"max_pool_backward(Tensor grad, Tensor argmax, SymInt[] spatial, {_WINDOW}, {_LAST}) -> Tensor",
    _run_max_backward,
    _fake_max_backward,
    _setup_max_backward,
    _backward_max_backward,
    **_packed(2, with_spatial=True),
)


def _run_gather(x: _Tensor, argmax: _Tensor, placing: Placing, channels_last: bool) -> torch.Tensor:
    y, rank = _fake_gather(x, argmax, placing, channels_last), placing.rank
    if not y.numel():
        return y
    indices = _run_indices(argmax, placing, channels_last).flatten(-rank)
    # A window with no tap inside the input has no value, and no gradient: index -1.
    found = x.flatten(-rank).gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, 0)
    return y.copy_(found.reshape(y.shape))


def _fake_gather(x: _Tensor, argmax: _Tensor, placing: Placing, channels_last: bool) -> torch.Tensor:
    return arrays.empty(_shape(x, argmax.shape[-placing.rank :]), x.dtype, x, channels_last)


def _backward_gather(ctx: Any, dy: torch.Tensor) -> tuple:
    return (max_pool_backward(dy, *ctx.saved_tensors, *ctx.rest),)


max_pool_gather = define(
    f"max_pool_gather(Tensor input, Tensor argmax, SymInt[] spatial, {_WINDOW}, {_LAST}) -> Tensor",
    _run_gather,
    _fake_gather,
    _setup_max_backward,
    _backward_gather,
    **_packed(2, with_spatial=True),
)


def _run_indices(argmax: _Tensor, placing: Placing, channels_last: bool) -> torch.Tensor:
    found = _fake_indices(argmax, placing, channels_last)
    if not argmax.numel():
        return found
    window = placing.window
    flat, inside, number, step = 0, True, argmax.to(torch.int64), 1
    for axis in reversed(range(window.rank)):
        at = _origins(window, axis, argmax) + number % window.kernel[axis] * window.dilation[axis]
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


def _fake_indices(argmax: _Tensor, placing: Placing, channels_last: bool) -> torch.Tensor:
    return arrays.empty(argmax.shape, torch.int64, argmax, channels_last)


max_pool_indices = define(
    f"max_pool_indices(Tensor argmax, SymInt[] spatial, {_WINDOW}, {_LAST}) -> Tensor",
    _run_indices,
    _fake_indices,
    **_packed(1, with_spatial=True),
)


# ---- the mean of each window; the sum of the linear map that it is, and of its transpose

_DIVISOR = "bool count_include_pad, int? divisor_override"


def _run_avg(
    x: _Tensor, placing: Placing, count_include_pad: bool, divisor: int | None, channels_last: bool
) -> torch.Tensor:
    if placing.is_empty or not x.numel():
        return _fake_avg(x, placing, count_include_pad, divisor, channels_last)
    place = arrays.here(x)
    batch, last = place.array(x, channels_last), (channels_last, count_include_pad, divisor, None)
    if x.dim() > placing.rank + 1:
        found = place.floor.avg_pool_forward(batch, placing.window, *last)
    else:
        (found,) = place.floor.avg_pool_forward(batch[None], placing.window, *last)
    return place.tensor(found, channels_last)


def _fake_avg(
    x: _Tensor, placing: Placing, count_include_pad: bool, divisor: int | None, channels_last: bool
) -> torch.Tensor:
    return arrays.empty(_shape(x, placing.outputs), x.dtype, x, channels_last)


def _setup_avg(ctx: Any, inputs: tuple, output: Any) -> None:
    _, *ctx.rest = inputs


def _backward_avg(ctx: Any, dy: torch.Tensor) -> tuple:
    return (avg_pool_backward.in_backward(dy, *ctx.rest),)


avg_pool = define(
    f"avg_pool(Tensor input, {_WINDOW}, {_DIVISOR}, {_LAST}) -> Tensor",
    _run_avg,
    _fake_avg,
    _setup_avg,
    _backward_avg,
    **_packed(1),
)


def _run_avg_backward(
    dy: _Tensor, placing: Placing, count_include_pad: bool, divisor: int | None, channels_last: bool
) -> torch.Tensor:
    if not dy.numel():
        return _fake_avg_backward(dy, placing, count_include_pad, divisor, channels_last).zero_()
    place = arrays.here(dy)
    batch, last = place.array(dy, channels_last), (channels_last, count_include_pad, divisor, None)
    if dy.dim() > placing.rank + 1:
        found = place.floor.avg_pool_backward(batch, placing.window, *last)
    else:
        (found,) = place.floor.avg_pool_backward(batch[None], placing.window, *last)
    return place.tensor(found, channels_last)


def _fake_avg_backward(
    dy: _Tensor, placing: Placing, count_include_pad: bool, divisor: int | None, channels_last: bool
) -> torch.Tensor:
    return arrays.empty(_shape(dy, placing.spatial), dy.dtype, dy, channels_last)


def _backward_avg_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    return (avg_pool(gradient, *ctx.rest),)


avg_pool_backward = define(
    f"avg_pool_backward(Tensor grad, SymInt[] spatial, {_WINDOW}, {_DIVISOR}, {_LAST}) -> Tensor",
    _run_avg_backward,
    _fake_avg_backward,
    _setup_avg,
    _backward_avg_backward,
    **_packed(1, with_spatial=True),
)


# ---- the norm of each window


def _run_lp(x: _Tensor, placing: Placing, p: float, channels_last: bool) -> torch.Tensor:
    if placing.is_empty or not x.numel():
        return _fake_lp(x, placing, p, channels_last)
    place, rank = arrays.here(x), placing.rank
    batch = _batched(place, x, rank, channels_last)
    y, _ = place.floor.lp_pool_forward(batch, placing.window, p, channels_last)
    return _of_batch(place, y, x, rank, channels_last)


def _fake_lp(x: _Tensor, placing: Placing, p: float, channels_last: bool) -> torch.Tensor:
    return arrays.empty(_shape(x, placing.outputs), x.dtype, x, channels_last)


def _setup_lp(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, *ctx.rest = inputs
    ctx.save_for_backward(x)


def _backward_lp(ctx: Any, dy: torch.Tensor) -> tuple:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (_lp_gradient(dy, x, *ctx.rest),)
    return (lp_pool_backward.in_backward(dy, x, *ctx.rest),)


lp_pool = define(
    f"lp_pool(Tensor input, {_WINDOW}, float norm_type, {_LAST}) -> Tensor",
    _run_lp,
    _fake_lp,
    _setup_lp,
    _backward_lp,
    **_packed(1),
)


def _run_lp_backward(dy: _Tensor, x: _Tensor, placing: Placing, p: float, channels_last: bool) -> torch.Tensor:
    if not dy.numel():
        return arrays.empty(x.shape, x.dtype, x, channels_last).zero_()
    place, rank = arrays.here(x), placing.rank
    given = [_batched(place, one, rank, channels_last) for one in (dy, x)]
    found = place.floor.lp_pool_backward(*given, None, placing.window, p, channels_last)
    return _of_batch(place, found, x, rank, channels_last)


def _fake_lp_backward(dy: _Tensor, x: _Tensor, placing: Placing, p: float, channels_last: bool) -> torch.Tensor:
    return arrays.empty(x.shape, x.dtype, x, channels_last)


def _lp_gradient(dy: _Tensor, x: _Tensor, placing: Placing, p: float, channels_last: bool) -> torch.Tensor:
    """Gradient of x, of operations that are differentiable: ``sign(x) |x|^(p-1) sum(dy c y^(1-p))``."""
    wide = x.to(accumulation_dtype(x.dtype))
    size, norm = wide.abs(), lp_pool(wide, placing, p, channels_last)
    # Without 0 to a negative power, whose derivative would be no number.
    norm = torch.where(norm == 0, 1.0, norm)
    # The transpose of an average with c = argmax / argmax inside before it: by 1 / argmax inside, and by all argmax.
    weights = dy.to(wide.dtype) * norm ** (1 - p) * math.prod(placing.numbers[0])
    spread = avg_pool_backward(weights, placing, True, None, channels_last)
    base = torch.where(size == 0, 1.0, size)
    power = torch.where(size == 0, 0.0, base ** (p - 1))
    return (wide.sign() * power * spread).to(x.dtype)


def _setup_lp_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    dy, x, *ctx.rest = inputs
    ctx.save_for_backward(dy, x)


def _backward_lp_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    def composite(dy: Any, x: Any) -> tuple:
        return (_lp_gradient(dy, x, *ctx.rest),)

    return tuple(through(composite, ctx.saved_tensors, ctx.needs_input_grad[:2], (gradient,)))


lp_pool_backward = define(
    f"lp_pool_backward(Tensor grad, Tensor input, SymInt[] spatial, {_WINDOW}, float norm_type, {_LAST}) -> Tensor",
    _run_lp_backward,
    _fake_lp_backward,
    _setup_lp_backward,
    _backward_lp_backward,
    **_packed(2, with_spatial=True),
)


# ---- the inverse of max pooling


def _run_unpool(x: _Tensor, indices: _Tensor, output_size: Any, channels_last: bool) -> torch.Tensor:
    rank, output_size = len(output_size), tuple(output_size)
    if not (x.numel() and math.prod(output_size)):
        return _fake_unpool(x, indices, output_size, channels_last).zero_()
    place = arrays.here(x)
    batch, at = (_batched(place, one, rank, channels_last) for one in (x, indices))
    found = place.floor.max_unpool_forward(batch, at, output_size, channels_last)
    return _of_batch(place, found, x, rank, channels_last)


def _fake_unpool(x: _Tensor, indices: _Tensor, output_size: Any, channels_last: bool) -> torch.Tensor:
    return arrays.empty(_shape(x, output_size), x.dtype, x, channels_last)


def _setup_unpool(ctx: Any, inputs: tuple, output: Any) -> None:
    _, indices, ctx.output_size, ctx.channels_last = inputs
    ctx.save_for_backward(indices)


def _backward_unpool(ctx: Any, dy: torch.Tensor) -> tuple:
    return (max_unpool_backward.in_backward(dy, *ctx.saved_tensors, len(ctx.output_size), ctx.channels_last),)


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
    place = arrays.here(indices)
    _, outside = place.floor.max_unpool_keep(place.array(indices), math.prod(sizes))
    return not bool(outside.any())


def _run_unpool_backward(dy: _Tensor, indices: _Tensor, rank: int, channels_last: bool) -> torch.Tensor:
    if not (indices.numel() and dy.numel()):
        return _fake_unpool_backward(dy, indices, rank, channels_last).zero_()
    place = arrays.here(dy)
    batch, at = (_batched(place, one, rank, channels_last) for one in (dy, indices))
    found = place.floor.max_unpool_backward(batch, at, channels_last)
    return _of_batch(place, found, indices, rank, channels_last)


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
    return (zeros.scatter_add(-1, torch.where(inside, flat, 0), values).reshape(ctx.shape),)


max_unpool_backward = define(
    f"max_unpool_backward(Tensor grad, Tensor indices, int rank, {_LAST}) -> Tensor",
    _run_unpool_backward,
    _fake_unpool_backward,
    _setup_unpool_backward,
    _backward_unpool_backward,
)
