"""Two processes train a converted model together; threads train models of their own."""

import copy
import socket
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import gpu_layers.torch as glt


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize(
    "backend",
    [
        "gloo",
        pytest.param(
            "nccl",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="GPU: fewer than two that this torch can use"),
            ],
        ),
    ],
)
def test_two_processes(backend):
    port = free_port()
    command = [sys.executable, "-m", "tests.torch.distributed_ranks"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank), str(port), backend], **pipes) for rank in range(2)]
    told = [process.communicate(timeout=120) for process in processes]
    # Of the one that failed first the other only says that it is gone.
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors for _, errors in told)
    for rank, (output, _) in enumerate(told):
        assert f"rank {rank} agrees" in output


def test_threads_train_as_one_thread_does():
    torch.manual_seed(0)
    net = glt.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), fuse=True)
    inputs = [torch.randn(4, 3, 8, 8, requires_grad=True) for _ in range(4)]
    copies = [copy.deepcopy(net) for _ in range(8)]

    def step(module, x, results, place):
        results[place] = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])

    alone, together = [None] * 4, [None] * 4
    for place, x in enumerate(inputs):
        step(copies[place], x, alone, place)
    threads = [
        threading.Thread(target=step, args=(copies[4 + place], x, together, place)) for place, x in enumerate(inputs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_replicas_of_data_parallel_share_what_they_should():
    net = glt.convert(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.2)))
    replica = net[0]._replicate_for_data_parallel()
    assert type(replica) is glt.BatchNorm2d
    assert replica.running_mean is net[0].running_mean
