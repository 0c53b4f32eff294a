"""Which memory has been written to since: exactly that, for as long as it is there."""

import numpy as np
import pytest

from gpu_layers.core.writes import check_unwritten, record_write, write_count


def is_written(since, array):
    """Whether a backward would refuse it, named or beside what is not there."""
    try:
        check_unwritten(since, nothing=None, empty=array[:0], x=array)
    except RuntimeError:
        return True
    return False


VIEWS = {
    "forward": (lambda x: x[7:], range(7, 10)),
    "backward": (lambda x: x[::-1][:3], range(7, 10)),
    "backward in steps": (lambda x: x[8::-3], range(2, 9)),
    "two axes, one backward": (lambda x: x.reshape(2, 5)[:, ::-1][1:], range(5, 10)),
    "one element": (lambda x: x[4:5], range(4, 5)),
    "all": (lambda x: x, range(10)),
}


@pytest.mark.parametrize(("view", "touched"), VIEWS.values(), ids=VIEWS)
def test_what_lies_between_the_first_and_the_last_element_is_written(view, touched):
    x = np.zeros(10)
    since = write_count()
    record_write(view(x))
    assert [is_written(since, x[place : place + 1]) for place in range(10)] == [place in touched for place in range(10)]
    # Likewise of what was saved.
    for place in range(10):
        since = write_count()
        record_write(x[place : place + 1])
        assert is_written(since, view(x)) == (place in touched)


@pytest.mark.parametrize("nothing", [lambda x: x[2:7, :0], lambda x: x[3:3], lambda x: x[::-1][:0]])
def test_an_empty_array_is_no_write(nothing):
    x = np.zeros((10, 5))
    since = write_count()
    record_write(nothing(x))
    assert write_count() == since
    assert not is_written(since, x)


def test_the_same_memory_once_more_is_the_last_write():
    x, other = np.zeros(3), np.zeros(3)
    record_write(x)
    record_write(other)
    since = write_count()
    assert not is_written(since, x)
    record_write(x)
    assert is_written(since, x)
    assert not is_written(since, other)


def test_a_write_is_forgotten_with_its_own_array_alone():
    memory = bytearray(80)
    first, second = np.frombuffer(memory), np.frombuffer(memory)
    record_write(first)
    since = write_count()
    record_write(second)
    # What is freed now is not what was written to last.
    del first
    assert is_written(since, second)
    since -= 1
    del second
    assert not is_written(since, np.frombuffer(memory))
