"""The NumPy reference: short, readable, the definition of correct. Same functions as ``gpu_layers.kernels``."""

from gpu_layers.core.exports import exported

_FUNCTIONS = exported(__name__)
__all__ = list(_FUNCTIONS)
globals().update(_FUNCTIONS)
