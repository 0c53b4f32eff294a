"""The functions of ``torch.nn.functional`` that this package covers, and functions that torch does not have.

Names and arguments are torch's; keyword arguments are added: ``generator=`` to dropout, ``residual=`` and
``activation=`` to batch norm. Results and dtypes are torch's too. Shapes are ``(N, C, *spatial)`` in any memory format.

Every function raises a TypeError for an input that is not a floating-point tensor, and a RuntimeError on a device or
with a layout that no kernel takes. Other invalid arguments raise torch's errors. Sections Raises say what is added.
"""

from typing import TYPE_CHECKING

from gpu_layers.core.exports import exported
from gpu_layers.torch.functional.batch_norm import *
from gpu_layers.torch.functional.dropout import *
from gpu_layers.torch.functional.pooling import *

if not TYPE_CHECKING:
    __all__ = list(exported(__name__))
