"""The tester is tested: each seeded bug is caught with the right message, and its corrected twin passes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import pytest

from gpu_layers import emulator
from gpu_layers.emulator import errors

from .conftest import KERNELS, marked_line

X = np.arange(1, 257, dtype=np.float32)
FLOATS = (X, "y")


@dataclass(frozen=True)
class Bug:
    """A seeded bug: how to launch it, and what must be said of it."""

    name: str
    error: type[errors.EmulationError]
    says: tuple[str, ...]
    arguments: tuple = FLOATS
    block: int = 64
    grid: int = 1
    lines: tuple[str, ...] | None = None  # marks; the bug's name alone unless given
    mode: str = "trace"
    cooperative: bool = False
    shared_bytes: int = 0
    initialised: tuple = ()
    names: tuple[str, ...] | None = field(default=None)

    def __str__(self) -> str:
        return f"{self.name}-{self.mode}"


n = np.int32


BUGS = [
    Bug(
        "missing_syncthreads",
        errors.RaceError,
        ("no barrier orders them", "the shared array 'tile'"),
        lines=("missing_syncthreads read", "missing_syncthreads write"),
    ),
    Bug(
        "missing_second_syncthreads",
        errors.RaceError,
        ("no barrier orders them",),
        lines=("missing_second_syncthreads write", "missing_second_syncthreads read"),
    ),
    Bug("missing_syncwarp", errors.RaceError, ("no __syncwarp() or barrier orders them",), block=32),
    Bug("shuffle_instead_of_syncwarp", errors.RaceError, ("no __syncwarp() or barrier orders them",), block=32),
    Bug(
        "divergent_barrier",
        errors.BarrierError,
        ("divergent barrier", "thread (32,0,0)", "thread (0,0,0) waits in another"),
        lines=("divergent_barrier first", "divergent_barrier second"),
        mode="fast",
    ),
    Bug(
        "early_return",
        errors.BarrierError,
        ("thread (50,0,0) returned while", "every thread of the block must reach it"),
        arguments=(X, "y", n(50)),
        mode="fast",
    ),
    Bug(
        "deadlock",
        errors.DeadlockError,
        ("no thread of the block can go on", "__syncwarp() (mask 0xffffffff)", "and 15 more wait in", "and 47 more"),
        lines=("deadlock lanes", "deadlock others"),
        mode="fast",
    ),
    Bug(
        "off_by_one",
        errors.OutOfBoundsError,
        ("block (3,0,0), thread (8,0,0) reads 4 bytes", "argument 0 'x' (800 bytes), directly past its end"),
        arguments=(X[:200].copy(), "y200", n(200)),
        grid=4,
        names=("x", "y", "n"),
    ),
    Bug(
        "off_by_one_store",
        errors.OutOfBoundsError,
        ("thread (0,0,0) writes 4 bytes", "4 bytes before the start of argument 0"),
        arguments=("y", n(64)),
    ),
    Bug(
        "shared_overrun",
        errors.OutOfBoundsError,
        ("thread (31,0,0) writes 4 bytes", "the shared array 'guarded' (128 bytes), directly past its end"),
        block=32,
    ),
    Bug(
        "dynamic_shared_overrun",
        errors.OutOfBoundsError,
        ("thread (63,0,0) writes 4 bytes", "the dynamic shared memory (256 bytes), directly past its end"),
        shared_bytes=256,
    ),
    Bug("misaligned", errors.MisalignedError, ("reads 16 bytes", "no multiple of 16"), block=8),
    Bug("null_pointer", errors.OutOfBoundsError, ("reads 4 bytes", "a null pointer"), arguments=(None, "y")),
    Bug(
        "null_pointer",
        errors.CrashError,
        ("block (0,0,0), thread (0,0,0)", "not mapped", "Segmentation fault"),
        arguments=(None, "y"),
        lines=(),
        mode="fast",
    ),
    Bug("write_through_const", errors.ReadOnlyError, ("writes 4 bytes", "byte 0 of argument 0 is const")),
    Bug("uninitialised_shared", errors.UninitialisedError, ("byte 0 of the shared array 'sums' was never written",)),
    Bug("uninitialised_global", errors.UninitialisedError, ("byte 0 of argument 1 was never written",)),
    Bug("missing_wait_for_copies", errors.UninitialisedError, ("the shared array 'tile' was never written",)),
    Bug("wait_for_the_batch_before", errors.UninitialisedError, ("byte 256 of the shared array 'tile'",)),
    Bug("missing_barrier_after_copies", errors.EmulationError, ("the shared array 'tile'",)),
    Bug("misaligned_copy", errors.MisalignedError, ("copies 16 bytes", "no multiple of that")),
    Bug("race_between_blocks", errors.RaceError, ("block (1,0,0)", "block (0,0,0)", "blocks run in any order"), grid=4),
    Bug(
        "plain_beside_atomic",
        errors.RaceError,
        ("argument 0",),
        arguments=("counter", "counters"),
        lines=("plain_beside_atomic update", "plain_beside_atomic"),
        initialised=(0,),
    ),
    Bug(
        "missing_threadfence",
        errors.RaceError,
        ("block (3,0,0), thread (0,0,0) reads 4 bytes", "block (0,0,0), thread (0,0,0) wrote"),
        arguments=(X, "y", "ticket", "y"),
        lines=("missing_threadfence", "missing_threadfence write"),
        grid=4,
        initialised=(2,),
    ),
    *(
        Bug(
            name,
            errors.RaceError,
            ("thread (0,0,0) reads 4 bytes", "wrote"),
            arguments=(X, "y", "ticket", "y"),
            lines=(name, f"{name} write"),
            grid=4,
            cooperative=True,
            initialised=(2,),
        )
        for name in ("group_barrier_without_fence", "group_barrier_without_acquire")
    ),
    Bug(
        "group_barrier_of_too_many",
        errors.EmulationError,
        ("deadlock", "thread (0,0,0) waits in __nanosleep()", "and 62 more wait in __syncthreads()"),
        arguments=("ticket", "y"),
        lines=("group_barrier_of_too_many", "group_barrier_of_too_many others"),
        grid=3,
        cooperative=True,
        initialised=(0,),
        mode="fast",
    ),
    Bug("wrong_mask", errors.WarpError, ("lane 16", "is not in its mask", "0x0000ffff"), block=32, mode="fast"),
    Bug("different_masks", errors.WarpError, ("0xffffffff", "0xfffffffe"), block=32, mode="fast"),
    Bug(
        "shuffle_from_exited_lane",
        errors.WarpError,
        ("lane 19", "reads lane 20, which has returned"),
        arguments=(X, "y", n(20)),
        block=32,
        mode="fast",
    ),
    Bug(
        "shuffle_from_outside_the_mask",
        errors.WarpError,
        ("reads lane 16, which is not in the mask",),
        block=32,
        mode="fast",
    ),
    Bug(
        "different_operations",
        errors.WarpError,
        ("__shfl_xor_sync", "__ballot_sync", "lanes of one mask are in different warp operations"),
        lines=("different_operations one", "different_operations other"),
        block=32,
        mode="fast",
    ),
    Bug(
        "missing_grid_sync",
        errors.RaceError,
        ("blocks run in any order",),
        arguments=(X, "y", "y"),
        grid=4,
        lines=(),
        cooperative=True,
    ),
    Bug(
        "block_misses_grid_sync",
        errors.BarrierError,
        ("waits in the grid barrier", "every thread of block (1,0,0) has returned"),
        grid=3,
        cooperative=True,
        mode="fast",
    ),
    Bug("trap", errors.TrapError, ("thread (3,0,0) called __trap()",), arguments=("y",), mode="fast"),
    Bug(
        "division_by_zero",
        errors.CrashError,
        ("thread (5,0,0) divided an integer by zero",),
        arguments=(np.array([1, 2, 3, 4, 5, 0, 7, 8], np.int32), "counters"),
        lines=(),
        block=8,
        mode="fast",
    ),
    Bug(
        "stack_overflow",
        errors.CrashError,
        ("overflowed its stack",),
        arguments=("counters",),
        lines=(),
        block=4,
        mode="fast",
    ),
]

NAMES = sorted({f"{bug.name}<{twin}>" for bug in BUGS for twin in ("true", "false")})


@functools.cache
def module(mode: str) -> emulator.EmulatedModule:
    return emulator.load(KERNELS / "seeded_bugs.cu", NAMES, mode=mode)


def fresh(argument):
    """Outputs are written as text in the table: each launch gets its own."""
    return (
        {
            "y": lambda: np.zeros(256, np.float32),
            "y200": lambda: np.zeros(200, np.float32),
            "counter": lambda: np.zeros(1, np.int32),
            "counters": lambda: np.zeros(64, np.int32),
            "ticket": lambda: np.zeros(1, np.uint32),
        }[argument]()
        if isinstance(argument, str)
        else argument
    )


def launch(bug: Bug, twin: str, mode: str, schedule: emulator.Schedule):
    values = [fresh(argument) for argument in bug.arguments]
    return module(mode).launch(
        f"{bug.name}<{twin}>",
        (bug.grid,),
        (bug.block,),
        values,
        schedule=schedule,
        cooperative=bug.cooperative,
        shared_bytes=bug.shared_bytes,
        initialised=bug.initialised,
        argument_names=bug.names,
    )


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_each_bug_is_caught_with_its_line_and_thread(bug):
    with pytest.raises(bug.error) as caught:
        launch(bug, "false", bug.mode, emulator.Schedule())
    message = str(caught.value)
    assert message.startswith(f"{bug.name}<false>: ")
    for text in bug.says:
        assert text in message
    for mark in (bug.name,) if bug.lines is None else bug.lines:
        assert marked_line("seeded_bugs.cu", mark) in message
    assert "{" not in message  # every place and name was filled in


@pytest.mark.parametrize("bug", [b for b in BUGS if b.mode == "trace"], ids=str)
def test_each_bug_is_caught_under_every_schedule(bug, schedule):
    with pytest.raises(errors.EmulationError):
        launch(bug, "false", "trace", schedule)


@pytest.mark.parametrize("mode", ["fast", "trace"])
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_the_corrected_twin_passes(bug, mode, schedule):
    launch(bug, "true", mode, schedule)


def test_a_module_works_after_each_kind_of_failure():
    """An error abandons threads in mid-flight: nothing of them may leak into the next launch."""
    fast = module("fast")
    for bug in [b for b in BUGS if b.mode == "fast"]:
        with pytest.raises(bug.error):
            launch(bug, "false", "fast", emulator.Schedule())
        y = np.zeros(64, np.float32)
        fast.launch("missing_syncthreads<true>", (1,), (64,), [X[:64], y])
        np.testing.assert_array_equal(y, X[63::-1])
