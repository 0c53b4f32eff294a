"""What a call of ``gpu_layers.torch`` costs the host, beside torch.nn's own: ``python -m profiling.torch_overhead``.

Tiny tensors of the CPU. The floors' functions, which would compute (or launch), are replaced by ones that give results
that were made before: what is left is what this package does in Python. torch's times hold its kernels, which take next
to no time at this size. Times are those of the thread's processor, the least of many short rounds in which both take
turns, so that what else the machine does counts little.

With ``--device cuda`` tensors are a GPU's and nothing is replaced: the times are those in which the host issues its
launches, ours as torch's, and the GPU is waited for between rounds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

import gpu_layers.torch as glt
from gpu_layers.torch import arrays
from profiling.overhead import python_calls

_SHAPE = (2, 4, 4, 4)
LAYERS: tuple[tuple[str, tuple], ...] = (
    ("Dropout", (0.5,)),
    ("Dropout2d", (0.5,)),
    ("BatchNorm2d", (4,)),
    ("MaxPool2d", (2,)),
    ("AvgPool2d", (2,)),
    ("AdaptiveAvgPool2d", (2,)),
)


def _idle_floor() -> SimpleNamespace:
    """Functions of a floor that do nothing, for inputs of one shape."""
    whole, pooled = np.zeros(_SHAPE, np.float32), np.zeros((2, 4, 2, 2), np.float32)
    taps, channels, statistics = np.zeros((2, 4, 2, 2), np.uint8), np.ones(4, np.float32), np.ones((5, 4), np.float32)
    return SimpleNamespace(
        dropout_forward=lambda *_, **__: whole,
        batch_norm_forward=lambda *_, **__: (whole, statistics),
        batch_norm_backward=lambda *_, **__: (whole, channels, channels, None),
        batch_norm_fold=lambda *_, **__: None,
        max_pool_forward=lambda *_: (pooled, taps),
        max_pool_backward=lambda *_: whole,
        avg_pool_forward=lambda *_: pooled,
        avg_pool_backward=lambda *_: whole,
    )


@contextmanager
def idle_floors() -> Iterator[None]:
    """A block in which the package's operations compute nothing."""
    place: Any = arrays.here(torch.empty(0))
    original = place.floor
    place.floor = _idle_floor()
    try:
        yield
    finally:
        place.floor = original


def least_times(
    functions: Sequence[Callable[[], Any]], rounds: int, calls: int, wait: Callable[[], Any] = lambda: None
) -> list[float]:
    """Microseconds a call of each, the least of the rounds; ``wait`` is called between them."""
    least = [float("inf")] * len(functions)
    for _ in range(rounds + 1):
        for place, function in enumerate(functions):
            wait()
            start = time.thread_time()
            for _ in range(calls):
                function()
            least[place] = min(least[place], (time.thread_time() - start) / calls)
    wait()
    return [1e6 * one for one in least]


def _forward_backward(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
    module(x).backward(gradient)


def measure(rounds: int, calls: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Of each layer, ours and torch's: microseconds of forward, of forward and backward, and Python calls of these."""
    x = torch.randn(_SHAPE, device=device, requires_grad=True)
    on_gpu = x.is_cuda
    calls_of: list[Callable[[], Any]] = []
    for name, arguments in LAYERS:
        modules = [getattr(lib, name)(*arguments).to(device) for lib in (glt, nn)]
        calls_of += [partial(module, x) for module in modules]
        calls_of += [partial(_forward_backward, module, x, torch.ones_like(module(x))) for module in modules]
    floors: AbstractContextManager = nullcontext() if on_gpu else idle_floors()
    with floors:
        # All layers in turn: what else the machine does, for a second or two, is not one layer's.
        times = iter(least_times(calls_of, rounds, calls, torch.cuda.synchronize if on_gpu else lambda: None))
        counts = [python_calls(call) for call in calls_of]
    keys = ("forward", "torch_forward", "both", "torch_both", "calls", "torch_calls")
    return [
        {"layer": name, **dict(zip(keys, (*itertools.islice(times, 4), *counts[4 * number + 2 :][:2]), strict=True))}
        for number, (name, _) in enumerate(LAYERS)
    ]


def table(entries: list[dict[str, Any]]) -> str:
    """The entries as text."""
    lines = [
        f"{'':20}{'forward':>10}{'torch':>8}{'ratio':>7}{'both':>10}{'torch':>8}{'ratio':>7}{'calls':>8}{'torch':>7}"
        "   microseconds; Python calls of both"
    ]
    for entry in entries:
        a, b, c, d, *counts = list(entry.values())[1:]
        row = f"{entry['layer']:20}{a:10.1f}{b:8.1f}{a / b:7.2f}{c:10.1f}{d:8.1f}{c / d:7.2f}"
        lines.append(row + "{:8}{:7}".format(*counts))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; status 1 if a limit is given and a layer's forward and backward together are above it."""
    parser = argparse.ArgumentParser(prog="python -m profiling.torch_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500, help="rounds; the fastest counts (%(default)s)")
    parser.add_argument("--calls", type=int, default=10, help="calls in a round (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of the tensors: cpu or cuda (%(default)s)")
    parser.add_argument("--limit", type=float, help="largest ratio to torch's own, for forward and backward")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    entries = measure(options.rounds, options.calls, options.device)
    print(table(entries))
    worst = max(entry["both"] / entry["torch_both"] for entry in entries)
    return int(options.limit is not None and worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
