"""The functions of ``torch.nn.functional`` that this package covers, and those that torch has none of.

Names and arguments are torch's; keyword arguments are added: ``generator=`` to dropout, ``residual=`` and
``activation=`` to batch norm. Results, dtypes and errors are torch's too. Shapes are ``(N, C, *spatial)``
in any memory format.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as reference

from gpu_layers.ops.activation_dropout import check_order
from gpu_layers.random import Generator
from gpu_layers.torch import arrays, random, registry
from gpu_layers.torch.checks import (
    check_probability,
    check_same_device,
    check_tensor,
    checked_activation,
    checked_residual,
    fail_as_torch,
)
from gpu_layers.torch.ops import batch_norm as batch_norm_rows
from gpu_layers.torch.ops import dropout as dropout_rows
from gpu_layers.torch.ops import pooling as pool_rows

__all__ = [
    "activation_dropout",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "alpha_dropout",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "feature_alpha_dropout",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
]


# ---- dropout


def _drop(
    input: Tensor, p: float, training: bool, inplace: bool, generator: Generator | None, axes: int, kind: str
) -> Tensor:
    """Draw a mask whose decisions the elements behind the leading axes share, and drop; input itself in evaluation."""
    check_tensor(input)
    p = check_probability(p)
    random.check_generator(generator)
    if not training:
        return input
    if inplace:
        return _drop_in_place(input, p, generator, axes, kind)
    seed, offset = random.draw(input, generator)
    return dropout_rows.dropout(input, seed, offset, p, axes, kind, arrays.is_channels_last(input))


def _drop_in_place(input: Tensor, p: float, generator: Generator | None, axes: int, kind: str) -> Tensor:
    if torch.is_grad_enabled() and input.requires_grad and input.is_leaf:
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    if any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
    channels_last = arrays.is_channels_last(input)
    seed, offset = random.draw(input, generator)
    numbers = (seed, offset, p, axes, kind, channels_last)
    if registry.is_eager(input):
        return dropout_rows.DropoutInPlace.apply(input, *numbers)
    return input.copy_(dropout_rows.dropout(input, *numbers))


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
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
        For what is no tensor of floats, or no generator.
    RuntimeError
        On a device without kernels.
    """
    return _drop(input, p, training, inplace, generator, -1, "inverted")


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Dropout that keeps mean 0 and variance 1 (Klambauer et al., 2017); arguments as of :func:`dropout`."""
    return _drop(input, p, training, inplace, generator, -1, "alpha")


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Alpha dropout of whole channels of ``(N, C, ...)``; arguments as of :func:`dropout`."""
    check_tensor(input)
    if training and input.dim() < 2:
        fail_as_torch(
            "feature_alpha_dropout takes at least 2 axes", reference.feature_alpha_dropout, input, p, training
        )
    return _drop(input, p, training, inplace, generator, 2, "alpha")


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Drop whole channels of ``(N, C, L)`` or ``(C, L)``; arguments as of :func:`dropout`."""
    check_tensor(input)
    rank = input.dim()
    if rank not in (2, 3):
        fail_as_torch(
            f"dropout1d: Expected 2D or 3D input, but received a {rank}D input.", reference.dropout1d, input, p, False
        )
    return _drop(input, p, training, inplace, generator, rank - 1, "inverted")


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Drop whole channels of ``(N, C, H, W)``; arguments as of :func:`dropout`.

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
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Drop whole channels of ``(N, C, D, H, W)`` or ``(C, D, H, W)``; arguments as of :func:`dropout`."""
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
    input: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    generator: Generator | None = None,
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
    residual = checked_residual(residual, input)
    if not training:
        return residual + input
    seed, offset = random.draw(input, generator)
    return dropout_rows.dropout_add(input, residual, seed, offset, p, arrays.is_channels_last(input))


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
    channels_last = arrays.is_channels_last(input)
    if not training:
        # No number is drawn: nothing is dropped for p = 0.
        seed, offset, p = 0, 0, 0.0
    else:
        seed, offset = random.draw(input, generator)
    if activation == "identity":
        if not training:
            return input
        return dropout_rows.dropout(input, seed, offset, p, -1, "inverted", channels_last)
    return dropout_rows.activation_dropout(input, seed, offset, p, activation, order == "before", channels_last)


# ---- batch norm


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``phi(weight * (x - mean) / sqrt(var + eps) + bias + residual)``, in one kernel each way.

    Parameters
    ----------
    input : Tensor, shape (N, C, *spatial)
    running_mean, running_var : Tensor, shape (C,), or None
        Updated in place in training (not within a backward pass, so that a batch that is recomputed counts once),
        used in evaluation.
    weight, bias : Tensor, shape (C,), or None
        Of the input's dtype; float32 too where that is float16 or bfloat16. The same holds for the statistics.
    training : bool
        Normalise with the statistics of the batch.
    momentum : float
    eps : float
    residual : Tensor, optional
        Of the input's shape and dtype; under autocast it is cast to the input's dtype.
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        phi; None is the identity.

    Raises
    ------
    ValueError
        For one value a channel in training, an eps that is not positive, another shape of the residual, or an unknown
        activation.
    TypeError
        For what is no tensor of floats, or another dtype of the residual.
    RuntimeError
        For parameters or statistics of another size, dtype or device.
    """
    check_tensor(input)
    return normalize(
        input, running_mean, running_var, None, weight, bias, training, momentum, eps, residual, activation, False
    )


def normalize(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    skip_nonfinite: bool,
) -> Tensor:
    """:func:`batch_norm` of a tensor, with a layer's counter of batches, which a momentum of None averages by."""
    name = "identity" if activation is None else checked_activation(activation)
    _check_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        residual = checked_residual(residual, input)
    channels_last = arrays.is_channels_last(input)
    if not training:
        rows = batch_norm_rows.batch_norm_inference
        return rows(input, running_mean, running_var, weight, bias, residual, eps, name, channels_last)[0]
    rows = batch_norm_rows.batch_norm_training
    y, statistics = rows(input, weight, bias, residual, eps, name, channels_last)
    if running_mean is not None and not random.is_recomputation():
        count = input.numel() // input.shape[1]
        batch_norm_rows.update_statistics(
            running_mean, running_var, num_batches_tracked, statistics, count, momentum, skip_nonfinite
        )
    return y


def _check_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> None:
    shape, dtype, device = input.shape, input.dtype, input.device
    good = len(shape) >= 2 and (running_mean is None) == (running_var is None)
    if good and training:
        # More than one value a channel.
        good = eps > 0.0 and (shape[0] != 1 or (len(shape) > 2 and math.prod(shape[2:]) != 1))
        if good and len(shape) > 2 and shape[0] != 1:
            good = shape[0] * math.prod(shape[2:]) != 1
    elif good:
        good = eps >= 0.0 and running_mean is not None
    elsewhere = False
    if good:
        of_channels, half = shape[1:2], dtype is not torch.float64
        for one in (running_mean, running_var, weight, bias):
            if one is not None:
                # The input's dtype, or float32 for half types.
                kind = one.dtype
                if one.shape != of_channels or not (kind is dtype or (half and kind is torch.float32)):
                    good = False
                elif one.device != device:
                    elsewhere = True
    if not good:
        fail_as_torch(
            "batch_norm does not take these arguments",
            reference.batch_norm,
            input,
            *(None if one is None else one.detach().clone() for one in (running_mean, running_var)),
            weight,
            bias,
            training,
            0.1 if momentum is None else momentum,
            eps,
        )
    if elsewhere:
        check_same_device(input, running_mean, running_var, weight, bias)


# ---- pooling


def _per_axis(value: Any, rank: int) -> tuple:
    """One number a spatial axis, of one for all or of as many as were given."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * rank if len(values) == 1 else values


def _numbers(kernel_size: Any, stride: Any, padding: Any, dilation: Any, rank: int) -> tuple | None:
    """Kernel, stride, padding and dilation, one a spatial axis; None where they make no window."""
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        stride = kernel_size
    found = []
    for value in (kernel_size, stride, padding, dilation):
        values = _per_axis(value, rank)
        if len(values) != rank:
            return None
        for one in values:
            # A size may be a symbol in a compiled graph.
            if not isinstance(one, (int, torch.SymInt)) or isinstance(one, bool):
                return None
        found.append(values)
    kernel, strides, pads, dilations = found
    for k, s, pad, d in zip(kernel, strides, pads, dilations, strict=True):
        if k < 1 or s < 1 or d < 1 or pad < 0 or 2 * pad > d * (k - 1) + 1:
            return None
    return kernel, strides, pads, dilations


def _fits(shape: Any, rank: int, window: tuple | None, ceil_mode: bool) -> bool:
    """Whether an input has spatial axes, none of them (nor the channels) empty, and a window fits in."""
    if window is None or len(shape) not in (rank + 1, rank + 2):
        return False
    image = shape[-rank - 1 :]
    for size in image:
        if size == 0:
            return False
    kernel, strides, pads, dilations = window
    sizes = pool_rows.output_sizes(image[1:], kernel, strides, pads, dilations, ceil_mode, ())
    return all(size >= 1 for size in sizes)


def _placed(
    shape: Any, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple | None:
    """What operations take of a window over an input of this shape; None where it is none, or does not fit."""
    window = _numbers(kernel_size, stride, padding, dilation, rank)
    return (*window, ceil_mode, ()) if window is not None and _fits(shape, rank, window, ceil_mode) else None


_cached_place = lru_cache(maxsize=4096, typed=True)(_placed)


def _place(
    input: Tensor, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> tuple | None:
    arguments = (input.shape, rank, kernel_size, stride, padding, dilation, bool(ceil_mode))
    if is_compiling():
        return _placed(*arguments)
    try:
        return _cached_place(*arguments)
    except TypeError:  # lists, and sizes that are symbols, which are not hashable
        return _placed(*arguments)


def _max_pool(
    rank: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    return_indices: bool,
) -> Any:
    check_tensor(input)
    numbers = _place(input, rank, kernel_size, stride, padding, dilation, ceil_mode)
    if numbers is None:
        theirs = getattr(reference, f"max_pool{rank}d")
        fail_as_torch(
            f"max_pool{rank}d does not take these arguments",
            theirs,
            input,
            kernel_size,
            stride,
            padding,
            dilation,
            ceil_mode=ceil_mode,
            return_indices=return_indices,
        )
    return _largest(input, rank, numbers, return_indices)


def _largest(input: Tensor, rank: int, numbers: tuple, return_indices: bool) -> Any:
    channels_last = arrays.is_channels_last(input) and input.dim() == rank + 2
    y, taps = pool_rows.max_pool(input, *numbers, channels_last)
    if not return_indices:
        return y
    return y, pool_rows.max_pool_indices(taps, input.shape[-rank:], *numbers, channels_last)


def max_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Largest value of each window of ``(N, C, L)`` or ``(C, L)``."""
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Largest value of each window of ``(N, C, H, W)`` or ``(C, H, W)``."""
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Largest value of each window of ``(N, C, D, H, W)`` or ``(C, D, H, W)``."""
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _avg_pool(
    rank: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    check_tensor(input)
    numbers = _place(input, rank, kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override == 0 or numbers is None:
        theirs = getattr(reference, f"avg_pool{rank}d")
        given = (kernel_size, () if stride is None else stride, padding, ceil_mode, count_include_pad)
        divisor = () if rank == 1 else (divisor_override,)
        fail_as_torch(f"avg_pool{rank}d does not take these arguments", theirs, input, *given, *divisor)
    channels_last = arrays.is_channels_last(input) and input.dim() == rank + 2
    return pool_rows.avg_pool(input, *numbers, bool(count_include_pad), divisor_override, channels_last)


def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Mean of each window of ``(N, C, L)`` or ``(C, L)``."""
    return _avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean of each window of ``(N, C, H, W)`` or ``(C, H, W)``."""
    return _avg_pool(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean of each window of ``(N, C, D, H, W)`` or ``(C, D, H, W)``."""
    return _avg_pool(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _lp_pool(rank: int, input: Tensor, norm_type: float, kernel_size: Any, stride: Any, ceil_mode: bool) -> Tensor:
    check_tensor(input)
    numbers = _place(input, rank, kernel_size, stride, 0, 1, ceil_mode)
    if numbers is None:
        fail_as_torch(
            f"lp_pool{rank}d does not take these arguments",
            getattr(reference, f"lp_pool{rank}d"),
            input,
            norm_type,
            kernel_size,
            stride,
            ceil_mode,
        )
    norm_type = float(norm_type)
    # Compared, not math.isinf: a compiled graph may hold a symbol for the number.
    if norm_type == math.inf or norm_type == -math.inf:
        sign = 1 if norm_type > 0 else -1
        return sign * _largest(sign * input.abs(), rank, numbers, False)
    if not norm_type > 0:
        raise ValueError(f"norm_type must be greater than zero, but got {norm_type}")
    kernel, strides = numbers[:2]
    channels_last = arrays.is_channels_last(input) and input.dim() == rank + 2
    return pool_rows.lp_pool(input, norm_type, kernel, strides, bool(ceil_mode), channels_last)[0]


def lp_pool1d(input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:
    """``(sum |x|^p)^(1/p)`` of each window of ``(N, C, L)`` or ``(C, L)``; torch's for x >= 0."""
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:
    """``(sum |x|^p)^(1/p)`` of each window of ``(N, C, H, W)`` or ``(C, H, W)``; torch's for x >= 0."""
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:
    """``(sum |x|^p)^(1/p)`` of each window of ``(N, C, D, H, W)`` or ``(C, D, H, W)``; torch's for x >= 0."""
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)


def _adaptive(shape: Any, rank: int, output_size: Any) -> tuple | None:
    """Output sizes of an adaptive pooling of an input of this shape; None where there are none."""
    if not isinstance(output_size, (tuple, list)):
        output_size = (output_size,) * rank
    elif len(output_size) == 1:
        output_size = tuple(output_size) * rank
    if len(output_size) != rank or len(shape) not in (rank + 1, rank + 2):
        return None
    image = shape[-rank - 1 :]
    for size in image:
        if size == 0:
            return None
    sizes = tuple(own if size is None else size for size, own in zip(output_size, image[1:], strict=True))
    for size in sizes:
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool) or size < 0:
            return None
    return sizes


_cached_adaptive = lru_cache(maxsize=4096, typed=True)(_adaptive)


def _output_size(input: Tensor, output_size: Any, rank: int) -> tuple | None:
    if is_compiling():
        return _adaptive(input.shape, rank, output_size)
    try:
        return _cached_adaptive(input.shape, rank, output_size)
    except TypeError:  # lists, and sizes that are symbols, which are not hashable
        return _adaptive(input.shape, rank, output_size)


def _adaptive_max_pool(rank: int, input: Tensor, output_size: Any, return_indices: bool) -> Any:
    check_tensor(input)
    sizes = _output_size(input, output_size, rank)
    if sizes is None:
        fail_as_torch(
            f"adaptive_max_pool{rank}d does not take these arguments",
            getattr(reference, f"adaptive_max_pool{rank}d"),
            input,
            output_size,
        )
    return _largest(input, rank, ((), (), (), (), False, sizes), return_indices)


def _adaptive_avg_pool(rank: int, input: Tensor, output_size: Any) -> Tensor:
    check_tensor(input)
    sizes = _output_size(input, output_size, rank)
    if sizes is None:
        fail_as_torch(
            f"adaptive_avg_pool{rank}d does not take these arguments",
            getattr(reference, f"adaptive_avg_pool{rank}d"),
            input,
            output_size,
        )
    channels_last = arrays.is_channels_last(input) and input.dim() == rank + 2
    return pool_rows.avg_pool(input, (), (), (), (), False, sizes, True, None, channels_last)


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Largest value of each window, of windows that cut ``(N, C, L)`` into an output of this size."""
    return _adaptive_max_pool(1, input, output_size, return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Largest value of each window, of windows that cut ``(N, C, H, W)`` into an output of this size."""
    return _adaptive_max_pool(2, input, output_size, return_indices)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Largest value of each window, of windows that cut ``(N, C, D, H, W)`` into an output of this size."""
    return _adaptive_max_pool(3, input, output_size, return_indices)


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Mean of each window, of windows that cut ``(N, C, L)`` into an output of this size."""
    return _adaptive_avg_pool(1, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Mean of each window, of windows that cut ``(N, C, H, W)`` into an output of this size."""
    return _adaptive_avg_pool(2, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """Mean of each window, of windows that cut ``(N, C, D, H, W)`` into an output of this size."""
    return _adaptive_avg_pool(3, input, output_size)


def _max_unpool(
    rank: int, input: Tensor, indices: Tensor, kernel_size: Any, stride: Any, padding: Any, output_size: Any
) -> Tensor:
    check_tensor(input)
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a torch.Tensor, got {type(indices).__name__}")
    theirs = getattr(reference, f"max_unpool{rank}d")
    as_theirs = (
        f"max_unpool{rank}d does not take these arguments",
        theirs,
        input,
        indices,
        kernel_size,
        stride,
        padding,
        output_size,
    )
    sizes = _unpooled_size(input, indices, rank, kernel_size, stride, padding, output_size)
    if sizes is None:
        fail_as_torch(*as_theirs)
    check_same_device(input, indices)
    if not pool_rows.indices_are_valid(indices, sizes):
        extent = "x".join(map(str, sizes))
        fail_as_torch(f"Found an invalid max index: output volumes are of size {extent}", *as_theirs[1:])
    channels_last = arrays.is_channels_last(input) and input.dim() == rank + 2
    return pool_rows.max_unpool(input, indices, sizes, channels_last)


def _unpooled_size(
    input: Tensor, indices: Tensor, rank: int, kernel_size: Any, stride: Any, padding: Any, output_size: Any
) -> tuple | None:
    """Spatial sizes of the output; None where there is none."""
    given = []
    for value in (kernel_size, kernel_size if stride is None else stride, padding):
        values = _per_axis(value, rank)
        if len(values) != rank:
            return None
        given.append(values)
    if input.dim() not in (rank + 1, rank + 2) or indices.shape != input.shape or indices.dtype is not torch.int64:
        return None
    shape = input.shape[-rank - 1 :]
    for size in shape:
        if size == 0:
            return None
    kernel, strides, pads = given
    sizes = tuple(
        (size - 1) * s + k - 2 * pad for size, k, s, pad in zip(shape[1:], kernel, strides, pads, strict=True)
    )
    if output_size is not None:
        wanted = tuple(output_size)[2:] if len(output_size) == rank + 2 else tuple(output_size)
        if len(wanted) != rank:
            return None
        for own, one, s in zip(sizes, wanted, strides, strict=True):
            if not own - s < one < own + s:
                return None
        sizes = wanted
    for size in sizes:
        if size < 1:
            return None
    return sizes


def max_unpool1d(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Tensor:
    """Each value of ``(N, C, L)`` at its index in the output, and 0 elsewhere: the inverse of :func:`max_pool1d`."""
    return _max_unpool(1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Tensor:
    """Each value of ``(N, C, H, W)`` at its index in the output, and 0 elsewhere: the inverse of :func:`max_pool2d`."""
    return _max_unpool(2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Tensor:
    """Each value of ``(N, C, D, H, W)`` at its index in the output: the inverse of :func:`max_pool3d`."""
    return _max_unpool(3, input, indices, kernel_size, stride, padding, output_size)
