"""Every kernel with every memory access watched: no overrun, no uninitialised read, no data race."""

from gpu_layers.verification import emulated_backend
from tests.parity.cases import check, every_case


@every_case
def test_clean_and_right_in_checked_mode(case):
    check(case, emulated_backend(check=True))
