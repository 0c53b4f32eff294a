"""Processes with a GPU each, connected by NCCL."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_integer
from gpu_layers.core.cuda import array_module
from gpu_layers.distributed.communicator import Communicator


class NcclCommunicator(Communicator):
    """An engine of ``cupyx.distributed``, as ``cupyx.distributed.init_process_group(size, rank)`` returns it.

    Arrays stay on the GPUs. Gathering is asynchronous, in the order of CuPy's current stream, so there is no timeout
    here: NCCL reports lost processes by its own settings. Not tested: this code has not run on several GPUs yet.

    Parameters
    ----------
    backend : object
        With ``all_gather(in_array, out_array, count)``.
    rank, size : int
        As passed to ``init_process_group``.

    Raises
    ------
    TypeError, ValueError
        If rank and size are not valid numbers.
    """

    def __init__(self, backend: Any, rank: int, size: int) -> None:
        self._backend = backend
        self.size = check_integer(size, "size", 1, 2**31 - 1)
        self.rank = check_integer(rank, "rank", 0, self.size - 1)

    def gather(self, values: Array) -> Array:
        """Gather ``values`` as :meth:`Communicator.gather`; float32 and float64 only."""
        if values.dtype not in (np.float32, np.float64):
            raise TypeError(f"NCCL gathers float32 and float64 here, got {values.dtype}")
        xp = array_module(values)
        own = xp.asarray(values, order="C")
        everything = xp.empty((self.size, *own.shape), own.dtype)
        if own.size:
            self._backend.all_gather(own, everything, own.size)
        return everything

    def abort(self) -> None:
        """End this process at once; the program that started the others has to end them."""
        os._exit(1)
