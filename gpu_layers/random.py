"""Random numbers of the layers: a seed, and a counter that each training call of a dropout layer advances."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np

from gpu_layers.ops.checks import check_integer, check_uint64
from gpu_layers.reference.philox import SEED_STEP, philox4x32_10, sample_seed
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.cuda import array_module, require_gpu

_LOW_32 = 0xFFFFFFFF
#: "weights" in ASCII, as a number.
_WEIGHTS = int.from_bytes(b"weights", "big")


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
        self._weights: np.random.Generator | None = None

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

    def weights(self) -> np.random.Generator:
        """NumPy's generator of the initial weights that this seed gives; it takes no offset.

        One for all calls, so that the next layer gets the next numbers. :meth:`set_state` starts it anew.
        """
        if self._weights is None:
            # A key of its own: else the numbers would be those that a user draws from default_rng with the same seed.
            self._weights = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(_WEIGHTS,)))
        return self._weights

    def numbers(self) -> tuple[int | None, int | None]:
        """Seed and offset of the next call; None for both where :attr:`draw` holds them."""
        return self._seed, self._offset

    @property
    def draw(self) -> Any:
        """None; of a :class:`CudaGraphGenerator` the array that holds seed and offset."""
        return None

    def advance(self, taken: Any) -> Any:
        """Go on to the next offset, once a call has taken the current one.

        Parameters
        ----------
        taken : array or None
            What the caller's last call to this got.

        Returns
        -------
        array or None
            Where the numbers of this call are kept for its backward; None where they are known as :meth:`numbers`.
        """
        self.next_offset()
        return None

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
        self._weights = None

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


class CudaGraphGenerator(Generator):
    """A generator whose offset lies in device memory, for CUDA graphs.

    Kernels read seed and offset where they lie, and a kernel advances the offset, in the order of the stream: each
    replay of a captured graph draws fresh masks, and the backward captured with a forward draws the matching ones.

    Keep the generator and the layers for as long as the graph is used: it refers to their memory.

    Parameters
    ----------
    seed : int, optional
        In ``0 .. 2**64 - 1``; from the operating system's entropy by default.
    offset : int
        Number of the next call, in ``0 .. 2**64 - 1``.
    device : {"cuda", "cpu"}
        CuPy's current device; or NumPy, where the same code runs on the reference and emulated.

    Raises
    ------
    TypeError, ValueError
        If seed or offset is not such a number, or for another device.
    RuntimeError
        If there is no GPU or no CuPy.
    """

    def __init__(self, seed: int | None = None, offset: int = 0, *, device: str = "cuda") -> None:
        super().__init__(seed, offset)
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
        self.device = device
        self._draw = (np if device == "cpu" else require_gpu()).empty(3, np.uint64)
        self._write(self._seed, self._offset)

    def __repr__(self) -> str:
        return f"CudaGraphGenerator(seed={self.seed}, offset={self.offset}, device={self.device!r})"

    @property
    def offset(self) -> int:
        """Number of the next call, read back from the device, which waits for the stream."""
        return int(self._draw[1])

    @property
    def draw(self) -> Any:
        """Seed, offset and the seed of sample 0: three uint64 on the device."""
        return self._draw

    def numbers(self) -> tuple[int | None, int | None]:
        """None for both: kernels read them from :attr:`draw`."""
        return None, None

    def next_offset(self) -> int:
        """The current offset; the next call gets the one after. Waits for the stream: layers do not call it."""
        current = self.offset
        self._write(self._seed, (current + 1) % 2**64)
        return current

    def advance(self, taken: Any) -> Any:
        """Go on to the next offset, by a kernel.

        Parameters
        ----------
        taken : array or None
            What the caller's last call to this got; used again, so that a captured graph stays valid.

        Returns
        -------
        array of uint64, shape (3,)
            The numbers that the call took.
        """
        if taken is None or array_module(taken) is not array_module(self._draw):
            taken = array_module(self._draw).empty_like(self._draw)
        backend_for(self._draw).advance_draw(self._draw, taken)
        return taken

    def get_state(self) -> dict[str, int]:
        """Seed and offset, for :meth:`set_state`; read back from the device."""
        return {"seed": self._seed, "offset": self.offset}

    def set_state(self, state: dict[str, int]) -> None:
        """Go back to a state; a graph captured before follows.

        Raises
        ------
        TypeError, ValueError
            If it is not one that :meth:`get_state` gives; the generator is then unchanged.
        """
        super().set_state(state)
        self._write(self._seed, self._offset)

    def spawn(self, n: int) -> list[Generator]:
        """Generators of n distinct streams on the same device: the seeds of :meth:`Generator.spawn`."""
        children = Generator(self._seed, self.offset).spawn(n)
        return [CudaGraphGenerator(child.seed, device=self.device) for child in children]

    def _write(self, seed: int, offset: int) -> None:
        numbers = np.array([seed, offset, sample_seed(seed)], np.uint64)
        self._draw[...] = array_module(self._draw).asarray(numbers)


def manual_seed(seed: int) -> Generator:
    """Restart :data:`default_generator` with a seed, at offset 0: masks, and weights of layers that are made from here.

    Returns
    -------
    Generator
        The default generator.
    """
    default_generator.set_state({"seed": check_uint64(seed, "seed"), "offset": 0})
    return default_generator


#: The generator of every layer that was given none.
default_generator = Generator()
