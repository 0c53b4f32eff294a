"""Functions of the dropout family."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta
from torch._C._autograd import _get_creation_meta as _creation_of
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as reference

from gpu_layers.ops.activation_dropout import check_order
from gpu_layers.random import Generator
from gpu_layers.torch import arrays, random, registry
from gpu_layers.torch.checks import (
    check_probability,
    check_residual,
    check_savable,
    check_tensor,
    checked_activation,
    fail_as_torch,
)
from gpu_layers.torch.ops import dropout as dropout_rows
from gpu_layers.torch.ops.dropout import Dropping

__all__ = [
    "activation_dropout",
    "alpha_dropout",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "feature_alpha_dropout",
]


def _drop(
    input: Tensor, p: float, training: bool, inplace: bool, generator: Generator | None, axes: int, kind: str
) -> Tensor:
    """Drop by a fresh mask; elements that differ only in the trailing axes share one decision. Evaluation: the input.

    Callers have checked the input.
    """
    if type(p) is not float or not 0.0 <= p <= 1.0:
        p = check_probability(p)
    if generator is not None:
        random.check_generator(generator)
    if type(training) is not bool:
        fail_as_torch("training must be a bool", reference.dropout, input.new_zeros(0), p, training)
    if not training:
        return input
    if forward_ad._current_level >= 0 and not is_dynamo_compiling():
        registry.refuse_tangents("dropout", (input,))
    if inplace:
        return _drop_in_place(input, p, generator, axes, kind)
    eager, dropping = registry.is_eager(input), _dropping(input, p, axes, kind)
    seed, offset = random.draw(input, generator, eager)
    numbers = offset, dropping
    return dropout_rows.dropout.eagerly(input, seed, numbers) if eager else dropout_rows.dropout(input, seed, numbers)


def _drop_in_place(input: Tensor, p: float, generator: Generator | None, axes: int, kind: str) -> Tensor:
    eager = registry.is_eager(input)
    if eager and p == 0:
        # Nothing is written, as by torch: what keeps the input for its backward may go on. (Of a graph a draw that
        # nothing uses would be removed.)
        random.draw(input, generator, eager, inplace=True)
        return input
    if not is_dynamo_compiling() and _is_refused_in_place(input):
        input.mul_(1)  # raises, as torch words it, before anything is drawn or written
    if any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
    dropping = _dropping(input, p, axes, kind)
    seed, offset = random.draw(input, generator, eager, inplace=True)
    numbers = offset, dropping
    if eager:
        return dropout_rows.DropoutInPlace.apply(input, seed, numbers)
    return input.copy_(dropout_rows.dropout(input, seed, numbers))


def _is_refused_in_place(x: Tensor) -> bool:
    """Whether autograd allows no change of x: of a leaf or a view of one, of some views, of tensors of inference."""
    if torch.is_grad_enabled() and x.requires_grad:
        if x.is_leaf:
            return True
        if x._is_view() and (x._base.is_leaf or _creation_of(x) is not CreationMeta.DEFAULT):
            return True
    return x.is_inference() and not torch.is_inference_mode_enabled()


def _dropping(input: Tensor, p: float, axes: int, kind: str) -> Dropping:
    if not is_dynamo_compiling():
        try:
            return _kept(input.shape, input.stride(), p, axes, kind)
        except TypeError:  # sizes that are symbols are not hashable
            pass
    return _made(input.shape, input.stride(), p, axes, kind)


def _made(shape: Any, strides: Any, p: float, axes: int, kind: str) -> Dropping:
    return Dropping(shape, p, axes, kind, arrays.is_channels_last(shape, strides))


_kept = lru_cache(maxsize=4096)(_made)


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Drop each element with probability p and divide the others by ``1 - p``.

    Parameters
    ----------
    input : Tensor
        float16, bfloat16, float32 or float64, any shape and format.
    p : float
        In [0, 1].
    training : bool
        Otherwise the input itself is returned.
    inplace : bool
        Write the result into the input.
    generator : gpu_layers.Generator, optional
        Where the mask comes from; torch's default generator of the device by default.

    Returns
    -------
    Tensor
        Of the input's dtype; in its format where that is contiguous or channels_last.

    Raises
    ------
    ValueError
        For p outside [0, 1].
    TypeError
        If it is not a floating-point tensor, or not a generator.
    RuntimeError
        On a device without kernels.
    """
    check_tensor(input)
    return _drop(input, p, training, inplace, generator, -1, "inverted")


def alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Dropout that keeps mean 0 and variance 1 (Klambauer et al., 2017); arguments and errors as of :func:`dropout`."""
    check_tensor(input)
    return _drop(input, p, training, inplace, generator, -1, "alpha")


def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Alpha dropout of whole channels of ``(N, C, ...)``; arguments and errors as of :func:`dropout`."""
    check_tensor(input)
    if training and input.dim() < 2:
        fail_as_torch(
            "feature_alpha_dropout takes at least 2 axes", reference.feature_alpha_dropout, input, p, training
        )
    return _drop(input, p, training, inplace, generator, 2, "alpha")


def dropout1d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Drop whole channels of ``(N, C, L)`` or ``(C, L)``; arguments and errors as of :func:`dropout`."""
    check_tensor(input)
    rank = input.dim()
    if rank not in (2, 3):
        fail_as_torch(
            f"dropout1d: Expected 2D or 3D input, but received a {rank}D input.", reference.dropout1d, input, p, False
        )
    return _drop(input, p, training, inplace, generator, rank - 1, "inverted")


def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Drop whole channels of ``(N, C, H, W)``; arguments and errors as of :func:`dropout`.

    As torch, of a 3-D input those of ``(N, C, L)``, with a warning.
    """
    check_tensor(input)
    rank = input.dim()
    if rank != 4:
        _warn_of_rank("dropout2d", rank, (3, 4), 2)
        if rank == 3:
            warnings.warn(
                "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior is "
                "desired - input is interpreted as shape (N, C, L), where C is the channel dim: switch to dropout1d.",
                stacklevel=2,
            )
        if rank < 2:
            fail_as_torch("dropout2d takes at least 2 axes", reference.dropout2d, input, p, training)
    return _drop(input, p, training, inplace, generator, 2, "inverted")


def dropout3d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Drop whole channels of ``(N, C, D, H, W)`` or ``(C, D, H, W)``; arguments and errors as of :func:`dropout`."""
    check_tensor(input)
    rank = input.dim()
    if rank not in (4, 5):
        _warn_of_rank("dropout3d", rank, (4, 5), 3)
    # As torch: whatever is not 5-D has no axis of samples.
    axes = 2 if rank == 5 else 1
    if rank < axes:
        fail_as_torch("dropout3d takes at least 1 axis", reference.dropout3d, input, p, training)
    return _drop(input, p, training, inplace, generator, axes, "inverted")


def _warn_of_rank(name: str, rank: int, expected: tuple[int, int], spatial: int) -> None:
    if rank not in expected:
        warnings.warn(
            f"{name}: Received a {rank}-D input to {name}, which is deprecated and will result in an error in a future "
            f"release. To retain the behavior and silence this warning, please use dropout instead. Note that {name} "
            f"exists to provide channel-wise dropout on inputs with {spatial} spatial dimensions, a channel dimension, "
            f"and an optional batch dimension (i.e. {expected[0]}D or {expected[1]}D inputs).",
            stacklevel=3,
        )


def drop_path(input: Tensor, p: float = 0.0, training: bool = True, *, generator: Generator | None = None) -> Tensor:
    """Drop whole samples (indices of axis 0) with probability p and divide the others by ``1 - p``.

    Stochastic depth (Huang et al., 2016), for the branch of a residual block.

    Parameters
    ----------
    input : Tensor, shape (N, ...)
    p, training, generator
        As of :func:`dropout`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`dropout`; ValueError for an input without axes.
    """
    check_tensor(input)
    if not input.dim():
        raise ValueError("drop_path takes an input of at least 1 axis, that of the samples, got a 0-d tensor")
    return _drop(input, p, training, False, generator, 1, "inverted")


def dropout_add(
    input: Tensor, residual: Tensor, p: float = 0.5, training: bool = True, *, generator: Generator | None = None
) -> Tensor:
    """``residual + dropout(input)``; the sum is rounded once.

    Parameters
    ----------
    input : Tensor
    residual : Tensor
        Of the input's shape and dtype; under autocast it is cast to the input's dtype.
    p, training, generator
        As of :func:`dropout`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`dropout`; ValueError for another shape of the residual, TypeError for another dtype.
    """
    check_tensor(input)
    p = check_probability(p)
    random.check_generator(generator)
    check_residual(residual, input)
    if residual.dtype is not input.dtype:
        residual = residual.to(input.dtype)
    dropping = _dropping(input, p if training else 0.0, -1, "inverted")
    if not training:
        if not dropping.channels_last:
            return input + residual
        # By an operation whose gradients have this format too.
        return dropout_rows.dropout_add(input, residual, 0, (0, dropping))
    if forward_ad._current_level >= 0 and not is_dynamo_compiling():
        registry.refuse_tangents("dropout_add", (input, residual))
    seed, offset = random.draw(input, generator, registry.is_eager(input))
    return dropout_rows.dropout_add(input, residual, seed, (offset, dropping))


def activation_dropout(
    input: Tensor,
    activation: str,
    p: float = 0.5,
    training: bool = True,
    *,
    order: str = "after",
    generator: Generator | None = None,
) -> Tensor:
    """Activation phi and dropout D in one pass: ``D(phi(x))``, or ``phi(D(x))``; ``phi(x)`` in evaluation.

    Parameters
    ----------
    input : Tensor
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        leaky_relu has a slope of 0.01, gelu is the exact one (by erf), None is the identity.
    p, training, generator
        As of :func:`dropout`.
    order : {"after", "before"}
        Dropout after the activation, or before it.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`dropout`; ValueError for an unknown activation or order.
    """
    check_tensor(input)
    p = check_probability(p)
    activation, order = checked_activation(activation), check_order(order)
    random.check_generator(generator)
    if activation == "identity" and not training:
        return input
    dropping = _dropping(input, p if training else 0.0, -1, "inverted")
    if not training:
        # No number is drawn: nothing is dropped for p = 0.
        seed, offset = 0, 0
    else:
        if forward_ad._current_level >= 0 and not is_dynamo_compiling():
            registry.refuse_tangents("activation_dropout", (input,))
        eager = registry.is_eager(input)
        if eager and input.is_inference():
            check_savable(input)
        seed, offset = random.draw(input, generator, eager)
    if activation == "identity":
        return dropout_rows.dropout(input, seed, (offset, dropping))
    return dropout_rows.activation_dropout(input, seed, (offset, dropping, activation, order == "before"))
