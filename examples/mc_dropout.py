"""Uncertainty by dropout: the variance over masks grows where there was nothing to learn from.

Run it: python examples/mc_dropout.py
"""

import numpy as np

import gpu_layers as gl
from gpu_layers.training import Adam


def make_network():
    return gl.Sequential(
        gl.Linear(1, 64), gl.ReLU(), gl.Dropout(0.1), gl.Linear(64, 64), gl.ReLU(), gl.Dropout(0.1), gl.Linear(64, 1)
    )


def train(network, x, target, steps):
    """Least squares."""
    optimizer = Adam(network.parameters, lr=0.01)
    for _ in range(steps):
        difference = network(x) - target
        network.backward(2 / len(x) * difference)
        optimizer.step(network.gradients)
    return float((difference**2).mean())


def main():
    gl.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (256, 1)).astype(np.float32)
    network = make_network()
    loss = train(network, x, np.sin(3 * x), 300)
    print(f"mean squared error on [-1, 1]: {loss:.4f}")

    seen, unseen = np.linspace(-1, 1, 9), np.linspace(2, 4, 9)
    points = np.concatenate([seen, unseen])[:, None].astype(np.float32)
    # The mask is keyed by the sample's number: a point has the same answer in any batch.
    ids = np.arange(len(points))
    mean, variance = gl.mc_dropout(network, points, passes=100, sample_ids=ids)
    print("     x    mean  deviation")
    for point, m, v in zip(points[:, 0], mean[:, 0], variance[:, 0], strict=True):
        print(f"{point:6.2f} {m:7.2f} {v**0.5:10.2f}")
    inside, outside = variance[:9].mean() ** 0.5, variance[9:].mean() ** 0.5
    print(f"deviation where there were samples: {inside:.2f}; where there were none: {outside:.2f}")
    return inside, outside


if __name__ == "__main__":
    main()
