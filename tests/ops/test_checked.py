"""Checks that are made once: for what they may depend on, and nothing that only looks like it."""

import numpy as np
import pytest

from gpu_layers.ops import checked
from gpu_layers.ops.checked import Checked

X = np.zeros((2, 3), np.float32)


@pytest.fixture
def check():
    """A check that gives how often it was made."""
    made = []

    @Checked
    def noted(arrays, *arguments):
        made.append((arrays, arguments))
        return len(made)

    return noted


@pytest.mark.parametrize("arrays", [X, (X, None), (X, X)], ids=["one", "and none", "two"])
@pytest.mark.parametrize("arguments", [(), (1, 2.5, "mean", None, True), ((1, 2), [3, (4.0,)])], ids=str)
def test_what_is_equal_and_alike_is_checked_once(check, arrays, arguments):
    same = tuple(None if one is None else one.copy() for one in arrays) if type(arrays) is tuple else arrays + 1
    assert [check(one, *arguments) for one in (arrays, same, arrays)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X, X.astype(np.float64)),
        (X, X.reshape(3, 2)),
        (X, X.ravel()),
        ((X, X), (X, X.astype(np.float64))),
        ((X, X), (X.astype(np.float64), X)),
        ((X, X), (X, X[:1])),
        ((X, X), (X, None)),
        ((X, None), (None, X)),
        ((X, X), (X,)),
        ((X,), X),
    ],
    ids=str,
)
def test_other_arrays_are_checked_anew(check, one, other):
    assert [check(arrays) for arrays in (one, other, one, other)] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0, False),
        (0.0, -0.0),
        (1.0, True),
        ((1, 2), (1, 2.0)),
        ((1, 2), [1, 2]),
        (((1,), 2), ((1.0,), 2)),
        ("1", 1),
        (None, 0),
        (float("inf"), -float("inf")),
        (2**31, 2.0**31),
        ((1, 2), (1, 2, None)),
    ],
    ids=str,
)
def test_what_is_equal_but_not_alike_is_checked_anew(check, one, other):
    assert [check(X, argument) for argument in (one, other, one, other)] == [1, 2, 1, 2]


# Of these pairs the bytes are the same, and so would their keys be.
BYTES_OF_ONE = np.float64(1).view(np.int64)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.float64(1), BYTES_OF_ONE),
        ((np.float64(1),), (BYTES_OF_ONE,)),
        ([3, (np.float64(1),)], [3, (BYTES_OF_ONE,)]),
        (np.float64(1).tobytes(), np.float64(1)),
        (np.ones(1), BYTES_OF_ONE),
    ],
    ids=str,
)
def test_numbers_of_numpy_are_checked_each_time(check, one, other):
    assert [check(X, argument) for argument in (one, other, one, other)] == [1, 2, 3, 4]


def test_what_has_no_bytes_is_checked_each_time(check):
    assert [check(X, argument) for argument in (slice(1), object(), np.float32, slice(1))] == [1, 2, 3, 4]


def test_what_a_check_refuses_it_refuses_each_time():
    made = []

    @Checked
    def refusing(arrays, number):
        made.append(number)
        if number < 0:
            raise ValueError("below 0")
        return

    for _ in range(2):
        with pytest.raises(ValueError, match="below 0"):
            refusing(X, -1)
        # None is a finding too.
        assert refusing(X, 1) is None
    assert made == [-1, 1, -1]


def test_the_oldest_findings_go_first(check, monkeypatch):
    monkeypatch.setattr(checked, "_MOST", 2)
    assert [check(X, number) for number in (1, 2, 3, 2, 3, 1)] == [1, 2, 3, 2, 3, 4]
