"""The functions of ``torch.nn.functional`` that this package covers, and those that torch has none of.

Names and arguments are torch's; keyword arguments are added: ``generator=`` to dropout, ``residual=`` and
``activation=`` to batch norm. Results, dtypes and errors are torch's too. Shapes are ``(N, C, *spatial)``
in any memory format.
"""

from typing import TYPE_CHECKING

from gpu_layers.core.exports import exported
from gpu_layers.torch.functional.batch_norm import *
from gpu_layers.torch.functional.dropout import *
from gpu_layers.torch.functional.pooling import *

if not TYPE_CHECKING:
    __all__ = list(exported(__name__))
