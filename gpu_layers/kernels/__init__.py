"""The launchers of the CUDA kernels. Same functions as ``gpu_layers.reference``."""

from gpu_layers.core.exports import exported

_FUNCTIONS = exported(__name__)
__all__ = list(_FUNCTIONS)
globals().update(_FUNCTIONS)
