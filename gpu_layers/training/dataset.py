"""Labelled images, split into training and test: scikit-learn's digits, or those of a file."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_layers.training.extras import import_extra

_KEYS = ("x_train", "y_train", "x_test", "y_test")
# Fixed: the test images are part of the task, not of a run.
_DIGITS_SPLIT_SEED = 0
_DIGITS_TEST_SHARE = 0.2
LAYOUTS = ("auto", "nchw", "nhwc")
#: Sizes of a channel axis: grey, colours, colours and opacity. Real heights are larger.
_CHANNELS = (1, 3, 4)
#: Pixels of 8 bits are 255 times those from 0 to 1; parts of one data set differ far less.
_SCALES_APART = 32
#: If one part has negative pixels and the other has none: this share, in so many images, is not an accident.
_SHARE_OF_SIGNS, _MANY_IMAGES = 0.1, 8


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
    classes : tuple of int or of str
        The labels of the training images, ascending.
    mean, std : float
        Mean and standard deviation over all training images.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[int, ...] | tuple[str, ...]
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
    """The 1,797 handwritten digits of 8 x 8 pixels from scikit-learn; a fifth of each class is for testing.

    Returns
    -------
    Dataset

    Raises
    ------
    RuntimeError
        If scikit-learn is not installed.
    """
    datasets, selection = import_extra("sklearn.datasets"), import_extra("sklearn.model_selection")
    images, labels = datasets.load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = selection.train_test_split(
        images.reshape(-1, 8, 8), labels, test_size=_DIGITS_TEST_SHARE, random_state=_DIGITS_SPLIT_SEED, stratify=labels
    )
    return _dataset("digits", "auto", x_train, y_train, x_test, y_test)


def load_npz(path: Path, layout: str = "auto") -> Dataset:
    """Images and labels of an ``.npz`` file.

    Parameters
    ----------
    path : Path
        A file with four arrays. ``x_train`` and ``x_test``: booleans, integers or floating numbers of any byte order,
        of shape (N, H, W), (N, C, H, W) or (N, H, W, C). ``y_train`` and ``y_test``: integers, whole floating numbers,
        booleans or texts of shape (N,) or (N, 1), or one-hot rows of shape (N, classes).
    layout : {"auto", "nchw", "nhwc"}
        Layout of images with four axes. "auto": the channels are the second or the last axis, whichever has the size 1,
        3 or 4.

    Returns
    -------
    Dataset

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is damaged, holds something else, or has an unclear layout; the message says what to do.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    arrays = _read_arrays(path)
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: expected the arrays {', '.join(_KEYS)}")
    try:
        return _dataset(_printable(path.name), layout, *(arrays[key] for key in _KEYS))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _printable(name: str) -> str:
    """The name of a file, which may be any bytes, with unprintable letters escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(
                f"{path} is damaged or not an .npz file: it is not an archive, as numpy.savez(path, x_train=..., ...) "
                "writes one"
            )
        file.seek(0)
        arrays = {}
        # A damaged file makes NumPy, zipfile and zlib raise almost anything, also MemoryError for a huge shape.
        try:
            loaded: Any = np.load(file, allow_pickle=False)
            present = [key for key in _KEYS if key in loaded.files]
        except Exception as error:
            raise ValueError(f"{path} is damaged or not an .npz file ({error})") from error
        for key in present:
            try:
                arrays[key] = loaded[key]
            except Exception as error:  # noqa: PERF203 (says which array it is)
                if "allow_pickle" in str(error):
                    raise ValueError(
                        f"{path} is damaged or not an .npz file of plain arrays: {key} holds Python objects; "
                        f"save it with a dtype of numbers, e.g. numpy.array({key}.tolist())"
                    ) from error
                raise ValueError(f"{path} is damaged or not an .npz file of plain arrays ({key}: {error})") from error
        return arrays


def _dataset(
    name: str, layout: str, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> Dataset:
    x_train = _checked_images(x_train, "x_train", 2, layout)
    x_test = _checked_images(x_test, "x_test", 1, layout)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"x_train and x_test hold images of different shapes: {list(x_train.shape[1:])}, {list(x_test.shape[1:])}"
        )
    y_train, y_test = _checked_labels(y_train, "y_train", len(x_train)), _checked_labels(y_test, "y_test", len(x_test))
    if (y_train.dtype.kind == "U") != (y_test.dtype.kind == "U"):
        raise ValueError("y_train and y_test must both hold texts or both hold numbers, got one of each")
    classes = np.unique(y_train)
    if classes.size < 2:
        raise ValueError(f"y_train holds the single class {classes[0]}: there is nothing to tell apart")
    unknown = np.setdiff1d(y_test, classes)
    if unknown.size:
        raise ValueError(f"y_test holds the label {unknown[0]}, which y_train does not")
    # In float64: the sum of many small or large pixels must not lose them.
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(x_train.mean(dtype=np.float64)), float(x_train.std(dtype=np.float64))
    if std == 0:
        raise ValueError(f"every pixel of x_train is {mean:g}: there is nothing to learn from")
    if not np.isfinite(std):
        raise ValueError("x_train holds numbers too large to compute their spread")
    _check_scales(x_train, x_test)

    def standardised(images: np.ndarray) -> np.ndarray:
        # float32 holds integers below 2**24.
        exact = images.dtype.kind == "b" or images.dtype in (np.uint8, np.int8, np.uint16, np.int16, np.float16)
        wide: np.ndarray = images.astype(np.float32 if exact or images.dtype == np.float32 else np.float64, copy=False)
        return np.ascontiguousarray(((wide - mean) / std).astype(np.float32, copy=False))

    return Dataset(
        name=name,
        x_train=standardised(x_train),
        y_train=np.searchsorted(classes, y_train),
        x_test=standardised(x_test),
        y_test=np.searchsorted(classes, y_test),
        classes=tuple(classes.tolist()),
        mean=mean,
        std=std,
    )


def _check_scales(x_train: np.ndarray, x_test: np.ndarray) -> None:
    """Raise if one part is 0 to 255 and the other 0 to 1, or if only one part has both signs.

    Parts of one data set may differ in dark images or in one bright pixel, so both the largest and the mean size of the
    pixels must be far apart.
    """
    ends = [(float(part.min()), float(part.max())) for part in (x_train, x_test)]
    largest = [max(abs(low), abs(high)) for low, high in ends]
    with np.errstate(over="ignore"):
        mean = [float(np.abs(part.astype(np.float64)).mean()) for part in (x_train, x_test)]
    apart = any(
        largest[one] > _SCALES_APART * largest[other] > 0 and mean[one] > _SCALES_APART * mean[other]
        for one, other in ((0, 1), (1, 0))
    )
    signs = len(x_test) >= _MANY_IMAGES and any(
        one_low >= 0 and (other < 0).mean() > _SHARE_OF_SIGNS
        for (one_low, _), other in zip(ends, (x_test, x_train), strict=True)
    )
    if apart or signs:
        (a, b), (c, d) = ends
        raise ValueError(
            f"x_train and x_test are on different scales: pixels from {a:g} to {b:g}, and from {c:g} to {d:g}; "
            "scale both in the same way"
        )


def _checked_images(images: np.ndarray, name: str, least: int, layout: str) -> np.ndarray:
    """Images as (N, C, H, W), in this machine's byte order."""
    plain = images.dtype.kind in "biu" or (images.dtype.kind == "f" and images.dtype.itemsize <= 8)
    if not plain:
        raise ValueError(
            f"{name} must hold booleans, integers or floating numbers up to float64, got {images.dtype}: convert it, "
            f'e.g. {name}.astype("float32")'
        )
    if images.ndim not in (3, 4):
        raise ValueError(
            f"{name} must have shape (N, H, W), (N, C, H, W) or (N, H, W, C), got {list(images.shape)}"
            + (f": reshape its rows to images, e.g. {name}.reshape(-1, 28, 28)" if images.ndim == 2 else "")
        )
    if len(images) < least or 0 in images.shape:
        raise ValueError(f"{name} must hold at least {least} images of at least one pixel, got {list(images.shape)}")
    if not np.isfinite(images).all():
        raise ValueError(f"{name} holds NaN or infinity")
    images = images.astype(images.dtype.newbyteorder("="), copy=False)
    if images.ndim == 3:
        return images[:, None]
    return np.moveaxis(images, -1, 1) if _layout(images.shape, name, layout) == "nhwc" else images


def _layout(shape: tuple[int, ...], name: str, layout: str) -> str:
    if layout != "auto":
        return layout
    second, last = (size in _CHANNELS for size in (shape[1], shape[-1]))
    if second == last:
        raise ValueError(
            f"{name} has shape {list(shape)}, which may be (N, C, H, W) or (N, H, W, C): "
            "say which with --layout nchw or --layout nhwc"
        )
    return "nhwc" if last else "nchw"


def _checked_labels(labels: np.ndarray, name: str, count: int) -> np.ndarray:
    """Labels as int64 or texts, shape (N,)."""
    if labels.ndim == 2 and labels.shape[1] > 1 and len(labels) == count and labels.dtype.kind in "biuf":
        return _from_one_hot(labels, name)
    if labels.shape not in ((count,), (count, 1)):
        raise ValueError(f"{name} must have shape [{count}], one label an image, got {list(labels.shape)}")
    labels = labels.reshape(count)
    kind = labels.dtype.kind
    if kind == "U":
        return labels
    if kind == "S":
        try:
            return labels.astype(str)
        except UnicodeDecodeError as error:
            raise ValueError(
                f'{name} holds bytes that are not ASCII: decode them, e.g. numpy.char.decode({name}, "utf-8")'
            ) from error
    if kind not in "biuf":
        raise ValueError(f"{name} must hold integers or texts, got {labels.dtype}: convert it, e.g. {name}.astype(int)")
    whole = np.isfinite(labels) & (labels == np.rint(labels))
    if not whole.all():
        raise ValueError(
            f"{name} must hold integers or texts, got {labels.dtype} with {labels[~whole][0]:g}: a class is a whole "
            f"number; turn scores or measured values into classes first, e.g. numpy.digitize({name}, bounds)"
        )
    largest = np.iinfo(np.int64).max
    # Compared as Python's integers: floating numbers cannot distinguish 2**63 from the number before it.
    for value in (labels.max(), labels.min()):
        if not -largest - 1 <= int(value) <= largest:
            raise ValueError(f"{name} holds {value}, which does not fit 64 bits with a sign")
    return labels.astype(np.int64)


def _from_one_hot(labels: np.ndarray, name: str) -> np.ndarray:
    ones, zeros = (labels == 1).sum(axis=1), (labels == 0).sum(axis=1)
    wrong = (ones != 1) | (zeros != labels.shape[1] - 1)
    if wrong.any():
        raise ValueError(
            f"{name} must have shape [{len(labels)}], one label an image, or hold one-hot rows, each a single 1 among "
            f"zeros, got {list(labels.shape)} with row {int(wrong.argmax())} otherwise; for scores take "
            f"{name}.argmax(axis=1)"
        )
    return labels.argmax(axis=1).astype(np.int64)
