"""Dropout, batch normalisation and pooling as CUDA kernels, under a layer API, with a NumPy reference."""

from gpu_layers import _process  # noqa: F401 (first: an interrupt during the imports below)

# isort: split
from typing import TYPE_CHECKING

from gpu_layers import distributed, layers, ops, random
from gpu_layers._version import __version__
from gpu_layers.graphs import Graph, capture
from gpu_layers.layers import *
from gpu_layers.layers.checkpoint import checkpoint
from gpu_layers.models.folding import fold_batch_norm, fold_batch_norm_arrays
from gpu_layers.models.foreign import load_foreign_batch_norm
from gpu_layers.models.fusing import fuse
from gpu_layers.models.recalibration import recalibrate
from gpu_layers.models.transaction import statistics_transaction
from gpu_layers.models.uncertainty import mc_dropout
from gpu_layers.random import CudaGraphGenerator, Generator, default_generator, manual_seed
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.ranges import profile_ranges
from gpu_layers.sync_conversion import convert_sync_batch_norm, revert_sync_batch_norm

__all__ = [
    "CudaGraphGenerator",
    "Generator",
    "Graph",
    "__version__",
    "capture",
    "checkpoint",
    "convert_sync_batch_norm",
    "default_generator",
    "distributed",
    "fold_batch_norm",
    "fold_batch_norm_arrays",
    "fuse",
    "load_foreign_batch_norm",
    "manual_seed",
    "mc_dropout",
    "ops",
    "profile_ranges",
    "random",
    "recalibrate",
    "revert_sync_batch_norm",
    "statistics_transaction",
    "use_backend",
]
if not TYPE_CHECKING:
    __all__ += layers.__all__
