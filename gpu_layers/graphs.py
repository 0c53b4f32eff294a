"""Capturing a step as a CUDA graph, with memory of its own and fresh masks in each replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from gpu_layers import random
from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_integer
from gpu_layers.core.cuda import graph_device, require_gpu
from gpu_layers.random import CudaGraphGenerator, Generator, GeneratorCall


def capture(step: Callable[[], object], *, warmup: int = 2) -> Graph:
    """Capture a step as a CUDA graph, on the current device.

    The step first runs ``warmup`` times like plain calls (parameters, running statistics and generators advance). That
    compiles and loads the kernels and allocates the memory. Then the step is recorded, which executes nothing.
    Everything that it allocates comes from a memory pool that belongs to the graph alone.

    Masks are those of the layers' generators, of any kind: a replay takes the offsets that a call of the step would
    take. Optimizers count the steps of replays; their rates are those of the capture.

    Parameters
    ----------
    step : callable
        Takes no arguments. It reads its input from arrays that the caller overwrites between replays. It must enqueue
        the same work in each call: it may neither wait for the device nor depend on values there.
    warmup : int
        At least 1.

    Returns
    -------
    Graph

    Raises
    ------
    RuntimeError
        If there is no GPU, or the step does something that a graph cannot hold: ``SyncBatchNorm`` of several
        processes, padded batches (``lengths=`` or ``mask=`` of batch norm, ``lengths=`` of pooling), ``MaxUnpool``
        with checked indices, ``Linear`` and ``Conv2d``, whose products CuPy does not capture, arrays on another device
        than the current one, or reading a value back. Nothing is captured then.
    TypeError, ValueError
        If warmup is not an integer of at least 1.

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
    with stream, cupy.cuda.using_allocator(pool.malloc), draws.in_use(), _on_one_device(cupy):
        for run in range(warmup):
            if run:
                draws.begin()
            step()
            draws.are_known = True
        stream.begin_capture()
        try:
            result = step()
        except BaseException:
            # The record is useless, and ending it may raise too.
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
                stream.end_capture()
            raise
        captured = stream.end_capture()
    outside.wait_event(stream.record())
    return Graph(captured, result, draws, pool)


@contextlib.contextmanager
def _on_one_device(cupy: ModuleType) -> Iterator[None]:
    """Work on another device, which would not be captured, is refused."""
    token = graph_device.set(cupy.cuda.device.get_device_id())
    try:
        yield
    finally:
        graph_device.reset(token)


class Graph:
    """A captured step; see :func:`capture`.

    Attributes
    ----------
    result : object
        What the step returned when it was captured: each replay fills these arrays again.
    """

    def __init__(self, captured: Any, result: Array, draws: _DeviceDraws, pool: object) -> None:
        self.result = result
        self._captured, self._draws = captured, draws
        # The graph writes to this memory, so it must belong to nobody else while the graph exists.
        self._pool = pool

    def replay(self) -> Any:
        """Run the step again on CuPy's current stream, without waiting for it; returns :attr:`result`."""
        self._draws.begin()
        self._captured.launch()
        return self.result


class _DeviceDraws:
    """For each generator that a step uses, a twin on the device, whose offset kernels read and advance.

    Attributes
    ----------
    are_known : bool
        Whether the step has run: then it is known how many offsets it takes from which generator.
    """

    def __init__(self) -> None:
        self.are_known = False
        self._twins: dict[int, _Twin] = {}

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Make generators draw from their twins."""
        token = random.device_draws.set(self)
        try:
            yield
        finally:
            random.device_draws.reset(token)

    def call(self, generator: Generator, taken: Array) -> GeneratorCall:
        """A call of the step with this generator."""
        twin = self._twins.get(id(generator))
        if twin is None:
            if self.are_known:
                raise RuntimeError("a captured step must do the same in each call, got a call with another generator")
            twin = self._twins[id(generator)] = _Twin(generator)
        if not self.are_known:
            twin.count()
        return twin.on_device.call(taken)

    def begin(self) -> None:
        """Take the offsets of one more run of the step from the generators."""
        for twin in self._twins.values():
            twin.begin()


class _Twin:
    """A generator on the device; the host's generator advances with it, run by run."""

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
        """All calls of one more run."""
        self._take(self._calls)

    def _take(self, calls: int) -> None:
        seed, offset = self._generator.take(calls)
        if (seed, offset) != self._next:
            # Another call has drawn, or the state was set.
            self.on_device.set_state({"seed": seed, "offset": offset})
        self._next = (seed, (offset + calls) % 2**64)
