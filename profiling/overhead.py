"""What a call costs the host: tiny arrays, where the device has next to nothing to do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from gpu_layers.runtime.backend import use_executor
from profiling.cases import Case
from profiling.data import InputMaker
from profiling.devices import Device
from profiling.implementations import Implementation, NotThereError, Ours, Torch
from profiling.launches import NoLaunches
from profiling.operation import Operation
from profiling.operations import OPERATIONS

_SHAPES = {2: (4, 32), 4: (2, 8, 8, 8)}
_REPEATS = 9
_IN_A_GRAPH = 20


def measure_overhead(device: Device, calls: int, operations: Sequence[Operation] = OPERATIONS) -> list[dict[str, Any]]:
    """Microseconds a call of every operation and pass, ours and PyTorch's.

    Parameters
    ----------
    device : Device
        On an emulated one our kernels are not executed: the time is that of everything before the driver.
    calls : int
        In a row, before the device is waited for.
    operations : sequence of Operation

    Returns
    -------
    list of dict
        ``op``, ``direction``; ``ours_us``, ``torch_us``: of the host; ``ours_graph_us``, ``torch_graph_us``: of a
        replayed CUDA graph. In place of a number that could not be had there is the reason.
    """
    entries = []
    maker = InputMaker(device, block=2**12)
    for operation in operations:
        shape = _SHAPES[min(len(operation.shapes[0]), 4)]
        for direction in operation.passes:
            case = Case(operation, direction, shape, "float32")
            entry: dict[str, Any] = {"op": operation.name, "direction": direction}
            for implementation in (Ours, Torch):
                name = implementation.name
                entry[f"{name}_us"] = _tried(lambda: _host(implementation(case, device), maker, calls))  # noqa: B023
                if device.kind == "measured":
                    replay = {Ours.name: _cupy_graph, Torch.name: _torch_graph}[name]
                    entry[f"{name}_graph_us"] = _tried(lambda: replay(implementation(case, device), maker))  # noqa: B023
            entries.append(entry)
    return entries


def overhead_table(entries: list[dict[str, Any]]) -> str:
    """The entries as text."""
    columns = [name for name in entries[0] if name not in ("op", "direction")]
    lines = ["Microseconds of a call on a tiny array, on the host and in a replayed CUDA graph:"]
    lines.append(f"{'operation':<32}" + "".join(f"{name:>16}" for name in columns))
    for entry in entries:
        cells = [entry[name] for name in columns]
        text = "".join(f"{cell:>16.1f}" if isinstance(cell, float) else f"{'-':>16}" for cell in cells)
        reasons = "; ".join(dict.fromkeys(str(cell) for cell in cells if not isinstance(cell, float)))
        lines.append(f"{entry['op'] + ' ' + entry['direction']:<32}{text}  {reasons}".rstrip())
    return "\n".join(lines)


def _tried(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except NotThereError as error:
        return str(error)
    except Exception as error:  # a graph that cannot be captured is a result, not an end
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _context(implementation: Implementation) -> AbstractContextManager:
    device = implementation.device
    if device.kind == "measured":
        return device.activate()
    return use_executor(NoLaunches()) if isinstance(implementation, Ours) else nullcontext()


def _host(implementation: Implementation, maker: InputMaker, calls: int) -> float:
    device, timer = implementation.device, implementation.device.timer
    with device.activate():
        call = implementation.prepare(maker.inputs(implementation.case))
    samples = []
    with _context(implementation):
        for _ in range(_REPEATS):
            timer.synchronize()
            begin = timer.now()
            for _ in range(calls):
                call()
            samples.append((timer.now() - begin) / calls)
    timer.synchronize()
    # The least disturbed half: what else the host does only ever adds.
    return 1e6 * statistics.median(sorted(samples)[: _REPEATS // 2 + 1])


def _cupy_graph(implementation: Implementation, maker: InputMaker) -> float:
    cupy = implementation.device.xp
    stream = cupy.cuda.Stream(non_blocking=True)
    with implementation.device.activate(), stream:
        call = implementation.prepare(maker.inputs(implementation.case))
        results = [call() for _ in range(_IN_A_GRAPH)]
        stream.synchronize()
        results.clear()
        stream.begin_capture()
        try:
            results = [call() for _ in range(_IN_A_GRAPH)]
        finally:
            graph = stream.end_capture()
        microseconds = _replayed(lambda: graph.launch(stream), implementation, stream)
        stream.synchronize()
    del results
    return microseconds


def _torch_graph(implementation: Implementation, maker: InputMaker) -> float:
    assert isinstance(implementation, Torch)
    torch, cupy = implementation.torch, implementation.device.xp
    inputs = maker.inputs(implementation.case)
    implementation.device.timer.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call = implementation.prepare(inputs)
        for _ in range(3):
            call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            results = [call() for _ in range(_IN_A_GRAPH)]
    side.synchronize()
    # A graph is replayed on PyTorch's current stream.
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    microseconds = _replayed(graph.replay, implementation, stream)
    del results
    return microseconds


def _replayed(replay: Callable[[], Any], implementation: Implementation, stream: Any) -> float:
    cupy = implementation.device.xp
    samples = []
    for _ in range(_REPEATS):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        for _ in range(_REPEATS):
            replay()
        end.record(stream)
        end.synchronize()
        samples.append(1000.0 * cupy.cuda.get_elapsed_time(start, end) / (_REPEATS * _IN_A_GRAPH))
    return statistics.median(samples)
