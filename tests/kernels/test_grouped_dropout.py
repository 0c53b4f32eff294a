"""Dropout of runs of neighbours, as a kernel: warps that take what they have in several turns."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.runtime.limits import force_limits
from profiling.traffic import listed_launches
from tests.inputs import assert_same_bits, each_dtype, normal

SEED, OFFSET, START = 2**63 + 12345, 2**32 + 7, 2**40 + 5
# The shortest; some in a vector; some in a turn, in a warp's span and beyond it; whole vectors, spans, and neither.
RUNS = [16, 17, 100, 512, 513, 1024, 1500, 4099]


def dropped(x):
    return gl.ops.dropout_forward(x, 0.5, SEED, OFFSET, start=START, mask_axes=2)[0]


@each_dtype
@pytest.mark.parametrize("run", RUNS)
def test_bits_in_several_turns(dtype, run):
    x = normal((3, -(-7000 // run), run), dtype)
    expected = dropped(x)
    with force_limits(full_grid=1):
        with listed_launches() as launches:
            dropped(x)
        with gl.use_backend("emulated"):
            assert_same_bits(dropped(x), expected)
            with force_limits(max_blocks=1):
                assert_same_bits(dropped(x), expected)
    # Spans of 1,024 elements, in turns of two vectors a lane.
    (launch,) = launches
    assert launch.kernel.name.startswith("dropout_apply_grouped<")
    assert launch.values[-1] == x.dtype.itemsize
    with listed_launches() as launches:
        dropped(x)
    assert launches[0].values[-1] == 1


def test_clean_in_checked_mode():
    x = normal((2, 9, 1001), np.float32)
    expected = dropped(x)
    with force_limits(full_grid=1), gl.use_backend("emulated", check=True):
        assert_same_bits(dropped(x), expected)
