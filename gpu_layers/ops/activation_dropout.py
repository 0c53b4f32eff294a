"""Activation and dropout as one stateless pair, in either order."""

from __future__ import annotations

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_choice
from gpu_layers.core.dropout_saved import ActivationDropoutSaved, DropoutSaved
from gpu_layers.core.writes import check_unwritten, write_count
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_activation, check_gradient
from gpu_layers.ops.dropout import call_mask, check_dropout, dropout_backward, dropout_forward
from gpu_layers.ops.output import claim_elementwise
from gpu_layers.runtime.backend import backend_for

__all__ = ["ActivationDropoutSaved", "activation_dropout_backward", "activation_dropout_forward"]

ORDERS = ("after", "before")


def check_order(order: object) -> str:
    """``"after"`` or ``"before"``; ValueError for any other."""
    return check_choice(order, "order", ORDERS)


def activation_dropout_forward(
    x: Array,
    activation: str,
    p: float,
    seed: int | None,
    offset: int | None,
    *,
    order: str = "after",
    start: int = 0,
    rng_state: Array = None,
    channels_last: bool = False,
    out: Array = None,
) -> tuple[Array, ActivationDropoutSaved]:
    """Activation phi and (inverted) dropout D in one kernel: ``D(phi(x))``, or ``phi(D(x))``.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64, any shape and layout.
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"}
        leaky_relu has a slope of 0.01, gelu is the exact one (by erf).
    p, seed, offset, start, rng_state, channels_last
        As in :func:`dropout_forward`: the mask is the same.
    order : {"after", "before"}
        Dropout after the activation (a dropped element is +0 whatever it was) or before it (a dropped element is
        phi(0)).
    out : array, optional
        Where to write y; may be x. A backward that needs x then raises.

    Returns
    -------
    y : array
        x's shape and dtype.
    saved : ActivationDropoutSaved
        For :func:`activation_dropout_backward`.

    Raises
    ------
    TypeError
        For a wrong array type, dtype or number type.
    ValueError
        For an unknown activation or order, p outside [0, 1], seed, offset, start out of range, or an out that cannot
        take the result.
    """
    backend = backend_for(x, optional=(rng_state, out))
    activation, order, drop_below, scale, run = _checked(x, activation, order, p, start, channels_last)
    channels_last = bool(channels_last)
    if activation == "identity":
        y, dropout = dropout_forward(
            x, p, seed, offset, start=start, rng_state=rng_state, channels_last=channels_last, out=out
        )
        return y, ActivationDropoutSaved(activation, order, dropout)
    mask = call_mask(x, drop_below, seed, offset, start, run, None, rng_state)
    # Before out is written to: a backward that needs x then notices.
    writes = write_count()
    source = x if out is None else claim_elementwise(out, x)
    y, bits = backend.activation_dropout_forward(source, activation, mask, scale, order == "before", channels_last, out)
    dropout = DropoutSaved(mask, scale, x.shape, x.dtype, channels_last, writes)
    return y, ActivationDropoutSaved(activation, order, dropout, x if bits is None else None, bits, writes)


@Checked
def _checked(
    x: Array, activation: str, order: str, p: float, start: int, channels_last: bool
) -> tuple[str, str, int, float, int]:
    """Names of the activation and the order; threshold, factor and run of the mask."""
    activation, order = check_activation(activation), check_order(order)
    drop_below, scale, run, _ = check_dropout(x, p, start, None, None, (), False, channels_last)
    return activation, order, drop_below, scale, run


def activation_dropout_backward(dy: Array, saved: ActivationDropoutSaved, *, out: Array = None) -> Array:
    """Gradient of :func:`activation_dropout_forward`, in one kernel.

    With the mask m it is ``m / (1 - p) * phi'(x) * dy`` for the order "after" and ``phi'(D(x)) * m / (1 - p) * dy`` for
    "before"; +0 where an element was dropped.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : ActivationDropoutSaved
    out : array, optional
        Where to write the result; may be dy, must not overlap x if the gradient depends on it.

    Returns
    -------
    array
        Shape and dtype of x.

    Raises
    ------
    TypeError
        If dy has another array type or dtype than y.
    ValueError
        If dy has another shape than y, or out cannot take the result.
    RuntimeError
        If the gradient depends on x and this library has written to x since the forward.
    """
    dropout = saved.dropout
    if saved.activation == "identity":
        return dropout_backward(dy, dropout, out=out)
    backend = backend_for(dy, optional=(saved.x, saved.gradient_bits, dropout.mask.rng_state, out))
    check_gradient(dy, dropout.shape, dropout.dtype)
    if saved.gradient_bits is None:
        check_unwritten(saved.writes, x=saved.x)
        dropout.check_unwritten()
    if out is not None:
        dy = claim_elementwise(out, dy, apart=(saved.x,))
    if saved.gradient_bits is not None:
        return backend.relu_dropout_backward(dy, saved.gradient_bits, dropout.scale, out)
    of_call = dropout.mask, dropout.scale, saved.order == "before", dropout.channels_last
    return backend.activation_dropout_backward(dy, saved.x, saved.activation, *of_call, out)
