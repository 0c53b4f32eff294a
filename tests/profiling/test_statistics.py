"""Middle, spread, and what counts as a change."""

import pytest

from profiling.timing import Timing, summarize, verdict


def test_summary_in_microseconds():
    timing = summarize([3e-6, 1e-6, 2e-6, 5e-6, 4e-6])
    assert timing == Timing(pytest.approx(3.0), pytest.approx(1.4), pytest.approx(4.6), 5)
    assert timing.spread == pytest.approx(3.2 / 3)


def test_no_samples():
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((100, 99, 101), (90, 89, 91), "faster"),
        ((100, 99, 101), (110, 109, 111), "slower"),
        ((100, 99, 101), (102, 101.5, 103), "same"),  # beyond the spread, but below 3 %
        ((100, 80, 120), (90, 75, 110), "same"),  # 10 %, but within the spread
        ((100, 99, 101), (100, 99, 101), "same"),
    ],
)
def test_verdict(old, new, expected):
    assert verdict(Timing(*map(float, old), 9), Timing(*map(float, new), 9)) == expected
