"""Rows of the dropout family. The mask is drawn outside and passed in as numbers, so that every operation is pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from gpu_layers.core.mask import DropoutMask
from gpu_layers.ops.dropout import alpha_map, drop_threshold, inverted_scale
from gpu_layers.torch import arrays
from gpu_layers.torch.activations import activation_gradient
from gpu_layers.torch.registry import define, is_plain, through

# A number, or a tensor of one, or of it and the offset.
_Seed: TypeAlias = int | torch.Tensor
_LOW_64 = 2**64 - 1
_MASK = "Tensor seed, int offset, float p"


class Dropping:
    """What a dropout does to tensors of a shape; what follows is computed once it is asked for.

    Parameters
    ----------
    shape : sequence of int
    p : float
    axes : int
        Elements that have the same place along so many leading axes share a decision; -1: each has its own.
    kind : {"inverted", "alpha", "alpha_gradient"}
    channels_last : bool
    """

    def __init__(self, shape: Sequence[int], p: float, axes: int, kind: str, channels_last: bool) -> None:
        self.shape, self.p, self.axes, self.kind, self.channels_last = shape, p, axes, kind, channels_last
        self.factors: tuple = ()

    def find(self) -> tuple:
        """Scale, shift and what is written for a dropped element, as far as floors are to be told.

        To be asked for once all sizes are known; nothing where there are no elements.
        """
        if 0 not in self.shape:
            self.drop_below = drop_threshold(self.p)
            # Elements that share a decision.
            self.run = 1 if self.axes < 0 else math.prod(self.shape[self.axes :])
            factors = (inverted_scale(self.p),) if self.kind == "inverted" else alpha_map(self.p)
            self.factors = factors[:1] if self.kind == "alpha_gradient" else factors
        return self.factors

    def mask(self, seed: _Seed, offset: int) -> DropoutMask:
        """The mask of a call with these numbers."""
        rng_state = None
        if isinstance(seed, torch.Tensor):
            if not seed.is_cpu:
                seed, rng_state = 0, _on_device(seed, offset)
            elif seed.dim():
                # Not one number, but seed and offset.
                seed, offset = seed.tolist()
            else:
                seed = seed.item()
        return DropoutMask(self.drop_below, seed & _LOW_64, offset & _LOW_64, 0, self.run, None, rng_state)

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor for the result of x."""
        return arrays.empty(self.shape, x.dtype, x, self.channels_last)


def _on_device(seed: torch.Tensor, offset: int) -> torch.Tensor:
    """Seed and offset where kernels read them: nothing waits for the device."""
    rng_state = seed.new_zeros(3)
    rng_state[0] = seed
    if offset:
        rng_state[1] = offset
    return rng_state.view(torch.uint64)


def _pack(tensors: tuple, numbers: tuple) -> tuple:
    offset, *others = numbers
    return offset, Dropping(tensors[0].shape, *others)


def _unpack(numbers: tuple) -> tuple:
    offset, dropping = numbers
    return offset, dropping.p, dropping.axes, dropping.kind, dropping.channels_last


def _with_tensor(args: tuple) -> tuple:
    """Seeds, the last before the numbers, may be numbers; an operation of the dispatcher takes tensors."""
    *tensors, seed, numbers = args
    if not isinstance(seed, torch.Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=tensors[0].device)
    return *tensors, seed, numbers


def _run(x: torch.Tensor, seed: _Seed, numbers: tuple) -> torch.Tensor:
    offset, dropping = numbers
    factors = dropping.factors or dropping.find()
    if not factors:
        return dropping.empty(x)
    place, last = arrays.here(x), dropping.channels_last
    mask = dropping.mask(seed, offset)
    return place.tensor(place.floor.dropout_forward(place.array(x, last), mask, *factors, channels_last=last), last)


def _fill_in_place(x: torch.Tensor, seed: _Seed, numbers: tuple) -> None:
    offset, dropping = numbers
    factors = dropping.factors or dropping.find()
    if not factors:
        return
    place, last = arrays.here(x), dropping.channels_last
    mask = dropping.mask(seed, offset)
    if arrays.is_dense(x, last):
        array = place.array(x, last)
        place.floor.dropout_forward(array, mask, *factors, out=array, channels_last=last)
    else:
        x.copy_(place.tensor(place.floor.dropout_forward(place.array(x), mask, *factors)))


def _fake(x: torch.Tensor, seed: _Seed, numbers: tuple) -> torch.Tensor:
    return numbers[1].empty(x)


def _save_seed(ctx: Any, inputs: tuple, output: Any) -> None:
    """Save the numbers of the mask; those that torch drew as a tensor, which a recomputation replaces."""
    ctx.seed = seed = inputs[-2]
    if isinstance(seed, torch.Tensor):
        ctx.save_for_backward(seed)
        ctx.seed = None


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    # The same map of dy, which is its own derivative.
    seed = ctx.saved_tensors[0] if ctx.seed is None else ctx.seed
    numbers = offset, dropping = ctx.numbers
    if dropping.kind == "alpha":
        numbers = offset, Dropping(dropping.shape, dropping.p, dropping.axes, "alpha_gradient", dropping.channels_last)
    row: Any = _run if is_plain(dy) else dropout
    return row(dy, seed, numbers), None


dropout = define(
    f"dropout(Tensor input, {_MASK}, int axes, str kind, bool channels_last) -> Tensor",
    _run,
    _fake,
    _backward,
    _save_seed,
    pack=_pack,
    unpack=_unpack,
    with_tensors=_with_tensor,
)


class DropoutInPlace(torch.autograd.Function):
    """Dropout that writes its result into its input."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """Overwrite the first input."""
        ctx.place, ctx.numbers = arrays.place(), inputs[-1]
        _save_seed(ctx, inputs, None)
        _fill_in_place(*inputs)
        ctx.mark_dirty(inputs[0])
        return inputs[0]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        """As of the operation that writes a new tensor."""
        with arrays.at(ctx.place):
            return *_backward(ctx, dy), None


def _run_add(x: torch.Tensor, residual: torch.Tensor, seed: _Seed, numbers: tuple) -> torch.Tensor:
    offset, dropping = numbers
    factors = dropping.factors or dropping.find()
    if not factors:
        return dropping.empty(x)
    place, last = arrays.here(x), dropping.channels_last
    mask, added = dropping.mask(seed, offset), place.array(residual, last)
    found = place.floor.dropout_forward(place.array(x, last), mask, *factors, residual=added, channels_last=last)
    return place.tensor(found, last)


def _fake_add(x: torch.Tensor, residual: torch.Tensor, seed: _Seed, numbers: tuple) -> torch.Tensor:
    return numbers[1].empty(x)


def _backward_add(ctx: Any, dy: torch.Tensor) -> tuple:
    dx = _backward(ctx, dy)[0] if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return dx, None, None
    return dx, arrays.in_format(dy, ctx.numbers[1].channels_last), None


dropout_add = define(
    f"dropout_add(Tensor input, Tensor residual, {_MASK}, bool channels_last) -> Tensor",
    _run_add,
    _fake_add,
    _backward_add,
    _save_seed,
    pack=lambda tensors, numbers: _pack(tensors, (*numbers[:2], -1, "inverted", numbers[2])),
    unpack=lambda numbers: (numbers[0], numbers[1].p, numbers[1].channels_last),
    with_tensors=_with_tensor,
)


# ---- numbers: offset, dropping, activation, dropout_first


def _pack_activated(tensors: tuple, numbers: tuple) -> tuple:
    offset, p, activation, dropout_first, channels_last = numbers
    return *_pack(tensors, (offset, p, -1, "inverted", channels_last)), activation, dropout_first


def _unpack_activated(numbers: tuple) -> tuple:
    offset, dropping, activation, dropout_first = numbers
    return offset, dropping.p, activation, dropout_first, dropping.channels_last


def _run_activation(x: torch.Tensor, seed: _Seed, numbers: tuple) -> torch.Tensor:
    offset, dropping, activation, dropout_first = numbers
    factors = dropping.factors or dropping.find()
    if not factors:
        return dropping.empty(x)
    place, last, mask = arrays.here(x), dropping.channels_last, dropping.mask(seed, offset)
    of_call = activation, mask, *factors, dropout_first, last
    found, _ = place.floor.activation_dropout_forward(place.array(x, last), *of_call)
    return place.tensor(found, last)


def _save_input_and_seed(ctx: Any, inputs: tuple, output: Any) -> None:
    # The gradient of ReLU is computed from x too, which its producer keeps anyway: nothing is kept beside it.
    x, seed, _ = inputs
    ctx.seed = seed
    if isinstance(seed, torch.Tensor):
        ctx.save_for_backward(x, seed)
        ctx.seed = None
    else:
        ctx.save_for_backward(x)


def _backward_activation(ctx: Any, dy: torch.Tensor) -> tuple:
    x, *drawn = ctx.saved_tensors
    row: Any = _gradient if torch.is_grad_enabled() else activation_dropout_backward
    return row(dy, x, drawn[0] if drawn else ctx.seed, ctx.numbers), None


def _gradient(dy: torch.Tensor, x: torch.Tensor, seed: _Seed, numbers: tuple) -> torch.Tensor:
    """:data:`activation_dropout_backward`, of operations that are differentiable."""
    *drawn, activation, dropout_first = numbers
    z = dropout(x, seed, drawn) if dropout_first else x
    return activation_gradient(dropout(dy, seed, drawn), z, activation)


def _run_activation_backward(dy: torch.Tensor, x: torch.Tensor, seed: _Seed, numbers: tuple) -> torch.Tensor:
    offset, dropping, activation, dropout_first = numbers
    factors = dropping.factors or dropping.find()
    if not factors:
        return dropping.empty(x)
    place, last, mask = arrays.here(x), dropping.channels_last, dropping.mask(seed, offset)
    of_call = activation, mask, *factors, dropout_first, last
    return place.tensor(
        place.floor.activation_dropout_backward(place.array(dy, last), place.array(x, last), *of_call), last
    )


def _save_all(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _backward_activation_backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    dy, x, seed = ctx.saved_tensors

    def composite(dy: torch.Tensor, x: torch.Tensor) -> tuple:
        return (_gradient(dy, x, seed, ctx.numbers),)

    needed = ctx.needs_input_grad[:2]
    return *through(composite, (dy, x), needed, (gradient,)), None


_ACTIVATED = f"{_MASK}, str activation, bool dropout_first, bool channels_last"
activation_dropout = define(
    f"activation_dropout(Tensor input, {_ACTIVATED}) -> Tensor",
    _run_activation,
    _fake,
    _backward_activation,
    _save_input_and_seed,
    pack=_pack_activated,
    unpack=_unpack_activated,
    with_tensors=_with_tensor,
)
activation_dropout_backward = define(
    f"activation_dropout_backward(Tensor grad, Tensor input, {_ACTIVATED}) -> Tensor",
    _run_activation_backward,
    _fake_add,
    _backward_activation_backward,
    _save_all,
    pack=_pack_activated,
    unpack=_unpack_activated,
    with_tensors=_with_tensor,
)
