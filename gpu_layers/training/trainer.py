"""A training run: network, optimizer, epochs, and the state between epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType

import ml_dtypes
import numpy as np

from gpu_layers.core.array import Array, Facts
from gpu_layers.core.cuda import array_module, is_cupy_array, require_gpu
from gpu_layers.distributed import Communicator, SingleProcess, shard
from gpu_layers.layers.dropout import DropoutLayer
from gpu_layers.training.batches import batch_count, batches, epoch_order
from gpu_layers.training.dataset import Dataset
from gpu_layers.training.extras import import_extra
from gpu_layers.training.loss import softmax_cross_entropy
from gpu_layers.training.network import dropout_generators, image_classifier
from gpu_layers.training.optimizers import SGD, Adam, Optimizer
from gpu_layers.training.sums import added

#: Of the activations, by the name that ``--dtype`` takes.
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
#: Learning rate that suits each optimizer.
DEFAULT_LR = {"adam": 1e-2, "sgd": 5e-2}
_SGD_MOMENTUM = 0.9
_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights of a run, except the machine and the data.

    Attributes
    ----------
    device : {"cpu", "cuda"}
    dtype : str
        A key of :data:`DTYPES`.
    seed, epochs, batch_size : int
    p : float
    placement : {"after", "before"}
    optimizer : {"adam", "sgd"}
    lr : float
        At the start; it falls to 0 along half a cosine.
    """

    device: str
    dtype: str
    seed: int
    epochs: int
    batch_size: int
    p: float
    placement: str
    optimizer: str
    lr: float


@dataclass(frozen=True)
class Progress:
    """How far an epoch is.

    Attributes
    ----------
    images : int
        Seen in this epoch.
    loss, accuracy : float
        Means over these.
    images_per_second : float
    """

    images: int
    loss: float
    accuracy: float
    images_per_second: float


@dataclass(frozen=True)
class _Part:
    """The finished part of an epoch that was stopped.

    Attributes
    ----------
    batches, images, correct : int
    loss_sum : float
        Over the images.
    seconds : float
    """

    batches: int = 0
    images: int = 0
    correct: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0


class Trainer:
    """A run: network, optimizer, history.

    Parameters
    ----------
    settings : Settings
    dataset : Dataset
    communicator : Communicator, optional
        Processes that share each batch, each with a trainer like this one: masks are those of a single process, and
        losses and weights the same to rounding, and the same bits in all processes.

    Attributes
    ----------
    history : list of dict
        Of each finished epoch: ``epoch``, ``train_loss``, ``train_accuracy``, ``test_loss``, ``test_accuracy``,
        ``seconds``, ``images_per_second``. The training numbers are means over the epoch, with dropout.

    Raises
    ------
    RuntimeError
        For device "cuda" without CuPy or a GPU.
    TypeError, ValueError
        For a setting that a layer or the optimizer refuses.
    """

    def __init__(self, settings: Settings, dataset: Dataset, communicator: Communicator | None = None) -> None:
        self.settings = settings
        self.classes = len(dataset.classes)
        self.communicator = communicator or SingleProcess()
        self.history: list[Facts] = []
        self._part: _Part | None = None
        xp: ModuleType = np if settings.device == "cpu" else require_gpu()
        dtype = DTYPES[settings.dtype]
        self._x_train, self._x_test = (xp.asarray(x.astype(dtype)) for x in (dataset.x_train, dataset.x_test))
        self._y_train, self._y_test = (xp.asarray(y) for y in (dataset.y_train, dataset.y_test))
        self._data_digest = dataset.digest()
        self.network = image_classifier(
            dataset.image_shape,
            self.classes,
            p=settings.p,
            placement=settings.placement,
            seed=settings.seed,
            dtype=dtype,
            communicator=self.communicator,
        )
        self.network.to(settings.device)
        self.optimizer: Optimizer
        if settings.optimizer == "adam":
            self.optimizer = Adam(self.network.parameters, settings.lr)
        else:
            self.optimizer = SGD(self.network.parameters, settings.lr, momentum=_SGD_MOMENTUM)

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.settings.epochs

    @property
    def batches_of_next_epoch(self) -> int:
        """Number of finished batches of the next epoch: not 0 if it was stopped in between."""
        return self._part.batches if self._part else 0

    def train_epoch(
        self, report: Callable[[Progress], None] = lambda progress: None, stop: Callable[[], bool] = lambda: False
    ) -> Facts | None:
        """Train on every training image once, then evaluate.

        Parameters
        ----------
        report : callable
            Called after each batch.
        stop : callable
            Called after each batch except the last. If it returns True the epoch ends there. The next call, or that of
            a trainer with this one's :meth:`state`, does the rest; both together do what one call would have done.

        Returns
        -------
        dict or None
            This epoch's entry of :attr:`history`; None if it was stopped.

        Raises
        ------
        FloatingPointError
            If the loss is no longer a finite number.
        """
        with _arithmetic():
            entry = self._train_epoch(report, stop)
        if entry is None:
            return None
        entry["test_loss"], entry["test_accuracy"] = self.evaluate()
        self._check_finite(entry["test_loss"])
        self.history.append(entry)
        return entry

    def _train_epoch(self, report: Callable[[Progress], None], stop: Callable[[], bool]) -> Facts | None:
        self.network.train()
        count = self._x_train.shape[0]
        order = array_module(self._x_train).asarray(epoch_order(count, self.settings.seed, self.epoch))
        steps = batch_count(count, self.settings.batch_size)
        begun, self._part = self._part or _Part(), None
        began = time.perf_counter() - begun.seconds
        images, loss_sum, correct = begun.images, begun.loss_sum, begun.correct
        for number, batch in enumerate(batches(count, self.settings.batch_size)):
            if number < begun.batches:
                continue
            self.optimizer.lr = self._learning_rate((self.epoch + number / steps) / self.settings.epochs)
            chosen = order[batch]
            samples = len(chosen)
            loss, hits = self._step(chosen)
            self._check_finite(loss)
            images, loss_sum, correct = images + samples, loss_sum + loss * samples, correct + hits
            seconds = time.perf_counter() - began
            report(Progress(images, loss_sum / images, correct / images, images / seconds))
            if number + 1 < steps and stop():
                self._part = _Part(number + 1, images, correct, loss_sum, seconds)
                return None
        seconds = time.perf_counter() - began
        return {
            "epoch": self.epoch + 1,
            "train_loss": loss_sum / images,
            "train_accuracy": correct / images,
            "seconds": seconds,
            "images_per_second": images / seconds,
        }

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test images, in evaluation mode."""
        self.network.eval()
        count = self._x_test.shape[0]
        loss_sum, correct = 0.0, 0
        with _arithmetic():
            for start in range(0, count, _EVALUATION_BATCH):
                labels = self._y_test[start : start + _EVALUATION_BATCH]
                logits = self.network(self._x_test[start : start + _EVALUATION_BATCH])
                loss, _ = softmax_cross_entropy(logits, labels)
                loss_sum, correct = loss_sum + loss * len(labels), correct + _hits(logits, labels)
        return loss_sum / count, correct / count

    def state(self) -> tuple[dict[str, np.ndarray], Facts]:
        """Arrays and facts from which :meth:`restore` continues bit for bit."""
        arrays = {f"model.{name}": value for name, value in self.network.state_dict().items()}
        arrays.update({f"optimizer.{name}": value for name, value in self.optimizer.state_dict().items()})
        facts = {
            "settings": asdict(self.settings),
            "data": self._data_digest,
            "generators": [generator.get_state() for generator in dropout_generators(self.network)],
            "history": self.history,
            "part": asdict(self._part) if self._part else None,
        }
        return {name: _on_cpu(value) for name, value in arrays.items()}, facts

    def restore(self, arrays: dict[str, np.ndarray], facts: Facts) -> int:
        """Go back to a :meth:`state`, possibly of a run with another number of epochs.

        Parameters
        ----------
        arrays, facts
            As :meth:`state` returned them.

        Returns
        -------
        int
            The number of epochs of that run. From now on the learning rate follows this trainer's number.

        Raises
        ------
        ValueError
            If it belongs to a run with other settings or data, which the message names, or has more epochs than this
            run.
        """
        now, then = asdict(self.settings), facts["settings"]
        different = [
            f"{name} {then.get(name)} instead of {now[name]}"
            for name in now
            if name != "epochs" and then.get(name) != now[name]
        ]
        if facts["data"] != self._data_digest:
            different.append("other data")
        if different:
            raise ValueError(f"the checkpoint was made with {', '.join(different)}")
        part = _Part(**facts["part"]) if facts.get("part") else None
        begun = len(facts["history"]) + (part is not None)
        if begun > self.settings.epochs:
            raise ValueError(
                f"the checkpoint is in or after epoch {begun}, beyond the {self.settings.epochs} of this run"
            )
        self.network.load_state_dict(_without_prefix(arrays, "model."))
        self.optimizer.load_state_dict(_without_prefix(arrays, "optimizer."))
        for generator, state in zip(dropout_generators(self.network), facts["generators"], strict=True):
            generator.set_state(state)
        self.history, self._part = facts["history"], part
        return int(then["epochs"])

    def weights(self) -> dict[str, np.ndarray]:
        """The network's parameters and running statistics, under PyTorch's names."""
        return {name: _on_cpu(value) for name, value in self.network.state_dict().items()}

    def _step(self, chosen: Array) -> tuple[float, int]:
        """Train on these images: loss and hits of all of them."""
        if self.communicator.size == 1:
            logits = self.network(self._x_train[chosen])
            labels = self._y_train[chosen]
            loss, gradient = softmax_cross_entropy(logits, labels)
            self.network.backward(gradient)
            self.optimizer.step(self.network.gradients)
            return loss, _hits(logits, labels)
        part = shard(len(chosen), self.communicator)
        for layer in self.network.layers:
            if isinstance(layer, DropoutLayer):
                layer.first_sample = part.start
        logits, labels = self.network(self._x_train[chosen[part]]), self._y_train[chosen[part]]
        loss, gradient = softmax_cross_entropy(logits, labels, samples=len(chosen))
        self.network.backward(gradient)
        loss, hits, gradients = added(self.communicator, loss, _hits(logits, labels), self.network.gradients)
        self.optimizer.step(gradients)
        return loss, hits

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training diverged: the loss is {loss} in epoch {self.epoch + 1}; a lower learning rate may help"
            )

    def _learning_rate(self, done: float) -> float:
        """Half a cosine, from the chosen rate to 0; a function of how much of the run is done and nothing else."""
        return self.settings.lr * 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def _arithmetic() -> Iterator[None]:
    """How the numbers of a run are computed: on one BLAS thread, and without a warning.

    How a BLAS divides sums among threads would decide the last bits of the weights. One thread costs little: most of
    the time goes to the NumPy reference, which has no more. What overflows is an error once it reaches the loss.
    """
    with import_extra("threadpoolctl").threadpool_limits(1, user_api="blas"), np.errstate(all="ignore"):
        yield


def _hits(logits: Array, labels: Array) -> int:
    # As float32: not every array library finds the largest of half-precision numbers.
    return int((logits.astype(np.float32, copy=False).argmax(axis=1) == labels).sum())


def _on_cpu(array: Array) -> np.ndarray:
    return array.get() if is_cupy_array(array) else array


def _without_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
