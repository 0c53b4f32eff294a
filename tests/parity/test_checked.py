"""Every kernel with every memory access watched: no overrun, no uninitialised read, no data race."""

from gpu_layers.verification import emulated_backend
from tests.parity.cases import every_case, fast_results, results


@every_case
def test_clean_in_checked_mode(case):
    """And the bits are those of the fast mode, which test_cases compares with the reference."""
    assert results(case, emulated_backend(check=True)) == fast_results(case)
