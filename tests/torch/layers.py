"""What the tests of gpu_layers.torch share: pairs of our modules and torch's, and comparisons of them."""

from __future__ import annotations

import torch
from torch import nn

import gpu_layers.torch as glt

torch.set_num_threads(1)  # for tensors of a few hundred elements, threads only cost time

#: Largest relative error of rounding to nearest.
UNIT_ROUNDOFF = {
    dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}

#: Name, arguments and shape of a call of every module that is also in torch.nn and draws no numbers.
CALLS = [
    ("BatchNorm1d", (5,), (7, 5)),
    ("BatchNorm1d", (5, 1e-3, None), (3, 5, 9)),
    ("BatchNorm2d", (5, 1e-3, 0.3, True, False), (2, 5, 7, 3)),
    ("BatchNorm2d", (5, 1e-5, 0.1, False), (3, 5, 7, 4)),
    ("BatchNorm3d", (3,), (2, 3, 3, 5, 4)),
    ("MaxPool1d", (3, 2, 1), (2, 3, 11)),
    ("MaxPool2d", ((3, 2), 2, (1, 0), 1, True, True), (2, 3, 9, 11)),
    ("MaxPool2d", (3, 1, 1, 2), (2, 3, 7, 10)),
    ("MaxPool2d", (2,), (3, 6, 5)),
    ("MaxPool3d", (2, 1, 1), (2, 3, 4, 3, 5)),
    ("AvgPool1d", (3, 2, 1, True), (2, 3, 10)),
    ("AvgPool2d", ((3, 2), 2, (1, 1), True, False), (2, 3, 8, 10)),
    ("AvgPool2d", (3, 2, 1, False, True, 5), (2, 3, 9, 7)),
    ("AvgPool3d", (2, 2, 1), (2, 3, 5, 4, 3)),
    ("LPPool1d", (2, 3, 2), (2, 3, 11)),
    ("LPPool2d", (3.5, (3, 2), 2, True), (2, 3, 8, 9)),
    ("LPPool3d", (1, 2), (2, 3, 4, 5, 4)),
    ("LPPool2d", (float("inf"), 2), (2, 3, 5, 6)),
    ("AdaptiveMaxPool1d", (4, True), (2, 3, 11)),
    ("AdaptiveMaxPool2d", ((3, None), True), (2, 3, 7, 4)),
    ("AdaptiveMaxPool3d", (2,), (2, 3, 5, 4, 3)),
    ("AdaptiveAvgPool1d", (4,), (3, 11)),
    ("AdaptiveAvgPool2d", ((3, 5),), (2, 3, 7, 4)),
    ("AdaptiveAvgPool2d", (1,), (2, 3, 7, 4)),
    ("AdaptiveAvgPool3d", (2,), (2, 3, 5, 4, 3)),
]


def pair(name: str, arguments: tuple, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, with the same parameters, which are not those at the start."""
    ours, theirs = (getattr(one, name)(*arguments).to(dtype) for one in (glt, nn))
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Positive and negative numbers, no two of them equal in float32."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod())
    return ((torch.randperm(count, generator=generator) - count // 2 + 0.25) / 8).reshape(shape).to(dtype)


def every_other(x: torch.Tensor) -> torch.Tensor:
    """The same values, with gaps."""
    wide = torch.full([2 * size for size in x.shape], 99.0, dtype=x.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The same values in the format in which channels lie side by side."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def first(result):
    """The values, where indices come beside."""
    return result[0] if isinstance(result, tuple) else result


def compare(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, rtol: float, atol: float) -> None:
    """Results, indices, gradients and buffers."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with_indices, expected = ours(a), theirs(b)
    y, z = first(with_indices), first(expected)
    assert y.dtype is z.dtype
    torch.testing.assert_close(y, z, rtol=rtol, atol=atol)
    if isinstance(expected, tuple):
        assert torch.equal(with_indices[1], expected[1])
    dy = values(tuple(y.shape), y.dtype, 1)
    y.backward(dy)
    z.backward(dy)
    assert a.grad.dtype is b.grad.dtype
    scale = float(b.grad.abs().max())
    torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=atol * max(1.0, scale))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad.dtype is q.grad.dtype
        torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=atol * max(1.0, float(q.grad.abs().max())))
    for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert p.dtype is q.dtype
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
