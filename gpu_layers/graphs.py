"""Capturing a step as a CUDA graph: what its layers need is set up, kept, and brought up to date in each replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from gpu_layers import random
from gpu_layers.ops.checks import check_integer
from gpu_layers.random import CudaGraphGenerator, Generator, GeneratorCall
from gpu_layers.runtime.cuda import require_gpu


def capture(step: Callable[[], Any], *, warmup: int = 2) -> Graph:
    """Capture a step as a CUDA graph, on the current device.

    The step runs ``warmup`` times for good, as calls of it would (parameters, running statistics and generators go on):
    kernels are compiled and loaded, and memory gets its size. Then it is recorded, which executes nothing. Everything
    that a step allocates comes from a memory pool of the graph's own, which nobody else is given memory from.

    Masks are those of the layers' generators: a replay takes the offsets that a call of the step would take, and any
    generator will do.

    Parameters
    ----------
    step : callable
        Without arguments. It reads its input from arrays that are written to between replays, and enqueues the same
        work in each call: nothing in it may wait for the device, or depend on values there.
    warmup : int
        At least 1.

    Returns
    -------
    Graph

    Raises
    ------
    RuntimeError
        If there is no GPU, or the step does what a graph cannot hold: ``SyncBatchNorm``, padded batches (``lengths=``,
        ``mask=`` of batch norm), ``MaxUnpool`` with checked indices, or reading a value back. Nothing is captured then.
    TypeError, ValueError
        If warmup is no such number.

    Examples
    --------
    >>> x = cupy.empty((64, 128), cupy.float32)  # doctest: +SKIP
    >>> graph = gl.capture(lambda: model(x))  # doctest: +SKIP
    >>> for batch in batches:  # doctest: +SKIP
    ...     x[...] = batch
    ...     y = graph.replay()  # the same array each time
    """
    warmup = check_integer(warmup, "warmup", 1, 2**31 - 1)
    cupy = require_gpu()
    pool, stream, draws = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True), _DeviceDraws()
    outside = cupy.cuda.get_current_stream()
    stream.wait_event(outside.record())
    with stream, cupy.cuda.using_allocator(pool.malloc), draws.in_use():
        for run in range(warmup):
            if run:
                draws.begin()
            step()
            draws.are_known = True
        stream.begin_capture()
        try:
            result = step()
        except BaseException:
            # What was recorded is of no use, and ending it may be an error too.
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
                stream.end_capture()
            raise
        captured = stream.end_capture()
    outside.wait_event(stream.record())
    return Graph(captured, result, draws, pool)


class Graph:
    """A captured step; see :func:`capture`.

    Attributes
    ----------
    result : object
        What the step returned when it was captured: arrays that each replay fills anew.
    """

    def __init__(self, captured: Any, result: Any, draws: _DeviceDraws, pool: Any) -> None:
        self.result = result
        self._captured, self._draws = captured, draws
        # The graph writes to this memory: it must belong to nobody else for as long.
        self._pool = pool

    def replay(self) -> Any:
        """Run the step once more, on CuPy's current stream, without waiting for it; gives :attr:`result`."""
        self._draws.begin()
        self._captured.launch()
        return self.result


class _DeviceDraws:
    """Twins on the device of the generators that a step uses: kernels read offsets there, and advance them.

    Attributes
    ----------
    are_known : bool
        Whether the step has run, so that it is known how many offsets it takes of which generator.
    """

    def __init__(self) -> None:
        self.are_known = False
        self._twins: dict[int, _Twin] = {}

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let generators draw from their twins."""
        token = random.device_draws.set(self)
        try:
            yield
        finally:
            random.device_draws.reset(token)

    def call(self, generator: Generator, taken: Any) -> GeneratorCall:
        """A call of the step with this generator."""
        twin = self._twins.get(id(generator))
        if twin is None:
            if self.are_known:
                raise RuntimeError("a captured step must do the same in each call: this one used another generator")
            twin = self._twins[id(generator)] = _Twin(generator)
        if not self.are_known:
            twin.count()
        return twin.on_device.call(taken)

    def begin(self) -> None:
        """Take the offsets of another run of the step from the generators."""
        for twin in self._twins.values():
            twin.begin()


class _Twin:
    """A generator on the device, of whose calls the host's generator is told run by run."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._next = generator.take(0)
        self.on_device = CudaGraphGenerator(*self._next)
        self._calls = 0

    def count(self) -> None:
        """A call of the first run."""
        self._calls += 1
        self._take(1)

    def begin(self) -> None:
        """All calls of another run."""
        self._take(self._calls)

    def _take(self, calls: int) -> None:
        seed, offset = self._generator.take(calls)
        if (seed, offset) != self._next:
            # Somebody else has drawn, or gone back to a state.
            self.on_device.set_state({"seed": seed, "offset": offset})
        self._next = (seed, (offset + calls) % 2**64)
