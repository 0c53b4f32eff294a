"""PyTorch's dropout, batch norm and pooling on the kernels of gpu_layers.

``convert(model)`` changes the modules of a model in place; ``revert(model)`` changes them back. The classes have the
names and arguments of torch.nn, and their state_dicts load both ways.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    raise ImportError("gpu_layers.torch needs PyTorch, which is not installed: pip install torch") from _error

from gpu_layers.torch import functional
from gpu_layers.torch.convert import convert, revert
from gpu_layers.torch.fold import fold_batch_norm
from gpu_layers.torch.modules.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
)
from gpu_layers.torch.modules.dropout import (
    ActivationDropout,
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropoutAdd,
    DropPath,
    FeatureAlphaDropout,
)
from gpu_layers.torch.modules.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    LPPool1d,
    LPPool2d,
    LPPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
)
from gpu_layers.torch.modules.sync_batch_norm import SyncBatchNorm
from gpu_layers.torch.random import checkpoint_contexts

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
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "FeatureAlphaDropout",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "SyncBatchNorm",
    "checkpoint_contexts",
    "convert",
    "fold_batch_norm",
    "functional",
    "revert",
]
