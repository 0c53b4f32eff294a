"""A layer of layers: saved during training, loaded and resumed, bit for bit. With CuPy, or NumPy without a GPU."""

import json
import tempfile
from pathlib import Path

import numpy as np

import gpu_layers as gl
from gpu_layers.training import SGD, softmax_cross_entropy


class Residual(gl.Layer):
    """``x + f(x)``; the layers in its attributes belong to it."""

    def __init__(self, features):
        super().__init__()
        norm = gl.BatchNorm1d(features, activation="relu")
        self.branch = gl.Sequential(gl.Linear(features, features), norm, gl.Dropout(0.1))

    def forward(self, x):
        return x + self.branch(x)

    def backward(self, dy):
        return dy + self.branch.backward(dy)


def make(device):
    network = gl.Sequential(gl.Linear(8, 32), Residual(32), Residual(32), gl.Linear(32, 4)).to(device)
    return network, SGD(network.parameters, lr=0.1, momentum=0.9)


def train(network, optimizer, x, labels, steps):
    for _ in range(steps):
        loss, gradient = softmax_cross_entropy(network(x), labels)
        network.backward(gradient)
        optimizer.step(network.gradients)
    return loss


def save(folder, network, optimizer, xp):
    """What decides the rest of a run: weights and running statistics, momenta, and the next dropout mask."""
    xp.savez(folder / "network.npz", **network.state_dict())
    xp.savez(folder / "optimizer.npz", **optimizer.state_dict())
    (folder / "masks.json").write_text(json.dumps(gl.default_generator.get_state()))


def place():
    """The device that there is, and its array library."""
    try:
        gl.ReLU().to("cuda")
        import cupy
    except RuntimeError as error:
        print(f"on the CPU: {error}")
        return "cpu", np
    return "cuda", cupy


def main():
    device, xp = place()
    gl.manual_seed(0)
    numbers = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)
    x, labels = xp.asarray(numbers), xp.asarray(numbers[:, :4].argmax(axis=1))
    network, optimizer = make(device)
    print(f"loss after 20 steps: {train(network, optimizer, x, labels, 20):.4f}")
    with tempfile.TemporaryDirectory() as name:
        save(Path(name), network, optimizer, xp)
        expected = train(network, optimizer, x, labels, 20)
        again, resumed = make(device)
        again.load_state_dict(np.load(f"{name}/network.npz"))
        resumed.load_state_dict(np.load(f"{name}/optimizer.npz"))
        gl.default_generator.set_state(json.loads(Path(name, "masks.json").read_text()))
    loss = train(again, resumed, x, labels, 20)
    print(f"loss after 40 steps: {expected:.4f}; saved, loaded and resumed: {loss:.4f}")
    return expected, loss


if __name__ == "__main__":
    main()
