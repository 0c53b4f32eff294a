"""How many registers a thread of each kernel may take."""

from __future__ import annotations

import re

# 65,536 registers of a multiprocessor for at least 1,024 threads.
_MOST = 64

# Those that carry much from row to row: sums for eight channels, the largest of five rows, or numbers of every channel.
_CARRIES_ROWS = re.compile(
    r"(max|avg)_pool_backward_tiled<__(half|nv_bfloat16), 3, \d, 1, true, "
    r"|max_pool_(forward|backward)_tiled<\w+, 5, "
    r"|max_pool_backward_wide<"
    r"|(max|avg)_pool_forward_adaptive<"
    r"|batch_norm_max_pool_(gradient_sums|input_gradient)_nhwc<__(half|nv_bfloat16), 8>"
    r"|batch_norm_max_pool_forward_tiled<\w+, \d, \d, \d, true, "
)


def most_registers(kernel_name: str) -> int:
    """Registers of a thread, at most, of a kernel by its C++ name.

    The kernels of 64-bit indices, for images of 2**31 elements and more, those with an activation that is not
    straight, where arithmetic limits, those of second derivatives, with nine numbers of every channel, and those
    that keep what they read, of whose blocks shared memory holds two, may take twice as many. So may those that
    carry much from row to row: the float32 sums of gradients for eight channels of half types, also through batch
    norm; the largest of five rows; and, of channels-last batch norm before a pooling, the numbers of its channels.
    Those that hold numbers of every channel for the statistics and for what is fused, activations with the words of
    many elements, those that add a branch to a residual, with numbers of every feature, and the statistics and the
    input's gradient of rows, as many as 768 threads; if the branch has any activation, as many as 512.
    """
    if _CARRIES_ROWS.match(kernel_name):
        return 2 * _MOST
    if kernel_name.endswith(("long long>", "kSmooth>")) or "_persistent_" in kernel_name or "_double_" in kernel_name:
        return 2 * _MOST
    if kernel_name.startswith("dropout_add_") and kernel_name.endswith("false>"):
        return 2 * _MOST
    three_blocks = (
        "batch_norm_max_pool_",
        "activation_dropout_",
        "dropout_add_",
        "batch_norm_statistics_nhwc",
        "padded_batch_norm_statistics_nhwc",
        "batch_norm_input_gradient_nhwc",
    )
    return 80 if kernel_name.endswith("kPiecewiseLinear>") or kernel_name.startswith(three_blocks) else _MOST
