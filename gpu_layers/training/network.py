"""The network that ``gpu-layers train`` trains."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.distributed import Communicator
from gpu_layers.layers import BatchNorm1d, BatchNorm2d, Dropout, Layer, MaxPool2d, ReLU, SyncBatchNorm
from gpu_layers.layers.batch_norm import BatchNormLayer
from gpu_layers.layers.convolution import Conv2d
from gpu_layers.layers.linear import Flatten, Linear
from gpu_layers.layers.sequential import Sequential
from gpu_layers.random import Generator

PLACEMENTS = ("after", "before")
_WIDTHS = (16, 32)
_HIDDEN = 64


def image_classifier(
    image_shape: tuple[int, int, int],
    classes: int,
    *,
    p: float,
    placement: str,
    seed: int,
    dtype: np.dtype,
    communicator: Communicator | None = None,
) -> Sequential:
    """Conv-BN-ReLU-Dropout-MaxPool twice, then Linear-BN-ReLU-Dropout-Linear.

    Parameters
    ----------
    image_shape : tuple of three int
        Channels, height, width, of any size.
    classes : int
    p : float
        Probability of every dropout layer.
    placement : {"after", "before"}
        Whether dropout comes after or before the activation.
    seed : int
        Seed of the initial weights and of the dropout masks; each dropout layer has its own stream.
    dtype : numpy.dtype
        Dtype of the activations. Parameters are float64 for float64, float32 for all others.
    communicator : Communicator, optional
        Processes that share each batch: batch norm then uses the statistics of all of them.

    Returns
    -------
    Sequential
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(map(repr, PLACEMENTS))}, got {placement!r}")
    parameters = accumulation_dtype(dtype)
    weights = np.random.default_rng(np.random.SeedSequence(seed))
    masks = iter(Generator(seed).spawn(len(_WIDTHS) + 1))

    def batch_norm(kind: type[BatchNormLayer], channels: int) -> Layer:
        if communicator is None or communicator.size == 1:
            return kind(channels, dtype=parameters)
        return SyncBatchNorm(channels, dtype=parameters, communicator=communicator)

    def activation() -> list[Layer]:
        pair = [ReLU(), Dropout(p, generator=next(masks))]
        return pair if placement == "after" else pair[::-1]

    layers: list[Layer] = []
    channels, height, width = image_shape
    for filters in _WIDTHS:
        layers += [
            # No bias: batch norm would subtract it again.
            Conv2d(channels, filters, 3, padding=1, bias=False, dtype=parameters, seed=weights),
            batch_norm(BatchNorm2d, filters),
            *activation(),
            # Rounded up, so that an image of a single row or column keeps one.
            MaxPool2d(2, ceil_mode=True),
        ]
        channels, height, width = filters, -(-height // 2), -(-width // 2)
    layers += [
        Flatten(),
        Linear(channels * height * width, _HIDDEN, bias=False, dtype=parameters, seed=weights),
        batch_norm(BatchNorm1d, _HIDDEN),
        *activation(),
        Linear(_HIDDEN, classes, dtype=parameters, seed=weights),
    ]
    return Sequential(*layers)


def dropout_generators(network: Sequential) -> list[Generator]:
    """The generators of the network's dropout layers, first layer first."""
    layers = (layer for _, layer in network.named_layers())
    return [layer.generator for layer in layers if isinstance(layer, Dropout) and layer.generator]
