"""Processes connected by MPI."""

from __future__ import annotations

import importlib
import time
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_number
from gpu_layers.core.cuda import array_module, is_cupy_array
from gpu_layers.distributed.communicator import Communicator

MPI_ADVICE = "pip install 'gpu-layers[mpi]', and an MPI library such as Open MPI (on Debian and Ubuntu: openmpi-bin)"
#: Seconds of asking without a pause, and the pause after that: other processes may need this one's core.
_EAGER, _PAUSE = 1e-4, 2e-5


class MpiCommunicator(Communicator):
    """The processes that ``mpirun`` started, by mpi4py.

    CuPy arrays go through the host's memory; :class:`NcclCommunicator` keeps them on the GPUs.

    If a process ends by a signal, ``mpirun`` ends the others. If one stops at an exception, the others would wait:
    start programs with ``mpirun ... python -m mpi4py program.py``, which then ends all of them. Otherwise a process
    that waits gets an error after ``timeout`` seconds.

    Parameters
    ----------
    communicator : mpi4py.MPI.Comm, optional
        ``MPI.COMM_WORLD`` by default.
    timeout : float
        Seconds to wait for the other processes.

    Raises
    ------
    RuntimeError
        If mpi4py or an MPI library is missing.
    TypeError, ValueError
        For a timeout that is not a positive number.
    """

    def __init__(self, communicator: Any = None, *, timeout: float = 600.0) -> None:
        self.timeout = check_number(timeout, "timeout")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be positive, got {timeout}")
        self._comm = _import_mpi().COMM_WORLD if communicator is None else communicator
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()

    def gather(self, values: Array) -> Array:
        """Gather ``values`` as :meth:`Communicator.gather`."""
        host = np.asarray(values.get() if is_cupy_array(values) else values, order="C")
        everything = np.empty((self.size, *host.shape), host.dtype)
        # As bytes: MPI has no name for bfloat16.
        request = self._comm.Iallgather(host.reshape(-1).view(np.uint8), everything.reshape(-1).view(np.uint8))
        began = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - began
            if waited > self.timeout:
                raise RuntimeError(
                    f"process {self.rank} of {self.size} waited {self.timeout:g} s for the others: one has ended, or "
                    "has not come to the same place (did it see another number of batches?)"
                )
            if waited > _EAGER:
                time.sleep(_PAUSE)
        return array_module(values).asarray(everything)

    def abort(self) -> None:
        """As :meth:`Communicator.abort`."""
        self._comm.Abort(1)


def _import_mpi() -> Any:
    try:
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f"several processes need mpi4py ({error}): {MPI_ADVICE}") from error
