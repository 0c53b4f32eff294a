"""``gpu-layers train``: a convolutional network on real images, through this package's layers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gpu_layers.cli.arguments import integer, positive, probability
from gpu_layers.cli.progress import epoch_line, progress_display
from gpu_layers.distributed import default_communicator
from gpu_layers.distributed.communicator import local_rank
from gpu_layers.runtime.cuda import require_gpu
from gpu_layers.training.dataset import Dataset, digits, load_npz
from gpu_layers.training.extras import require_extras
from gpu_layers.training.network import PLACEMENTS
from gpu_layers.training.run_folder import RunFolder
from gpu_layers.training.trainer import DEFAULT_LR, DTYPES, Settings, Trainer

_DESCRIPTION = """
Trains Conv-BN-ReLU-Dropout-MaxPool twice, then Linear-BN-ReLU-Dropout-Linear, on the 1,797 handwritten digits that
come with scikit-learn, or on the images of a file. The same seed gives the same weights, bit for bit, on the same
machine. A run that was stopped continues with --resume from its last finished epoch, and ends with exactly the
weights of a run that was never stopped. Several processes share each batch: with "mpirun -n 2 gpu-layers train"
masks are those of a single process, and losses the same to rounding.
"""


def add_command(commands: Any) -> None:
    """Add this command to the parser's."""
    parser = commands.add_parser(
        "train",
        help="train a network on real images",
        description=_DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    add(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="x_train, y_train, x_test, y_test: uint8 or floating images "
        "(N, H, W) or (N, C, H, W), integer labels (default: scikit-learn's digits)",
        default=argparse.SUPPRESS,
    )
    add("--epochs", type=integer(1, 10**6), default=25, help="passes over the training images")
    add("--batch-size", type=integer(2, 2**31 - 1), default=64, help="at least 2: batch norm needs a variance")
    add("--p", type=probability, default=0.1, help="dropout probability")
    add(
        "--placement",
        choices=PLACEMENTS,
        default="after",
        help="dropout after or before the activation; for ReLU, as here, both are the same function",
    )
    add("--optimizer", choices=tuple(DEFAULT_LR), default="adam", help="sgd has a momentum of 0.9")
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in DEFAULT_LR.items())
    add(
        "--lr",
        type=positive,
        default=argparse.SUPPRESS,
        help=f"learning rate at the start, which falls to 0 along half a cosine (default: {rates})",
    )
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of the activations; parameters are float32, or float64 for float64",
    )
    add("--seed", type=integer(0, 2**64 - 1), default=0, help="of weights, dropout masks and shuffling")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/train"),
        help="for model.safetensors, metrics.json, curves.png and checkpoint.safetensors",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the checkpoint in DIR; from the beginning where none is yet",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train as the arguments say.

    Returns
    -------
    int
        0; everything that goes wrong is an exception.
    """
    data_file: Path | None = getattr(arguments, "data", None)
    require_extras("rich", "safetensors", "matplotlib", "threadpoolctl", *(() if data_file else ("sklearn",)))
    device = _device(arguments.device)
    dataset = load_npz(data_file) if data_file else digits()
    settings = Settings(
        device=device,
        dtype=arguments.dtype,
        seed=arguments.seed,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        p=arguments.p,
        placement=arguments.placement,
        optimizer=arguments.optimizer,
        lr=getattr(arguments, "lr", DEFAULT_LR[arguments.optimizer]),
    )
    communicator = default_communicator()
    if communicator.size > 1 and device == "cuda":
        _use_own_gpu()
    try:
        trainer = Trainer(settings, dataset, communicator)
        if communicator.rank == 0:
            _train(trainer, dataset, RunFolder(arguments.out), arguments.resume)
        else:
            _train_along(trainer, RunFolder(arguments.out), arguments.resume)
    except BaseException as error:
        if communicator.size > 1 and not isinstance(error, BrokenPipeError):
            print(
                f"gpu-layers: process {communicator.rank} of {communicator.size}: {error}", file=sys.stderr, flush=True
            )
            communicator.abort()
        raise
    return 0


def _train(trainer: Trainer, dataset: Dataset, folder: RunFolder, resume: bool) -> None:
    """The run as the first process does it, or the only one: it writes and reports."""
    settings, communicator = trainer.settings, trainer.communicator
    resumed = folder.begin(trainer, resume=resume)
    communicator.gather(np.array([resumed], np.int64))
    with progress_display(len(dataset.x_train)) as display:
        backend = "CUDA kernels" if settings.device == "cuda" else "NumPy reference"
        processes = f", {communicator.size} processes" if communicator.size > 1 else ""
        display.line(
            f"{dataset.name}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test images, "
            f"{len(dataset.classes)} classes; {backend}, {settings.dtype}, seed {settings.seed}{processes}"
        )
        if resumed:
            display.line(f"continuing after epoch {trainer.epoch} of {settings.epochs}")
        elif resume:
            display.line(f"no checkpoint in {folder.path}: starting from the beginning")
        while not trainer.finished:
            entry = trainer.train_epoch(display.begin_epoch(trainer.epoch + 1))
            folder.save_checkpoint(trainer)
            display.line(epoch_line(entry, settings.epochs))
    folder.save_outputs(trainer, dataset)
    accuracy, seconds = trainer.history[-1]["test_accuracy"], sum(entry["seconds"] for entry in trainer.history)
    print(f"test accuracy {100 * accuracy:.2f} % after {settings.epochs} epochs, {seconds:.1f} s of training")
    print(f"wrote {', '.join(path.name for path in (folder.model, folder.metrics, folder.curves))} in {folder.path}")


def _train_along(trainer: Trainer, folder: RunFolder, resume: bool) -> None:
    """The run as the other processes do it: in silence, from the checkpoint that the first one took."""
    resumed = trainer.communicator.gather(np.array([False], np.int64))[0]
    if resumed:
        folder.restore(trainer)
    while not trainer.finished:
        trainer.train_epoch()


def _use_own_gpu() -> None:
    """Have each process of a machine use another one of its GPUs, as far as there are enough."""
    cupy = require_gpu()
    cupy.cuda.Device(local_rank() % cupy.cuda.runtime.getDeviceCount()).use()


def _device(choice: str) -> str:
    """ "cpu" or "cuda" for the choice "auto", "cpu" or "cuda"."""
    if choice == "cuda":
        require_gpu()
    if choice != "auto":
        return choice
    try:
        require_gpu()
    except RuntimeError:
        return "cpu"
    return "cuda"
