"""Run by two processes; the second does not come along."""

import os
import signal
import sys
import time

import numpy as np

import gpu_layers as gl
from gpu_layers.distributed import MpiCommunicator

processes = MpiCommunicator()
layer = gl.SyncBatchNorm(3, communicator=processes, dtype="float64")
x = np.arange(12.0).reshape(4, 3)
layer(x)
# From here on both are awake: before, one may have been slower to start.
processes.timeout = 2.0
if processes.rank == 1:
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif sys.argv[1] == "raises":
        raise KeyError("this process has a bug")
    time.sleep(3600 if sys.argv[1] == "sleeps" else 0)
try:
    layer.backward(x)
except RuntimeError as error:
    print(f"process {processes.rank}: {error}", flush=True)
    processes.abort()
