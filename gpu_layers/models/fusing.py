"""Fusing neighbouring layers into one kernel."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.layers.activation import ReLU
from gpu_layers.layers.activation_dropout import ActivationDropout
from gpu_layers.layers.base import Layer
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormLayer
from gpu_layers.layers.batch_norm_max_pool import BatchNormMaxPool
from gpu_layers.layers.dropout import Dropout
from gpu_layers.layers.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from gpu_layers.layers.max_pool import MaxPool1d, MaxPool2d, MaxPool3d, MaxPoolLayer
from gpu_layers.layers.sequential import Sequential
from gpu_layers.layers.sync_batch_norm import SyncBatchNorm
from gpu_layers.models.plain_layers import added_attributes, is_plain, replaced_methods

# Batch norms whose kernels take in a max pooling: not those that take other statistics.
_POOLABLE = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_NORMS = (*_POOLABLE, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, SyncBatchNorm)
_POOLS = (MaxPool1d, MaxPool2d, MaxPool3d)
# What a fused layer takes over, and what makes no difference: ReLU has no mode, and working in place no other result.
_OF_RELU = ("inplace", "training")
_OF_DROPOUT = ("p", "generator", "first_sample", "scaling", "training", "inplace", "_taken", "_taken_again")
_OF_POOL = (
    *("kernel_size", "stride", "padding", "dilation", "ceil_mode", "channels_last", "return_indices"),
    *("_kernel", "training"),
)


class Absorbed(Layer):
    """The identity, in the place of a layer whose work the layer before it does.

    So the layers after it keep their positions, and parameters and buffers keep their names.
    """

    def forward(self, x: Array) -> Array:
        """``x`` itself."""
        return x

    def backward(self, dy: Array) -> Array:
        """``dy`` itself."""
        return dy


def fuse(sequential: Sequential) -> Sequential:
    """The same function with fewer kernels: neighbouring layers become one layer that does the work of both.

    =========================  ========================================================
    batch norm, ReLU, max      batch norm with ``activation="relu"`` and the pooling, in a
    pooling                    kernel that writes no normalised value; also without ReLU
    batch norm, ReLU           batch norm with ``activation="relu"``
    batch norm, dropout, ReLU  batch norm with ``activation="relu"``, dropout
    ReLU, dropout              ``ActivationDropout("relu", p, order="after")``
    dropout, ReLU              ``ActivationDropout("relu", p, order="before")``
    =========================  ========================================================

    So batch norm, ReLU, dropout becomes batch norm with ReLU, then dropout. That has as many kernels in training as
    ``ActivationDropout`` after a plain batch norm, one fewer in evaluation, and saves nothing but x. A Sequential
    within the Sequential is fused too; a row that crosses its border is not.

    Outputs have the same bits in both modes. So have the masks: the generators are the same objects. Gradients have the
    same bits in float32 and float64. In half precision they differ at elements whose normalised value is positive but
    rounds to 0: the fused ReLU passes their gradient, a separate one does not. Parameters and buffers are shared with
    the original, under the same names; gradients are not. Layers that worked in place may no longer do so. Layers that
    are not part of a pattern are the same objects, so use one of the two networks at a time.

    Only unchanged layers of exactly these types are fused. Subclasses, layers with a replaced method, layers with an
    attribute that the fused layer would not have, and a batch norm in several places stay as they are. The fused layer
    takes over everything else: modes, switches, ``first_sample``, counts.

    Parameters
    ----------
    sequential : Sequential

    Returns
    -------
    Sequential
        A new one, in the mode of the original. A placeholder replaces each layer that was merged into the one before.

    Raises
    ------
    TypeError
        If it is not a plain Sequential: also for subclasses, and if a method was replaced.
    RuntimeError
        If a batch norm to be fused has pending statistics, which would count twice.
    """
    if not is_plain(sequential, (Sequential,)):
        replaced = replaced_methods(sequential) if type(sequential) is Sequential else []
        what = f" whose {', '.join(replaced)} was replaced" if replaced else ""
        raise TypeError(f"expected a Sequential, got {type(sequential).__name__}{what}")
    places = Counter(id(layer) for layer in _layers_of(sequential))
    return _fused(sequential, {number for number, count in places.items() if count > 1})


def _layers_of(sequential: Sequential) -> Iterator[Layer]:
    """All layers, including those of Sequentials within."""
    for layer in sequential.layers:
        yield layer
        if is_plain(layer, (Sequential,)):
            yield from _layers_of(layer)  # type: ignore[arg-type]


def _fused(sequential: Sequential, repeated: set[int]) -> Sequential:
    layers: list[Layer] = [
        _fused(layer, repeated) if is_plain(layer, (Sequential,)) else layer  # type: ignore[arg-type]
        for layer in sequential.layers
    ]
    position = 0
    while position < len(layers):
        position += _fuse_at(layers, position, repeated)
    fused = Sequential(dict(zip(sequential._layers, layers, strict=True)))
    fused.training = sequential.training
    for name in added_attributes(sequential, fused, ("_layers",)):
        setattr(fused, name, vars(sequential)[name])
    return fused


def _fuse_at(layers: list[Layer], position: int, repeated: set[int]) -> int:
    """Fuse the layers from this position on, if a pattern fits; returns how many it took."""
    for pattern, replacement in _PATTERNS:
        row = layers[position : position + len(pattern)]
        fitting = len(row) == len(pattern) and all(fits(layer) for fits, layer in zip(pattern, row, strict=True))
        if fitting and _fit_together(row) and not _shares_a_norm(row, repeated):
            for layer in row:
                if isinstance(layer, BatchNormLayer) and layer.pending is not None:
                    raise RuntimeError(f"{layer!r} has statistics pending: commit() or rollback() them first")
            layers[position : position + len(row)] = replacement(*row)
            return len(row)
    return 1


def _shares_a_norm(row: list[Layer], repeated: set[int]) -> bool:
    """Whether the row has a batch norm that is also elsewhere: the two would no longer be one layer."""
    return any(isinstance(layer, BatchNormLayer) and id(layer) in repeated for layer in row)


def _is_plain_batch_norm(layer: Any) -> bool:
    return is_plain(layer, _NORMS) and layer.activation is None


def _is_relu(layer: Layer) -> bool:
    return is_plain(layer, (ReLU,)) and not added_attributes(layer, ReLU(), _OF_RELU)


def _is_dropout(layer: Any) -> bool:
    return is_plain(layer, (Dropout,)) and layer.scaling == "inverted"


def _is_fusable_dropout(layer: Layer) -> bool:
    return _is_dropout(layer) and not added_attributes(layer, Dropout(), _OF_DROPOUT)


def _with_relu(norm: BatchNormLayer) -> BatchNormLayer:
    # A shallow copy: a new layer with the original's dicts of parameters and buffers.
    fused = copy.copy(norm)
    fused.activation = "relu"
    fused.gradients, fused._saved = {}, None
    return fused


def _relu_dropout(dropout: Dropout, order: str) -> Layer:
    fused = ActivationDropout("relu", dropout.p, order=order, generator=dropout.generator)
    fused.first_sample, fused.training = dropout.first_sample, dropout.training
    return fused


def _is_poolable_batch_norm(layer: Layer) -> bool:
    # Also with an activation of its own: max pooling comes after it.
    return is_plain(layer, _POOLABLE)


def _is_max_pool(layer: Any) -> bool:
    plain = is_plain(layer, _POOLS) and not layer.return_indices
    return plain and not added_attributes(layer, type(layer)(1), _OF_POOL)


def _absorbed(*layers: Layer) -> list[Layer]:
    """Placeholders for layers whose work is done elsewhere."""
    absorbed: list[Layer] = []
    for layer in layers:
        absorbed.append(Absorbed())
        absorbed[-1].training = layer.training
    return absorbed


def _fit_together(row: list[Layer]) -> bool:
    """Whether batch norm and max pooling have the same layout, if the row has both."""
    layouts = {layer.channels_last for layer in row if isinstance(layer, (BatchNormLayer, MaxPoolLayer))}
    return len(layouts) < 2


_Fits = Callable[[Layer], bool]

#: Rows of layers, and their replacements. The first pattern that fits wins, so longer ones come first.
_PATTERNS: tuple[tuple[tuple[_Fits, ...], Callable[..., list[Layer]]], ...] = (
    # ReLU and dropout commute: both keep +0, and scaling keeps the sign.
    (
        (_is_plain_batch_norm, _is_dropout, _is_relu),
        lambda norm, dropout, relu: [_with_relu(norm), dropout, *_absorbed(relu)],
    ),
    (
        (lambda layer: _is_poolable_batch_norm(layer) and _is_plain_batch_norm(layer), _is_relu, _is_max_pool),
        lambda norm, relu, pool: [BatchNormMaxPool(_with_relu(norm), pool), *_absorbed(relu, pool)],
    ),
    ((_is_poolable_batch_norm, _is_max_pool), lambda norm, pool: [BatchNormMaxPool(norm, pool), *_absorbed(pool)]),
    ((_is_plain_batch_norm, _is_relu), lambda norm, relu: [_with_relu(norm), *_absorbed(relu)]),
    ((_is_relu, _is_fusable_dropout), lambda relu, dropout: [_relu_dropout(dropout, "after"), *_absorbed(dropout)]),
    ((_is_fusable_dropout, _is_relu), lambda dropout, relu: [_relu_dropout(dropout, "before"), *_absorbed(relu)]),
)
