"""What repeated timings say: the middle, the spread, and whether two of them differ beyond it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one call, in microseconds.

    Attributes
    ----------
    median, low, high : float
        Half of the samples are below the median, a tenth below ``low``, a tenth above ``high``.
    samples : int
    clock : {"events", "host"}
        Events on the device's own time line, or the host's clock around synchronised calls.
    steady : bool
        Whether the host was ahead of the device in every sample, so that no waiting for the host is in the numbers.
    """

    median: float
    low: float
    high: float
    samples: int
    clock: str = "events"
    steady: bool = True

    @property
    def spread(self) -> float:
        """Distance from ``low`` to ``high``, as a part of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def quantile(ordered: Sequence[float], part: float) -> float:
    """The value that this part of the ordered samples is below, between two samples in proportion."""
    place = part * (len(ordered) - 1)
    before = math.floor(place)
    after = min(before + 1, len(ordered) - 1)
    return ordered[before] + (place - before) * (ordered[after] - ordered[before])


def summarize(seconds: Sequence[float], clock: str = "events", steady: bool = True) -> Timing:
    """Middle and spread of samples in seconds.

    Raises
    ------
    ValueError
        If there are none.
    """
    if not seconds:
        raise ValueError("no samples")
    ordered = sorted(1e6 * value for value in seconds)
    median, low, high = (quantile(ordered, part) for part in (0.5, 0.1, 0.9))
    return Timing(median, low, high, len(ordered), clock, steady)


def verdict(old: Timing, new: Timing, at_least: float = 0.03) -> str:
    """``"faster"``, ``"slower"`` or ``"same"``: beyond the spread of both, and by 3 % or more.

    Two runs of one version differ by a few percent whatever their samples say (clocks, other memory addresses).
    """
    if abs(new.median - old.median) < at_least * old.median:
        return "same"
    if new.high < old.low:
        return "faster"
    return "slower" if new.low > old.high else "same"
