"""PyTorch's dropout, batch norm and pooling on the kernels of gpu_layers.

``convert(model)`` changes the modules of a model in place; ``revert(model)`` changes them back. The classes have the
names and arguments of torch.nn, and their state_dicts load both ways.

Modules raise what their functions in :mod:`gpu_layers.torch.functional` raise. A section Raises of theirs is about
their own arguments.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    raise ImportError("gpu_layers.torch needs PyTorch, which is not installed: pip install torch") from _error

from typing import TYPE_CHECKING

from gpu_layers.core.exports import exported
from gpu_layers.torch import functional
from gpu_layers.torch.convert import convert, revert
from gpu_layers.torch.fold import fold_batch_norm
from gpu_layers.torch.modules.batch_norm import *
from gpu_layers.torch.modules.dropout import *
from gpu_layers.torch.modules.pooling import *
from gpu_layers.torch.modules.sync_batch_norm import *
from gpu_layers.torch.random import checkpoint_contexts

__all__ = ["checkpoint_contexts", "convert", "fold_batch_norm", "functional", "revert"]
if not TYPE_CHECKING:
    __all__ += exported("gpu_layers.torch.modules")
