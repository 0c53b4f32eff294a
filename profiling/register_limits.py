"""How many registers a thread of each kernel may take."""

from __future__ import annotations

import re

# 65,536 registers of a multiprocessor for at least 1,024 threads.
_MOST = 64

_GATHERS_EIGHT_CHANNELS = re.compile(
    r"(max|avg)_pool_backward_tiled<__(half|nv_bfloat16), 3, \d, 1, true, "
    r"|batch_norm_max_pool_(gradient_sums|input_gradient)_nhwc<__(half|nv_bfloat16), 8>"
)


def most_registers(kernel_name: str) -> int:
    """Registers of a thread, at most, of a kernel by its C++ name.

    The kernels of 64-bit indices, for images of 2**31 elements and more, those with an activation that is not straight,
    where arithmetic limits, those of second derivatives, with nine numbers of every channel, and those that keep what
    they read, of whose blocks shared memory holds two, may take twice as many, and so may those that gather the
    gradients of overlapping windows for eight channels of half types, whose sums in float32 they carry from row to row,
    or through batch norm; those that hold numbers of every channel for the statistics and for what is fused, the
    derivatives in double, and those that add a branch to a residual, with numbers of every feature, as many as 768
    threads.
    """
    if _GATHERS_EIGHT_CHANNELS.match(kernel_name):
        return 2 * _MOST
    if kernel_name.endswith(("long long>", "kSmooth>")) or "_persistent_" in kernel_name or "_double_" in kernel_name:
        return 2 * _MOST
    three_blocks = ("batch_norm_max_pool_", "activation_dropout_backward<double>", "dropout_add_")
    return 80 if kernel_name.endswith("kPiecewiseLinear>") or kernel_name.startswith(three_blocks) else _MOST
