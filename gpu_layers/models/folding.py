"""Folding batch norm into the layer before it, for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_integer
from gpu_layers.core.cuda import place_of
from gpu_layers.layers.base import Layer
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNormLayer
from gpu_layers.layers.convolution import Conv2d
from gpu_layers.layers.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sync_batch_norm import SyncBatchNorm
from gpu_layers.models.plain_layers import added_attributes, replaced_methods
from gpu_layers.ops.checks import check_dtype, check_eps
from gpu_layers.runtime.backend import backend_for

_Weighted = TypeVar("_Weighted", Conv2d, Linear)

# Batch norms that evaluate alike, by the layer before them.
_FOLDABLE: dict[type[Layer], tuple[type[BatchNormLayer], ...]] = {
    Conv2d: (BatchNorm2d, GhostBatchNorm2d, SyncBatchNorm),
    Linear: (BatchNorm1d, GhostBatchNorm1d, SyncBatchNorm),
}
# Attributes of a batch norm that are used here, or do not affect evaluation.
_KNOWN = (
    *("num_features", "dtype", "eps", "affine", "channels_last", "activation", "parameters", "buffers", "training"),
    *("momentum", "track_running_stats", "_use_batch_statistics", "_update_statistics", "train_affine"),
    *("deferred", "skip_nonfinite", "_pending", "_skipped", "group_size", "communicator", "_before_conversion"),
)


def fold_batch_norm(layer: _Weighted, batch_norm: BatchNormLayer) -> _Weighted:
    """A single layer that computes ``batch_norm(layer(x))`` in evaluation.

    With ``s = gamma / sqrt(running_var + eps)`` its weight is ``s * weight`` and its bias is
    ``(bias - running_mean) * s + beta`` (Jacob et al., CVPR 2018, section 3.2). Both are computed in float64 and
    rounded once. The result differs from that of both layers by a few roundings of the layer's sum.

    Parameters
    ----------
    layer : Conv2d or Linear
    batch_norm : BatchNorm2d for a Conv2d, BatchNorm1d for a Linear; a ghost one, or SyncBatchNorm
        It must evaluate by its running statistics, and have no activation.

    Returns
    -------
    Conv2d or Linear
        A new layer with a bias; the given layers do not change.

    Raises
    ------
    TypeError
        For other layers, subclasses, layers with a replaced method, or a batch norm with an attribute that would be
        lost; or if both have different dtypes or are on different devices.
    ValueError
        For another number of channels, channels on the last axis of a convolution's output, no running statistics,
        evaluation by the batch (``use_batch_statistics``) or with updates (``update_statistics``), or an activation.
    RuntimeError
        If statistics are pending: the running ones do not include them yet.
    """
    _check(layer, batch_norm)
    weight, bias = layer.parameters["weight"], layer.parameters.get("bias")
    mean, var = batch_norm.buffers["running_mean"], batch_norm.buffers["running_var"]
    gamma, beta = batch_norm.parameters.get("weight"), batch_norm.parameters.get("bias")
    backend_for(weight, mean, optional=(bias, gamma, beta))
    folded_weight, folded_bias = _folded(weight, bias, mean, var, gamma, beta, batch_norm.eps, _rows)
    # A shallow copy: all attributes except the dicts are numbers.
    folded = copy.copy(layer)
    folded.parameters = {"weight": folded_weight, "bias": folded_bias}
    folded.gradients, folded.buffers, folded._saved = {}, {}, None
    return folded


def fold_batch_norm_arrays(
    weight: Array,
    bias: Array,
    running_mean: Array,
    running_var: Array,
    gamma: Array = None,
    beta: Array = None,
    *,
    eps: float = 1e-5,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Array, Array]:
    """:func:`fold_batch_norm` for a convolution or linear layer of any library: its weight and bias, as arrays.

    Parameters
    ----------
    weight : array, shape (out_channels, in_channels / groups, *kernel), or (out_features, in_features)
        PyTorch's layout; (in_channels, out_channels / groups, *kernel) of a transposed convolution. A floating dtype.
    bias : array, shape (out_channels,), or None
    running_mean, running_var : array, shape (out_channels,)
    gamma, beta : array, shape (out_channels,), or None
        Weight and bias of the batch norm.
    eps : float
    transposed : bool
        Whether the weight is that of a transposed convolution.
    groups : int
        Groups of the convolution; they only matter for a transposed one.

    Returns
    -------
    weight, bias : array
        New ones, of weight's dtype: computed in float64 and rounded once.

    Raises
    ------
    TypeError
        For a value that is not an array, arrays of several kinds, or a dtype that is not floating.
    ValueError
        For shapes that do not fit, or an eps that is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> import gpu_layers as gl
    >>> depthwise = np.ones((4, 1, 3, 3), np.float32)
    >>> weight, bias = gl.fold_batch_norm_arrays(depthwise, None, np.zeros(4), np.full(4, 0.25), eps=1e-12)
    >>> float(weight[0, 0, 0, 0])
    2.0
    """
    backend_for(weight, running_mean, running_var, optional=(bias, gamma, beta))
    check_dtype(weight, "weight")
    eps = check_eps(eps, np.float64)
    groups = check_integer(groups, "groups", 1, 2**63 - 1)
    if weight.ndim < 2 or weight.shape[0] % groups:
        raise ValueError(f"weight does not fit a layer with {groups} groups, got shape {list(weight.shape)}")
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    given = {"bias": bias, "running_mean": running_mean, "running_var": running_var, "gamma": gamma, "beta": beta}
    for name, one in given.items():
        if one is not None:
            check_dtype(one, name)
            if one.shape != (channels,):
                raise ValueError(f"{name} must have the shape {[channels]}, got {list(one.shape)}")
    along = _transposed_rows(groups) if transposed else _rows
    return _folded(weight, bias, running_mean, running_var, gamma, beta, eps, along)


def _folded(
    weight: Array,
    bias: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    along: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
    """Weight and bias of both layers; ``along(scale, weight)`` is the scale as it is multiplied with the weight."""
    with place_of(weight), np.errstate(over="ignore"):
        scale = 1 / np.sqrt(var.astype(np.float64) + eps)
        if gamma is not None:
            scale = scale * gamma.astype(np.float64)
        shift = ((0.0 if bias is None else bias.astype(np.float64)) - mean.astype(np.float64)) * scale
        if beta is not None:
            shift = shift + beta.astype(np.float64)
        return (weight.astype(np.float64) * along(scale, weight)).astype(weight.dtype), shift.astype(weight.dtype)


def _rows(scale: Array, weight: Array) -> Array:
    """Output channels are the first axis."""
    return scale.reshape(-1, *(1,) * (weight.ndim - 1))


def _transposed_rows(groups: int) -> Callable[[Array, Array], Array]:
    """Output channels are the second axis, those of a group for its input channels on the first."""

    def along(scale: Array, weight: Array) -> Array:
        by_input = scale.reshape(groups, weight.shape[1]).repeat(weight.shape[0] // groups, axis=0)
        return by_input.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))

    return along


def _check(layer: Any, batch_norm: Any) -> None:
    kind, given = type(layer).__name__, type(batch_norm).__name__
    if type(layer) not in _FOLDABLE:
        raise TypeError(f"expected a Conv2d or a Linear, got {kind}{_subclassed(layer, tuple(_FOLDABLE))}")
    foldable = _FOLDABLE[type(layer)]
    if type(batch_norm) not in foldable:
        raise TypeError(
            f"expected a {foldable[0].__name__} after a {kind}, got {given}{_subclassed(batch_norm, foldable)}"
        )
    for one in (layer, batch_norm):
        if replaced_methods(one):
            replaced = ", ".join(replaced_methods(one))
            raise TypeError(f"expected a plain {type(one).__name__}, got one whose {replaced} was replaced")
    fresh = type(batch_norm)(1, 1) if "group_size" in vars(batch_norm) else type(batch_norm)(1)
    added = added_attributes(batch_norm, fresh, _KNOWN)
    if added:
        raise TypeError(f"the {given} has {', '.join(added)}, which a folded layer would not have")
    if layer.dtype != batch_norm.dtype:
        raise TypeError(f"the {kind} has dtype {layer.dtype}, the batch norm {batch_norm.dtype}")
    channels = layer.parameters["weight"].shape[0]
    if batch_norm.num_features != channels:
        raise ValueError(f"the batch norm takes {batch_norm.num_features} channels, the layer gives {channels}")
    if batch_norm.channels_last and kind == "Conv2d":
        raise ValueError("the batch norm has its channels on the last axis, the convolution gives (N, C, H, W)")
    if not batch_norm.track_running_stats:
        raise ValueError("the batch norm keeps no running statistics: there is nothing to fold")
    batch_norm._check_buffers()
    if batch_norm.use_batch_statistics:
        raise ValueError("the batch norm has use_batch_statistics=True: it evaluates by the batch, which is not folded")
    if batch_norm.update_statistics:
        raise ValueError("the batch norm has update_statistics=True: what it evaluates by changes with every batch")
    if batch_norm.pending is not None:
        raise RuntimeError("the batch norm has statistics pending: commit() or rollback() them first")
    if batch_norm.activation not in (None, "identity"):
        raise ValueError(f"the batch norm applies {batch_norm.activation}, which cannot be folded into weights")


def _subclassed(layer: object, types: tuple[type, ...]) -> str:
    return ", a subclass, whose forward may be another" if isinstance(layer, types) else ""
