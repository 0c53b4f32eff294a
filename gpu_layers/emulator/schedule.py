"""In which order the threads and blocks of a launch run."""

from __future__ import annotations

from dataclasses import dataclass

#: ``Schedule`` of ``host/launch_abi.h``.
_CODES = {"ascending": 0, "descending": 1, "random": 2}


@dataclass(frozen=True)
class Schedule:
    """A kernel that is correct gives the same result under every schedule.

    Each thread runs until it must wait. Then the next one does:

    Attributes
    ----------
    order : {"ascending", "descending", "random"}
        Of the threads in a block. "descending" also runs the last block first.
    seed : int
        Of the random choices.
    shuffle_blocks : bool
        Run the blocks in random order.
    """

    order: str = "ascending"
    seed: int = 0
    shuffle_blocks: bool = False

    def __post_init__(self) -> None:
        if self.order not in _CODES:
            raise ValueError(f"schedule order must be one of {', '.join(_CODES)}, got {self.order!r}")

    @property
    def code(self) -> int:
        """The number a compiled module knows the order by."""
        return _CODES[self.order]


#: One of each kind, for tests that compare them.
ALL_SCHEDULES: tuple[Schedule, ...] = (
    Schedule("ascending"),
    Schedule("descending"),
    Schedule("random", seed=1),
    Schedule("random", seed=2, shuffle_blocks=True),
)
