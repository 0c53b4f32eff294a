"""Random numbers of the layers: a seed, and a counter that each training forward of a dropout layer advances."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_integer, check_uint64
from gpu_layers.core.cuda import array_module, place_of, require_gpu
from gpu_layers.core.philox import SEED_STEP, philox4x32_10, sample_seed
from gpu_layers.core.writes import record_write
from gpu_layers.runtime.backend import backend_for

_LOW_32 = 0xFFFFFFFF
#: "weights" in ASCII, as a number.
_WEIGHTS = int.from_bytes(b"weights", "big")

#: Set by :func:`gpu_layers.capture`: the source of a captured step's masks, with a method ``call(generator, taken)``.
device_draws: ContextVar[Any] = ContextVar("gpu_layers_device_draws", default=None)
#: What notes the calls of a forward, or gives them out again: a :class:`CallRecord`, or None.
_record: ContextVar[CallRecord | None] = ContextVar("gpu_layers_call_record", default=None)


class Generator:
    """A stream of dropout masks. Threads may share one: each call gets an offset of its own.

    Parameters
    ----------
    seed : int, optional
        In ``0 .. 2**64 - 1``; by default from the operating system's entropy.
    offset : int
        Number of the next call, in ``0 .. 2**64 - 1``.

    Raises
    ------
    TypeError, ValueError
        If seed or offset is not an integer in that range.
    """

    def __init__(self, seed: int | None = None, offset: int = 0) -> None:
        self._seed = secrets.randbits(64) if seed is None else check_uint64(seed, "seed")
        self._offset = check_uint64(offset, "offset")
        self._lock = threading.RLock()
        self._weights: np.random.Generator | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Locks cannot be copied or pickled: a copy has its own.
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Array]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()

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
        return self.take(1)[1]

    def take(self, calls: int) -> tuple[int, int]:
        """Take the offsets of several calls.

        Parameters
        ----------
        calls : int
            How many calls one kernel launch does.

        Returns
        -------
        seed, offset : int
            The offset of the first of them.
        """
        with self._lock:
            current = self._offset
            self._offset = (current + calls) % 2**64
            return self._seed, current

    def give_back(self, offset: int, calls: int) -> None:
        """Undo a :meth:`take`, unless the generator has gone on since.

        Parameters
        ----------
        offset : int
            The offset that it returned.
        calls : int
            As passed to it.
        """
        with self._lock:
            if self._offset == (offset + calls) % 2**64:
                self._offset = offset

    def weights(self) -> np.random.Generator:
        """NumPy's generator of initial weights for this seed; it takes no offset.

        All calls return the same one, so that the next layer gets the next numbers. :meth:`set_state` restarts it.
        """
        with self._lock:
            if self._weights is None:
                # With a key of its own: otherwise the numbers would be those of default_rng with the same seed.
                self._weights = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(_WEIGHTS,)))
            return self._weights

    @property
    def is_on_device(self) -> bool:
        """Whether :meth:`call` gives numbers in device memory."""
        return self.rng_state is not None or device_draws.get() is not None

    @property
    def rng_state(self) -> Array:
        """None; for a :class:`CudaGraphGenerator` the array that holds seed and offset."""
        return None

    def call(self, taken: Array) -> GeneratorCall:
        """A context in which an operation draws its mask; see :class:`GeneratorCall`.

        Parameters
        ----------
        taken : array or None
            :attr:`GeneratorCall.taken` of the caller's last call.

        Returns
        -------
        GeneratorCall
        """
        record = _record.get()
        if record is not None:
            return record.call(self, taken)
        draws = device_draws.get()
        return GeneratorCall(self) if draws is None else draws.call(self, taken)

    def get_state(self) -> dict[str, int]:
        """Seed and offset, for :meth:`set_state`."""
        with self._lock:
            return {"seed": self._seed, "offset": self._offset}

    def set_state(self, state: dict[str, int]) -> None:
        """Go back to a ``state``.

        Raises
        ------
        TypeError, ValueError
            If ``state`` is not one that :meth:`get_state` returns; the generator is then unchanged.
        """
        if not isinstance(state, dict):
            raise TypeError(f"generator state must be a dict, got {type(state).__name__}")
        if set(state) != {"seed", "offset"}:
            raise ValueError(f"generator state must hold seed and offset, got {sorted(map(str, state))}")
        seed, offset = check_uint64(state["seed"], "seed"), check_uint64(state["offset"], "offset")
        with self._lock:
            self._seed, self._offset = seed, offset
            self._weights = None

    def spawn(self, n: int) -> list[Generator]:
        """Generators of n distinct streams: the same ones for the same seed and offset.

        Their seeds are 64 Philox bits of this seed and offset plus multiples of an odd number, so all are different.
        This generator is not advanced.

        Returns
        -------
        list of Generator

        Raises
        ------
        TypeError, ValueError
            If n is not an integer of at least 0.
        """
        n = check_integer(n, "n", 0, 2**63 - 1)
        seed, offset = self.take(0)
        # No element of a mask ever uses this block: its number, 2**64 - 1, is beyond that of the last element.
        block = philox4x32_10(
            np.array([[_LOW_32], [_LOW_32], [offset & _LOW_32], [offset >> 32]], dtype=np.uint32),
            (seed & _LOW_32, seed >> 32),
        )
        base = int(block[0, 0]) | int(block[0, 1]) << 32
        return [Generator((base + child * SEED_STEP) % 2**64) for child in range(n)]


def is_by_counter(generator: Generator) -> bool:
    """Whether a call's numbers are seed and counter of a :class:`Generator`, and nothing notes or repeats it."""
    return type(generator) is Generator and _record.get() is None and device_draws.get() is None


class GeneratorCall:
    """One call of a layer. Entering it takes the generator's next offset; an exception gives the offset back.

    Attributes
    ----------
    seed, offset : int
        Numbers of the mask.
    rng_state : None
        For a :class:`CudaGraphGenerator`, the array that holds them instead.
    taken : None
        For a :class:`CudaGraphGenerator`, after the context: the array that keeps them for backward.
    """

    seed: int | None = None
    offset: int | None = None
    rng_state: Array = None
    taken: Array = None

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def __enter__(self) -> GeneratorCall:
        self.seed, self.offset = self._generator.take(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.offset is not None:
            self._generator.give_back(self.offset, 1)


class CallRecord:
    """The calls of all generators within a block, which can be repeated with the same masks."""

    def __init__(self) -> None:
        self._calls: list[GeneratorCall] = []
        self._again: Iterator[GeneratorCall] | None = None
        self._outer: CallRecord | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the calls in a ``with`` block."""
        self._calls, self._again = [], None
        with self._in_use():
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Repeat the calls in their order; no generator advances."""
        self._again = iter(self._calls)
        with self._in_use():
            yield

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        self._outer = _record.get()
        token = _record.set(self)
        try:
            yield
        finally:
            _record.reset(token)
            self._outer = None

    def call(self, generator: Generator, taken: Array) -> GeneratorCall:
        """A new call of a layer, or the noted call that it repeats."""
        if self._again is not None:
            earlier = next(self._again, None)
            if earlier is None:
                raise RuntimeError("expected the forward to draw the same masks again, got more of them")
            return _RecalledCall(earlier)
        # An outer block notes the call too, or repeats it.
        token = _record.set(self._outer)
        try:
            call = generator.call(taken)
        finally:
            _record.reset(token)
        self._calls.append(call)
        return call

    @property
    def draws(self) -> list[Array]:
        """The arrays on the device that hold the numbers of calls."""
        return [rng_state for rng_state in map(_kept_draw, self._calls) if rng_state is not None]


def _kept_draw(call: GeneratorCall) -> Array:
    """The array on the device that holds the numbers of a finished call, or None."""
    return call.rng_state if isinstance(call, _RecalledCall) else call.taken


class _RecalledCall(GeneratorCall):
    """A call with the numbers of an earlier one."""

    def __init__(self, earlier: GeneratorCall) -> None:
        self.seed, self.offset, self.rng_state = earlier.seed, earlier.offset, _kept_draw(earlier)

    def __enter__(self) -> GeneratorCall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class CudaGraphGenerator(Generator):
    """A generator whose offset is in device memory, for CUDA graphs.

    Kernels read seed and offset there, and a kernel advances the offset, in the order of the stream. So each replay of
    a captured graph draws fresh masks, and the backward that was captured with a forward draws the matching ones.
    Threads may share a generator that is used on one stream.

    Keep the generator and the layers for as long as the graph: it refers to their memory.

    Parameters
    ----------
    seed : int, optional
        In ``0 .. 2**64 - 1``; by default from the operating system's entropy.
    offset : int
        Number of the next call, in ``0 .. 2**64 - 1``.
    device : {"cuda", "cpu"}
        "cuda" is CuPy's current device. With "cpu" the same code runs on NumPy, by the reference or emulated.

    Raises
    ------
    TypeError, ValueError
        If seed or offset is not an integer in that range, or for another device.
    RuntimeError
        If there is no GPU or no CuPy.
    """

    def __init__(self, seed: int | None = None, offset: int = 0, *, device: str = "cuda") -> None:
        super().__init__(seed, offset)
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
        self.device = device
        self._rng_state = (np if device == "cpu" else require_gpu()).empty(3, np.uint64)
        self._write(self._seed, self._offset)

    def __repr__(self) -> str:
        return f"CudaGraphGenerator(seed={self.seed}, offset={self.offset}, device={self.device!r})"

    @property
    def offset(self) -> int:
        """Number of the next call, read back from the device; this waits for the stream."""
        return int(self._rng_state[1])

    @property
    def rng_state(self) -> Array:
        """Seed, offset and the seed of sample 0: three uint64 on the device."""
        return self._rng_state

    def next_offset(self) -> int:
        """The current offset; the next call gets the one after. This waits for the stream; layers do not call it."""
        return super().next_offset()

    def take(self, calls: int) -> tuple[int, int]:
        """Take the offsets of several ``calls``, as :meth:`Generator.take`; this waits for the stream."""
        with self._lock:
            current = self.offset
            if calls:
                self._write(self._seed, (current + calls) % 2**64)
            return self._seed, current

    def give_back(self, offset: int, calls: int) -> None:
        """Undo a :meth:`take`, as :meth:`Generator.give_back`; this waits for the stream.

        Parameters
        ----------
        offset, calls : int
            As in :meth:`Generator.give_back`.
        """
        with self._lock:
            if self.offset == (offset + calls) % 2**64:
                self._write(self._seed, offset)

    def call(self, taken: Array) -> GeneratorCall:
        """A context in which an operation draws its mask; see :class:`CudaGraphCall`.

        Parameters
        ----------
        taken : array or None
            :attr:`GeneratorCall.taken` of the caller's last call; it is used again, so that a captured graph stays
            valid.
        """
        record = _record.get()
        return CudaGraphCall(self, taken) if record is None else record.call(self, taken)

    def advance(self, taken: Array) -> Array:
        """Go on to the next offset, by a kernel.

        Parameters
        ----------
        taken : array or None
            The array to keep the call's numbers in. A new one is made for None, or for an array on another device.

        Returns
        -------
        array of uint64, shape (3,)
            That array.
        """
        if taken is None or array_module(taken) is not array_module(self._rng_state):
            with place_of(self._rng_state):
                taken = array_module(self._rng_state).empty_like(self._rng_state)
        backend_for(self._rng_state).advance_rng_state(self._rng_state, taken)
        record_write(self._rng_state)
        record_write(taken)
        return taken

    def get_state(self) -> dict[str, int]:
        """Seed and offset, for :meth:`set_state`; read back from the device."""
        with self._lock:
            return {"seed": self._seed, "offset": self.offset}

    def set_state(self, state: dict[str, int]) -> None:
        """Go back to a ``state``; a graph that was captured before follows.

        Raises
        ------
        TypeError, ValueError
            If ``state`` is not one that :meth:`get_state` returns; the generator is then unchanged.
        """
        with self._lock:
            super().set_state(state)
            self._write(self._seed, self._offset)

    def spawn(self, n: int) -> list[Generator]:
        """Generators of n distinct streams on the same device: the seeds of :meth:`Generator.spawn`."""
        children = super().spawn(n)
        with place_of(self._rng_state):
            return [CudaGraphGenerator(child.seed, device=self.device) for child in children]

    def _write(self, seed: int, offset: int) -> None:
        numbers = np.array([seed, offset, sample_seed(seed)], np.uint64)
        with place_of(self._rng_state):
            self._rng_state[...] = array_module(self._rng_state).asarray(numbers)
        record_write(self._rng_state)


class CudaGraphCall(GeneratorCall):
    """One call of a layer, with its numbers on the device. Leaving it advances the generator, unless by an error.

    Attributes
    ----------
    seed, offset : None
    rng_state : array of uint64, shape (3,)
        Holds them when kernels run.
    taken : array of uint64, shape (3,)
        After the context: keeps this call's numbers for its backward.
    """

    def __init__(self, generator: CudaGraphGenerator, taken: Array) -> None:
        self._graph_generator, self.rng_state, self.taken = generator, generator.rng_state, taken

    def __enter__(self) -> GeneratorCall:
        self._graph_generator._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.taken = self._graph_generator.advance(self.taken)
        finally:
            self._graph_generator._lock.release()


def manual_seed(seed: int) -> Generator:
    """Restart :data:`default_generator`: its masks, and the weights of layers that are made from now on.

    Parameters
    ----------
    seed : int
        In ``0 .. 2**64 - 1``. The offset becomes 0.

    Returns
    -------
    Generator
        The default generator.

    Raises
    ------
    TypeError, ValueError
        If seed is not an integer in that range.
    """
    default_generator.set_state({"seed": check_uint64(seed, "seed"), "offset": 0})
    return default_generator


#: The generator of every layer without one of its own.
default_generator = Generator()
