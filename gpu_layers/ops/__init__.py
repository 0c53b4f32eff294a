"""Stateless operations: ``<op>_forward(x, ...) -> (y, saved)`` and ``<op>_backward(dy, saved) -> dx``."""

from gpu_layers.ops.activation import ReluSaved, relu_backward, relu_forward
from gpu_layers.ops.activation_dropout import (
    ActivationDropoutSaved,
    activation_dropout_backward,
    activation_dropout_forward,
)
from gpu_layers.ops.avg_pool import AvgPoolSaved, adaptive_avg_pool_forward, avg_pool_backward, avg_pool_forward
from gpu_layers.ops.batch_norm import (
    BatchNormSaved,
    batch_norm_backward,
    batch_norm_double_backward,
    batch_norm_forward,
    batch_norm_inference,
    batch_norm_inference_backward,
)
from gpu_layers.ops.batch_norm_max_pool import (
    BatchNormMaxPoolSaved,
    batch_norm_max_pool_backward,
    batch_norm_max_pool_forward,
    batch_norm_max_pool_inference,
    batch_norm_max_pool_inference_backward,
)
from gpu_layers.ops.dropout import (
    DropoutSaved,
    alpha_dropout_backward,
    alpha_dropout_forward,
    dropout_backward,
    dropout_forward,
    dropout_mask,
    dropout_moments,
)
from gpu_layers.ops.dropout_add import DropoutAddSaved, dropout_add_backward, dropout_add_forward
from gpu_layers.ops.fractional_max_pool import (
    FractionalMaxPoolSaved,
    fractional_max_pool_backward,
    fractional_max_pool_forward,
    fractional_max_pool_indices,
)
from gpu_layers.ops.ghost_batch_norm import GhostBatchNormSaved, ghost_batch_norm_backward, ghost_batch_norm_forward
from gpu_layers.ops.lp_pool import LPPoolSaved, lp_pool_backward, lp_pool_forward
from gpu_layers.ops.max_pool import (
    MaxPoolSaved,
    adaptive_max_pool_forward,
    max_pool_backward,
    max_pool_forward,
    max_pool_gather,
    max_pool_indices,
)
from gpu_layers.ops.max_unpool import MaxUnpoolSaved, max_unpool_backward, max_unpool_forward
from gpu_layers.ops.sync_batch_norm import SyncBatchNormSaved, sync_batch_norm_backward, sync_batch_norm_forward

__all__ = [
    "ActivationDropoutSaved",
    "AvgPoolSaved",
    "BatchNormMaxPoolSaved",
    "BatchNormSaved",
    "DropoutAddSaved",
    "DropoutSaved",
    "FractionalMaxPoolSaved",
    "GhostBatchNormSaved",
    "LPPoolSaved",
    "MaxPoolSaved",
    "MaxUnpoolSaved",
    "ReluSaved",
    "SyncBatchNormSaved",
    "activation_dropout_backward",
    "activation_dropout_forward",
    "adaptive_avg_pool_forward",
    "adaptive_max_pool_forward",
    "alpha_dropout_backward",
    "alpha_dropout_forward",
    "avg_pool_backward",
    "avg_pool_forward",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "batch_norm_max_pool_backward",
    "batch_norm_max_pool_forward",
    "batch_norm_max_pool_inference",
    "batch_norm_max_pool_inference_backward",
    "dropout_add_backward",
    "dropout_add_forward",
    "dropout_backward",
    "dropout_forward",
    "dropout_mask",
    "dropout_moments",
    "fractional_max_pool_backward",
    "fractional_max_pool_forward",
    "fractional_max_pool_indices",
    "ghost_batch_norm_backward",
    "ghost_batch_norm_forward",
    "lp_pool_backward",
    "lp_pool_forward",
    "max_pool_backward",
    "max_pool_forward",
    "max_pool_gather",
    "max_pool_indices",
    "max_unpool_backward",
    "max_unpool_forward",
    "relu_backward",
    "relu_forward",
    "sync_batch_norm_backward",
    "sync_batch_norm_forward",
]
