"""Batch norm folded into the layer before it, for inference."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNormLayer
from gpu_layers.layers.convolution import Conv2d
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sync_batch_norm import SyncBatchNorm
from gpu_layers.runtime.backend import backend_for


def fold_batch_norm(layer: Conv2d | Linear, batch_norm: BatchNormLayer) -> Any:
    """A single layer that computes ``batch_norm(layer(x))`` of evaluation.

    With ``s = gamma / sqrt(running_var + eps)`` its weight is ``s * weight`` and its bias
    ``(bias - running_mean) * s + beta``: what is left of an affine map after an affine map (Jacob et al., CVPR 2018,
    section 3.2). Computed in float64 and rounded once. The result differs from that of both layers by a few roundings
    of the sum that the layer takes.

    Parameters
    ----------
    layer : Conv2d or Linear
    batch_norm : BatchNorm2d for a Conv2d, BatchNorm1d for a Linear, or SyncBatchNorm
        With running statistics, and without an activation, which no weight can take in.

    Returns
    -------
    Conv2d or Linear
        A new one with a bias; both that are passed stay as they are.

    Raises
    ------
    TypeError
        For other layers, or if both have different dtypes or are in different places.
    ValueError
        For another number of channels, channels on the last axis of a convolution's output, no running statistics, or
        an activation.
    """
    _check(layer, batch_norm)
    weight, bias = layer.parameters["weight"], layer.parameters.get("bias")
    mean, var = batch_norm.buffers["running_mean"], batch_norm.buffers["running_var"]
    gamma, beta = batch_norm.parameters.get("weight"), batch_norm.parameters.get("bias")
    backend_for(weight, mean, optional=(bias, gamma, beta))
    scale = 1 / np.sqrt(var.astype(np.float64) + batch_norm.eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale if bias is None else (bias.astype(np.float64) - mean) * scale
    if beta is not None:
        shift = shift + beta
    # A shallow copy: everything but the dicts is a number.
    folded = copy.copy(layer)
    folded.parameters = {
        "weight": (weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))).astype(layer.dtype),
        "bias": shift.astype(layer.dtype),
    }
    folded.gradients, folded.buffers, folded._saved = {}, {}, None
    return folded


def _check(layer: Any, batch_norm: Any) -> None:
    if not isinstance(layer, (Conv2d, Linear)):
        raise TypeError(f"expected a Conv2d or a Linear, got {type(layer).__name__}")
    expected = BatchNorm2d if isinstance(layer, Conv2d) else BatchNorm1d
    if not isinstance(batch_norm, (expected, SyncBatchNorm)):
        raise TypeError(
            f"expected a {expected.__name__} after a {type(layer).__name__}, got {type(batch_norm).__name__}"
        )
    if layer.dtype != batch_norm.dtype:
        raise TypeError(f"the {type(layer).__name__} has dtype {layer.dtype}, the batch norm {batch_norm.dtype}")
    channels = layer.parameters["weight"].shape[0]
    if batch_norm.num_features != channels:
        raise ValueError(f"the batch norm takes {batch_norm.num_features} channels, the layer gives {channels}")
    if batch_norm.channels_last and isinstance(layer, Conv2d):
        raise ValueError("the batch norm has its channels on the last axis, the convolution gives (N, C, H, W)")
    if not batch_norm.track_running_stats:
        raise ValueError("the batch norm keeps no running statistics: there is nothing to fold")
    if batch_norm.activation not in (None, "identity"):
        raise ValueError(f"the batch norm applies {batch_norm.activation}, which cannot be folded into weights")
