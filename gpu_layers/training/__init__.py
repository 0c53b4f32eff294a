"""Training: loss, optimizers, data and the trainer of ``gpu-layers train``."""

from gpu_layers.layers import Conv2d, Flatten, Linear, Sequential
from gpu_layers.training.dataset import Dataset, digits, load_npz
from gpu_layers.training.loss import softmax_cross_entropy
from gpu_layers.training.optimizers import SGD, Adam, Optimizer
from gpu_layers.training.trainer import Progress, Settings, Trainer

__all__ = [
    "SGD",
    "Adam",
    "Conv2d",
    "Dataset",
    "Flatten",
    "Linear",
    "Optimizer",
    "Progress",
    "Sequential",
    "Settings",
    "Trainer",
    "digits",
    "load_npz",
    "softmax_cross_entropy",
]
