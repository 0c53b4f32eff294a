"""The loss of a classifier."""

from __future__ import annotations

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, placed
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.layers.precision import rounded
from gpu_layers.ops.checks import check_dtype
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.copying import natural


@placed
def softmax_cross_entropy(logits: Array, labels: Array, *, samples: int | None = None) -> tuple[float, Array]:
    """Mean over samples of ``-log softmax(logits)[label]``, and its gradient.

    Computed in float32 (float64 for float64), relative to each sample's largest logit, so nothing overflows.

    Parameters
    ----------
    logits : array, shape (N, classes)
        float16, bfloat16, float32 or float64; N at least 1.
    labels : array of int, shape (N,)
        In ``0 .. classes - 1``.
    samples : int, optional
        What to divide by instead of N, where these are a part of a batch; then N may be 0.

    Returns
    -------
    loss : float
    dlogits : array, shape (N, classes)
        Gradient of the loss, in the dtype of the logits.

    Raises
    ------
    TypeError
        For a wrong array type or dtype.
    ValueError
        For a wrong shape, an empty batch or a label out of range.
    """
    backend_for(logits, labels)
    check_dtype(logits, "logits")
    logits, labels = natural(logits), natural(labels)
    _check_labels(logits, labels, may_be_empty=samples is not None)
    xp = array_module(logits)
    wide = logits.astype(accumulation_dtype(logits.dtype))
    if logits.shape[0] == 0:
        return 0.0, logits.copy()
    wide -= wide.max(axis=1, keepdims=True)
    log_softmax = wide - xp.log(xp.exp(wide).sum(axis=1, keepdims=True))
    count = labels.shape[0]
    rows = xp.arange(count)
    chosen = log_softmax[rows, labels]
    loss = -float(chosen.mean() if samples is None else chosen.sum() / samples)
    gradient = xp.exp(log_softmax)
    gradient[rows, labels] -= 1
    gradient /= count if samples is None else samples
    return loss, rounded(gradient, logits.dtype)


def _check_labels(logits: Array, labels: Array, may_be_empty: bool) -> None:
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "expected logits of shape (N, classes) and labels of shape (N,), "
            f"got {list(logits.shape)} and {list(labels.shape)}"
        )
    if logits.size == 0 and may_be_empty and logits.shape[1] > 0:
        return
    if logits.size == 0:
        raise ValueError(f"the mean loss of an empty batch is undefined, got logits of shape {list(logits.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"labels must be in 0 .. {logits.shape[1] - 1}, got {low if low < 0 else high}")
