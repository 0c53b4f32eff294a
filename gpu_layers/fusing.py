"""Layers in a row that one kernel can do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from gpu_layers.layers.activation import ReLU
from gpu_layers.layers.activation_dropout import ActivationDropout
from gpu_layers.layers.base import Layer
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormLayer
from gpu_layers.layers.batch_norm_max_pool import BatchNormMaxPool
from gpu_layers.layers.dropout import Dropout
from gpu_layers.layers.max_pool import MaxPoolLayer
from gpu_layers.layers.sequential import Sequential


class Absorbed(Layer):
    """Stands where a layer was that the layer before it does too: the identity.

    The layers behind it keep their positions, and so parameters and buffers their names.
    """

    def forward(self, x: Any) -> Any:
        """x itself."""
        return x

    def backward(self, dy: Any) -> Any:
        """dy itself."""
        return dy


def fuse(sequential: Sequential) -> Sequential:
    """The same function with fewer kernels: neighbours replaced by a layer that does the work of both.

    =========================  ========================================================
    batch norm, ReLU, max      batch norm with ``activation="relu"`` and the pooling, in a
    pooling                    kernel that writes no normalised value; so without ReLU
    batch norm, ReLU           batch norm with ``activation="relu"``
    batch norm, dropout, ReLU  batch norm with ``activation="relu"``, dropout
    ReLU, dropout              ``ActivationDropout("relu", p, order="after")``
    dropout, ReLU              ``ActivationDropout("relu", p, order="before")``
    =========================  ========================================================

    So batch norm, ReLU, dropout becomes batch norm with ReLU, and dropout: as many kernels in training as with
    ``ActivationDropout`` behind a plain batch norm, one fewer in evaluation, and nothing kept but x. A Sequential
    within the Sequential is fused too; a row that crosses its border is not.

    Outputs are the same bits, in both modes, and so are the masks: the generators are the same objects. Gradients are
    the same bits in float32 and float64. In half precision they differ at elements whose normalised value is positive
    but rounds to 0: the fused ReLU passes their gradient, a separate one does not see them. Parameters and buffers are
    shared with the original, under the same names; gradients are not. What worked in place may no longer do so. Layers
    that have no part in a pattern are the same objects, so use one of the two at a time.

    Parameters
    ----------
    sequential : Sequential

    Returns
    -------
    Sequential
        A new one, in the mode of the original. Where a layer was merged into the one before it stands a placeholder.

    Raises
    ------
    TypeError
        If it is no Sequential.
    """
    if not isinstance(sequential, Sequential):
        raise TypeError(f"expected a Sequential, got {type(sequential).__name__}")
    layers = [fuse(layer) if type(layer) is Sequential else layer for layer in sequential.layers]
    position = 0
    while position < len(layers):
        position += _fuse_at(layers, position)
    fused = Sequential(dict(zip(sequential._layers, layers, strict=True)))
    fused.training = sequential.training
    return fused


def _fuse_at(layers: list[Layer], position: int) -> int:
    """Fuse the layers from this position on, if a pattern fits; returns how many are done with."""
    for pattern, replacement in _PATTERNS:
        row = layers[position : position + len(pattern)]
        fitting = len(row) == len(pattern) and all(fits(layer) for fits, layer in zip(pattern, row, strict=True))
        if fitting and _fit_together(row):
            for place, (old, new) in enumerate(zip(row, replacement(*row), strict=True), position):
                new.training = old.training
                layers[place] = new
            return len(row)
    return 1


def _is_plain_batch_norm(layer: Layer) -> bool:
    return isinstance(layer, BatchNormLayer) and layer.activation is None


def _is_relu(layer: Layer) -> bool:
    return type(layer) is ReLU


def _is_dropout(layer: Layer) -> bool:
    return type(layer) is Dropout and layer.scaling == "inverted"


def _with_relu(norm: Any) -> Any:
    # A shallow copy: a layer of its own, whose dicts of parameters and buffers are the original's.
    fused = copy.copy(norm)
    fused.activation = "relu"
    fused.gradients, fused._saved = {}, None
    return fused


def _relu_dropout(dropout: Any, order: str) -> Layer:
    return ActivationDropout("relu", dropout.p, order=order, generator=dropout.generator)


def _is_poolable_batch_norm(layer: Layer) -> bool:
    # With an activation of its own too: max pooling comes after it. Not those that take other statistics.
    return type(layer) in (BatchNorm1d, BatchNorm2d, BatchNorm3d)


def _is_max_pool(layer: Layer) -> bool:
    return isinstance(layer, MaxPoolLayer) and not layer.return_indices


def _fit_together(row: list[Any]) -> bool:
    """Whether the layouts of a batch norm and a max pooling, if the row has both, are the same."""
    layouts = {layer.channels_last for layer in row if isinstance(layer, (BatchNormLayer, MaxPoolLayer))}
    return len(layouts) < 2


_Fits = Callable[[Layer], bool]

#: Rows of layers, and what stands in their places instead. The first that fits wins: the longer ones come first.
_PATTERNS: tuple[tuple[tuple[_Fits, ...], Callable[..., list[Layer]]], ...] = (
    # ReLU and dropout may be exchanged: both leave +0 where either makes it, and scaling keeps the sign.
    (
        (_is_plain_batch_norm, _is_dropout, _is_relu),
        lambda norm, dropout, relu: [_with_relu(norm), dropout, Absorbed()],
    ),
    (
        (lambda layer: _is_poolable_batch_norm(layer) and _is_plain_batch_norm(layer), _is_relu, _is_max_pool),
        lambda norm, relu, pool: [BatchNormMaxPool(_with_relu(norm), pool), Absorbed(), Absorbed()],
    ),
    (
        (_is_poolable_batch_norm, _is_max_pool),
        lambda norm, pool: [BatchNormMaxPool(norm, pool), Absorbed()],
    ),
    ((_is_plain_batch_norm, _is_relu), lambda norm, relu: [_with_relu(norm), Absorbed()]),
    ((_is_relu, _is_dropout), lambda relu, dropout: [_relu_dropout(dropout, "after"), Absorbed()]),
    ((_is_dropout, _is_relu), lambda dropout, relu: [_relu_dropout(dropout, "before"), Absorbed()]),
)
