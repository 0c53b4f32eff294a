"""Initial weights."""

from __future__ import annotations

import numpy as np

from gpu_layers import random
from gpu_layers.core.array import Array


def he_normal(
    shape: tuple[int, ...], fan_in: int, dtype: np.dtype, seed: int | np.random.Generator | None = None
) -> Array:
    """Normal numbers of variance ``2 / fan_in``, which keep the size of activations through ReLU (He et al., 2015).

    Parameters
    ----------
    shape : tuple of int
    fan_in : int
        Inputs that one output sums.
    dtype : numpy.dtype
    seed : int or numpy.random.Generator, optional
        A generator is advanced; by default that of :meth:`gpu_layers.Generator.weights` of the default generator, which
        :func:`gpu_layers.manual_seed` starts anew.

    Returns
    -------
    ndarray
    """
    numbers = random.default_generator.weights() if seed is None else np.random.default_rng(seed)
    return (numbers.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(dtype)
