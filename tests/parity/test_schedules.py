"""The order of threads and blocks, the size of the grid and the width of indices do not change a bit."""

import pytest

from gpu_layers.emulator import ALL_SCHEDULES, Schedule
from gpu_layers.runtime.limits import force_limits
from gpu_layers.verification import emulated_backend
from tests.parity.cases import CASES, check, fast_results, results

# All kernels of two dtypes: those of the others are the same templates.
SOME = [case for case in CASES if str(case.dtype) in ("float32", "bfloat16")]
some_cases = pytest.mark.parametrize("case", SOME, ids=str)


@some_cases
def test_equal_bits_under_every_schedule(case):
    assert Schedule() == ALL_SCHEDULES[0]
    for schedule in ALL_SCHEDULES[1:]:
        assert results(case, emulated_backend(schedule=schedule)) == fast_results(case), schedule


@some_cases
def test_small_grids_and_64_bit_indices(case):
    """One block walks over everything; every index has 64 bits: what arrays of 2**31 elements and more meet."""
    expected = fast_results(case)
    with force_limits(max_blocks=1, index64=True):
        assert results(case, emulated_backend()) == expected


@pytest.mark.parametrize("case", [case for case in SOME if case.op.endswith("pool")], ids=str)
def test_long_strips_and_small_grids(case):
    """A thread of the tiled poolings walks down all rows, one block over all threads: what large arrays meet."""
    expected = fast_results(case)
    with force_limits(max_blocks=1, full_grid=1):
        assert results(case, emulated_backend()) == expected
        check(case, emulated_backend(check=True))


def test_checked_under_a_hostile_schedule():
    """The check does not depend on the order that happened to run; a sample in another one shows it."""
    for case in SOME[::7]:
        check(case, emulated_backend(check=True, schedule=ALL_SCHEDULES[-1]))
