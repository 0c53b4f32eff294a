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
        (
            {"x_train": np.zeros((42, 30), np.uint8)},
            r"x_train must have shape \(N, H, W\), \(N, C, H, W\) or \(N, H, W, C\), got \[42, 30\]: reshape its rows",
        ),
        ({"x_train": np.zeros((42, 1, 1, 6, 5))}, r"got \[42, 1, 1, 6, 5\]"),
        ({"x_train": np.ones((42, 6, 5), complex)}, r'got complex128: convert it, e\.g\. x_train\.astype\("float32"\)'),
        ({"x_test": np.full((9, 6, 5), "a")}, r"x_test must hold booleans, integers or floating numbers .* got <U1"),
        ({"x_test": np.zeros((9, 6, 5), "V2")}, r"got \|V2: convert it"),
        ({"x_test": np.zeros((9, 6, 5), "M8[s]")}, "got datetime64"),
        ({"x_train": np.zeros((42, 6, 5), np.longdouble)}, r"up to float64, got float128|longdouble"),
        ({"x_train": np.zeros((41, 6, 5), np.uint8)}, r"y_train must have shape \[41\]"),
        ({"x_train": np.zeros((42, 6, 5), np.uint8)}, "every pixel of x_train is 0"),
        ({"x_train": np.full((42, 6, 5), np.nan)}, "x_train holds NaN or infinity"),
        ({"x_test": np.full((9, 6, 5), np.inf)}, "x_test holds NaN or infinity"),
        ({"x_train": np.resize([-1e308, 1e308], (42, 6, 5))}, "numbers too large to compute their spread"),
        ({"x_test": np.zeros((9, 5, 6), np.uint8)}, "images of different shapes"),
        ({"x_test": np.zeros((0, 6, 5), np.uint8), "y_test": np.zeros(0, int)}, "at least 1 images"),
        ({"x_train": np.zeros((1, 6, 5), np.uint8), "y_train": np.zeros(1, int)}, "at least 2 images"),
        ({"x_train": np.zeros((42, 0, 5), np.uint8)}, "of at least one pixel"),
        ({"y_train": np.linspace(0, 1, 42)}, "y_train must hold integers or texts, got float64 with 0.0243902"),
        ({"y_train": np.r_[np.nan, np.arange(41.0)]}, "got float64 with nan: a class is a whole number"),
        ({"y_train": np.r_[-np.inf, np.arange(41.0)]}, "got float64 with -inf"),
        ({"y_train": np.r_[np.arange(41.0), 2.0**63]}, "does not fit 64 bits"),
        ({"y_train": np.zeros(42)}, "y_train holds the single class 0"),
        ({"y_train": np.zeros(42, complex)}, r"y_train must hold integers or texts, got complex128: convert it"),
        ({"y_train": np.full(42, b"\xff")}, r"y_train holds bytes that are not ASCII: decode them"),
        ({"y_test": np.full(9, "0")}, "must both hold texts or both hold numbers"),
        ({"y_train": np.full((42, 3), 1 / 3)}, r"one-hot rows, .* row 0 otherwise; for scores take y_train\.argmax"),
        ({"y_train": np.r_[np.eye(3)[np.arange(41) % 3], [[1, 1, 0]]]}, "with row 41 otherwise"),
        ({"y_train": np.eye(3)[np.arange(42) % 3] * 2}, "with row 0 otherwise"),
        ({"y_train": np.zeros((42, 3, 1))}, r"y_train must have shape \[42\]"),
        ({"y_train": np.zeros(42, int)}, "y_train holds the single class 0"),
        ({"y_train": np.zeros((42, 2), int)}, "y_train must have shape"),
        ({"y_test": np.full(9, 17)}, "y_test holds the label 17, which y_train does not"),
        ({"y_train": np.full(42, 2**64 - 1, np.uint64)}, "does not fit 64 bits"),
        (
            {"y_train": np.array([None] * 42)},
            r"damaged or not an \.npz file of plain arrays: y_train holds Python objects; save it with",
        ),
    ],
)
def test_bad_content(tmp_path, changes, message):
    path = _write(tmp_path / "images.npz", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_npz(path)
    assert str(path) in str(caught.value)
    assert "pickle" not in str(caught.value)


@pytest.mark.parametrize("content", [b"x_train,y_train\n1,2\n", b"", b"\x93NUMPY\x01\x00", "texte é".encode("latin-1")])
def test_a_file_that_is_no_archive(tmp_path, content):
    path = tmp_path / "images.npz"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"damaged or not an \.npz file: it is not an archive, as numpy\.savez"
    ) as caught:
        load_npz(path)
    assert "pickle" not in str(caught.value)


def _same(first, second):
    return all(
        np.array_equal(getattr(first, name), getattr(second, name))
        and getattr(first, name).dtype == getattr(second, name).dtype
        for name in ("x_train", "y_train", "x_test", "y_test")
    )


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", ">u2", "i2", ">i4", "u4", "i8", ">f4", ">f8", "<f2", ">f2"])
def test_numbers_of_every_kind(tmp_path, dtype):
    """Values that all of them hold: the images are the same, whatever they are kept as."""
    arrays = {name: array % 2 if dtype == "?" else array // 4 for name, array in image_arrays().items()}
    arrays |= {name: value for name, value in image_arrays().items() if name.startswith("y")}
    plain = load_npz(_write(tmp_path / "plain.npz", **arrays))
    images = {name: arrays[name].astype(dtype) for name in ("x_train", "x_test")}
    data = load_npz(_write(tmp_path / "images.npz", **{**arrays, **images}))
    for one, other in ((data.x_train, plain.x_train), (data.x_test, plain.x_test)):
        assert one.dtype == np.float32
        assert one.dtype.isnative
        # Computed in float64 or float32: two roundings of values below 10.
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(data.y_train, plain.y_train)


def test_large_integers_keep_their_differences(tmp_path):
    """2**24 + 1 is no float32."""
    arrays = image_arrays()
    images = {name: arrays[name].astype(np.int64) % 2 + 2**40 for name in ("x_train", "x_test")}
    data = load_npz(_write(tmp_path / "images.npz", **images))
    assert np.unique(data.x_train).size == 2


@pytest.mark.parametrize(
    ("convert", "classes"),
    [
        (lambda y: y.astype(np.float32), (0, 1, 2)),
        (lambda y: y.astype(">f8")[:, None], (0, 1, 2)),
        (lambda y: y.astype(">i2"), (0, 1, 2)),
        (lambda y: np.array(["cat", "dog", "été"])[y], ("cat", "dog", "été")),
        (lambda y: np.array(["cat", "dog", "été"])[y].astype(">U9"), ("cat", "dog", "été")),
        (lambda y: np.array([b"a", b"bb", b"c"])[y], ("a", "bb", "c")),
        (lambda y: np.eye(3)[y], (0, 1, 2)),
        (lambda y: np.eye(3, dtype=bool)[y], (0, 1, 2)),
        (lambda y: np.eye(5, dtype=np.uint8)[y + 2], (2, 3, 4)),
    ],
)
def test_labels_of_every_kind(tmp_path, convert, classes):
    arrays = image_arrays()
    labels = {name: convert(arrays[name]) for name in ("y_train", "y_test")}
    data = load_npz(_write(tmp_path / "images.npz", **labels))
    assert data.classes == classes
    assert all(type(label) in (int, str) for label in data.classes)
    for name in ("y_train", "y_test"):
        np.testing.assert_array_equal(getattr(data, name), arrays[name])
        assert getattr(data, name).dtype == np.int64


def test_boolean_labels(tmp_path):
    arrays = image_arrays(classes=2)
    labels = {name: arrays[name].astype(bool) for name in ("y_train", "y_test")}
    data = load_npz(_write(tmp_path / "images.npz", **{**arrays, **labels}))
    assert data.classes == (0, 1)
    np.testing.assert_array_equal(data.y_test, arrays["y_test"])


def _channels_last(arrays):
    return {name: np.moveaxis(value, 1, -1) if value.ndim == 4 else value for name, value in arrays.items()}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("contiguous", [True, False])
def test_channels_last_is_recognised(tmp_path, channels, contiguous):
    arrays = image_arrays(shape=(channels, 6, 5))
    first = load_npz(_write(tmp_path / "first.npz", **arrays))
    last = {name: np.ascontiguousarray(a) if contiguous else a for name, a in _channels_last(arrays).items()}
    path = _write(tmp_path / "last.npz", **last)
    for layout in ("auto", "nhwc"):
        assert _same(first, load_npz(path, layout))
        assert load_npz(path, layout).digest() == first.digest()
    assert load_npz(path).x_train.flags.c_contiguous
    assert load_npz(path, "nchw").image_shape == (6, 5, channels), "who says so gets it"


@pytest.mark.parametrize("shape", [(3, 6, 3), (1, 28, 3), (4, 4, 4), (2, 8, 8), (8, 8, 2), (5, 5, 5)])
def test_an_unclear_layout_is_refused(tmp_path, shape):
    arrays = image_arrays(shape=shape)
    path = _write(tmp_path / "images.npz", **arrays)
    with pytest.raises(ValueError, match=r"may be \(N, C, H, W\) or \(N, H, W, C\): say which with --layout nchw or"):
        load_npz(path)
    assert load_npz(path, "nchw").image_shape == shape
    assert load_npz(path, "nhwc").image_shape == (shape[2], shape[0], shape[1])
    with pytest.raises(ValueError, match="layout must be one of auto, nchw, nhwc, got 'chwn'"):
        load_npz(path, "chwn")


def test_the_layout_of_images_without_channels_does_not_matter(tmp_path):
    path = _write(tmp_path / "images.npz")
    assert _same(load_npz(path), load_npz(path, "nhwc"))


@pytest.mark.parametrize(
    "scaled",
    [
        lambda x: x / 255,
        lambda x: (x / 255).astype(np.float32),
        lambda x: x / 127.5 - 1,
        lambda x: (x - 60.0) / 70,
        lambda x: x.astype(np.uint16) * 257,
    ],
)
@pytest.mark.parametrize("part", ["x_train", "x_test"])
def test_parts_on_different_scales_are_refused(tmp_path, part, scaled):
    arrays = image_arrays()
    path = _write(tmp_path / "images.npz", **{part: scaled(arrays[part])})
    with pytest.raises(ValueError, match=r"x_train and x_test are on different scales: pixels from .*; scale both"):
        load_npz(path)
    both = {name: scaled(arrays[name]) for name in ("x_train", "x_test")}
    load_npz(_write(path, **both))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x // 20,  # dark
        lambda x: x * 0,
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, 1e5, x),  # one hot pixel
        lambda x: x[:1] // 20,
    ],
)
def test_parts_may_differ(tmp_path, change):
    arrays = image_arrays()
    x = change(arrays["x_test"])
    load_npz(_write(tmp_path / "images.npz", x_test=x, y_test=arrays["y_test"][: len(x)]))


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
