"""Batch norm as functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as reference

from gpu_layers.torch import arrays, random
from gpu_layers.torch.checks import check_same_device, check_tensor, checked_activation, checked_residual, fail_as_torch
from gpu_layers.torch.ops import batch_norm as batch_norm_rows

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``phi(weight * (x - mean) / sqrt(var + eps) + bias + residual)``, in one kernel each way.

    Parameters
    ----------
    input : Tensor, shape (N, C, *spatial)
    running_mean, running_var : Tensor, shape (C,), or None
        Updated in place in training (not within a backward pass, so that a batch that is recomputed counts once),
        used in evaluation.
    weight, bias : Tensor, shape (C,), or None
        Of the input's dtype; float32 too where that is float16 or bfloat16. The same holds for the statistics.
    training : bool
        Normalise with the statistics of the batch.
    momentum : float
    eps : float
    residual : Tensor, optional
        Of the input's shape and dtype; under autocast it is cast to the input's dtype.
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        phi; None is the identity.

    Raises
    ------
    ValueError
        For one value per channel in training, an eps that is not positive, another shape of the residual, or an unknown
        activation.
    TypeError
        If input is not a floating-point tensor, or for another dtype of the residual.
    RuntimeError
        For parameters or statistics of another size, dtype or device.
    """
    check_tensor(input)
    if input.dim() == 1 and not input.numel():
        return input.clone()  # as torch
    return normalize(
        input, running_mean, running_var, None, weight, bias, training, momentum, eps, residual, activation, False
    )


def normalize(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    skip_nonfinite: bool,
) -> Tensor:
    """:func:`batch_norm` of a tensor, with a layer's counter of batches, which a momentum of None averages by."""
    name = "identity" if activation is None else checked_activation(activation)
    check_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        residual = checked_residual(residual, input)
    channels_last = arrays.is_channels_last(input)
    if not training:
        rows = batch_norm_rows.batch_norm_inference.first
        return rows(input, running_mean, running_var, weight, bias, residual, eps, name, channels_last)
    running = None
    if running_mean is not None and not random.is_recomputation():
        running = running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite
    rows = batch_norm_rows.batch_norm_training.first
    return rows(input, weight, bias, residual, eps, name, channels_last, running)


def check_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    given_later: bool = False,
) -> None:
    """Raise as torch does; ``given_later``: without training the statistics may be missing."""
    shape, dtype, device = input.shape, input.dtype, input.device
    good = len(shape) >= 2 and (running_mean is None) == (running_var is None)
    if good and training:
        # More than one value per channel.
        good = eps > 0.0 and (shape[0] != 1 or (len(shape) > 2 and math.prod(shape[2:]) != 1))
        if good and len(shape) > 2 and shape[0] != 1:
            good = shape[0] * math.prod(shape[2:]) != 1
    elif good:
        good = eps >= 0.0 and (given_later or running_mean is not None)
    elsewhere = False
    if good:
        of_channels, half = shape[1:2], dtype is not torch.float64
        for one in (running_mean, running_var, weight, bias):
            if one is not None:
                # The input's dtype, or float32 for half types.
                kind = one.dtype
                if one.shape != of_channels or not (kind is dtype or (half and kind is torch.float32)):
                    good = False
                elif one.device != device:
                    elsewhere = True
    if not good:
        fail_as_torch(
            "batch_norm does not take these arguments",
            reference.batch_norm,
            input,
            *(None if one is None else one.detach().clone() for one in (running_mean, running_var)),
            weight,
            bias,
            training,
            0.1 if momentum is None else momentum,
            eps,
        )
    if elsewhere:
        check_same_device(input, running_mean, running_var, weight, bias)
