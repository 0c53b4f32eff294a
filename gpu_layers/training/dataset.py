"""Labelled images, split into training and test: scikit-learn's digits, or a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_layers.training.extras import import_extra

_KEYS = ("x_train", "y_train", "x_test", "y_test")
# Fixed: which digits are for testing is part of the task, not of a run.
_DIGITS_SPLIT_SEED = 0
_DIGITS_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Dataset:
    """Images and labels, checked and ready to train on.

    Attributes
    ----------
    name : str
    x_train, x_test : ndarray of float32, shape (N, C, H, W)
        Standardised: ``(image - mean) / std``.
    y_train, y_test : ndarray of int64, shape (N,)
        Positions in ``classes``.
    classes : tuple of int
        The labels of the training images, ascending.
    mean, std : float
        Of all training images together.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[int, ...]
    mean: float
    std: float

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def digest(self) -> str:
        """SHA-256 of all images and labels."""
        digest = hashlib.sha256(repr((self.x_train.shape, self.x_test.shape, self.classes)).encode())
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def digits() -> Dataset:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; a fifth of each class for testing.

    Raises
    ------
    RuntimeError
        If scikit-learn is not installed.
    """
    datasets, selection = import_extra("sklearn.datasets"), import_extra("sklearn.model_selection")
    images, labels = datasets.load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = selection.train_test_split(
        images.reshape(-1, 8, 8),
        labels,
        test_size=_DIGITS_TEST_SHARE,
        random_state=_DIGITS_SPLIT_SEED,
        stratify=labels,
    )
    return _dataset("digits", x_train, y_train, x_test, y_test)


def load_npz(path: Path) -> Dataset:
    """Images and labels of an ``.npz`` file.

    Parameters
    ----------
    path : Path
        Of a file with the arrays ``x_train``, ``x_test``: uint8 or floating, shape (N, H, W) or (N, C, H, W); and
        ``y_train``, ``y_test``: integers, shape (N,) or (N, 1).

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is damaged, or holds something else.
    """
    arrays = _read_arrays(path)
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: expected the arrays {', '.join(_KEYS)}")
    try:
        return _dataset(path.name, *(arrays[key] for key in _KEYS))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        # A damaged file makes NumPy, zipfile and zlib raise almost anything, MemoryError for a huge shape included.
        try:
            loaded: Any = np.load(file, allow_pickle=False)
            return {key: loaded[key] for key in _KEYS if key in loaded.files}
        except Exception as error:
            raise ValueError(f"{path} is damaged or not an .npz file of plain arrays ({error})") from error


def _dataset(name: str, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Dataset:
    x_train, x_test = _checked_images(x_train, "x_train", 2), _checked_images(x_test, "x_test", 1)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"x_train and x_test hold images of different shapes: {list(x_train.shape[1:])}, {list(x_test.shape[1:])}"
        )
    y_train, y_test = _checked_labels(y_train, "y_train", len(x_train)), _checked_labels(y_test, "y_test", len(x_test))
    classes = np.unique(y_train)
    if classes.size < 2:
        raise ValueError(f"y_train holds the single class {classes[0]}: there is nothing to tell apart")
    unknown = np.setdiff1d(y_test, classes)
    if unknown.size:
        raise ValueError(f"y_test holds the label {unknown[0]}, which y_train does not")
    # Wide: the sum of many small or large pixels must not lose them.
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(x_train.mean(dtype=np.float64)), float(x_train.std(dtype=np.float64))
    if std == 0:
        raise ValueError(f"every pixel of x_train is {mean:g}: there is nothing to learn from")
    if not np.isfinite(std):
        raise ValueError("x_train holds numbers too large to compute their spread")

    def standardised(images: np.ndarray) -> np.ndarray:
        wide: np.ndarray = images.astype(np.float64 if images.dtype == np.float64 else np.float32, copy=False)
        return ((wide - mean) / std).astype(np.float32, copy=False)

    return Dataset(
        name=name,
        x_train=standardised(x_train),
        y_train=np.searchsorted(classes, y_train),
        x_test=standardised(x_test),
        y_test=np.searchsorted(classes, y_test),
        classes=tuple(int(label) for label in classes),
        mean=mean,
        std=std,
    )


def _checked_images(images: np.ndarray, name: str, least: int) -> np.ndarray:
    """Images as (N, C, H, W)."""
    if images.dtype != np.uint8 and images.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{name} must be uint8, float16, float32 or float64, got {images.dtype}")
    if images.ndim not in (3, 4):
        raise ValueError(f"{name} must have shape (N, H, W) or (N, C, H, W), got {list(images.shape)}")
    if len(images) < least or 0 in images.shape:
        raise ValueError(f"{name} must hold at least {least} images of at least one pixel, got {list(images.shape)}")
    if not np.isfinite(images).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return images[:, None] if images.ndim == 3 else images


def _checked_labels(labels: np.ndarray, name: str, count: int) -> np.ndarray:
    """Labels as int64 (N,)."""
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, got {labels.dtype}")
    if labels.shape not in ((count,), (count, 1)):
        raise ValueError(f"{name} must have shape [{count}], one label an image, got {list(labels.shape)}")
    if labels.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {labels.max()}, which does not fit 64 bits with a sign")
    return labels.reshape(count).astype(np.int64)
