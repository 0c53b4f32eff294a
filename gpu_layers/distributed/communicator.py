"""What the library asks of an engine that connects processes, and which engine there is."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

from gpu_layers.runtime.cuda import array_module

#: Number of processes, as the starters of MPI programs announce it: Open MPI, and MPICH and its relatives.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


class Communicator:
    """Processes of which each has a number.

    Everything goes through :meth:`gather`: who receives all parts can add them in the order of the ranks, which gives
    the same bits everywhere and in every run; engines' own sums promise neither.

    Attributes
    ----------
    rank, size : int
        Number of this process, from 0, and how many there are.
    """

    rank: int
    size: int

    def gather(self, values: Any) -> Any:
        """Every process's array, in the order of their ranks, in all processes.

        Parameters
        ----------
        values : array
            Of the same shape and dtype everywhere. All processes must call this, and as often.

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

    # A connection is one: copies of a layer speak through it too.
    def __copy__(self) -> Communicator:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Nor does it go into a file, or to another process: there the default one takes its place.
        was_default = bool(default_communicator.cache_info().currsize) and self is default_communicator()
        return _default_instead, (type(self).__name__, self.size, was_default)


class SingleProcess(Communicator):
    """A process without others."""

    rank, size = 0, 1

    def gather(self, values: Any) -> Any:
        """The values, on a new first axis."""
        return array_module(values).stack([values])

    def abort(self) -> None:
        """Exit with status 1."""
        raise SystemExit(1)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SingleProcess, ()) if type(self) is SingleProcess else super().__reduce__()


def started_processes() -> int:
    """How many processes ``mpirun`` says that it started; 1 without it."""
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
        If ``mpirun`` started several, and mpi4py or an MPI library is missing.
    """
    if started_processes() == 1:
        return SingleProcess()
    # Here, not above: that module is built on this one.
    from gpu_layers.distributed.mpi import MpiCommunicator

    return MpiCommunicator()


def _default_instead(kind: str, size: int, was_default: bool) -> Communicator:
    """What a pickled communicator becomes; a warning where that is another one."""
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
    """This process's part of a batch: consecutive samples, as many as the others have or one more or fewer."""
    first, last = (samples * rank // communicator.size for rank in (communicator.rank, communicator.rank + 1))
    return slice(first, last)
