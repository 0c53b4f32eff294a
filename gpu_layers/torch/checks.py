"""Checks of what a call passes, before anything is drawn, launched or written.

Valid input passes a few cheap comparisons. Invalid input goes to torch's function, which raises torch's error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.compiler import is_compiling

from gpu_layers.core.checks import check_number
from gpu_layers.ops.checks import check_activation
from gpu_layers.torch import arrays


def check_tensor(x: Any, name: str = "input") -> None:
    """TypeError unless it is a floating-point tensor, RuntimeError where nothing here takes it."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in arrays.FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not (x.is_cpu and x.layout is torch.strided):
        arrays.check_place(x)


def check_probability(p: Any) -> Any:
    """ValueError outside [0, 1] or for NaN, TypeError for anything that is not a number."""
    if type(p) is not float and not is_compiling():
        p = check_number(p, "dropout probability")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return p


def checked_activation(activation: Any) -> str:
    """The name of an activation; "identity" of None."""
    return "identity" if activation is None else check_activation(activation)


def checked_residual(residual: Any, x: torch.Tensor) -> torch.Tensor:
    """A residual of the input's shape (ValueError) and dtype (TypeError), cast to it under autocast."""
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"residual must be a torch.Tensor, got {type(residual).__name__}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the input's shape {list(x.shape)}, got {list(residual.shape)}")
    if residual.dtype is not x.dtype:
        if not (residual.dtype in arrays.FLOAT_DTYPES and torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"residual must have the input's dtype {x.dtype}, got {residual.dtype}")
        residual = residual.to(x.dtype)
    check_same_device(x, residual)
    return residual


def check_same_device(x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """RuntimeError, in torch's words, unless all are where x is."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {x.device} and "
                f"{other.device}!"
            )


def fail_as_torch(message: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    """Raise what torch's function raises for the same arguments; a ValueError if it takes them."""
    with torch.no_grad():
        function(*args, **kwargs)
    raise ValueError(message)
