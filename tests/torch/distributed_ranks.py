"""What each of two processes does, joined by gloo: data-parallel training of a converted model."""

import copy
import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gpu_layers as gl
import gpu_layers.torch as glt


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten()
    )
    return net.append(nn.Linear(36, 2))


def one_process_with_all(rank, sizes, dtype, memory_format, device="cpu"):
    """Synchronised batch norm of parts against batch norm of the whole batch."""
    generator = torch.Generator().manual_seed(1)
    whole, dy = (3 + torch.randn(sum(sizes), 4, 5, 3, generator=generator, dtype=dtype).to(device) for _ in range(2))
    own = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
    alone = nn.BatchNorm2d(4).to(device, dtype)
    synced = glt.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(alone))
    assert type(synced) is glt.SyncBatchNorm
    whole.requires_grad_()
    part = whole.detach()[own].contiguous(memory_format=memory_format).requires_grad_()
    expected, y = alone(whole), synced(part)
    assert y.is_contiguous(memory_format=memory_format) or not y.numel()
    expected.backward(dy)
    y.backward(dy[own])
    bound = 1e-12 if dtype is torch.float64 else 2e-5
    torch.testing.assert_close(y, expected[own], rtol=bound, atol=bound)
    torch.testing.assert_close(part.grad, whole.grad[own], rtol=bound, atol=bound)
    for a, b in zip(synced.parameters(), alone.parameters(), strict=True):
        total = a.grad.clone()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(total, b.grad, rtol=10 * bound, atol=10 * bound)
    for a, b in zip(synced.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
    synced.eval(), alone.eval()
    torch.testing.assert_close(synced(whole), alone(whole), rtol=bound, atol=bound)
    assert type(glt.revert(synced)) is nn.SyncBatchNorm


def second_derivatives_of_one_process_with_all(rank, sizes):
    """A penalty on gradients, which depend on all parts of the batch."""
    generator = torch.Generator().manual_seed(2)
    whole, dy, other = (torch.randn(sum(sizes), 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    own = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
    alone = nn.BatchNorm1d(2).double()
    synced = glt.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(alone))
    found = []
    for layer, part in ((alone, slice(None)), (synced, own)):
        x, gradient = (one[part].clone().requires_grad_() for one in (whole, dy))
        (dx,) = torch.autograd.grad(layer(x), x, gradient, create_graph=True)
        found.append(torch.autograd.grad((dx.tanh() * other[part]).sum(), [x, gradient, layer.weight]))
    *expected, of_weight = found[0]
    *parts, total = found[1]
    torch.distributed.all_reduce(total)
    for a, b in zip(parts, expected, strict=True):
        torch.testing.assert_close(a, b[own], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, of_weight, rtol=1e-12, atol=1e-12)


def on_gpus(rank, port):
    """Synchronised batch norm by NCCL, a GPU a process."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        one_process_with_all(rank, (5, 3), torch.float64, torch.channels_last, "cuda")
    finally:
        torch.distributed.destroy_process_group()
    print(f"rank {rank} agrees")


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
        # Sharded, and recomputed in backward: statistics count a batch once, as without.
        net, plain = glt.convert(model(), fuse=True), glt.convert(model(), fuse=True)
        net[4].p = plain[4].p = 0.0
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        plain(x), checkpoint(net, x, use_reentrant=False).square().sum().backward()
        torch.testing.assert_close(net[1].running_mean, plain[1].running_mean)
        assert net[1].num_batches_tracked == 1
        for dtype, backend, sizes, memory_format in (
            (torch.float64, "reference", (5, 3), torch.contiguous_format),
            (torch.float64, "reference", (4, 0), torch.channels_last),
            (torch.float32, "emulated", (1, 6), torch.channels_last),
        ):
            with gl.use_backend(backend):
                one_process_with_all(rank, sizes, dtype, memory_format)
        for sizes in ((3, 2), (4, 0)):
            second_derivatives_of_one_process_with_all(rank, sizes)
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
    (on_gpus if sys.argv[3:] == ["nccl"] else main)(int(sys.argv[1]), int(sys.argv[2]))
