"""Layers: thin state around the operations of ``gpu_layers.ops``."""

from typing import TYPE_CHECKING

from gpu_layers.core.exports import exported
from gpu_layers.layers.activation import *
from gpu_layers.layers.activation_dropout import *
from gpu_layers.layers.adaptive_pool import *
from gpu_layers.layers.avg_pool import *
from gpu_layers.layers.base import *
from gpu_layers.layers.batch_norm import *
from gpu_layers.layers.checkpoint import *
from gpu_layers.layers.convolution import *
from gpu_layers.layers.dropout import *
from gpu_layers.layers.dropout_add import *
from gpu_layers.layers.fractional_max_pool import *
from gpu_layers.layers.ghost_batch_norm import *
from gpu_layers.layers.linear import *
from gpu_layers.layers.lp_pool import *
from gpu_layers.layers.max_pool import *
from gpu_layers.layers.max_unpool import *
from gpu_layers.layers.running_statistics import *
from gpu_layers.layers.sequential import *
from gpu_layers.layers.state import *
from gpu_layers.layers.sync_batch_norm import *

if not TYPE_CHECKING:
    __all__ = list(exported(__name__))
