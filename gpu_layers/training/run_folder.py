"""The folder of a run: its checkpoint and its results."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_layers._version import __version__
from gpu_layers.core.array import Facts
from gpu_layers.core.cache import remove_partial, write_atomically
from gpu_layers.training.checkpoint import load_arrays, save_arrays
from gpu_layers.training.curves import curves_png
from gpu_layers.training.dataset import Dataset
from gpu_layers.training.extras import import_extra
from gpu_layers.training.trainer import Trainer


class RunFolder:
    """The files of a run. Each is replaced atomically, so none is ever half written.

    A new run in the folder of an old one replaces the old checkpoint when it begins, so that a resumed run cannot
    continue the wrong one. It replaces each other file when its own is complete.

    Parameters
    ----------
    path : Path
        Made by :meth:`reserved` if it is missing.

    Attributes
    ----------
    checkpoint, model, metrics, curves : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self.model = path / "model.safetensors"
        self.metrics = path / "metrics.json"
        self.curves = path / "curves.png"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise unless a run may begin here without losing an earlier one by mistake. It writes nothing.

        Parameters
        ----------
        resume : bool
            Continue the folder's run. A run that was stopped before its first checkpoint starts again.
        overwrite : bool
            Replace it.

        Raises
        ------
        ValueError
            If the folder holds files of a run that would be replaced; the message names them and says what to do.
        """
        found = [file.name for file in self._files() if file.exists()]
        if not found or overwrite or (resume and self.checkpoint.exists()):
            return
        if self.checkpoint.exists():
            lacking, way = "", "continue it with --resume, "
        else:
            lacking, way = " but no checkpoint to continue from", ""
        raise ValueError(
            f"{self.path} holds {', '.join(found)} of an earlier run{lacking}: {way}train anew with --overwrite, "
            "or choose another --out"
        )

    @contextmanager
    def reserved(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Make the folder, and keep other runs out of it during the block.

        Parameters
        ----------
        resume, overwrite : bool
            As for :meth:`check`, which is repeated: another run may have ended here meanwhile.

        Raises
        ------
        OSError
            If the folder cannot be written to, found now rather than after an epoch.
        RuntimeError
            If another run is using it, or filelock is not installed.
        ValueError
            As :meth:`check`.
        """
        filelock = import_extra("filelock")
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / ".lock"
        lock = filelock.FileLock(file)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if file.exists():
                raise RuntimeError(
                    f"another run is using {self.path}: wait for its end, or choose another --out"
                ) from None
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self.path)) from None
        try:
            self.check(resume=resume, overwrite=overwrite)
            for file in self._files():
                remove_partial(file)
            yield
        finally:
            lock.release()

    def _files(self) -> tuple[Path, ...]:
        return self.checkpoint, self.model, self.metrics, self.curves

    def begin(self, trainer: Trainer, *, resume: bool) -> int | None:
        """Make the folder belong to this run.

        Parameters
        ----------
        trainer : Trainer
            Loads the checkpoint, if there is one to resume.
        resume : bool
            Whether to continue from the folder's checkpoint.

        Returns
        -------
        int or None
            The number of epochs that a continued run was started with; None for a new run.

        Raises
        ------
        OSError
            If the folder cannot be written to.
        ValueError
            If the checkpoint is damaged, foreign, or of a run with other settings or data.
        """
        if resume and self.checkpoint.exists():
            return self.restore(trainer)
        self.save_checkpoint(trainer)
        return None

    def restore(self, trainer: Trainer) -> int:
        """Load the checkpoint into the trainer.

        Returns
        -------
        int
            The number of epochs that its run was started with.

        Raises
        ------
        OSError, ValueError
            If there is none, or if it is damaged, foreign, or of a run with other settings or data.
        """
        try:
            return trainer.restore(*load_arrays(self.checkpoint, "checkpoint"))
        except ValueError as error:
            raise ValueError(f"cannot resume from {self.checkpoint}: {error}") from error

    def save_checkpoint(self, trainer: Trainer) -> None:
        """Write the trainer's state.

        Raises
        ------
        OSError
            If it could not be written; the old checkpoint then stays.
        """
        arrays, facts = trainer.state()
        save_arrays(self.checkpoint, "checkpoint", arrays, facts)

    def save_outputs(self, trainer: Trainer, dataset: Dataset) -> None:
        """Write model and metrics of a finished run.

        A run that is stopped in between writes both again when it is resumed.

        Raises
        ------
        OSError
            If one could not be written; the old file then stays.
        """
        described = _description(trainer, dataset)
        preparation = {key: described["data"][key] for key in ("classes", "mean", "std")}
        save_arrays(
            self.model, "model", trainer.weights(), {"settings": described["settings"], "preparation": preparation}
        )
        text = json.dumps({**described, "epochs": trainer.history}, indent=2, allow_nan=False)
        write_atomically(self.metrics, (text + "\n").encode())

    def save_curves(self, trainer: Trainer, dataset: Dataset) -> None:
        """Draw the history. It comes after :meth:`save_outputs`, so that a failure cannot lose the model.

        Raises
        ------
        Exception
            Whatever matplotlib, its fonts and its settings may raise.
        """
        settings = trainer.settings
        title = f"{dataset.name}: dropout p = {settings.p:g} {settings.placement} the activation, seed {settings.seed}"
        try:
            picture = curves_png(trainer.history, title)
        except Exception:
            # The picture is of an earlier run, whose model was replaced: none is better.
            self.curves.unlink(missing_ok=True)
            raise
        write_atomically(self.curves, picture)


def _description(trainer: Trainer, dataset: Dataset) -> Facts:
    _, facts = trainer.state()
    last = trainer.history[-1]
    return {
        "gpu_layers": __version__,
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "seconds": sum(entry["seconds"] for entry in trainer.history),
        "settings": facts["settings"],
        "data": {
            "name": dataset.name,
            "sha256": facts["data"],
            "train": len(dataset.x_train),
            "test": len(dataset.x_test),
            "image_shape": list(dataset.image_shape),
            "classes": list(dataset.classes),
            "mean": dataset.mean,
            "std": dataset.std,
        },
        "parameters": sum(int(value.size) for value in trainer.network.parameters.values()),
        "network": repr(trainer.network).splitlines(),
    }
