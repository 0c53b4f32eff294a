"""Gradients of activations, of torch's differentiable operations: for second derivatives."""

from __future__ import annotations

import math

import torch


def activation_gradient(dy: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    """``phi'(z) * dy``, of the activations of ``ops.activation_dropout_forward``; of ReLU 0 where z is 0."""
    slope = _slope(z, activation)
    # Not by multiplying: a clipped unit passes no gradient, were it infinite.
    return torch.where(slope == 0, 0.0, dy * slope)


def _slope(z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return torch.where(z <= 0, 0.0, 1.0).to(z.dtype)
    if activation == "leaky_relu":
        return torch.where(z > 0, torch.ones_like(z), 0.01)  # of z's dtype, not of the default one
    if activation == "sigmoid":
        return torch.sigmoid(z) * torch.sigmoid(-z)
    if activation == "tanh":
        return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s + z * s * torch.sigmoid(-z)
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * torch.special.erfc(z * -math.sqrt(0.5)) + z * density
    return torch.ones_like(z)
