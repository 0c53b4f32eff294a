"""Several processes, each with a part of every batch, and how they exchange numbers."""

from gpu_layers.distributed.communicator import Communicator, SingleProcess, default_communicator, shard
from gpu_layers.distributed.mpi import MpiCommunicator
from gpu_layers.distributed.nccl import NcclCommunicator

__all__ = ["Communicator", "MpiCommunicator", "NcclCommunicator", "SingleProcess", "default_communicator", "shard"]
