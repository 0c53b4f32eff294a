"""Every GPU is filled, however few the channels: blocks of the batch norm kernels at the reference shapes."""

import numpy as np
import pytest

from gpu_layers.kernels.batch_norm import blocks_for_shape

MULTIPROCESSORS = 132  # of an H100
RESIDENT_BLOCKS = 4  # of 256 threads with up to 64 registers each: what the kernels ask for with __launch_bounds__


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape", [(256, 64, 112, 112), (64, 256, 56, 56), (128, 512, 7, 7), (256, 2048, 7, 7), (64, 3, 224, 224)]
)
def test_blocks_at_reference_shapes(shape, channels_last, dtype):
    if channels_last:
        shape = (shape[0], *shape[2:], shape[1])
    blocks = blocks_for_shape(shape, dtype, channels_last)
    assert blocks >= MULTIPROCESSORS * RESIDENT_BLOCKS
    # Not far more than fill it either: every block has a partial result to merge.
    assert blocks <= 100_000
