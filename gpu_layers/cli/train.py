"""``gpu-layers train``: a convolutional network on real images, through this package's layers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from gpu_layers.cli.arguments import Commands, file, folder, integer, positive, probability
from gpu_layers.cli.device import CHOICES, Device, choose_device
from gpu_layers.cli.progress import epoch_line, progress_display
from gpu_layers.cli.termination import Terminated, deaf_to_termination, termination_requests
from gpu_layers.core.cuda import require_gpu
from gpu_layers.distributed import default_communicator
from gpu_layers.distributed.communicator import local_rank
from gpu_layers.training.dataset import LAYOUTS, Dataset, digits, load_npz
from gpu_layers.training.extras import require_extras
from gpu_layers.training.network import PLACEMENTS
from gpu_layers.training.run_folder import RunFolder
from gpu_layers.training.trainer import DEFAULT_LR, DTYPES, Settings, Trainer

_DESCRIPTION = """
Trains Conv-BN-ReLU-Dropout-MaxPool twice, then Linear-BN-ReLU-Dropout-Linear, on the 1,797 handwritten digits that
come with scikit-learn, or on the images of a file. The same seed gives the same weights, bit for bit, on the same
machine. A run that was stopped continues with --resume from its last checkpoint, one after each epoch and one when
SIGTERM ends it. It ends with exactly the weights of a run that was never stopped; more --epochs make it longer. It
replaces nothing of an earlier run without --overwrite. Several processes share each batch: with
"mpirun -n 2 gpu-layers train" masks are those of a single process, and losses the same to rounding.
"""


def add_command(commands: Commands) -> None:
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
    add("--device", choices=CHOICES, default="auto", help="auto: the GPU if there is one that works")
    add(
        "--data",
        type=file,
        metavar="FILE.npz",
        help="x_train, y_train, x_test, y_test: images of numbers, (N, H, W), (N, C, H, W) or (N, H, W, C); "
        "labels that are integers, texts or one-hot rows (default: scikit-learn's digits)",
        default=argparse.SUPPRESS,
    )
    add(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="of images with four axes; auto: the channels are the axis of size 1, 3 or 4",
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
        type=folder,
        metavar="DIR",
        default=Path("runs/train"),
        help="for model.safetensors, metrics.json, curves.png and checkpoint.safetensors",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoint in DIR, possibly with other --epochs: the learning rate then follows these; "
        "from the beginning where there is no run yet",
    )
    existing.add_argument(
        "--overwrite",
        action="store_true",
        help="train anew where DIR holds a run: its checkpoint is replaced now, its model when the new one is complete",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train as the arguments say.

    Returns
    -------
    int
        0; every failure is an exception.
    """
    data_file: Path | None = getattr(arguments, "data", None)
    packages = ("rich", "safetensors", "matplotlib", "threadpoolctl", "filelock")
    require_extras(*packages, *(() if data_file else ("sklearn",)))
    communicator = default_communicator()
    run_folder = RunFolder(arguments.out)
    choices = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    try:
        if communicator.rank == 0:
            run_folder.check(**choices)  # before anything that takes time
        device = choose_device(arguments.device)
        dataset = load_npz(data_file, arguments.layout) if data_file else digits()
        settings = Settings(
            device=device.name,
            dtype=arguments.dtype,
            seed=arguments.seed,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            p=arguments.p,
            placement=arguments.placement,
            optimizer=arguments.optimizer,
            lr=getattr(arguments, "lr", DEFAULT_LR[arguments.optimizer]),
        )
        if communicator.size > 1 and device.name == "cuda":
            _use_own_gpu()
        if communicator.rank == 0:
            with run_folder.reserved(**choices):
                trainer = Trainer(settings, dataset, communicator)
                _train(trainer, dataset, run_folder, device, arguments.resume)
        else:
            _train_along(Trainer(settings, dataset, communicator), run_folder)
    except BaseException as error:
        if communicator.size > 1 and not isinstance(error, BrokenPipeError):
            print(
                f"gpu-layers: process {communicator.rank} of {communicator.size}: {error}", file=sys.stderr, flush=True
            )
            communicator.abort()
        raise
    return 0


def _train(trainer: Trainer, dataset: Dataset, run_folder: RunFolder, device: Device, resume: bool) -> None:
    """The run in the first or only process, which writes and reports."""
    settings, communicator = trainer.settings, trainer.communicator
    planned = run_folder.begin(trainer, resume=resume)
    communicator.gather(np.array([planned is not None], np.int64))
    with termination_requests() as asked_to_end:
        with progress_display(len(dataset.x_train)) as display:
            if device.note:
                display.line(device.note)
            backend = "CUDA kernels" if settings.device == "cuda" else "NumPy reference"
            processes = f", {communicator.size} processes" if communicator.size > 1 else ""
            display.line(
                f"{dataset.name}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test images, "
                f"{len(dataset.classes)} classes; {backend}, {settings.dtype}, seed {settings.seed}{processes}"
            )
            if planned is not None:
                display.line(
                    f"continuing after {_position(trainer)} of {settings.epochs}{_other_plan(planned, settings)}"
                )
            elif resume:
                display.line(f"no checkpoint in {run_folder.path}: starting from the beginning")
            while not trainer.finished:
                entry = trainer.train_epoch(display.begin_epoch(trainer.epoch + 1), asked_to_end)
                run_folder.save_checkpoint(trainer)
                if entry is not None:
                    display.line(epoch_line(entry, settings.epochs))
                if asked_to_end() and not trainer.finished:
                    raise Terminated(
                        f"terminated after {_position(trainer)} of {settings.epochs}: "
                        f"{run_folder.checkpoint} is written, --resume continues"
                    )
        run_folder.save_outputs(trainer, dataset)
        written = [run_folder.model, run_folder.metrics]
        try:
            run_folder.save_curves(trainer, dataset)
            written.append(run_folder.curves)
        # Fonts and settings may raise anything; the model is already written.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"gpu-layers: warning: {run_folder.curves.name} is not drawn: {reason}", file=sys.stderr)
    accuracy, seconds = trainer.history[-1]["test_accuracy"], sum(entry["seconds"] for entry in trainer.history)
    print(f"test accuracy {100 * accuracy:.2f} % after {settings.epochs} epochs, {seconds:.1f} s of training")
    print(f"wrote {', '.join(path.name for path in written)} in {run_folder.path}")


def _position(trainer: Trainer) -> str:
    """The progress of a run in words."""
    begun = trainer.batches_of_next_epoch
    return f"epoch {trainer.epoch}" + (f" and {begun} batches of the next," if begun else "")


def _other_plan(planned: int, settings: Settings) -> str:
    if planned == settings.epochs:
        return ""
    return f" (planned were {planned}: from here on the learning rate falls to 0 in epoch {settings.epochs})"


def _train_along(trainer: Trainer, run_folder: RunFolder) -> None:
    """The run in the other processes: silent, from the checkpoint of the first process."""
    with deaf_to_termination():
        resumed = trainer.communicator.gather(np.array([False], np.int64))[0]
        if resumed:
            run_folder.restore(trainer)
        while not trainer.finished:
            trainer.train_epoch()


def _use_own_gpu() -> None:
    """Make each process of a machine use its own GPU, if there are enough."""
    cupy = require_gpu()
    cupy.cuda.Device(local_rank() % cupy.cuda.runtime.getDeviceCount()).use()
