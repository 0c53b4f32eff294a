"""Launching ``activation_dropout.cu``."""

from __future__ import annotations

from typing import Any

from gpu_layers.core.activations import NUMBERS
from gpu_layers.core.array import Array
from gpu_layers.core.mask import DropoutMask
from gpu_layers.kernels.activation import empty_bits, octet_blocks, passing_blocks
from gpu_layers.kernels.arrays import ELEMENT_TYPES, element_type, ready
from gpu_layers.kernels.dropout import LAST_TYPES, STRUCTS, call_numbers, last_parts, rule
from gpu_layers.kernels.elementwise import THREADS, filled
from gpu_layers.runtime.kernel import Arguments, KernelTemplate, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["activation_dropout_backward", "activation_dropout_forward", "relu_dropout_backward"]

_TYPES = combinations(T=ELEMENT_TYPES)
_SOURCE = "activation_dropout.cu"
_FORWARD = KernelTemplate(_SOURCE, "activation_dropout_forward", _TYPES, STRUCTS)
_BACKWARD = KernelTemplate(_SOURCE, "activation_dropout_backward", _TYPES, STRUCTS)
_FORWARD_LAST = KernelTemplate(_SOURCE, "activation_dropout_forward_last", LAST_TYPES, STRUCTS)
_BACKWARD_LAST = KernelTemplate(_SOURCE, "activation_dropout_backward_last", LAST_TYPES, STRUCTS)
_RELU_BACKWARD = KernelTemplate(_SOURCE, "relu_dropout_backward", _TYPES)


def activation_dropout_forward(
    x: Array,
    activation: str,
    mask: DropoutMask,
    scale: float,
    dropout_first: bool,
    channels_last: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array | None]:
    """``gpu_layers.reference.activation_dropout_forward``, as a kernel."""
    arguments = (channels_last, activation, mask.drop_below, scale, dropout_first)
    return _forward((x, mask.rng_state, out), arguments, call_numbers(mask))


def activation_dropout_backward(
    dy: Array,
    x: Array,
    activation: str,
    mask: DropoutMask,
    scale: float,
    dropout_first: bool,
    channels_last: bool = False,
    out: Array | None = None,
) -> Array:
    """``gpu_layers.reference.activation_dropout_backward``, as a kernel."""
    arguments = (channels_last, activation, mask.drop_below, scale, dropout_first)
    return _backward((dy, x, mask.rng_state, out), arguments, call_numbers(mask))


def relu_dropout_backward(dy: Array, gradient_bits: Array, scale: float, out: Array | None = None) -> Array:
    """``gpu_layers.reference.relu_dropout_backward``, as a kernel."""
    return _relu_backward((dy, gradient_bits, out), (scale,))


def _call(
    x: Array, rng_state: Array, numbers: Numbers, activation: str, drop_below: int, scale: float, dropout_first: bool
) -> Arguments:
    seed, offset, start = numbers
    of_rule = rule(drop_below, scale, 0.0, 0.0, element_type(x))
    return NUMBERS[activation], int(dropout_first), of_rule, seed, offset, rng_state, start


@Launcher
def _forward(
    operands: Operands, numbers: Numbers, channels_last: bool, activation: str, *of_dropout: Any
) -> tuple[Array, Array]:
    x, rng_state, out = operands
    x = ready(x)
    call = _call(x, rng_state, numbers, activation, *of_dropout)
    if channels_last:
        return filled(out, x, lambda y: _launch_last(_FORWARD_LAST, (x, y), call)), None
    bits = empty_bits(x) if activation == "relu" else None
    kernel = _FORWARD(T=element_type(x))
    blocks = octet_blocks(x, 2 if x.dtype.itemsize < 8 else 1)
    return filled(out, x, lambda y: launch(kernel, blocks, THREADS, (x, y, bits, x.size, *call))), bits


@Launcher
def _backward(operands: Operands, numbers: Numbers, channels_last: bool, *of_call: Any) -> Array:
    dy, x, rng_state, out = operands
    dy, x = ready(dy), ready(x)
    call = _call(x, rng_state, numbers, *of_call)
    if channels_last:
        return filled(out, dy, lambda dx: _launch_last(_BACKWARD_LAST, (dy, x, dx), call))
    kernel = _BACKWARD(T=element_type(x))
    return filled(out, dy, lambda dx: launch(kernel, octet_blocks(x), THREADS, (dy, x, dx, x.size, *call)))


def _launch_last(template: KernelTemplate, arrays: tuple[Array, ...], call: tuple[Any, ...]) -> None:
    width, parts, blocks = last_parts(arrays[0].shape, arrays[0].dtype)
    kernel = template(T=element_type(arrays[0]), Width=str(width))
    launch(kernel, blocks, THREADS, (*arrays, parts, *call))


@Launcher
def _relu_backward(operands: Operands, numbers: Numbers, scale: float) -> Array:
    dy, gradient_bits, out = operands
    dy, gradient_bits = ready(dy), ready(gradient_bits)
    kernel = _RELU_BACKWARD(T=element_type(dy))
    return filled(
        out, dy, lambda dx: launch(kernel, passing_blocks(dy), THREADS, (dy, gradient_bits, dx, dy.size, scale))
    )
