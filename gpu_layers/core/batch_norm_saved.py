"""What a batch norm saves for its backward: an argument of both backends."""

from __future__ import annotations

from dataclasses import dataclass, field

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
