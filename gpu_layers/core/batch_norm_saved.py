"""What a batch norm saves for its backward: an argument of both backends."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from gpu_layers.core.array import Array
from gpu_layers.core.valid import ValidPositions
from gpu_layers.core.writes import check_unwritten, write_count


@dataclass(slots=True)
class BatchNormSaved:
    """What backward needs.

    Attributes
    ----------
    x : array
        The input itself. Backward notices what this library has written to it.
    statistics : array, shape (5, C)
        Rows :attr:`mean`, :attr:`var`, :attr:`inv_std`, :attr:`gamma` and :attr:`beta`, copied in the forward: changing
        parameters or running statistics before backward does not change them. float64 for float64 input, float32 for
        all others.
    channels_last : bool
    residual : array or None
        What was added before the activation, not copied. Backward computes the activation's input from this and x.
    activation : str
    writes : int
        :func:`write_count` of the forward.
    valid : ValidPositions or None
        Of a padded batch, the positions that count.
    """

    x: Array
    statistics: Array
    channels_last: bool = False
    residual: Array = None
    activation: str = "identity"
    writes: int = field(default_factory=write_count)
    valid: ValidPositions | None = None

    def check_unwritten(self) -> None:
        """RuntimeError if this library has written to an array that backward reads, since the forward."""
        residual = None if self.activation == "identity" else self.residual
        check_unwritten(self.writes, x=self.x, residual=residual)

    @property
    def mean(self) -> Array:
        """Mean: of the batch in training, the given one in inference; shape (C,)."""
        return self.statistics[0]

    @property
    def var(self) -> Array:
        """Biased variance: of the batch in training, the given one in inference; shape (C,)."""
        return self.statistics[1]

    @property
    def inv_std(self) -> Array:
        """``1 / sqrt(var + eps)``."""
        return self.statistics[2]

    @property
    def gamma(self) -> Array:
        """Weight, shape (C,); 1 if there was none."""
        return self.statistics[3]

    @property
    def beta(self) -> Array:
        """Bias, shape (C,); 0 if there was none."""
        return self.statistics[4]

    @property
    def count(self) -> int:
        """Values per channel."""
        if self.valid is not None:
            return self.valid.count
        return int(self.x.size // max(self.statistics.shape[1], 1))


@dataclass(slots=True)
class GhostBatchNormSaved:
    """What the backward of groups of samples needs.

    Attributes
    ----------
    x : array
        The input.
    bounds : tuple of int
        Where groups begin and end on the first axis.
    statistics : array, shape (groups, at least 5 C)
        Of each group, one after the other.
    channels_last, residual, activation, writes
        As of :class:`BatchNormSaved`.
    valid : tuple of ValidPositions
        Of a padded batch, the positions of each group that count.
    """

    x: Array
    bounds: tuple[int, ...]
    statistics: Array
    channels_last: bool = False
    residual: Array = None
    activation: str = "identity"
    writes: int = field(default_factory=write_count)
    valid: tuple[ValidPositions, ...] = ()

    def check_unwritten(self) -> None:
        """RuntimeError if this library has written to an array that backward reads, since the forward."""
        residual = None if self.activation == "identity" else self.residual
        check_unwritten(self.writes, x=self.x, residual=residual)

    @property
    def groups(self) -> tuple[BatchNormSaved, ...]:
        """What the backward of each group needs."""
        channels = self.x.shape[-1 if self.channels_last else 1]
        return tuple(
            BatchNormSaved(
                self.x[start:stop],
                self.statistics[group, : 5 * channels].reshape(5, channels),
                self.channels_last,
                None if self.residual is None else self.residual[start:stop],
                self.activation,
                self.writes,
                self.valid[group] if self.valid else None,
            )
            for group, (start, stop) in enumerate(pairwise(self.bounds))
        )
