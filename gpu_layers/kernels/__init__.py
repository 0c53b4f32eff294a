"""The launchers of the CUDA kernels. Same functions as ``gpu_layers.reference``."""

from gpu_layers.core.argmax import max_pool_indices
from gpu_layers.kernels.activation import relu_backward, relu_forward
from gpu_layers.kernels.activation_dropout import (
    activation_dropout_backward,
    activation_dropout_forward,
    relu_dropout_backward,
)
from gpu_layers.kernels.avg_pool import avg_pool_backward, avg_pool_forward
from gpu_layers.kernels.batch_norm import (
    batch_norm_backward,
    batch_norm_fold,
    batch_norm_forward,
    batch_norm_gradient_sums,
    batch_norm_inference,
    batch_norm_inference_backward,
    batch_norm_input_gradient,
    batch_norm_statistics,
)
from gpu_layers.kernels.batch_norm_double_backward import batch_norm_double_backward
from gpu_layers.kernels.batch_norm_max_pool import (
    batch_norm_max_pool,
    batch_norm_max_pool_backward,
    batch_norm_max_pool_inference,
    batch_norm_max_pool_inference_backward,
)
from gpu_layers.kernels.dropout import (
    advance_rng_state,
    dropout_backward,
    dropout_forward,
    dropout_moments,
)
from gpu_layers.kernels.dropout_add import dropout_add_backward, dropout_add_forward
from gpu_layers.kernels.fractional_max_pool import (
    fractional_max_pool_backward,
    fractional_max_pool_forward,
    fractional_pool_starts,
)
from gpu_layers.kernels.lp_pool import lp_pool_backward, lp_pool_forward
from gpu_layers.kernels.max_pool import max_pool_backward, max_pool_forward, max_pool_gather
from gpu_layers.kernels.max_unpool import max_unpool_backward, max_unpool_forward, max_unpool_keep

__all__ = [
    "activation_dropout_backward",
    "activation_dropout_forward",
    "advance_rng_state",
    "avg_pool_backward",
    "avg_pool_forward",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_fold",
    "batch_norm_forward",
    "batch_norm_gradient_sums",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "batch_norm_input_gradient",
    "batch_norm_max_pool",
    "batch_norm_max_pool_backward",
    "batch_norm_max_pool_inference",
    "batch_norm_max_pool_inference_backward",
    "batch_norm_statistics",
    "dropout_add_backward",
    "dropout_add_forward",
    "dropout_backward",
    "dropout_forward",
    "dropout_moments",
    "fractional_max_pool_backward",
    "fractional_max_pool_forward",
    "fractional_pool_starts",
    "lp_pool_backward",
    "lp_pool_forward",
    "max_pool_backward",
    "max_pool_forward",
    "max_pool_gather",
    "max_pool_indices",
    "max_unpool_backward",
    "max_unpool_forward",
    "max_unpool_keep",
    "relu_backward",
    "relu_dropout_backward",
    "relu_forward",
]
