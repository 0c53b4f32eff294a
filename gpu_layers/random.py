"""Random numbers of the layers: a seed, and a counter that each training call of a dropout layer advances."""

from __future__ import annotations

import secrets

import numpy as np

from gpu_layers.ops.checks import check_integer, check_uint64
from gpu_layers.reference.philox import SEED_STEP, philox4x32_10

_LOW_32 = 0xFFFFFFFF


class Generator:
    """A stream of dropout masks.

    Parameters
    ----------
    seed : int, optional
        In ``0 .. 2**64 - 1``; from the operating system's entropy by default.
    offset : int
        Number of the next call, in ``0 .. 2**64 - 1``.

    Raises
    ------
    TypeError, ValueError
        If seed or offset is not such a number.
    """

    def __init__(self, seed: int | None = None, offset: int = 0) -> None:
        self._seed = secrets.randbits(64) if seed is None else check_uint64(seed, "seed")
        self._offset = check_uint64(offset, "offset")

    def __repr__(self) -> str:
        return f"Generator(seed={self._seed}, offset={self._offset})"

    @property
    def seed(self) -> int:
        """Key of every mask."""
        return self._seed

    @property
    def offset(self) -> int:
        """Number of the next call."""
        return self._offset

    def next_offset(self) -> int:
        """The current offset; the next call gets the one after."""
        current = self._offset
        self._offset = (current + 1) % 2**64
        return current

    def get_state(self) -> dict[str, int]:
        """Seed and offset, for :meth:`set_state`."""
        return {"seed": self._seed, "offset": self._offset}

    def set_state(self, state: dict[str, int]) -> None:
        """Go back to a state.

        Raises
        ------
        TypeError, ValueError
            If it is not one that :meth:`get_state` gives; the generator is then unchanged.
        """
        if not isinstance(state, dict):
            raise TypeError(f"generator state must be a dict, got {type(state).__name__}")
        if set(state) != {"seed", "offset"}:
            raise ValueError(f"generator state must hold seed and offset, got {sorted(map(str, state))}")
        seed, offset = check_uint64(state["seed"], "seed"), check_uint64(state["offset"], "offset")
        self._seed, self._offset = seed, offset

    def spawn(self, n: int) -> list[Generator]:
        """Generators of n distinct streams: the same ones for the same seed and offset.

        The seeds are 64 Philox bits of this seed and offset plus multiples of an odd number, hence all different.
        This generator is not advanced.

        Raises
        ------
        TypeError, ValueError
            If n is not an integer of at least 0.
        """
        n = check_integer(n, "n", 0, 2**63 - 1)
        # No element of a mask ever uses this block: its number, 2**64 - 1, is beyond that of the last element.
        block = philox4x32_10(
            np.array([[_LOW_32], [_LOW_32], [self._offset & _LOW_32], [self._offset >> 32]], dtype=np.uint32),
            (self._seed & _LOW_32, self._seed >> 32),
        )
        base = int(block[0, 0]) | int(block[0, 1]) << 32
        return [Generator((base + child * SEED_STEP) % 2**64) for child in range(n)]


def manual_seed(seed: int) -> Generator:
    """Restart :data:`default_generator` with a seed, at offset 0.

    Returns
    -------
    Generator
        The default generator.
    """
    default_generator.set_state({"seed": check_uint64(seed, "seed"), "offset": 0})
    return default_generator


#: The generator of every layer that was given none.
default_generator = Generator()
