"""What each of two processes does, joined by gloo: data-parallel training of a converted model."""

import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gpu_layers.torch as glt


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten()
    )
    return net.append(nn.Linear(36, 2))


def main(rank, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
        gradients = []
        for change in (lambda net: net, lambda net: glt.convert(net, fuse=True)):
            net = change(model())
            net[4].p = 0.0
            parallel = DistributedDataParallel(net)
            parallel(x).square().sum().backward()
            gradients.append([parameter.grad for parameter in net.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        # Masks of their own: torch's generators differ, and the mean of the gradients is the same on both.
        net = glt.convert(model())
        torch.manual_seed(100 + rank)
        parallel = DistributedDataParallel(net)
        y = parallel(x)
        y.sum().backward()
        mine = net[6].weight.grad.clone()
        total = mine.clone()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(mine, total / 2)
        # What other converters make of a converted model works in a group too.
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(glt.convert(model()))
        glt.convert(synced)
        assert type(synced[1]) is nn.SyncBatchNorm
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(glt.convert(model(), fuse=True))
        assert type(fused[1]) is glt.BatchNormAct2d
    finally:
        torch.distributed.destroy_process_group()
    print(f"rank {rank} agrees")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
