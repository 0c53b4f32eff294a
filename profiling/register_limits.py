"""How many registers a thread of each kernel may take."""

from __future__ import annotations

# 65,536 registers of a multiprocessor for at least 1,024 threads.
_MOST = 64


def most_registers(kernel_name: str) -> int:
    """Registers of a thread, at most, of a kernel by its C++ name.

    The kernels of 64-bit indices, for images of 2**31 elements and more, those with an activation that is not straight,
    where arithmetic limits, and those that keep what they read, of whose blocks shared memory holds two, may take twice
    as many; those that hold numbers of every channel for the statistics and for what is fused, and the derivatives in
    double, as many as 768 threads.
    """
    if kernel_name.endswith(("long long>", "kCurved>")) or "_resident_" in kernel_name:
        return 2 * _MOST
    three_blocks = ("batch_norm_max_pool_forward<", "activation_dropout_backward<double>")
    return 80 if kernel_name.endswith("kSloped>") or kernel_name.startswith(three_blocks) else _MOST
