"""``python -m profiling.overhead``: what a call costs the host, against what PyTorch's and an addition cost it.

On tiny arrays the device has next to nothing to do, and what is left is the host's. All are called in turn in one
process, some times in a row each, and of each the fastest turn counts: what else the host does only ever adds. A ratio
is the median of those of turns that followed one another: what slows the host for a while slows both. The ratios are
what carries over from machine to machine, the microseconds do not. Without a GPU launches do nothing, and
the others are NumPy's addition and PyTorch's CPU operations. Of two processes one is there, and a copy on the device
stands in for the exchange: what that takes of a synchronised batch norm has a row of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gpu_layers as gl
from gpu_layers.catalogue import HEADLINE, OPERATIONS
from gpu_layers.catalogue.batch_norm import BATCH_NORM
from gpu_layers.catalogue.batch_norm_variants import exchange_operation
from gpu_layers.catalogue.case import Arrays
from gpu_layers.catalogue.dropout import DROPOUT
from gpu_layers.catalogue.inputs import NoLaunches
from gpu_layers.catalogue.operation import Operation
from gpu_layers.catalogue.pooling import MAX_POOL
from gpu_layers.runtime.backend import use_executor
from gpu_layers.verification.selection import named_like
from profiling.cases import Case, InputMaker
from profiling.devices import CudaDevice, Device, EmulatedDevice, environment
from profiling.implementations import Implementation, NotThereError, Ours, Torch
from profiling.results import Run

_SHAPES = {2: (4, 32), 4: (2, 8, 8, 8)}
# Many short turns rather than few long ones: in most of these the host did nothing else.
_TURNS = 201
_SECONDS_A_TURN = 1e-4
_LEAST_CALLS = 5
_CALLS = 100
_REPLAYS = 9
_IN_A_GRAPH = 20


def python_calls(call: Callable[[], Any]) -> int:
    """How many Python functions one call enters: the same number on every machine."""
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


#: What is counted of our calls, beside their time, by column: each takes a call that has been warmed up.
COUNTS: dict[str, Callable[[Callable[[], Any]], int]] = {"python_calls": python_calls}


def layer_operations(device: Device) -> list[Operation]:
    """Layers as operations, against PyTorch's modules."""
    where = "cuda" if device.kind == "measured" else "cpu"
    channels = _SHAPES[4][1]
    layers = (
        (DROPOUT, gl.Dropout(0.5), lambda torch: torch.nn.Dropout(0.5)),
        (BATCH_NORM, gl.BatchNorm2d(channels).to(where), lambda torch: torch.nn.BatchNorm2d(channels)),
        (MAX_POOL, gl.MaxPool2d(3, 2, 1), lambda torch: torch.nn.MaxPool2d(3, 2, 1)),
    )
    return [_of_layer(operation, layer, module) for operation, layer, module in layers]


def _of_layer(operation: Operation, layer: Any, module: Callable[[Any], Any]) -> Operation:
    @cache
    def on(device: Any) -> Any:
        return module(sys.modules["torch"]).to(device)

    def forward(arrays: Arrays, channels_last: bool) -> tuple[Any, Any]:
        return layer(arrays["x"]), layer

    return replace(
        operation,
        name=f"layer {type(layer).__name__}",
        shapes=(_SHAPES[4],),
        forward=forward,
        backward=lambda dy, layer: layer.backward(dy),
        torch=lambda F, tensors: on(tensors["x"].device)(tensors["x"]),  # noqa: N803
        per_channel=(),
    )


def measure_overhead(
    device: Device,
    calls: int = _CALLS,
    operations: Sequence[Operation] = HEADLINE,
    graphs: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> list[dict[str, Any]]:
    """Microseconds a call of every operation and pass on the host, ours and others'.

    Parameters
    ----------
    device : Device
        On an emulated one our kernels are not executed: the time is that of everything before the driver.
    calls : int
        In a row at most, before the device is waited for.
    operations : sequence of Operation
    graphs : bool
        Measure the device's time in a replayed CUDA graph too.
    report : callable
        Takes each entry as soon as it is there.

    Returns
    -------
    list of dict
        ``op``, ``direction``; ``ours_us``, ``torch_us``, ``add_us``: of ours, PyTorch's, and an addition of the array
        library's; ``of_add``, ``of_torch``: ours over theirs; each of :data:`COUNTS`; with ``graphs``
        ``ours_graph_us``, ``torch_graph_us``. In place of a number that could not be had there is the reason.
    """
    maker = InputMaker(device, block=2**12)
    entries = []
    for operation in operations:
        shape = _SHAPES[min(len(operation.shapes[0]), 4)]
        for direction in operation.passes:
            case = Case(operation, direction, shape, "float32")
            entries.append(_entry(case, device, maker, calls, graphs))
            report(entries[-1])
    return entries


def _entry(case: Case, device: Device, maker: InputMaker, calls: int, graphs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": case.operation.name, "direction": case.direction}
    made = {cls.name: _tried(lambda: _prepared(cls(case, device), maker)) for cls in (Ours, Torch)}  # noqa: B023
    x = maker.numbers(case.shape, "float32")
    made["add"] = (nullcontext, lambda: device.xp.add(x, x))
    turns = _seconds_of_turns({name: it for name, it in made.items() if not isinstance(it, str)}, device, calls)
    for name, it in made.items():
        entry[f"{name}_us"] = it if isinstance(it, str) else 1e6 * min(turns[name])
    for name in ("add", "torch"):
        pairs = zip(turns.get("ours", ()), turns.get(name, ()), strict=False)
        ratios = [ours / theirs for ours, theirs in pairs]
        entry[f"of_{name}"] = statistics.median(ratios) if ratios else "-"
    ours = made["ours"]
    for name, counted in COUNTS.items():
        if isinstance(ours, str):
            entry[name] = "-"
            continue
        context, call = ours
        with context():
            entry[name] = counted(call)
    if graphs and device.kind == "measured":
        for cls, replay in ((Ours, _cupy_graph), (Torch, _torch_graph)):
            entry[f"{cls.name}_graph_us"] = _tried(lambda: replay(cls(case, device), maker))  # noqa: B023
    return entry


def _tried(measure: Callable[[], Any]) -> Any:
    """What it gives, or the reason why not."""
    try:
        return measure()
    except NotThereError as error:
        return str(error)
    except Exception as error:  # a graph that cannot be captured is a result, not an end
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


_Prepared = tuple[Callable[[], AbstractContextManager], Callable[[], Any]]


def _prepared(implementation: Implementation, maker: InputMaker) -> _Prepared:
    """The context of its calls, and a call that has been made before."""
    device = implementation.device
    with device.activate():
        call = implementation.prepare(maker.inputs(implementation.case))
    # On a GPU as users call: its arrays say by themselves where they belong.
    context: Callable[[], AbstractContextManager] = nullcontext
    if isinstance(implementation, Ours) and device.kind != "measured":
        context = lambda: use_executor(NoLaunches())  # noqa: E731
    with context():
        for _ in range(3):
            call()
    device.timer.synchronize()
    return context, call


def _seconds_of_turns(prepared: dict[str, _Prepared], device: Device, most_calls: int) -> dict[str, list[float]]:
    """Seconds a call, of each turn."""
    few = min(_LEAST_CALLS, most_calls)
    turns: dict[str, list[float]] = {name: [] for name in prepared}
    calls = {
        name: max(few, min(most_calls, int(_SECONDS_A_TURN / _seconds(one, device, few))))
        for name, one in prepared.items()
    }
    for _ in range(_TURNS):
        for name, one in prepared.items():
            turns[name].append(_seconds(one, device, calls[name]))
    device.timer.synchronize()
    return turns


def _seconds(prepared: _Prepared, device: Device, calls: int) -> float:
    """Seconds a call of one turn."""
    context, call = prepared
    timer = device.timer
    with context():
        timer.synchronize()
        begin = timer.now()
        for _ in range(calls):
            call()
        return (timer.now() - begin) / calls


def overhead_head(entry: dict[str, Any]) -> str:
    """The table's first line, for entries like this."""
    return f"{'operation':<32}" + "".join(f"{name:>16}" for name in _columns(entry))


def overhead_line(entry: dict[str, Any]) -> str:
    """An entry as text; reasons in place of numbers stand at its end."""
    cells = [entry[name] for name in _columns(entry)]
    text = "".join(f"{_cell(cell):>16}" for cell in cells)
    reasons = "; ".join(dict.fromkeys(cell for cell in cells if isinstance(cell, str) and cell != "-"))
    return f"{entry['op'] + ' ' + entry['direction']:<32}{text}  {reasons}".rstrip()


def _columns(entry: dict[str, Any]) -> list[str]:
    return [name for name in entry if name not in ("op", "direction")]


def _cell(value: float | int | str) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value) if isinstance(value, int) else "-"


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
    for _ in range(_REPLAYS):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        for _ in range(_REPLAYS):
            replay()
        end.record(stream)
        end.synchronize()
        samples.append(1000.0 * cupy.cuda.get_elapsed_time(start, end) / (_REPLAYS * _IN_A_GRAPH))
    return statistics.median(samples)


def _chosen(device: Device, every: bool, only: str | None) -> list[Operation]:
    known = (*((*OPERATIONS, exchange_operation()) if every else HEADLINE), *layer_operations(device))
    return named_like(known, only, "operation", lambda operation: operation.name)


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print a table.

    Returns
    -------
    int
        0; 2 for bad usage.
    """
    parser = argparse.ArgumentParser(
        prog="python -m profiling.overhead", description=main.__doc__, allow_abbrev=False, epilog=_EPILOG
    )
    parser.add_argument("--every", action="store_true", help="all operations, not only those that matter most")
    parser.add_argument("--only", metavar="REGEX", help="operations and layers whose name this finds")
    parser.add_argument(
        "--calls", type=int, default=_CALLS, help="in a row at most: less than what a GPU's queue takes"
    )
    parser.add_argument("--graphs", action="store_true", help="the device's time in a replayed CUDA graph too")
    parser.add_argument("--no-gpu", action="store_true", help="with launches that do nothing, where there is a GPU too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        device = _device(options.no_gpu)
        operations = _chosen(device, options.every, options.only)
        if options.calls < 1:
            raise ValueError(f"--calls must be at least 1, got {options.calls}")
    except ValueError as error:
        print(f"profiling.overhead: error: {error}", file=sys.stderr)
        return 2
    run = Run(device.kind, environment(gpu=device.kind == "measured"))
    where = run.environment.get("gpu") or "no GPU, launches that do nothing"
    print(f"Microseconds of a call on the host: {where}. of_add, of_torch: ours over an addition's, over PyTorch's.")

    def report(entry: dict[str, Any]) -> None:
        if not run.overhead:
            print(overhead_head(entry))
        print(overhead_line(entry), flush=True)
        run.overhead.append(entry)
        if options.json:  # at once, so that it is there even if the process is ended
            run.save(options.json)

    measure_overhead(device, options.calls, operations, options.graphs, report)
    return 0


_EPILOG = "Without a GPU the addition is NumPy's, and PyTorch's operations are those of the CPU."


def _device(no_gpu: bool) -> Device:
    if not no_gpu:
        try:
            return CudaDevice()
        except RuntimeError as error:
            print(f"No GPU here ({error}).")
    return EmulatedDevice()


if __name__ == "__main__":
    sys.exit(main())
