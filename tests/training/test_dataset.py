"""Reading images: scikit-learn's digits, good files and every kind of bad file."""

import io

import numpy as np
import pytest

from gpu_layers.training import digits, load_npz
from tests.training.images import image_arrays, write_images


def _write(path, **changes):
    arrays = {**image_arrays(), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_digits():
    data = digits()
    assert (data.x_train.shape, data.x_test.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert data.classes == tuple(range(10))
    assert data.x_train.dtype == np.float32
    assert np.bincount(data.y_test).min() >= 34, "a fifth of each class"
    # float32 images: their mean is 0 and their spread 1 within its rounding.
    assert abs(data.x_train.mean(dtype=np.float64)) < 1e-6
    assert abs(data.x_train.std(dtype=np.float64) - 1) < 1e-6
    assert data.digest() == digits().digest()


def test_no_digit_is_in_both_parts():
    data = digits()
    train, test = ({image.tobytes() for image in part} for part in (data.x_train, data.x_test))
    assert not train & test


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 4, 7)])
def test_npz(tmp_path, shape, dtype):
    arrays = image_arrays(shape=shape)
    images = {name: arrays[name].astype(dtype) for name in ("x_train", "x_test")}
    data = load_npz(_write(tmp_path / "images.npz", **{**arrays, **images}))
    assert data.image_shape == (shape if len(shape) == 3 else (1, *shape))
    raw = arrays["x_test"].astype(np.float64).reshape(data.x_test.shape)
    # Standardised values are below 10; one rounding to float32 of such is below 6e-7.
    np.testing.assert_allclose(data.x_test, (raw - data.mean) / data.std, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(data.y_train, arrays["y_train"])


def test_labels_are_numbered_in_order(tmp_path):
    names = np.array([-7, 40, 1000])
    arrays = image_arrays()
    labels = {name: names[arrays[name]] for name in ("y_train", "y_test")}
    labels["y_test"] = labels["y_test"][:, None]
    data = load_npz(_write(tmp_path / "images.npz", **labels))
    assert data.classes == (-7, 40, 1000)
    np.testing.assert_array_equal(data.y_test, arrays["y_test"])


def test_other_data_has_another_digest(tmp_path):
    first = load_npz(_write(tmp_path / "a.npz")).digest()
    labels = image_arrays()["y_test"][::-1]
    assert load_npz(_write(tmp_path / "b.npz", y_test=labels)).digest() != first
    assert load_npz(_write(tmp_path / "c.npz")).digest() == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "has no y_test"),
        ({"x_train": None, "x_test": None}, "has no x_train, x_test"),
        ({"x_train": np.zeros((42, 30), np.uint8)}, r"x_train must have shape \(N, H, W\) or \(N, C, H, W\)"),
        ({"x_train": np.zeros((42, 6, 5), np.int64)}, "x_train must be uint8, float16, float32 or float64, got int64"),
        ({"x_train": np.zeros((42, 6, 5), bool)}, "x_train must be uint8"),
        ({"x_train": np.zeros((41, 6, 5), np.uint8)}, r"y_train must have shape \[41\]"),
        ({"x_train": np.zeros((42, 6, 5), np.uint8)}, "every pixel of x_train is 0"),
        ({"x_train": np.full((42, 6, 5), np.nan)}, "x_train holds NaN or infinity"),
        ({"x_test": np.full((9, 6, 5), np.inf)}, "x_test holds NaN or infinity"),
        ({"x_train": np.resize([-1e308, 1e308], (42, 6, 5))}, "numbers too large to compute their spread"),
        ({"x_test": np.zeros((9, 5, 6), np.uint8)}, "images of different shapes"),
        ({"x_test": np.zeros((0, 6, 5), np.uint8), "y_test": np.zeros(0, int)}, "at least 1 images"),
        ({"x_train": np.zeros((1, 6, 5), np.uint8), "y_train": np.zeros(1, int)}, "at least 2 images"),
        ({"x_train": np.zeros((42, 0, 5), np.uint8)}, "of at least one pixel"),
        ({"y_train": np.zeros(42)}, "y_train must hold integers, got float64"),
        ({"y_train": np.zeros(42, int)}, "y_train holds the single class 0"),
        ({"y_train": np.zeros((42, 2), int)}, "y_train must have shape"),
        ({"y_test": np.full(9, 17)}, "y_test holds the label 17, which y_train does not"),
        ({"y_train": np.full(42, 2**64 - 1, np.uint64)}, "does not fit 64 bits"),
        ({"y_train": np.array([None] * 42)}, "damaged or not an .npz file of plain arrays"),
    ],
)
def test_bad_content(tmp_path, changes, message):
    path = _write(tmp_path / "images.npz", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_npz(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "none.npz")
    with pytest.raises(IsADirectoryError):
        load_npz(tmp_path)


def test_every_kind_of_damage_is_a_value_error(tmp_path):
    compressed = io.BytesIO()
    np.savez_compressed(compressed, **image_arrays())
    plain = write_images(tmp_path / "plain.npz").read_bytes()
    npy = io.BytesIO()
    np.save(npy, np.zeros(3))
    rng = np.random.default_rng(0)
    damaged = [b"", b"text", npy.getvalue(), plain[: len(plain) // 2], plain[:-1], plain[100:]]
    for whole in (plain, compressed.getvalue()):
        for _ in range(100):
            content = bytearray(whole)
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(content))
    path = tmp_path / "damaged.npz"
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            load_npz(path)
        except ValueError:
            refused += 1
    # A flipped bit of a date or of a file mode in the archive is no damage to the data.
    assert refused > len(damaged) / 2
