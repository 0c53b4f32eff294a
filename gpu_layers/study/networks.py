"""Networks that the studies train: many small ones at once, and classifiers of handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.cuda import array_module
from gpu_layers.core.writes import check_unwritten, write_count
from gpu_layers.layers import Layer
from gpu_layers.layers.initialization import he_normal
from gpu_layers.layers.sequential import Sequential
from gpu_layers.study.lab import Lab
from gpu_layers.training.batches import batches, epoch_order
from gpu_layers.training.dataset import Dataset
from gpu_layers.training.loss import softmax_cross_entropy
from gpu_layers.training.optimizers import SGD

_MOMENTUM = 0.9


class StackedLinear(Layer):
    """``copies`` independent fully connected layers in one array: copy s computes ``x[s] @ weight[s] + bias[s]``.

    Parameters
    ----------
    copies, in_features, out_features : int
    seeds : sequence of numpy.random.Generator
        Of the initial weight of each copy; the initial bias is 0.
    dtype : dtype
    """

    def __init__(
        self,
        copies: int,
        in_features: int,
        out_features: int,
        *,
        seeds: Sequence[np.random.Generator],
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__()
        shape = (in_features, out_features)
        weights = [he_normal(shape, in_features, np.dtype(dtype), seed) for seed in seeds[:copies]]
        self.parameters["weight"] = np.stack(weights)
        self.parameters["bias"] = np.zeros((copies, 1, out_features), dtype)

    def forward(self, x: Array) -> Array:
        """The layers' outputs, shape (copies, N, out_features), for x of shape (copies, N, in_features)."""
        weight = self.parameters["weight"]
        self._saved = (x, weight, write_count())
        return x @ weight + self.parameters["bias"]

    def backward(self, dy: Array) -> Array:
        """Gradient of x; assigns those of weight and bias."""
        x, weight, writes = self._saved_by_forward()
        check_unwritten(writes, x=x, weight=weight)
        self.gradients = {"weight": x.swapaxes(1, 2) @ dy, "bias": dy.sum(axis=1, keepdims=True)}
        return dy @ weight.swapaxes(1, 2)


def train_classifier(
    lab: Lab,
    network: Sequential,
    dataset: Dataset,
    *,
    epochs: int,
    lr: float = 0.05,
    batch_size: int = 64,
    seed: int = 0,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train by SGD with momentum 0.9, at a rate that falls to 0 along half a cosine.

    Parameters
    ----------
    lab : Lab
    network : Sequential
        Of flat images; moved to the lab's device.
    dataset : Dataset
    epochs : int
    lr : float
    batch_size, seed : int
        The seed is that of the order of the images.
    after_epoch : callable
        Takes the number of the epoch, from 1, and the mean training loss in it.
    """
    network.to(lab.device)
    optimizer = SGD(network.parameters, lr, momentum=_MOMENTUM)
    x, y = flat(lab, dataset.x_train), lab.place(dataset.y_train)
    portions = list(batches(len(dataset.y_train), batch_size))
    for epoch in range(epochs):
        network.train()
        order = lab.place(epoch_order(len(dataset.y_train), seed, epoch))
        total = 0.0
        for number, portion in enumerate(portions):
            done = (epoch + number / len(portions)) / epochs
            optimizer.lr = lr * 0.5 * (1 + float(np.cos(np.pi * done)))
            chosen = order[portion]
            loss, gradient = softmax_cross_entropy(network(x[chosen]), y[chosen])
            network.backward(gradient)
            optimizer.step(network.gradients)
            total += loss * chosen.size
        after_epoch(epoch + 1, total / len(dataset.y_train))


def flat(lab: Lab, images: np.ndarray) -> Array:
    """Images as rows, on the lab's device."""
    return lab.place(images.reshape(len(images), -1))


def loss_and_accuracy(logits: Array, labels: Array) -> tuple[float, float]:
    """Mean cross-entropy, and the part of the samples whose largest logit is that of their label."""
    xp = array_module(logits)
    labels = xp.asarray(labels)
    loss, _ = softmax_cross_entropy(logits, labels)
    return loss, float((logits.argmax(axis=1) == labels).mean())
