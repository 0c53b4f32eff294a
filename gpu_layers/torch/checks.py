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


def check_savable(*tensors: torch.Tensor | None) -> None:
    """RuntimeError, in torch's words, if autograd would save tensors and one is of inference mode."""
    given = [one for one in tensors if one is not None]
    needed = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    if needed and any(one.is_inference() for one in given):
        raise RuntimeError(
            "Inference tensors cannot be saved for backward. Please do not use Tensors created in inference mode in "
            "computation tracked by autograd. To work around this, you can make a clone to get a normal tensor and "
            "use it in autograd, or use `torch.no_grad()` instead of `torch.inference_mode()`."
        )


def check_statistics(running_mean: torch.Tensor, running_var: torch.Tensor) -> None:
    """RuntimeError, in torch's words, if running statistics require a gradient; autograd records the call."""
    for name, one in (("running_mean", running_mean), ("running_var", running_var)):
        if one.requires_grad:
            raise RuntimeError(
                f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. This "
                "input cannot have requires_grad True."
            )


def check_probability(p: Any) -> Any:
    """ValueError outside [0, 1] or for NaN, TypeError for anything that is not a number."""
    given = p
    if type(p) is not float and not is_compiling():
        # Of tensors and truth values as torch.
        if isinstance(p, torch.Tensor):
            torch.nn.functional.dropout(torch.empty(0), p)
        p = float(p) if isinstance(p, (bool, torch.Tensor)) else check_number(p, "dropout probability")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {given}")
    return p


def checked_activation(activation: Any) -> str:
    """The name of an activation; "identity" of None."""
    return "identity" if activation is None else check_activation(activation)


def check_residual(residual: Any, x: torch.Tensor) -> None:
    """ValueError unless it has the input's shape, TypeError unless it has its dtype, or is cast to it by autocast."""
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"residual must be a torch.Tensor, got {type(residual).__name__}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the input's shape {list(x.shape)}, got {list(residual.shape)}")
    if residual.dtype is not x.dtype and not (
        residual.dtype in arrays.FLOAT_DTYPES and torch.is_autocast_enabled(x.device.type)
    ):
        raise TypeError(f"residual must have the input's dtype {x.dtype}, got {residual.dtype}")
    check_same_device(x, residual)


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
