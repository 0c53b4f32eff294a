"""The small network on two noisy moons, 2-20-3-1, many copies at once: what the study of scaling trains."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.cuda import array_module
from gpu_layers.layers import Dropout, Layer, ReLU
from gpu_layers.layers.sequential import Sequential
from gpu_layers.random import Generator
from gpu_layers.study.lab import Lab, on_cpu
from gpu_layers.study.networks import StackedLinear
from gpu_layers.training.optimizers import SGD

WIDTHS = (2, 20, 3, 1)
DROP = 0.14
LR = 0.3
POINTS = 200
_NOISE = 0.3
#: Steps between two entries of the history of costs.
RECORD_EVERY = 100
# Of the plane that decision boundaries are drawn in.
PLANE = (-2.0, 3.0, -1.6, 2.1)
_PIXELS = 70


@dataclass(frozen=True)
class Moons:
    """Two noisy half circles for each seed, as in scikit-learn's ``make_moons``.

    Attributes
    ----------
    x_train, x_test : ndarray of float32, shape (seeds, 200, 2)
    y_train, y_test : ndarray of float32, shape (seeds, 200, 1)
        0 or 1.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def moons(seeds: int) -> Moons:
    """The data of the seeds ``0 .. seeds - 1``: half of the points of each part in each moon."""
    parts: dict[str, list[np.ndarray]] = {"x_train": [], "x_test": [], "y_train": [], "y_test": []}
    for seed in range(seeds):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        for part in ("train", "test"):
            angle = rng.uniform(0, np.pi, POINTS)
            label = np.arange(POINTS) % 2
            x = np.where(label == 0, np.cos(angle), 1 - np.cos(angle))
            y = np.where(label == 0, np.sin(angle), 0.5 - np.sin(angle))
            points = np.stack([x, y], axis=1) + _NOISE * rng.standard_normal((POINTS, 2))
            parts[f"x_{part}"].append(points)
            parts[f"y_{part}"].append(label[:, None])
    return Moons(**{name: np.stack(arrays).astype(np.float32) for name, arrays in parts.items()})


def network(seeds: int, scaling: str | None, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Linear-ReLU-Dropout twice, then Linear, one copy a seed; the same weights and masks whatever the scaling.

    Parameters
    ----------
    seeds : int
    scaling : {"inverted", "inference"} or None
        None: without dropout.
    dtype : dtype
    """
    weights = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,))) for seed in range(seeds)]
    masks = Generator(2026).spawn(2)
    layers: list[Layer] = []
    for number, (features, units) in enumerate(pairwise(WIDTHS)):
        layers.append(StackedLinear(seeds, features, units, seeds=weights, dtype=dtype))
        if number < len(masks):
            layers.append(ReLU())
            if scaling is not None:
                layers.append(Dropout(DROP, scaling=scaling, generator=masks[number]))
    return Sequential(*layers)


def bernoulli_cross_entropy(logits: Array, labels: Array) -> tuple[np.ndarray, Array]:
    """Mean cost of each copy, and the gradient of their sum."""
    xp = array_module(logits)
    cost = xp.maximum(logits, 0) - logits * labels + xp.log1p(xp.exp(-xp.abs(logits)))
    return on_cpu(cost.mean(axis=(1, 2))), gradient_of_cost(logits, labels)


def gradient_of_cost(logits: Array, labels: Array) -> Array:
    """Gradient of the sum of the copies' mean costs."""
    xp = array_module(logits)
    # By tanh: no overflow, whatever the logit.
    return (0.5 * (1 + xp.tanh(0.5 * logits)) - labels) / logits.dtype.type(logits.shape[1])


@dataclass(frozen=True)
class Trained:
    """What one way of training gave, for each seed.

    Attributes
    ----------
    costs : ndarray, shape (records, seeds)
        Cost in training, its masks included, before steps 0, 100, 200, ... and after the last.
    late_cost : ndarray, shape (seeds,)
        The same, mean over the last tenth of the steps.
    accuracy : dict
        By the way of inference: ``train`` and ``test``, each of shape (seeds,).
    plane : dict
        By the way of inference: probability of the second moon over the plane, for seed 0.
    """

    costs: np.ndarray
    late_cost: np.ndarray
    accuracy: dict[str, dict[str, np.ndarray]]
    plane: dict[str, np.ndarray]


def train(lab: Lab, scaling: str | None, *, seeds: int, steps: int) -> Trained:
    """Train all seeds' networks at once, on the whole batch."""
    data, net = moons(seeds), network(seeds, scaling)
    net.to(lab.device)
    x, y = lab.place(data.x_train), lab.place(data.y_train)
    optimizer = SGD(net.parameters, LR)
    costs, late = [], []
    for step in range(steps):
        logits = net(x)
        if step % RECORD_EVERY == 0 or step >= 0.9 * steps:
            cost, gradient = bernoulli_cross_entropy(logits, y)
            if step % RECORD_EVERY == 0:
                costs.append(cost)
                lab.progress(step / steps)
            if step >= 0.9 * steps:
                late.append(cost)
        else:
            gradient = gradient_of_cost(logits, y)
        net.backward(gradient)
        optimizer.step(net.gradients)
    costs.append(bernoulli_cross_entropy(net(x), y)[0])
    ways: dict[str, Layer] = {"as is": net}
    if scaling == "inference":
        # In evaluation an inverted dropout is the identity: the correction left away.
        left_away = network(seeds, "inverted").to(lab.device)
        left_away.load_state_dict(net.state_dict())
        ways = {"corrected": net, "as is": left_away}
    accuracy, plane = {}, {}
    for way, model in ways.items():
        model.eval()
        accuracy[way] = {
            part: _accuracy(model(lab.place(points)), labels)
            for part, points, labels in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test))
        }
        plane[way] = _plane(lab, model, seeds)
    return Trained(np.stack(costs), np.mean(late, axis=0), accuracy, plane)


def _accuracy(logits: Array, labels: np.ndarray) -> np.ndarray:
    return ((on_cpu(logits) > 0) == (labels > 0.5)).mean(axis=(1, 2))


def _plane(lab: Lab, model: Any, seeds: int) -> np.ndarray:
    left, right, bottom, top = PLANE
    grid = np.meshgrid(np.linspace(left, right, _PIXELS), np.linspace(bottom, top, _PIXELS))
    points = np.stack([axis.ravel() for axis in grid], axis=1).astype(np.float32)
    logits = on_cpu(model(lab.place(np.broadcast_to(points, (seeds, *points.shape)).copy())))[0, :, 0]
    return (0.5 * (1 + np.tanh(0.5 * logits))).reshape(_PIXELS, _PIXELS)
