"""Batch norm as functions."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as reference

from gpu_layers.torch import arrays, random, registry
from gpu_layers.torch.checks import (
    check_residual,
    check_same_device,
    check_savable,
    check_statistics,
    check_tensor,
    checked_activation,
    fail_as_torch,
)
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
    if momentum is None or type(training) is not bool:
        given = input.new_zeros((2, 1)), None, None, None, None, training, momentum
        fail_as_torch("batch_norm does not take these arguments", reference.batch_norm, *given)
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
    if not (isinstance(eps, (float, int)) and (momentum is None or isinstance(momentum, (float, int)))):
        # torch's error, unless torch takes this other type of number.
        given = 0.1 if momentum is None else momentum
        reference.batch_norm(input.new_zeros((2, 1)), None, None, None, None, True, given, eps)
        momentum, eps = None if momentum is None else float(momentum), float(eps)
    name = "identity" if activation is None else checked_activation(activation)
    eager = registry.is_eager(input, weight, bias, residual)
    check_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, eager)
    if residual is not None:
        check_residual(residual, input)
    channels_last = arrays.is_channels_last(input.shape, input.stride())
    if not training:
        rows = batch_norm_rows.batch_norm_inference.first
        return rows(input, running_mean, running_var, weight, bias, residual, (eps, name, channels_last))
    running = None
    if running_mean is not None and not random.is_recomputation():
        assert running_var is not None
        if (running_mean.requires_grad or running_var.requires_grad) and torch.is_grad_enabled():
            check_statistics(running_mean, running_var)
        if eager and (
            input.is_inference()
            or (weight is not None and weight.is_inference())
            or (residual is not None and residual.is_inference())
        ):
            check_savable(input, weight, bias, residual)
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0  # as torch: nobody counts what is averaged over
        running = running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite
    rows = batch_norm_rows.batch_norm_training.first
    if eager:
        rows = rows.eagerly
    return rows(input, weight, bias, residual, (eps, name, channels_last, running))


def check_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    eager: bool,
    given_later: bool = False,
) -> None:
    """Raise as torch does.

    ``eager``: of plain tensors, for which verdicts are kept; ``given_later``: without training the statistics may be
    missing.
    """
    verdict = _kept_verdict if eager else _verdict
    try:
        good, elsewhere = verdict(
            input.shape,
            input.dtype,
            input.device,
            training,
            eps,
            given_later,
            None if running_mean is None else (running_mean.shape, running_mean.dtype, running_mean.device),
            None if running_var is None else (running_var.shape, running_var.dtype, running_var.device),
            None if weight is None else (weight.shape, weight.dtype, weight.device),
            None if bias is None else (bias.shape, bias.dtype, bias.device),
        )
    except AttributeError:  # not a tensor
        good = elsewhere = False
    if not good:
        fail_as_torch(
            "batch_norm does not take these arguments",
            reference.batch_norm,
            input,
            *(one.detach().clone() if isinstance(one, Tensor) else one for one in (running_mean, running_var)),
            weight,
            bias,
            training,
            0.1 if momentum is None else momentum,
            eps,
        )
    if elsewhere:
        check_same_device(input, running_mean, running_var, weight, bias)


def _verdict(
    shape: Any, dtype: torch.dtype, device: torch.device, training: bool, eps: float, given_later: bool, *others: Any
) -> tuple[bool, bool]:
    """Whether torch takes these, and whether something is not where the input is.

    Others are shape, dtype and device of running mean and variance, weight and bias, or None.
    """
    good = len(shape) >= 2 and (others[0] is None) == (others[1] is None)
    if good and training:
        # More than one value per channel.
        good = not eps <= 0.0 and (shape[0] != 1 or (len(shape) > 2 and math.prod(shape[2:]) != 1))
        if good and len(shape) > 2 and shape[0] != 1:
            good = shape[0] * math.prod(shape[2:]) != 1
    elif good:
        good = not eps < 0.0 and (given_later or others[0] is not None)
    elsewhere = False
    if good:
        of_channels, half = shape[1:2], dtype is not torch.float64
        for one in others:
            if one is not None:
                # The input's dtype, or float32 for half types.
                own, kind, place = one
                if own != of_channels:
                    good = False
                elif not (kind is dtype or (half and kind is torch.float32)):
                    good = not training and 0 in shape  # torch looks at nothing then
                elif place != device:
                    elsewhere = True
    return good, elsewhere


_kept_verdict = lru_cache(maxsize=4096)(_verdict)
