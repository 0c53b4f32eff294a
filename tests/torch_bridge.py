"""PyTorch tensors from NumPy arrays and back, bfloat16 included, without a change of bits."""

from __future__ import annotations

import numpy as np
import torch

from tests.inputs import BFLOAT16

torch.set_num_threads(1)  # for tensors of a few hundred elements, threads only cost time

#: Every activation; None is the identity too.
ACTIVATIONS = {
    None: lambda z: z,
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


def to_torch(x: np.ndarray) -> torch.Tensor:
    x = np.array(x, order="C")
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == BFLOAT16 else torch.from_numpy(x)


def from_torch(x: torch.Tensor) -> np.ndarray:
    x = x.detach().contiguous()
    return x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()
