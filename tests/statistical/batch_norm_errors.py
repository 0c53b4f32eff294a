"""Errors of batch norm against float64, beside PyTorch's on a CPU: ``python -m tests.statistical.batch_norm_errors``.

Prints the table of docs/batch_norm.md. The kernels run emulated, so the numbers are those of the source, whatever the
machine; they are errors, not times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

import gpu_layers as gl

_SHAPE = (16, 8, 28, 28)
_EPS = 1e-5
_DTYPES = {
    "float32": (np.dtype(np.float32), torch.float32),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), torch.bfloat16),
    "float16": (np.dtype(np.float16), torch.float16),
}


@dataclass(frozen=True)
class Results:
    """A training step: output, gradient of the input, running variance after a step with momentum 1."""

    y: np.ndarray
    dx: np.ndarray
    var: np.ndarray


@dataclass(frozen=True)
class Row:
    """Largest errors of one input: of y and dx relative to the largest value there, of the variance to itself."""

    dtype: str
    data: str
    ours: tuple[float, float, float]
    torchs: tuple[float, float, float]


def rows() -> Iterator[Row]:
    """All rows of the table."""
    rng = np.random.default_rng(0)
    noise, dy = rng.standard_normal((2, *_SHAPE))
    inputs: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {
        "mean 0, std 1": (noise, tuple(_DTYPES)),
        "mean 100, std 1": (100 + noise, tuple(_DTYPES)),
        "mean 1e4, std 1": (1e4 + noise, ("float32",)),
        "mean 1e6, std 1": (1e6 + noise, ("float32",)),
        "mean 0, std 1e-4": (1e-4 * noise, tuple(_DTYPES)),
    }
    for name, (values, dtypes) in inputs.items():
        for dtype in dtypes:
            kind, _ = _DTYPES[dtype]
            x, gradient = values.astype(kind), dy.astype(kind)
            exact = _exact(x.astype(np.float64), gradient.astype(np.float64))
            yield Row(dtype, name, _errors(_ours(x, gradient), exact), _errors(_torchs(x, gradient, dtype), exact))


def _exact(x: np.ndarray, dy: np.ndarray) -> Results:
    axes, count = (0, 2, 3), x.size // x.shape[1]
    deviation = x - x.mean(axis=axes, keepdims=True)
    var = np.square(deviation).mean(axis=axes, keepdims=True)
    inv_std = 1 / np.sqrt(var + _EPS)
    xhat = deviation * inv_std
    dx = inv_std * (dy - dy.mean(axis=axes, keepdims=True) - xhat * (dy * xhat).mean(axis=axes, keepdims=True))
    return Results(xhat, dx, var.reshape(-1) * count / (count - 1))


def _ours(x: np.ndarray, dy: np.ndarray) -> Results:
    layer = gl.BatchNorm2d(x.shape[1], eps=_EPS, momentum=1.0)
    with gl.use_backend("emulated"):
        y = layer(x)
        dx = layer.backward(dy)
    return Results(y, dx, layer.buffers["running_var"])


def _torchs(x: np.ndarray, dy: np.ndarray, dtype: str) -> Results:
    layer = torch.nn.BatchNorm2d(x.shape[1], eps=_EPS, momentum=1.0)
    convert: Callable[[np.ndarray], torch.Tensor] = lambda a: torch.from_numpy(a.astype(np.float32)).to(  # noqa: E731
        _DTYPES[dtype][1]
    )
    leaf = convert(x).requires_grad_()
    y = layer(leaf)
    y.backward(convert(dy))
    assert leaf.grad is not None
    return Results(y.detach().float().numpy(), leaf.grad.float().numpy(), layer.running_var.numpy())


def _errors(results: Results, exact: Results) -> tuple[float, float, float]:
    y, dx, var = (
        np.abs(one.astype(np.float64) - right)
        for one, right in zip((results.y, results.dx, results.var), (exact.y, exact.dx, exact.var), strict=True)
    )
    return (
        float(y.max() / np.abs(exact.y).max()),
        float(dx.max() / np.abs(exact.dx).max()),
        float((var / exact.var).max()),
    )


def table() -> str:
    """The rows as Markdown."""
    lines = [
        f"| input | y: gpu_layers | PyTorch {torch.__version__.partition('+')[0]} | dx: gpu_layers | PyTorch "
        "| variance: gpu_layers | PyTorch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        pairs = zip(row.ours, row.torchs, strict=True)
        cells = [f"{number:.1e}" for pair in pairs for number in pair]
        lines.append(f"| {row.dtype}, {row.data} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
