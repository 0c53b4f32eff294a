"""Every GPU is filled, however few the channels: blocks of the batch norm kernels at the reference shapes."""

import numpy as np
import pytest

from gpu_layers.kernels.batch_norm_plan import backward_plan, elementwise_plan, forward_plan
from profiling.devices import GPUS

MULTIPROCESSORS = GPUS["H100"].multiprocessors
PERSISTENT_BLOCKS = 4  # of 256 threads with up to 64 registers each: what the kernels ask for with __launch_bounds__
each_dtype = pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
each_layout = pytest.mark.parametrize("channels_last", [False, True])
each_shape = pytest.mark.parametrize(
    "shape", [(256, 64, 112, 112), (64, 256, 56, 56), (128, 512, 7, 7), (256, 2048, 7, 7), (64, 3, 224, 224)]
)


def planned(plan, shape, dtype, channels_last):
    shape = (shape[0], *shape[2:], shape[1]) if channels_last else shape
    return plan(shape, np.dtype(dtype).itemsize, channels_last)


@each_dtype
@each_layout
@each_shape
def test_blocks_of_what_streams(shape, channels_last, dtype):
    blocks = planned(elementwise_plan, shape, dtype, channels_last).blocks
    assert blocks >= MULTIPROCESSORS * PERSISTENT_BLOCKS
    # Not far more than fill it either: every block has a partial result to merge.
    assert blocks <= 100_000


@each_dtype
@each_layout
@each_shape
@pytest.mark.parametrize("plan", [forward_plan, backward_plan])
def test_blocks_of_sums(shape, channels_last, dtype, plan):
    plan = planned(plan, shape, dtype, channels_last)
    if plan.slots is None:
        assert plan.blocks >= MULTIPROCESSORS * PERSISTENT_BLOCKS
        return
    # Two blocks on a multiprocessor, as groups that are there all at once: few blocks are left over.
    groups = min(plan.tiles, 2 * MULTIPROCESSORS // plan.blocks_per_group)
    assert groups >= 1
    assert groups * plan.blocks_per_group >= (0.7 if channels_last else 0.9) * 2 * MULTIPROCESSORS
