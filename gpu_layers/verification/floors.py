"""The fewest bytes that each operation can move: the one declaration, for kernels that are counted, modelled or timed.

Each input once and each output once, what belongs to channels included. Of batch norm in training each input as often
as ``reads`` says: twice where the values cannot be kept until the statistics are known, or must not, because processes
exchange them in between.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Sizes:
    """What byte counts are made of.

    Attributes
    ----------
    inputs, outputs : int
        Elements of x and of y.
    itemsize : int
        Bytes of one.
    shape : tuple of int
        (N, C, *spatial) of x.
    """

    inputs: int
    outputs: int
    itemsize: int
    shape: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """Elements of a channel of x."""
        return self.inputs // self.shape[1]

    @property
    def statistic(self) -> int:
        """Bytes of one number for each channel, of the type that statistics have."""
        return self.accumulated * self.shape[1]

    @property
    def accumulated(self) -> int:
        """Bytes of a number of the type that is computed in."""
        return max(self.itemsize, 4)

    def elements(self, inputs: int, outputs: int = 0) -> int:
        """Bytes of this many arrays like x and like y."""
        return self.itemsize * (inputs * self.inputs + outputs * self.outputs)


def dropout(s: Sizes, kept: float = 1.0) -> int:
    """A pass of dropout. What is dropped with its neighbours need not be read: ``kept`` is the rest's part."""
    return s.elements(1) + round(kept * s.elements(1))


def dropout_moments(s: Sizes) -> int:
    """Mean and variance are of the type that is computed in."""
    return s.elements(1) + 2 * s.accumulated * s.inputs


def relu(s: Sizes) -> int:
    """A pass of ReLU: one bit an element is all that the backward needs besides dy."""
    return s.elements(2) + s.inputs // 8


def activation_dropout(s: Sizes, direction: str, saves_bits: bool) -> int:
    """The backward needs x, or, of ReLU, one bit an element."""
    if saves_bits:
        return s.elements(2) + s.inputs // 8
    return s.elements(2 if direction == FORWARD else 3)


def dropout_add(s: Sizes, direction: str, activation: str | None, *, bias: bool) -> int:
    """A bias of a number of the last axis, of the type that is computed in; the residual's gradient is that of y.

    The backward needs x, or, of ReLU, one bit an element, or nothing.
    """
    numbers = s.accumulated * s.shape[-1] if bias else 0
    bits = s.inputs // 8 if activation == "relu" else 0
    if direction == FORWARD:
        return s.elements(3) + bits + numbers
    keeps = activation not in (None, "relu")
    return s.elements(3 if keeps else 2) + bits + numbers * (2 if keeps else 1)


# Numbers of a channel that a forward of batch norm keeps: mean, variance, 1 / deviation, gamma, beta; and those of
# them that its backward reads.
_KEPT, _READ = 5, 4


def batch_norm(s: Sizes, direction: str, *, reads: int = 1, residual: bool = False, affine: bool = False) -> int:
    """In training; of a channel what the forward keeps, or what of it the backward reads, and two gradients.

    With a residual, ReLU follows, and the residual has a gradient too. ``affine``: gamma and beta are given.
    """
    if direction == FORWARD:
        return s.elements(reads + residual + 1) + (_KEPT + 2 * affine) * s.statistic
    return s.elements((2 + residual) * reads + 1 + residual) + (_READ + 2) * s.statistic


def batch_norm_double_backward(s: Sizes, *, residual: bool = False) -> int:
    """The gradients of dx and dgamma and dbeta, dy, x, twice; results of their shapes.

    With a residual, it and the gradient of its gradient too, the latter once.
    """
    return s.elements(8 + 3 * residual) + (_READ + 3) * s.statistic


def batch_norm_inference(s: Sizes, *, affine: bool = False) -> int:
    """Of a channel mean and variance, gamma and beta, and what is kept of them."""
    return s.elements(2) + (2 + 2 * affine + _KEPT) * s.statistic


def ghost_batch_norm(groups: list[tuple[Sizes, int]], direction: str, *, affine: bool = False) -> int:
    """Groups of samples, each with its reads: a batch of its own each."""
    return sum(batch_norm(s, direction, reads=reads, affine=affine) for s, reads in groups)


def sync_batch_norm(s: Sizes, direction: str, *, residual: bool = False, affine: bool = False) -> int:
    """One of several processes: what it kept is lost in the exchange, which the statistics stand on both sides of.

    The statistics do not need the residual.
    """
    inputs = 2 if residual else 1
    if direction == FORWARD:
        return s.elements(2 + inputs) + (_KEPT + 2 + 2 * affine + _KEPT) * s.statistic
    return s.elements(2 * (1 + inputs) + inputs) + 2 * (_READ + 2) * s.statistic


def padded_batch_norm(s: Sizes, direction: str, valid: int, *, reads: int = 1, affine: bool = False) -> int:
    """``valid`` elements of the inputs, and all of the outputs, whose padding is to be 0. The lengths are apart."""
    arrays = reads if direction == FORWARD else 2 * reads
    numbers = _KEPT + 2 * affine if direction == FORWARD else _READ + 2
    return s.itemsize * arrays * valid + s.elements(1) + numbers * s.statistic


def batch_norm_max_pool(s: Sizes, direction: str, *, taps: int = 1, reads: int = 1, affine: bool = False) -> int:
    """Forward always reads x twice: it writes nothing that is as large as it. ``taps``: bytes of a maximum's place."""
    pooled = s.elements(0, 1) + taps * s.outputs
    if direction == FORWARD:
        return s.elements(2) + pooled + (_KEPT + 2 * affine) * s.statistic
    return reads * (s.elements(1) + pooled) + s.elements(1) + (_READ + 2) * s.statistic


def pool(s: Sizes, taps: int = 0, seen: int | None = None) -> int:
    """A pass of pooling: ``taps`` bytes for each maximum, ``seen`` elements of x, if not all, that lie in a window."""
    return s.itemsize * (s.inputs if seen is None else seen) + s.elements(0, 1) + taps * s.outputs


def fractional_max_pool(s: Sizes, direction: str, starts: int, seen: int | None = None) -> int:
    """``starts``: bytes of the windows' starts, which the forward writes besides; ``seen``: elements in a window."""
    return pool(s, 1, seen) + (2 * starts if direction == FORWARD else starts)


def lp_pool(s: Sizes, direction: str, taps: int = 0) -> int:
    """Kept of each output: of the largest value its place, of ``taps`` bytes. The backward reads x too."""
    return s.elements(1 if direction == FORWARD else 2, 1) + taps * s.outputs


def max_unpool(s: Sizes, direction: str, index: int = 8, touched: int | None = None) -> int:
    """``touched``: bytes of the sectors of the gradient that an index points into, if not all of it."""
    if direction == FORWARD:
        return s.elements(1, 1) + index * s.inputs
    return s.elements(1) + index * s.inputs + (s.elements(0, 1) if touched is None else touched)
