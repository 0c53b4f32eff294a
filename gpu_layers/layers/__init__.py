"""Layers: thin state around the operations of ``gpu_layers.ops``."""

from gpu_layers.layers.activation import ReLU
from gpu_layers.layers.activation_dropout import (
    ActivationDropout,
)
from gpu_layers.layers.adaptive_pool import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
)
from gpu_layers.layers.avg_pool import AvgPool1d, AvgPool2d, AvgPool3d
from gpu_layers.layers.base import Layer
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from gpu_layers.layers.checkpoint import Checkpoint
from gpu_layers.layers.convolution import Conv2d
from gpu_layers.layers.dropout import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
)
from gpu_layers.layers.dropout_add import DropoutAdd
from gpu_layers.layers.fractional_max_pool import FractionalMaxPool2d, FractionalMaxPool3d
from gpu_layers.layers.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from gpu_layers.layers.linear import Flatten, Linear
from gpu_layers.layers.lp_pool import LPPool1d, LPPool2d, LPPool3d
from gpu_layers.layers.max_pool import MaxPool1d, MaxPool2d, MaxPool3d
from gpu_layers.layers.max_unpool import MaxUnpool1d, MaxUnpool2d, MaxUnpool3d
from gpu_layers.layers.running_statistics import BatchStatistics
from gpu_layers.layers.sequential import Sequential
from gpu_layers.layers.state import IncompatibleKeys
from gpu_layers.layers.sync_batch_norm import SyncBatchNorm

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
    "BatchStatistics",
    "Checkpoint",
    "Conv2d",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "FeatureAlphaDropout",
    "Flatten",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "IncompatibleKeys",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "Layer",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "ReLU",
    "Sequential",
    "SyncBatchNorm",
]
