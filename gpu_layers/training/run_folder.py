"""The folder of a run: the checkpoint it continues from, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_layers._version import __version__
from gpu_layers.runtime.cache import remove_partial, write_atomically
from gpu_layers.training.checkpoint import load_arrays, save_arrays
from gpu_layers.training.curves import curves_png
from gpu_layers.training.dataset import Dataset
from gpu_layers.training.trainer import Trainer


class RunFolder:
    """Files of a run. Each is replaced atomically, so none is ever half written.

    Parameters
    ----------
    path : Path
        Made by :meth:`begin` if need be.

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

    def begin(self, trainer: Trainer, *, resume: bool) -> bool:
        """Make the folder that of this run.

        Parameters
        ----------
        trainer : Trainer
            Takes over the checkpoint, where there is one to resume.
        resume : bool
            Whether to continue from the folder's checkpoint. One that was stopped before it had any begins anew.

        Returns
        -------
        bool
            Whether the trainer continues from a checkpoint.

        Raises
        ------
        OSError
            If the folder cannot be written to: found here rather than after an epoch.
        ValueError
            If the checkpoint is damaged, foreign, or of a run with other settings or data.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        outputs = (self.model, self.metrics, self.curves)
        for file in (self.checkpoint, *outputs):
            remove_partial(file)
        if resume and self.checkpoint.exists():
            self.restore(trainer)
            return True
        # The outputs of an earlier run must not stand beside the checkpoint of this one.
        for file in outputs:
            file.unlink(missing_ok=True)
        self.save_checkpoint(trainer)
        return False

    def restore(self, trainer: Trainer) -> None:
        """Let the trainer take over the checkpoint.

        Raises
        ------
        OSError, ValueError
            If there is none, or it is damaged, foreign, or of a run with other settings or data.
        """
        try:
            trainer.restore(*load_arrays(self.checkpoint, "checkpoint"))
        except ValueError as error:
            raise ValueError(f"cannot resume from {self.checkpoint}: {error}") from error

    def save_checkpoint(self, trainer: Trainer) -> None:
        """Write the trainer's state.

        Raises
        ------
        OSError
            If it could not be written; the old checkpoint is then untouched.
        """
        arrays, facts = trainer.state()
        save_arrays(self.checkpoint, "checkpoint", arrays, facts)

    def save_outputs(self, trainer: Trainer, dataset: Dataset) -> None:
        """Write model, metrics and curves of a finished run.

        A run that is stopped in between writes all of them again when it is resumed.
        """
        described = _description(trainer, dataset)
        preparation = {key: described["data"][key] for key in ("classes", "mean", "std")}
        save_arrays(
            self.model, "model", trainer.weights(), {"settings": described["settings"], "preparation": preparation}
        )
        text = json.dumps({**described, "epochs": trainer.history}, indent=2, allow_nan=False)
        write_atomically(self.metrics, (text + "\n").encode())
        settings = trainer.settings
        title = f"{dataset.name}: dropout p = {settings.p:g} {settings.placement} the activation, seed {settings.seed}"
        write_atomically(self.curves, curves_png(trainer.history, title))


def _description(trainer: Trainer, dataset: Dataset) -> dict[str, Any]:
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
