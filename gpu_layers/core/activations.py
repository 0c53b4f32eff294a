"""The activations by name, and the numbers by which kernels know them."""

from __future__ import annotations

#: As in ``with_activation`` of ``activation.cuh``.
NUMBERS = {"relu": 0, "leaky_relu": 1, "sigmoid": 2, "tanh": 3, "gelu": 4, "silu": 5}
#: The identity has no number: kernels leave it out.
NAMES = (*NUMBERS, "identity")
