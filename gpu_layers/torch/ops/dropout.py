"""Rows of the dropout family. The mask is drawn outside and passed in as numbers, so that every operation is pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from gpu_layers.core.mask import DropoutMask
from gpu_layers.ops.dropout import alpha_map, drop_threshold, inverted_scale
from gpu_layers.torch import arrays
from gpu_layers.torch.activations import gradient_factor
from gpu_layers.torch.registry import define, through

_LOW_64 = 2**64 - 1
_MASK = "Tensor seed, int offset, float p"


def _mask(x: torch.Tensor, seed: Any, offset: int, drop_below: int, axes: int) -> DropoutMask:
    """The mask over x: elements that differ only in the axes from ``axes`` on share one decision; none do for -1."""
    run, rng_state = 1 if axes < 0 else _elements_behind(x.shape, axes), None
    if isinstance(seed, torch.Tensor):
        if not seed.is_cpu:
            seed, rng_state = 0, _on_device(seed, offset)
        elif seed.dim():
            # Not one number, but seed and offset.
            seed, offset = seed.tolist()
        else:
            seed = seed.item()
    return DropoutMask(drop_below, seed & _LOW_64, offset & _LOW_64, 0, run, None, rng_state)


@lru_cache(maxsize=1024)
def _elements_behind(shape: tuple, axes: int) -> int:
    return max(math.prod(shape[axes:]), 1)


def _on_device(seed: torch.Tensor, offset: int) -> Any:
    """Seed and offset where kernels read them: nothing waits for the device."""
    rng_state = seed.new_zeros(3)
    rng_state[0] = seed
    if offset:
        rng_state[1] = offset
    return rng_state.view(torch.uint64)


@lru_cache(maxsize=1024)
def _numbers(kind: str, p: float) -> tuple:
    """The threshold of the words; scale, shift and what is written for a dropped element."""
    if kind == "inverted":
        return drop_threshold(p), inverted_scale(p)
    numbers = alpha_map(p)
    return drop_threshold(p), *(numbers[:1] if kind == "alpha_gradient" else numbers)


def _applied(
    x: torch.Tensor,
    mask: DropoutMask,
    numbers: list[float],
    channels_last: bool,
    residual: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dropout of x: a new tensor, or in a dense one of x's format."""
    place = arrays.here(x)
    found = place.floor.dropout_forward(
        place.array(x, channels_last),
        mask,
        *numbers,
        out=None if into is None else place.array(into, channels_last),
        residual=None if residual is None else place.array(residual, channels_last),
        channels_last=channels_last,
    )
    return place.tensor(found, channels_last) if into is None else into


def _run(x: Any, seed: Any, offset: int, p: float, axes: int, kind: str, channels_last: bool) -> torch.Tensor:
    if not x.numel():
        return _fake(x, seed, offset, p, axes, kind, channels_last)
    drop_below, *numbers = _numbers(kind, p)
    return _applied(x, _mask(x, seed, offset, drop_below, axes), numbers, channels_last)


def _fill_in_place(x: Any, seed: Any, offset: int, p: float, axes: int, kind: str, channels_last: bool) -> None:
    if not x.numel():
        return
    drop_below, *numbers = _numbers(kind, p)
    mask = _mask(x, seed, offset, drop_below, axes)
    if arrays.is_dense(x, channels_last):
        _applied(x, mask, numbers, channels_last, into=x)
    else:
        x.copy_(_applied(x, mask, numbers, False))


def _with_tensor(at: int) -> Callable[[tuple], tuple]:
    """Seeds, at this place among the arguments, may be numbers; an operation of the dispatcher takes tensors."""

    def flat(args: tuple) -> tuple:
        seed = args[at]
        if isinstance(seed, torch.Tensor):
            return args
        seed = torch.full((), seed, dtype=torch.int64, device=args[0].device)
        return *args[:at], seed, *args[at + 1 :]

    return flat


def _fake(x: Any, seed: Any, offset: int, p: float, axes: int, kind: str, channels_last: bool) -> torch.Tensor:
    return arrays.empty(x.shape, x.dtype, x, channels_last)


def _keep_numbers(ctx: Any, seed: Any, *numbers: Any) -> None:
    """Save the numbers of the mask; those that torch drew as a tensor, which a recomputation replaces."""
    if isinstance(seed, torch.Tensor):
        ctx.save_for_backward(seed)
        seed = None
    ctx.seed, ctx.numbers = seed, numbers


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _, seed, offset, p, axes, kind, channels_last = inputs
    _keep_numbers(ctx, seed, offset, p, axes, "inverted" if kind == "inverted" else "alpha_gradient", channels_last)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    # The same map of dy, which is its own derivative.
    seed = ctx.saved_tensors[0] if ctx.seed is None else ctx.seed
    return (dropout.in_backward(dy, seed, *ctx.numbers),)


dropout = define(
    f"dropout(Tensor input, {_MASK}, int axes, str kind, bool channels_last) -> Tensor",
    _run,
    _fake,
    _setup,
    _backward,
    flat=_with_tensor(1),
)


class DropoutInPlace(torch.autograd.Function):
    """Dropout that writes its result into its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *numbers: Any) -> torch.Tensor:
        """Overwrite x."""
        ctx.place = arrays.place()
        _setup(ctx, (x, *numbers), x)
        _fill_in_place(x, *numbers)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        """As of the operation that writes a new tensor."""
        with arrays.at(ctx.place):
            return *_backward(ctx, dy), *(None,) * 6


def _run_add(x: Any, residual: Any, seed: Any, offset: int, p: float, channels_last: bool) -> torch.Tensor:
    if not x.numel():
        return _fake_add(x, residual, seed, offset, p, channels_last)
    drop_below, scale = _numbers("inverted", p)
    return _applied(x, _mask(x, seed, offset, drop_below, -1), [scale], channels_last, residual)


def _fake_add(x: Any, residual: Any, seed: Any, offset: int, p: float, channels_last: bool) -> torch.Tensor:
    return arrays.empty(x.shape, x.dtype, x, channels_last)


def _setup_add(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, seed, offset, p, channels_last = inputs
    _keep_numbers(ctx, seed, offset, p, -1, "inverted", channels_last)


def _backward_add(ctx: Any, dy: torch.Tensor) -> tuple:
    dx = _backward(ctx, dy)[0] if ctx.needs_input_grad[0] else None
    return dx, dy if ctx.needs_input_grad[1] else None


dropout_add = define(
    f"dropout_add(Tensor input, Tensor residual, {_MASK}, bool channels_last) -> Tensor",
    _run_add,
    _fake_add,
    _setup_add,
    _backward_add,
    flat=_with_tensor(2),
)


def _run_activation(
    x: Any, seed: Any, offset: int, p: float, activation: str, dropout_first: bool, channels_last: bool
) -> torch.Tensor:
    y = arrays.empty(x.shape, x.dtype, x, channels_last)
    if not y.numel():
        return y
    drop_below, scale = _numbers("inverted", p)
    mask = _mask(x, seed, offset, drop_below, -1)
    place = arrays.here(x)
    found, _ = place.floor.activation_dropout_forward(place.array(x), activation, mask, scale, dropout_first)
    return place.store(y, found) if channels_last else place.tensor(found)


def _fake_activation(
    x: Any, seed: Any, offset: int, p: float, activation: str, dropout_first: bool, channels_last: bool
) -> torch.Tensor:
    return arrays.empty(x.shape, x.dtype, x, channels_last)


def _setup_activation(ctx: Any, inputs: tuple, output: Any) -> None:
    x, seed, *numbers = inputs
    # The gradient of ReLU is computed from x too, which its producer keeps anyway: nothing is kept beside it.
    if isinstance(seed, torch.Tensor):
        ctx.save_for_backward(x, seed)
        ctx.numbers = (None, *numbers)
    else:
        ctx.save_for_backward(x)
        ctx.numbers = (seed, *numbers)


def _backward_activation(ctx: Any, dy: torch.Tensor) -> tuple:
    x, *drawn = ctx.saved_tensors
    numbers = (drawn[0] if drawn else ctx.numbers[0], *ctx.numbers[1:])
    dx = (
        _gradient(dy, x, *numbers)
        if torch.is_grad_enabled()
        else activation_dropout_backward.in_backward(dy, x, *numbers)
    )
    return (dx,)


def _gradient(
    dy: Any, x: Any, seed: Any, offset: int, p: float, activation: str, dropout_first: bool, channels_last: bool
) -> torch.Tensor:
    """:data:`activation_dropout_backward`, of operations that are differentiable."""
    mask = (seed, offset, p, -1, "inverted", channels_last)
    z = dropout(x, *mask) if dropout_first else x
    return dropout(dy, *mask) * gradient_factor(z, activation)


def _run_activation_backward(
    dy: Any, x: Any, seed: Any, offset: int, p: float, activation: str, dropout_first: bool, channels_last: bool
) -> torch.Tensor:
    dx = arrays.empty(x.shape, x.dtype, x, channels_last)
    if not dx.numel():
        return dx
    drop_below, scale = _numbers("inverted", p)
    mask = _mask(x, seed, offset, drop_below, -1)
    place = arrays.here(x)
    found = place.floor.activation_dropout_backward(
        place.array(dy), place.array(x), activation, mask, scale, dropout_first
    )
    return place.store(dx, found) if channels_last else place.tensor(found)


def _fake_activation_backward(
    dy: Any, x: Any, seed: Any, offset: int, p: float, activation: str, dropout_first: bool, channels_last: bool
) -> torch.Tensor:
    return arrays.empty(x.shape, x.dtype, x, channels_last)


def _setup_activation_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    dy, x, seed, *numbers = inputs
    ctx.save_for_backward(dy, x, seed)
    ctx.numbers = numbers


def _backward_activation_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    dy, x, seed = ctx.saved_tensors

    def composite(dy: Any, x: Any) -> tuple:
        return (_gradient(dy, x, seed, *ctx.numbers),)

    needed = ctx.needs_input_grad[:2]
    return tuple(through(composite, (dy, x), needed, (gradient,)))


_ACTIVATED = f"{_MASK}, str activation, bool dropout_first, bool channels_last"
activation_dropout = define(
    f"activation_dropout(Tensor input, {_ACTIVATED}) -> Tensor",
    _run_activation,
    _fake_activation,
    _setup_activation,
    _backward_activation,
    flat=_with_tensor(1),
)
activation_dropout_backward = define(
    f"activation_dropout_backward(Tensor grad, Tensor input, {_ACTIVATED}) -> Tensor",
    _run_activation_backward,
    _fake_activation_backward,
    _setup_activation_backward,
    _backward_activation_backward,
    flat=_with_tensor(2),
)
