"""Train a convolutional network on handwritten digits, on the CPU, with NumPy alone.

The digits come with scikit-learn: pip install "gpu-layers[train]". Run it: python examples/train_digits_numpy.py
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import gpu_layers as gl
from gpu_layers.training import Adam, softmax_cross_entropy


def load():
    """Images of mean 0 and deviation 1, shape (N, 1, 8, 8), and labels; shuffled, in two parts."""
    digits = load_digits()
    x = (digits.images[:, None] - digits.images.mean()) / digits.images.std()
    order = np.random.default_rng(0).permutation(len(x))
    x, labels = x[order].astype(np.float32), digits.target[order]
    return (x[:1400], labels[:1400]), (x[1400:], labels[1400:])


def make_network():
    return gl.Sequential(
        gl.Conv2d(1, 16, 3, padding=1),
        gl.BatchNorm2d(16, activation="relu"),
        gl.Dropout2d(0.1),
        gl.MaxPool2d(2),
        gl.Flatten(),
        gl.Linear(16 * 4 * 4, 10),
    )


def train_epoch(network, optimizer, x, labels, rng, batch_size=64):
    """One pass over the data; the mean loss."""
    network.train()
    losses = []
    for batch in np.split(rng.permutation(len(x)), range(batch_size, len(x), batch_size)):
        loss, gradient = softmax_cross_entropy(network(x[batch]), labels[batch])
        network.backward(gradient)
        optimizer.step(network.gradients)
        losses.append(loss)
    return np.mean(losses)


def accuracy(network, x, labels):
    network.eval()
    return (network(x).argmax(axis=1) == labels).mean()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args(arguments).epochs

    gl.manual_seed(0)  # weights and dropout masks
    rng = np.random.default_rng(0)  # order of the images
    train, test = load()
    network = make_network()
    optimizer = Adam(network.parameters, lr=0.01)
    for epoch in range(epochs):
        loss = train_epoch(network, optimizer, *train, rng)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy(network, *test):.3f}")
    return accuracy(network, *test)


if __name__ == "__main__":
    main()
