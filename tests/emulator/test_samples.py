"""Kernels of the kinds this project has: right under every schedule, and fast enough to test with."""

from __future__ import annotations

import functools
import time

import numpy as np
import pytest

from gpu_layers import emulator

from .conftest import KERNELS

#: Elements per second of processor time; the real figures are several times higher.
TARGETS = {
    ("dropout", "fast"): 10e6,
    ("channel_statistics", "fast"): 5e6,
    ("dropout", "trace"): 1e6,
    ("channel_statistics", "trace"): 1e6,
}


@functools.cache
def module(mode: str) -> emulator.EmulatedModule:
    return emulator.load(KERNELS / "samples.cu", ["dropout", "channel_statistics"], mode=mode)


def dropout(mode, x, schedule):
    y = np.zeros_like(x)
    values = [x, y, np.uint32(1 << 30), np.float32(4 / 3), np.uint32(7), np.int64(x.size)]
    module(mode).launch("dropout", (max(1, x.size // 4096),), (256,), values, schedule=schedule)
    return (y,)


def channel_statistics(mode, x, schedule):
    mean, m2 = np.zeros(x.size // 4096, np.float32), np.zeros(x.size // 4096, np.float32)
    values = [x, mean, m2, np.int32(4096)]
    module(mode).launch("channel_statistics", (mean.size,), (256,), values, schedule=schedule)
    return mean, m2


RUN = {"dropout": dropout, "channel_statistics": channel_statistics}


@pytest.mark.parametrize("mode", ["fast", "trace"])
@pytest.mark.parametrize("name", RUN)
def test_every_schedule_gives_the_same_bits(name, mode):
    x = np.random.default_rng(0).standard_normal(1 << 15).astype(np.float32)
    results = [RUN[name](mode, x, schedule) for schedule in emulator.ALL_SCHEDULES]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_dropout_drops_and_scales():
    x = np.ones(1 << 16, np.float32)
    (y,) = dropout("fast", x, emulator.Schedule())
    assert set(np.unique(y)) == {np.float32(0), np.float32(4 / 3)}
    assert abs((y == 0).mean() - 0.25) < 5 * (0.25 * 0.75 / x.size) ** 0.5  # five standard deviations


def test_statistics_are_those_of_numpy():
    x = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32) + 10
    mean, m2 = channel_statistics("fast", x, emulator.Schedule())
    exact = x.reshape(-1, 4096).astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(1), rtol=1e-6)  # 4096 = 256 * 16 terms: a short tree of roundings
    np.testing.assert_allclose(m2, exact.var(1) * 4096, rtol=1e-5)


@pytest.mark.parametrize(("name", "mode"), TARGETS, ids="-".join)
def test_speed(name, mode):
    x = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    RUN[name](mode, x[: 1 << 12], emulator.Schedule())
    best = 0.0
    for _ in range(3):
        start = time.process_time()  # of this process alone: others may be busy
        RUN[name](mode, x, emulator.Schedule())
        best = max(best, x.size / (time.process_time() - start))
    print(f"{name} {mode}: {best / 1e6:.1f} M elements/s")
    assert best >= TARGETS[name, mode]
