"""Launching ``activation.cu``."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.kernels.arrays import ELEMENT_TYPES, element_type, empty, ready
from gpu_layers.kernels.elementwise import THREADS, filled, tile_blocks, vector_blocks
from gpu_layers.runtime.kernel import KernelTemplate, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["relu_backward", "relu_forward"]

_OCTET = 8
_TYPES = combinations(T=ELEMENT_TYPES)
_RELU_FORWARD = KernelTemplate("activation.cu", "relu_forward", _TYPES)
_RELU_BACKWARD = KernelTemplate("activation.cu", "relu_backward", _TYPES)


def octet_blocks(x: Array, unroll: int = 1) -> int:
    """Blocks of a kernel whose threads own octets of x, so many at a time, twice as many of elements of 16 bits."""
    return tile_blocks(x.size, THREADS * _OCTET * unroll * (2 if x.dtype.itemsize == 2 else 1))


def passing_blocks(x: Array) -> int:
    """Blocks of a kernel over x whose threads own vectors, and share the bytes of their octets."""
    # ``kPassingUnroll`` of ``gradient_bits.cuh``.
    return vector_blocks(x.size, x.dtype, 2 if x.dtype.itemsize == 2 else 4)


def empty_bits(x: Array) -> Array:
    """Room for one bit per element of x."""
    return empty((-(-x.size // _OCTET),), np.uint8, x)


def relu_forward(x: Array, out: Array | None = None) -> tuple[Array, Array]:
    """``gpu_layers.reference.relu_forward``, as a kernel."""
    return _forward((x, out))


def relu_backward(dy: Array, gradient_bits: Array, out: Array | None = None) -> Array:
    """``gpu_layers.reference.relu_backward``, as a kernel."""
    return _backward((dy, gradient_bits, out))


@Launcher
def _forward(operands: Operands, numbers: Numbers) -> tuple[Array, Array]:
    x, out = operands
    x = ready(x)
    kernel, bits = _RELU_FORWARD(T=element_type(x)), empty_bits(x)
    return filled(out, x, lambda y: launch(kernel, passing_blocks(x), THREADS, (x, y, bits, x.size))), bits


@Launcher
def _backward(operands: Operands, numbers: Numbers) -> Array:
    dy, gradient_bits, out = operands
    dy, bits = ready(dy), ready(gradient_bits)
    kernel = _RELU_BACKWARD(T=element_type(dy))
    return filled(out, dy, lambda dx: launch(kernel, passing_blocks(dy), THREADS, (dy, bits, dx, dy.size)))
