"""``python -m gpu_layers``: the command ``gpu-layers``."""

from gpu_layers.cli import command

if __name__ == "__main__":
    command()
