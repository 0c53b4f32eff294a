"""Dropout, batch normalisation and pooling as CUDA kernels, under a layer API, with a NumPy reference."""

from gpu_layers import _process  # noqa: F401 (first: an interrupt during the imports below)

# isort: split
from gpu_layers import distributed, ops, random
from gpu_layers._version import __version__
from gpu_layers.folding import fold_batch_norm
from gpu_layers.foreign import load_foreign_batch_norm
from gpu_layers.fusing import fuse
from gpu_layers.graphs import Graph, capture
from gpu_layers.layers import (
    ActivationDropout,
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AlphaDropout,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    Layer,
    LPPool1d,
    LPPool2d,
    LPPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
    ReLU,
    SyncBatchNorm,
)
from gpu_layers.random import (
    CudaGraphGenerator,
    Generator,
    default_generator,
    manual_seed,
)
from gpu_layers.recalibration import recalibrate
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.ranges import profile_ranges
from gpu_layers.transaction import statistics_transaction
from gpu_layers.uncertainty import (
    mc_dropout,
)

__all__ = [
    "ActivationDropout",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AlphaDropout",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CudaGraphGenerator",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "Generator",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "Graph",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "Layer",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "ReLU",
    "SyncBatchNorm",
    "__version__",
    "capture",
    "default_generator",
    "distributed",
    "fold_batch_norm",
    "fuse",
    "load_foreign_batch_norm",
    "manual_seed",
    "mc_dropout",
    "ops",
    "profile_ranges",
    "random",
    "recalibrate",
    "statistics_transaction",
    "use_backend",
]
