"""The interface of engines that connect processes, and the default engine."""

from __future__ import annotations

import os
import warnings
from functools import cache

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module

#: Number of processes, as Open MPI and MPICH announce it.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


class Communicator:
    """Several processes, each with a number.

    Everything goes through :meth:`gather`: a process that has all parts can add them in the order of the ranks. That
    gives the same bits everywhere and in every run; the engines' own sums promise neither.

    Attributes
    ----------
    rank, size : int
        Number of this process, from 0, and how many there are.
    """

    rank: int
    size: int

    def gather(self, values: Array) -> Array:
        """The arrays of all processes, in the order of their ranks.

        Parameters
        ----------
        values : array
            Of the same shape and dtype in all processes. All must call this equally often.

        Returns
        -------
        array, shape (size, *values.shape)

        Raises
        ------
        RuntimeError
            If the others do not answer.
        """
        raise TypeError(f"{type(self).__name__} defines no gather")

    def abort(self) -> None:
        """End all processes, with exit status 1: the others would wait for this one."""
        raise TypeError(f"{type(self).__name__} defines no abort")

    # There is one connection: copies of a layer use it too.
    def __copy__(self) -> Communicator:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Communicator:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        # It cannot go into a file or to another process: the default one replaces it there.
        was_default = bool(default_communicator.cache_info().currsize) and self is default_communicator()
        return _default_instead, (type(self).__name__, self.size, was_default)


class SingleProcess(Communicator):
    """A process without others."""

    rank, size = 0, 1

    def gather(self, values: Array) -> Array:
        """The ``values`` on a new first axis."""
        return array_module(values).stack([values])

    def abort(self) -> None:
        """Exit with status 1."""
        raise SystemExit(1)

    def __reduce__(self) -> tuple[object, ...]:
        return (SingleProcess, ()) if type(self) is SingleProcess else super().__reduce__()


def started_processes() -> int:
    """Number of processes that ``mpirun`` started; 1 without it."""
    return max(int(os.environ.get(name, "1")) for name in _SIZE_VARIABLES)


def local_rank() -> int:
    """Number of this process among those of the same machine, as ``mpirun`` announces it; 0 without it."""
    return max(int(os.environ.get(name, "0")) for name in _LOCAL_RANK_VARIABLES)


@cache
def default_communicator() -> Communicator:
    """All processes that ``mpirun`` started, or this one alone.

    Raises
    ------
    RuntimeError
        If ``mpirun`` started several and mpi4py or an MPI library is missing.
    """
    if started_processes() == 1:
        return SingleProcess()
    # Imported here: that module imports this one.
    from gpu_layers.distributed.mpi import MpiCommunicator

    return MpiCommunicator()


def _default_instead(kind: str, size: int, was_default: bool) -> Communicator:
    """The communicator that replaces a pickled one; a warning if it is another one."""
    here = default_communicator()
    if not (was_default and here.size == size):
        warnings.warn(
            f"a pickled layer had a {kind} of {size} processes, which cannot be pickled: it now has the default "
            f"communicator, {type(here).__name__} of {here.size}; set layer.communicator to another one",
            UserWarning,
            stacklevel=2,
        )
    return here


def shard(samples: int, communicator: Communicator) -> slice:
    """This process's part of a batch: consecutive samples. The parts differ by at most one sample.

    Parameters
    ----------
    samples : int
        Samples in the batch.
    communicator : Communicator

    Returns
    -------
    slice
    """
    first, last = (samples * rank // communicator.size for rank in (communicator.rank, communicator.rank + 1))
    return slice(first, last)
