"""The timing core against a device whose times are known."""

import pytest

from profiling.timing import HostTimer, Subject, measure
from tests.profiling.fake_device import FakeTimer


def timed(timer, host, device, **options):
    settings = {"buffers": 3, "calls": 5, "samples": 7, "seconds": 1e9} | options
    return measure([Subject("op", lambda i: timer.work(host, device))], timer, **settings)["op"]


def test_a_call_shorter_than_its_launch_is_timed_by_the_device_alone():
    timing = timed(FakeTimer(), host=20e-6, device=2e-6)
    assert timing.median == pytest.approx(2.0)
    assert timing.low == pytest.approx(2.0)
    assert timing.high == pytest.approx(2.0)
    assert timing.steady
    assert timing.samples == 7


def test_a_call_that_waits_for_the_device_is_said_to_be_unsteady():
    timer = FakeTimer()

    def waiting(i):
        timer.work(20e-6, 2e-6)
        timer.synchronize()

    timing = measure([Subject("op", waiting)], timer, buffers=1, calls=4, samples=5, seconds=1e9)["op"]
    assert not timing.steady
    # Tried with longer and longer stalls once, then no more.
    assert len(timer.stalls) == 4 + 4
    assert max(timer.stalls) > 4 * min(timer.stalls)


def test_a_stall_that_was_too_short_is_repeated_longer():
    timer = FakeTimer()
    hosts = iter([1e-6] * 10 + [500e-6] * 10)  # the host is slower than the warm-up let expect

    def call(i):
        timer.work(next(hosts, 1e-6), 5e-6)

    timing = measure([Subject("op", call)], timer, buffers=1, calls=5, samples=3, seconds=1e9)["op"]
    assert timing.steady
    assert timing.high == pytest.approx(5.0)
    assert len(timer.stalls) > 3


def test_every_buffer_has_its_turn_and_results_live_until_the_next():
    alive, seen, most = set(), [], 0

    class Result:
        def __init__(self, i):
            self.i = i
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    def call(i):
        nonlocal most
        seen.append(i)
        result = Result(i)
        most = max(most, len(alive))
        return result

    measure([Subject("op", call)], HostTimer(), buffers=4, calls=3, samples=4, seconds=1e9)
    assert seen == [i % 4 for i in range(4 + 3 + 4 * 3)]
    assert most == 5  # four buffers' results, and the one being made
    assert not alive


def test_samples_of_subjects_alternate_and_stop_in_time():
    timer, order = FakeTimer(), []

    def subject(name, seconds):
        def call(i):
            order.append(name)
            timer.work(0.0, seconds)

        return Subject(name, call)

    timings = measure([subject("a", 1.0), subject("b", 2.0)], timer, buffers=1, calls=1, samples=100, seconds=20.0)
    assert order[4:] == ["a", "b"] * ((len(order) - 4) // 2)
    assert timings["a"].median == pytest.approx(1e6)
    assert timings["b"].median == pytest.approx(2e6)
    assert 3 <= timings["a"].samples == timings["b"].samples < 10


def test_three_samples_whatever_the_time():
    assert timed(FakeTimer(), 1e-6, 1.0, seconds=0.0).samples == 3


def test_what_has_its_own_time_line_is_timed_by_the_host():
    timer, waited = FakeTimer(), []

    def wait(result):
        waited.append(result)
        timer.synchronize()

    def call(i):
        timer.work(1e-6, 50e-6)
        return i

    timing = measure([Subject("op", call, wait)], timer, buffers=2, calls=4, samples=3, seconds=1e9)["op"]
    assert timing.clock == "host"
    assert timing.median == pytest.approx(50.0, rel=0.02)
    assert timer.stalls == []
    assert set(waited) == {0, 1}
