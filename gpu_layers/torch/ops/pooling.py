"""Rows of the poolings. Windows are numbers in schemas; shapes follow by plain arithmetic, of symbols too.

A ``kernel`` without numbers stands for adaptive windows: then the sizes of the output are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from gpu_layers.core.window import Window, adaptive_window, sliding_window
from gpu_layers.torch import arrays, registry
from gpu_layers.torch.arrays import accumulation_dtype
from gpu_layers.torch.registry import define, first_result, is_plain, keep, kept, through

_WINDOW = "int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, SymInt[] output_size"
_LAST = "bool channels_last"
_NUMBERS = 6  # of _WINDOW


def output_sizes(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    output_size: Sequence[int],
) -> list[int]:
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
    """Windows over an input, and all else that a pooling of it is told; what follows is computed once it is asked for.

    Parameters
    ----------
    outer : sequence of int
        Sizes in front of the spatial ones: of samples and channels, or of channels.
    spatial : sequence of int
        Spatial sizes of the input.
    numbers : sequence
        Kernel, stride, padding, dilation, ceil_mode and output_size, as the schemas have them.
    options : sequence
        What the schemas have after those.
    """

    def __init__(
        self, outer: Sequence[int], spatial: Sequence[int], numbers: Sequence[Any], options: Sequence[Any]
    ) -> None:
        self.outer, self.spatial, self.numbers, self.rank = outer, spatial, numbers, len(spatial)
        *self.options, self.channels_last = options
        self.batched = len(outer) > 1
        self.window: Window | None = None

    def find(self) -> Window | None:
        """The window, to be asked for once all sizes are known; None where input or output have no elements."""
        if 0 not in (*self.outer, *self.spatial, *self.outputs()):
            *given, ceil_mode, output_size = self.numbers
            self.window = _window(tuple(self.spatial), *map(tuple, given), ceil_mode, tuple(output_size))
        return self.window

    def outputs(self) -> list[int]:
        """Spatial sizes of the output."""
        return output_sizes(self.spatial, *self.numbers)

    def argmax_dtype(self) -> torch.dtype:
        """dtype of max pooling's numbers of taps, whose option says whether those of floors are widened."""
        return torch.int32 if self.options[0] else self.least_argmax_dtype()

    def least_argmax_dtype(self) -> torch.dtype:
        """Smallest dtype that numbers the taps, of ``core.argmax.argmax_dtype``."""
        taps = 1
        kernel, *_, output_size = self.numbers
        if kernel:
            taps = math.prod(kernel)
        else:
            for size, outputs in zip(self.spatial, output_size, strict=True):
                taps = taps * _most_taps(size, outputs)
        if taps <= 2**8:
            return torch.uint8
        return torch.uint16 if taps <= 2**16 else torch.uint32

    def narrowed(self, argmax: torch.Tensor) -> torch.Tensor:
        """Numbers of taps as floors have them."""
        return argmax.to(self.least_argmax_dtype()) if self.options[0] else argmax

    def of_output(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor beside x, of the output's shape."""
        return arrays.empty((*self.outer, *self.outputs()), dtype, x, self.channels_last)

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """A new tensor beside x, of its dtype and the input's shape."""
        return arrays.empty((*self.outer, *self.spatial), x.dtype, x, self.channels_last)


def _most_taps(size: int, outputs: int) -> int:
    """Taps of the largest adaptive window along an axis: ``ceil((i + 1) L / o) - floor(i L / o)``."""
    if type(outputs) is not int:
        return 1  # as many windows as inputs: of other symbols the numbers are wide
    most = 1
    for i in range(outputs):
        most = torch.sym_max(most, -(-(i + 1) * size // outputs) - i * size // outputs)
    return most


def _placed(tensors: tuple, numbers: tuple) -> Placing:
    """From the numbers of a schema, after a tensor of the input's shape."""
    shape, rank = tensors[0].shape, len(numbers[0]) or len(numbers[_NUMBERS - 1])
    return Placing(shape[:-rank], shape[-rank:], numbers[:_NUMBERS], numbers[_NUMBERS:])


def _placed_by(tensors: tuple, numbers: tuple) -> Placing:
    """From the numbers of a schema whose first ones are the input's spatial sizes."""
    spatial, *others = numbers
    return Placing(tensors[0].shape[: -len(spatial)], spatial, others[:_NUMBERS], others[_NUMBERS:])


def _numbers(placing: Placing) -> tuple:
    return *placing.numbers, *placing.options, placing.channels_last


def _numbers_with_sizes(placing: Placing) -> tuple:
    return list(placing.spatial), *_numbers(placing)


_FROM_INPUT: dict[str, Any] = {"pack": _placed, "unpack": _numbers}
_FROM_OUTPUT: dict[str, Any] = {"pack": _placed_by, "unpack": _numbers_with_sizes}


def _batched(place: arrays.Place, x: torch.Tensor, rank: int, channels_last: bool) -> Any:
    """The array of a batch: one sample gets its axis."""
    found = place.array(x, channels_last)
    return found if x.dim() == rank + 2 else found[None]


def _of_batch(place: arrays.Place, found: Any, x: torch.Tensor, rank: int, channels_last: bool) -> torch.Tensor:
    """The tensor of what a floor found for the batch of x."""
    return place.tensor(found if x.dim() == rank + 2 else found[0], channels_last)


# ---- the largest of each window
#
# A graph may be compiled for images of sizes that are not known, and so for adaptive windows of any number of taps:
# their numbers are wide then, as the results' dtypes are not to depend on sizes.

_WIDE = "bool wide_argmax"


def _raw_max(x: torch.Tensor, placing: Placing) -> tuple:
    window = placing.window or placing.find()
    if window is None:
        return _fake_max(x, placing)
    place, last = arrays.here(x), placing.channels_last
    batch = place.array(x, last)
    if placing.batched:
        y, argmax = place.floor.max_pool_forward(batch, window, last, None)
    else:
        (y,), (argmax,) = place.floor.max_pool_forward(batch[None], window, last, None)
    return place.tensor(y, last), place.kept(argmax, last)


def _run_max(x: torch.Tensor, placing: Placing) -> tuple:
    y, argmax = _raw_max(x, placing)
    argmax = arrays.tensor_of(argmax, placing.channels_last)
    return y, argmax.to(torch.int32) if placing.options[0] else argmax


def _fake_max(x: torch.Tensor, placing: Placing) -> tuple:
    return placing.of_output(x, x.dtype), placing.of_output(x, placing.argmax_dtype())


def _save_argmax(ctx: Any, inputs: tuple, output: tuple) -> None:
    keep(ctx, last=output[1], channels_last=ctx.numbers.channels_last)


def _backward_max(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple:
    if dy is None:
        return (None,)
    (argmax,), placing = kept(ctx), ctx.numbers
    if is_plain(dy):
        return (_run_max_backward(dy, argmax, placing),)
    return (max_pool_backward(dy, arrays.tensor_of(argmax, placing.channels_last), placing),)


max_pool = define(
    f"max_pool(Tensor input, {_WINDOW}, {_WIDE}, {_LAST}) -> (Tensor, Tensor)",
    _run_max,
    _fake_max,
    _backward_max,
    _save_argmax,
    first=first_result,
    raw=_raw_max,
    **_FROM_INPUT,
)


def _run_max_backward(dy: torch.Tensor, argmax: torch.Tensor, placing: Placing) -> torch.Tensor:
    window = placing.window or placing.find()
    if window is None:
        return placing.of_input(dy).zero_()
    place, last = arrays.here(dy), placing.channels_last
    if placing.options[0]:
        argmax = placing.narrowed(argmax)
    batch, chosen = place.array(dy, last), place.raw(argmax, last)
    if placing.batched:
        found = place.floor.max_pool_backward(batch, chosen, window, last, None)
    else:
        (found,) = place.floor.max_pool_backward(batch[None], chosen[None], window, last, None)
    return place.tensor(found, last)


def _fake_of_input(dy: torch.Tensor, *others: Any) -> torch.Tensor:
    return others[-1].of_input(dy)


def _save_second(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_max_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    return max_pool_gather(gradient, *ctx.saved_tensors, ctx.numbers), None


max_pool_backward = define(
    f"max_pool_backward(Tensor grad, Tensor argmax, SymInt[] spatial, {_WINDOW}, {_WIDE}, {_LAST}) -> Tensor",
    _run_max_backward,
    _fake_of_input,
    _backward_max_backward,
    _save_second,
    **_FROM_OUTPUT,
)


def _run_gather(x: torch.Tensor, argmax: torch.Tensor, placing: Placing) -> torch.Tensor:
    window = placing.window or placing.find()
    if window is None:
        return _fake_gather(x, argmax, placing)
    place, last, rank = arrays.here(x), placing.channels_last, placing.rank
    argmax = placing.narrowed(argmax)
    found = place.floor.max_pool_gather(*(_batched(place, one, rank, last) for one in (x, argmax)), window, last)
    return _of_batch(place, found, x, rank, last)


def _fake_gather(x: torch.Tensor, argmax: torch.Tensor, placing: Placing) -> torch.Tensor:
    return placing.of_output(x, x.dtype)


def _backward_gather(ctx: Any, dy: torch.Tensor) -> tuple:
    return max_pool_backward(dy, *ctx.saved_tensors, ctx.numbers), None


max_pool_gather = define(
    f"max_pool_gather(Tensor input, Tensor argmax, SymInt[] spatial, {_WINDOW}, {_WIDE}, {_LAST}) -> Tensor",
    _run_gather,
    _fake_gather,
    _backward_gather,
    _save_second,
    **_FROM_OUTPUT,
)


def _run_indices(argmax: torch.Tensor, placing: Placing) -> torch.Tensor:
    window = placing.window or placing.find()
    if window is None:
        return _fake_indices(argmax, placing)
    place, last, rank = arrays.here(argmax), placing.channels_last, placing.rank
    argmax = placing.narrowed(argmax)
    found = place.floor.max_pool_indices(_batched(place, argmax, rank, last), window, last)
    return _of_batch(place, found, argmax, rank, last)


def _fake_indices(argmax: torch.Tensor, placing: Placing) -> torch.Tensor:
    return placing.of_output(argmax, torch.int64)


max_pool_indices = define(
    f"max_pool_indices(Tensor argmax, SymInt[] spatial, {_WINDOW}, {_WIDE}, {_LAST}) -> Tensor",
    _run_indices,
    _fake_indices,
    **_FROM_OUTPUT,
)


# ---- the mean of each window; the sum of the linear map that it is, and of its transpose

_DIVISOR = "bool count_include_pad, int? divisor_override"


def _run_avg(x: torch.Tensor, placing: Placing) -> torch.Tensor:
    window = placing.window or placing.find()
    if window is None:
        return _fake_of_output(x, placing)
    place, last = arrays.here(x), placing.channels_last
    batch, (include_pad, divisor) = place.array(x, last), placing.options
    if placing.batched:
        found = place.floor.avg_pool_forward(batch, window, last, include_pad, divisor, None)
    else:
        (found,) = place.floor.avg_pool_forward(batch[None], window, last, include_pad, divisor, None)
    return place.tensor(found, last)


def _fake_of_output(x: torch.Tensor, placing: Placing) -> torch.Tensor:
    return placing.of_output(x, x.dtype)


def _backward_avg(ctx: Any, dy: torch.Tensor) -> tuple:
    row: Any = _run_avg_backward if is_plain(dy) else avg_pool_backward
    return (row(dy, ctx.numbers),)


avg_pool = define(
    f"avg_pool(Tensor input, {_WINDOW}, {_DIVISOR}, {_LAST}) -> Tensor",
    _run_avg,
    _fake_of_output,
    _backward_avg,
    **_FROM_INPUT,
)


def _run_avg_backward(dy: torch.Tensor, placing: Placing) -> torch.Tensor:
    window = placing.window or placing.find()
    if window is None:
        return placing.of_input(dy).zero_()
    place, last = arrays.here(dy), placing.channels_last
    batch, (include_pad, divisor) = place.array(dy, last), placing.options
    if placing.batched:
        found = place.floor.avg_pool_backward(batch, window, last, include_pad, divisor, None)
    else:
        (found,) = place.floor.avg_pool_backward(batch[None], window, last, include_pad, divisor, None)
    return place.tensor(found, last)


def _backward_avg_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    return (avg_pool(gradient, ctx.numbers),)


avg_pool_backward = define(
    f"avg_pool_backward(Tensor grad, SymInt[] spatial, {_WINDOW}, {_DIVISOR}, {_LAST}) -> Tensor",
    _run_avg_backward,
    _fake_of_input,
    _backward_avg_backward,
    **_FROM_OUTPUT,
)


# ---- the norm of each window


def _run_lp(x: torch.Tensor, placing: Placing) -> torch.Tensor:
    window = placing.window or placing.find()
    if window is None:
        return _fake_of_output(x, placing)
    place, last, rank = arrays.here(x), placing.channels_last, placing.rank
    batch = _batched(place, x, rank, last)
    y, _ = place.floor.lp_pool_forward(batch, window, *placing.options, last)
    return _of_batch(place, y, x, rank, last)


def _save_input(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward_lp(ctx: Any, dy: torch.Tensor) -> tuple:
    (x,) = ctx.saved_tensors
    row: Any = _lp_gradient if torch.is_grad_enabled() else _run_lp_backward if is_plain(dy) else lp_pool_backward
    return (row(dy, x, ctx.numbers),)


lp_pool = define(
    f"lp_pool(Tensor input, {_WINDOW}, float norm_type, {_LAST}) -> Tensor",
    _run_lp,
    _fake_of_output,
    _backward_lp,
    _save_input,
    **_FROM_INPUT,
)


def _run_lp_backward(dy: torch.Tensor, x: torch.Tensor, placing: Placing) -> torch.Tensor:
    window = placing.window or placing.find()
    if window is None:
        return placing.of_input(dy).zero_()
    place, last, rank = arrays.here(x), placing.channels_last, placing.rank
    given = [_batched(place, one, rank, last) for one in (dy, x)]
    found = place.floor.lp_pool_backward(*given, None, window, *placing.options, last)
    return _of_batch(place, found, x, rank, last)


def _lp_gradient(dy: torch.Tensor, x: torch.Tensor, placing: Placing) -> torch.Tensor:
    """Gradient of x, of operations that are differentiable: ``sign(x) |x|^(p-1) sum(dy c y^(1-p))``."""
    wide, (p,) = x.to(accumulation_dtype(x.dtype)), placing.options
    size, norm = wide.abs(), lp_pool(wide, placing)
    # Without 0 to a negative power, whose derivative would be no number.
    norm = torch.where(norm == 0, 1.0, norm)
    # The transpose of an average with c = argmax / argmax inside before it: by 1 / argmax inside, and by all argmax.
    weights = dy.to(wide.dtype) * norm ** (1 - p) * math.prod(placing.numbers[0])
    means = Placing(placing.outer, placing.spatial, placing.numbers, (True, None, placing.channels_last))
    spread = avg_pool_backward(weights, means)
    base = torch.where(size == 0, 1.0, size)
    power = torch.where(size == 0, 0.0, base ** (p - 1))
    return (wide.sign() * power * spread).to(x.dtype)


def _save_both(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward_lp_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    def composite(dy: Any, x: Any) -> tuple:
        return (_lp_gradient(dy, x, ctx.numbers),)

    return tuple(through(composite, ctx.saved_tensors, ctx.needs_input_grad[:2], (gradient,)))


lp_pool_backward = define(
    f"lp_pool_backward(Tensor grad, Tensor input, SymInt[] spatial, {_WINDOW}, float norm_type, {_LAST}) -> Tensor",
    _run_lp_backward,
    _fake_of_input,
    _backward_lp_backward,
    _save_both,
    **_FROM_OUTPUT,
)


# ---- the inverse of max pooling; numbers: sizes of the output, or how many, and channels_last


def _run_unpool(x: torch.Tensor, indices: torch.Tensor, numbers: tuple) -> torch.Tensor:
    output_size, channels_last = numbers
    if not (x.numel() and math.prod(output_size)):
        return _fake_unpool(x, indices, numbers).zero_()
    rank = len(output_size)
    place = arrays.here(x)
    batch, at = (_batched(place, one, rank, channels_last) for one in (x, indices))
    found, _ = place.floor.max_unpool_forward(batch, at, tuple(output_size), channels_last)
    return _of_batch(place, found, x, rank, channels_last)


def _fake_unpool(x: torch.Tensor, indices: torch.Tensor, numbers: tuple) -> torch.Tensor:
    output_size, channels_last = numbers
    return arrays.empty((*x.shape[: -len(output_size)], *output_size), x.dtype, x, channels_last)


def _backward_unpool(ctx: Any, dy: torch.Tensor) -> tuple:
    output_size, channels_last = ctx.numbers
    return max_unpool_backward(dy, *ctx.saved_tensors, (len(output_size), channels_last)), None


max_unpool = define(
    f"max_unpool(Tensor input, Tensor indices, SymInt[] output_size, {_LAST}) -> Tensor",
    _run_unpool,
    _fake_unpool,
    _backward_unpool,
    _save_second,
)


def indices_are_valid(indices: torch.Tensor, sizes: Any) -> bool:
    """Whether all lie in the output's plane. True where only a graph is made: nothing is read back then."""
    if not is_dynamo_compiling() and registry.transforms_active():
        with registry.beneath(indices) as plain:
            return indices_are_valid(plain, sizes)
    if not (registry.is_eager(indices) and indices.numel()) or arrays.is_capturing(indices):
        return True
    place = arrays.here(indices)
    _, outside = place.floor.max_unpool_keep(place.array(indices), math.prod(sizes))
    return not bool(outside.any())


def _run_unpool_backward(dy: torch.Tensor, indices: torch.Tensor, numbers: tuple) -> torch.Tensor:
    rank, channels_last = numbers
    if not (indices.numel() and dy.numel()):
        return _fake_unpool_backward(dy, indices, numbers).zero_()
    place = arrays.here(dy)
    batch, at = (_batched(place, one, rank, channels_last) for one in (dy, indices))
    found = place.floor.max_unpool_backward(batch, at, channels_last)
    return _of_batch(place, found, indices, rank, channels_last)


def _fake_unpool_backward(dy: torch.Tensor, indices: torch.Tensor, numbers: tuple) -> torch.Tensor:
    return arrays.empty(indices.shape, dy.dtype, dy, numbers[1])


def _save_unpool_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    dy, indices, _ = inputs
    ctx.save_for_backward(indices)
    ctx.shape = dy.shape


def _backward_unpool_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    (indices,), (rank, _) = ctx.saved_tensors, ctx.numbers
    # Of equal indices each has read the value: their gradients add up, which the forward's map does not do.
    flat, plane = indices.flatten(-rank), math.prod(ctx.shape[-rank:])
    inside = (flat >= 0) & (flat < plane)
    values = torch.where(inside, gradient.reshape(flat.shape), 0.0)
    zeros = gradient.new_zeros((*ctx.shape[:-rank], plane))
    return zeros.scatter_add(-1, torch.where(inside, flat, 0), values).reshape(ctx.shape), None


max_unpool_backward = define(
    f"max_unpool_backward(Tensor grad, Tensor indices, int rank, {_LAST}) -> Tensor",
    _run_unpool_backward,
    _fake_unpool_backward,
    _backward_unpool_backward,
    _save_unpool_backward,
)
