"""Activations as stateless pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_layers.ops.checks import check_dtype, check_gradient
from gpu_layers.ops.elementwise_output import into
from gpu_layers.runtime.backend import backend_for


@dataclass(frozen=True)
class ReluSaved:
    """What backward needs: the output, whose sign tells where the input was positive."""

    y: Any


def relu_forward(x: Any, *, out: Any = None) -> tuple[Any, ReluSaved]:
    """``max(x, 0)``; NaN stays NaN.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64.
    out : array, optional
        Where to write the result; may be x.

    Returns
    -------
    y : array
    saved : ReluSaved
    """
    backend = backend_for(x, optional=(out,))
    check_dtype(x)
    y = into(out, x, lambda target: backend.relu_forward(x, out=target))
    return y, ReluSaved(y)


def relu_backward(dy: Any, saved: ReluSaved) -> Any:
    """``dy`` where the output was positive (or NaN), 0 elsewhere, as PyTorch has it."""
    backend = backend_for(dy, saved.y)
    check_gradient(dy, saved.y.shape, saved.y.dtype)
    return backend.relu_backward(dy, saved.y)
