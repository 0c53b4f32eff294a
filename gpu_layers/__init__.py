"""Dropout, batch normalisation and pooling as CUDA kernels, under a layer API, with a NumPy reference."""

from gpu_layers import ops, random
from gpu_layers._version import __version__
from gpu_layers.layers import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    BatchNorm1d,
    BatchNorm2d,
    Dropout,
    Layer,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    ReLU,
)
from gpu_layers.random import Generator, default_generator, manual_seed
from gpu_layers.runtime.backend import use_backend

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Dropout",
    "Generator",
    "Layer",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "ReLU",
    "__version__",
    "default_generator",
    "manual_seed",
    "ops",
    "random",
    "use_backend",
]
