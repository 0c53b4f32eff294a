"""Launching ``activation.cu``."""

from __future__ import annotations

from typing import Any

from gpu_layers.kernels.arrays import ELEMENT_TYPES, element_type, ready
from gpu_layers.kernels.elementwise import THREADS, filled, vector_blocks
from gpu_layers.runtime.kernel import KernelTemplate, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher

_TYPES = combinations(T=ELEMENT_TYPES)
_RELU_FORWARD = KernelTemplate("activation.cu", "relu_forward", "const T* x, T* y, long long n", _TYPES)
_RELU_BACKWARD = KernelTemplate("activation.cu", "relu_backward", "const T* dy, const T* y, T* dx, long long n", _TYPES)


def relu_forward(x: Any, out: Any | None = None) -> Any:
    """``gpu_layers.reference.relu_forward``, as a kernel."""
    return _forward((x, out))


def relu_backward(dy: Any, y: Any, out: Any | None = None) -> Any:
    """``gpu_layers.reference.relu_backward``, as a kernel."""
    return _backward((dy, y, out))


@Launcher
def _forward(operands: Any, numbers: Any) -> Any:
    x, out = operands
    x = ready(x)
    kernel = _RELU_FORWARD(T=element_type(x))
    return filled(out, x, lambda y: launch(kernel, vector_blocks(x.size, x.dtype), THREADS, (x, y, x.size)))


@Launcher
def _backward(operands: Any, numbers: Any) -> Any:
    dy, y, out = operands
    dy, y = ready(dy), ready(y)
    kernel = _RELU_BACKWARD(T=element_type(dy))
    return filled(out, dy, lambda dx: launch(kernel, vector_blocks(dy.size, dy.dtype), THREADS, (dy, y, dx, dy.size)))
