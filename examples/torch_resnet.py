"""A ResNet-50-shaped network on the digits, before and after ``glt.convert``: the same training, fewer bytes kept."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch_memory import bytes_kept

import gpu_layers.torch as glt


def bottleneck(channels: int, width: int, stride: int) -> nn.Module:
    """1x1, 3x3, 1x1: each with batch norm, as in He et al., 2016, figure 5."""

    def step(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]

    body = nn.Sequential(
        *step(channels, width, 1), nn.ReLU(), *step(width, width, 3, stride), nn.ReLU(), *step(width, 4 * width, 1)
    )
    same = stride == 1 and channels == 4 * width
    return Residual(body, nn.Identity() if same else nn.Sequential(*step(channels, 4 * width, 1, stride)))


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.relu = body, shortcut, nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the branch to the shortcut."""
        return self.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 8, classes: int = 10) -> nn.Module:
    """The 50 layers, at a width that a CPU can train; dropout before the last one."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 1, 1))
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            size = width * 2**stage
            layers.append(bottleneck(channels, size, 2 if block == 0 and stage else 1))
            channels = 4 * size
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, classes))


def main(steps: int = 20, batch: int = 32) -> tuple[int, int]:
    """Convert, train, and print the loss and the bytes before and after."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    model = resnet()
    before = bytes_kept(model, images[:batch])
    glt.convert(model, fuse=True)
    after = bytes_kept(model, images[:batch])
    print(f"kept for backward: {before:,} bytes with torch.nn, {after:,} after convert: {after / before:.2f} of it")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(steps):
        rows = torch.randint(len(labels), (batch,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")
    return before, after


if __name__ == "__main__":
    main()
