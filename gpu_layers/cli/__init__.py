"""The command ``gpu-layers``."""

from gpu_layers.cli.entry import main

__all__ = ["main"]
