"""``python -m profiling.one OP``: a few calls of one operation, or of the headline ones, for a profiler to look at."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gpu_layers.catalogue import HEADLINE, OPERATIONS
from profiling.cases import DTYPES, Case, InputMaker
from profiling.devices import CudaDevice, Device, EmulatedDevice
from profiling.implementations import Ours
from profiling.results import ResultsError

#: In place of an operation: those that matter most.
ALL_HEADLINE = "headline"


def chosen(text: str, dtype: str, channels_last: bool) -> list[Case]:
    """The cases of ``OP`` or ``OP/forward`` or ``OP/backward`` at the operation's first shape, or of ``headline``.

    Raises
    ------
    ResultsError
        If there is no such operation, pass or layout.
    """
    if text == ALL_HEADLINE:
        known = [operation for operation in HEADLINE if channels_last in operation.layouts]
        return [
            Case(operation, direction, operation.shapes[0], dtype, channels_last)
            for operation in known
            for direction in operation.passes
        ]
    name, _, direction = text.partition("/")
    operations = [operation for operation in OPERATIONS if operation.name == name]
    if not operations:
        names = ", ".join(operation.name for operation in OPERATIONS)
        raise ResultsError(f"there is no operation {name!r}: the operations are {names}, or {ALL_HEADLINE}")
    (operation,) = operations
    if direction and direction not in operation.passes:
        raise ResultsError(f"{name} has no pass {direction!r}: {', '.join(operation.passes)}")
    if channels_last not in operation.layouts:
        raise ResultsError(f"{name} is not measured with channels last")
    directions = (direction,) if direction else operation.passes
    return [Case(operation, one, operation.shapes[0], dtype, channels_last) for one in directions]


def run(case: Case, device: Device, calls: int, nvtx: Any | None) -> None:
    """Warm up, and then call within a range of the case's name, within the one that ``ncu.sh`` asks for."""
    with device.activate():
        call = Ours(case, device).prepare(InputMaker(device).inputs(case))
        call()
        device.timer.synchronize()
        if nvtx is not None:
            nvtx.RangePush("profile")
            nvtx.RangePush(f"{case.operation.name}.{case.direction}")
        for _ in range(calls):
            call()
        device.timer.synchronize()
        if nvtx is not None:
            nvtx.RangePop()
            nvtx.RangePop()


def main(arguments: list[str] | None = None) -> int:
    """Run.

    Returns
    -------
    int
        0; 2 for an unknown operation or without a GPU.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.one", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "op", metavar="OP", help="e.g. max_pool, or max_pool/backward for one pass; headline: those that matter most"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--emulated", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(arguments)
    try:
        cases = chosen(options.op, options.dtype, options.channels_last)
        device: Device = EmulatedDevice() if options.emulated else CudaDevice()
    except (ResultsError, RuntimeError) as error:
        print(f"profiling.one: error: {error}", file=sys.stderr)
        return 2
    nvtx = None if options.emulated else device.xp.cuda.nvtx
    for case in cases:
        run(case.toy() if options.emulated else case, device, options.calls, nvtx)
        print(case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
