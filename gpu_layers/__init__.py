"""Dropout, batch normalisation and pooling as CUDA kernels, under a layer API, with a NumPy reference."""

from gpu_layers import ops, random
from gpu_layers._version import __version__
from gpu_layers.layers import AvgPool2d, BatchNorm1d, BatchNorm2d, Dropout, Layer, MaxPool2d, ReLU
from gpu_layers.random import Generator, default_generator, manual_seed
from gpu_layers.runtime.backend import use_backend

__all__ = [
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Dropout",
    "Generator",
    "Layer",
    "MaxPool2d",
    "ReLU",
    "__version__",
    "default_generator",
    "manual_seed",
    "ops",
    "random",
    "use_backend",
]
