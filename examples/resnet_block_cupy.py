"""The basic block of a ResNet: residual and ReLU in batch norm's kernels, and the stem fused with its pooling.

It runs on a GPU with CuPy, and on NumPy where there is none. Run it: python examples/resnet_block_cupy.py
"""

import numpy as np

import gpu_layers as gl


class BasicBlock(gl.Layer):
    """``relu(norm2(conv2(relu(norm1(conv1(x))))) + x)`` (He et al., 2016)."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = gl.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = gl.BatchNorm2d(channels, activation="relu")
        self.conv2 = gl.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = gl.BatchNorm2d(channels, activation="relu")

    def forward(self, x):
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y), residual=x)

    def backward(self, dy):
        dy, dresidual = self.norm2.backward(dy)
        dy = self.norm1.backward(self.conv2.backward(dy))
        return self.conv1.backward(dy) + dresidual


class PlainBlock(BasicBlock):
    """The same function in separate steps."""

    def __init__(self, channels):
        super().__init__(channels)
        self.norm1, self.norm2, self.relu = gl.BatchNorm2d(channels), gl.BatchNorm2d(channels), gl.ReLU()

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + x)

    def backward(self, dy):
        dx = self.relu.backward(dy)
        dy = self.conv2.backward(self.norm2.backward(dx))
        return self.conv1.backward(self.norm1.backward(self.relu.backward(dy))) + dx


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
    stem = gl.Sequential(gl.Conv2d(3, 16, 3, padding=1), gl.BatchNorm2d(16), gl.ReLU(), gl.MaxPool2d(3, 2, 1))
    fused = gl.fuse(stem.to(device))  # batch norm, ReLU and pooling in one kernel after the statistics
    print(fused)
    block, plain = BasicBlock(16).to(device), PlainBlock(16).to(device)
    plain.load_state_dict(block.state_dict())

    x = xp.asarray(np.random.default_rng(0).standard_normal((8, 3, 32, 32)), xp.float32)
    y = block(fused(x))
    dx = fused.backward(block.backward(xp.ones_like(y)))
    expected = plain(stem(x))
    dexpected = stem.backward(plain.backward(xp.ones_like(expected)))
    error, derror = (float(abs(a - b).max() / abs(b).max()) for a, b in ((y, expected), (dx, dexpected)))
    print(f"against separate steps, relative to the largest value: output {error:.1e}, gradient {derror:.1e}")
    return error, derror


if __name__ == "__main__":
    main()
