"""Monte Carlo dropout of a PyTorch model: how sure is it of what? (Gal and Ghahramani, 2016)

The masks come from a generator of this library, so that the passes are the same on every machine and device.
"""

import torch
from torch import nn

import gpu_layers as gl
import gpu_layers.torch as glt

PASSES = 200


def main() -> dict[str, float]:
    """Train on a curve that is known on [-1, 1] alone, and print how far apart the passes are inside and outside."""
    torch.manual_seed(0)
    generator = gl.Generator(seed=1)
    model = nn.Sequential(
        nn.Linear(1, 64),
        glt.ActivationDropout("tanh", 0.1, generator=generator),
        nn.Linear(64, 64),
        glt.ActivationDropout("tanh", 0.1, generator=generator),
        nn.Linear(64, 1),
    )
    x = torch.linspace(-1, 1, 64)[:, None]
    y = torch.sin(3 * x)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    model.eval()
    for module in model.modules():
        if isinstance(module, glt.ActivationDropout):
            module.train()  # dropout alone goes on
    points = {"inside": torch.zeros(1, 1), "outside": torch.full((1, 1), 3.0)}
    spread = {}
    with torch.no_grad():
        for name, point in points.items():
            passes = model(point.expand(PASSES, 1))  # one mask a row
            spread[name] = passes.std().item()
            print(f"{name:8} x = {point.item():4.1f}: {passes.mean().item():6.3f} +- {spread[name]:.3f}")
    return spread


if __name__ == "__main__":
    main()
