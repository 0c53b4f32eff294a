"""Stateless operations: ``<op>_forward(x, ...) -> (y, saved)`` and ``<op>_backward(dy, saved) -> dx``."""

from typing import TYPE_CHECKING

from gpu_layers.core.exports import exported
from gpu_layers.ops.activation import *
from gpu_layers.ops.activation_dropout import *
from gpu_layers.ops.avg_pool import *
from gpu_layers.ops.batch_moments import *
from gpu_layers.ops.batch_norm import *
from gpu_layers.ops.batch_norm_max_pool import *
from gpu_layers.ops.dropout import *
from gpu_layers.ops.dropout_add import *
from gpu_layers.ops.fractional_max_pool import *
from gpu_layers.ops.ghost_batch_norm import *
from gpu_layers.ops.lp_pool import *
from gpu_layers.ops.max_pool import *
from gpu_layers.ops.max_unpool import *
from gpu_layers.ops.sync_batch_norm import *

if not TYPE_CHECKING:
    __all__ = list(exported(__name__))
