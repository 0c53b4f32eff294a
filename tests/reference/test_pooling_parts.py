"""The reference pools some samples at a time, so that it needs little memory: how many changes nothing."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.reference import pool_taps
from tests.inputs import assert_all_same_bits, normal

SAMPLES = 37
WINDOW = {"kernel_size": (3,), "stride": 2, "padding": 1}
LENGTHS = np.arange(SAMPLES) % 9
CALLS = {
    "max": (gl.ops.max_pool_forward, gl.ops.max_pool_backward, WINDOW),
    "max of lengths": (gl.ops.max_pool_forward, gl.ops.max_pool_backward, {**WINDOW, "lengths": LENGTHS}),
    "average": (gl.ops.avg_pool_forward, gl.ops.avg_pool_backward, WINDOW),
    "average of lengths": (gl.ops.avg_pool_forward, gl.ops.avg_pool_backward, {**WINDOW, "lengths": LENGTHS}),
    "adaptive": (gl.ops.adaptive_avg_pool_forward, gl.ops.avg_pool_backward, {"output_size": (3,)}),
    **{
        f"power {p}": (lambda x, p=p, **window: gl.ops.lp_pool_forward(x, p, **window), gl.ops.lp_pool_backward, WINDOW)
        for p in (1, 3, np.inf)
    },
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_parts_of_a_batch_are_the_batch(name, channels_last, monkeypatch):
    forward, backward, options = CALLS[name]
    x = normal((SAMPLES, 8, 2) if channels_last else (SAMPLES, 2, 8))
    taken = []
    whole = pool_taps.by_samples

    def results():
        y, saved = forward(x, **options, channels_last=channels_last)
        return y, backward(np.cos(y), saved)

    expected = results()

    def counted(compute, *rest):
        return whole(lambda *parts: taken.append(len(parts[0])) or compute(*parts), *rest)

    for module in ("max_pool", "avg_pool", "lp_pool"):
        monkeypatch.setattr(f"gpu_layers.reference.{module}.by_samples", counted)
    # Of five samples, or of ten half as large: 37 are no whole number of either.
    monkeypatch.setattr(pool_taps, "_PART", 5 * x[0].size)
    assert_all_same_bits(results(), expected)
    assert max(taken) < SAMPLES
    assert set(taken) - {5, 10} == {SAMPLES % size for size in {5, 10} & set(taken)}
