"""Launching ``dropout.cu``."""

from __future__ import annotations

from typing import Any

from gpu_layers.kernels.arrays import ELEMENT_TYPES, element_type, ready
from gpu_layers.kernels.elementwise import THREADS, blocks_for, filled, vector_blocks
from gpu_layers.runtime.kernel import KernelTemplate, combinations
from gpu_layers.runtime.launch import launch

_SIGNATURE = (
    "const T* x, T* y, long long n, unsigned long long drop_below, A scale, "
    "unsigned long long seed, unsigned long long offset, unsigned long long start"
)
_APPLY = KernelTemplate("dropout.cu", "dropout_apply", _SIGNATURE, combinations(T=ELEMENT_TYPES))
_APPLY_SHARD = KernelTemplate("dropout.cu", "dropout_apply_shard", _SIGNATURE, combinations(T=ELEMENT_TYPES))


def dropout_forward(
    x: Any,
    drop_below: int,
    scale: float,
    seed: int,
    offset: int,
    start: int = 0,
    out: Any | None = None,
) -> Any:
    """``gpu_layers.reference.dropout_forward``, as a kernel."""
    x = ready(x)

    def fill(y: Any) -> None:
        template, blocks = _APPLY, vector_blocks(x.size, x.dtype)
        if start % 4:
            template, blocks = _APPLY_SHARD, blocks_for(x.size // 4 + 2, THREADS)
        arguments = (x, y, x.size, drop_below, scale, seed, offset, start)
        launch(template(T=element_type(x)), blocks, THREADS, arguments)

    return filled(out, x, fill)


# As in the reference: the same map, of dy.
dropout_backward = dropout_forward
