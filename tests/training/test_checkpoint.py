"""Files of arrays and facts: exact, atomic, and refused when they are not whole."""

import json
import os
import stat

import numpy as np
import pytest
import safetensors.numpy

from gpu_layers.core import cache
from gpu_layers.core.cache import remove_partial, write_atomically
from gpu_layers.training.checkpoint import load_arrays, save_arrays

ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "count": np.array(2**40, np.int64),
    "half": np.array([1.5, np.nan], np.float16),
    "empty": np.zeros((0, 3), np.float32),
}
FACTS = {"seed": 2**64 - 1, "history": [{"loss": 0.1 + 0.2}], "name": "ünï"}


def _save(path, **changes):
    save_arrays(path, "checkpoint", {**ARRAYS, **changes}, FACTS)
    return path


def test_gives_back_the_same_bits(tmp_path):
    arrays, facts = load_arrays(_save(tmp_path / "file"), "checkpoint")
    assert facts == FACTS
    assert arrays.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (value.dtype, value.shape)
        assert arrays[name].tobytes() == value.tobytes()


def test_same_content_same_bytes(tmp_path):
    assert _save(tmp_path / "a").read_bytes() == _save(tmp_path / "b").read_bytes()


def test_others_can_read_it(tmp_path):
    arrays = safetensors.numpy.load_file(_save(tmp_path / "file"))
    np.testing.assert_array_equal(arrays["weight"], ARRAYS["weight"])


def test_every_flipped_bit_and_every_missing_byte_is_noticed(tmp_path):
    whole = _save(tmp_path / "file").read_bytes()
    path = tmp_path / "damaged"
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        try:
            arrays, facts = load_arrays(path, "checkpoint")
        except ValueError:
            continue
        # Spaces that fill the header up may change; what is read may not.
        assert facts == FACTS
        assert all(arrays[name].tobytes() == value.tobytes() for name, value in ARRAYS.items())
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged or not a checkpoint file"):
            load_arrays(path, "checkpoint")


def test_refuses_foreign_files(tmp_path):
    path = tmp_path / "file"
    safetensors.numpy.save_file(ARRAYS | {"transposed": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not a checkpoint file of gpu-layers"):
        load_arrays(path, "checkpoint")
    safetensors.numpy.save_file({}, path, metadata={"gpu_layers": json.dumps([1])})
    with pytest.raises(ValueError, match="is not a checkpoint file of gpu-layers"):
        load_arrays(path, "checkpoint")
    save_arrays(path, "model", ARRAYS, FACTS)
    with pytest.raises(ValueError, match="expected a checkpoint file of version 1, got a model file of version 1"):
        load_arrays(path, "checkpoint")


def _fail_with_enospc(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_file_survives_a_failed_write(tmp_path, monkeypatch, step):
    path = _save(tmp_path / "file")
    before = path.read_bytes()
    monkeypatch.setattr(cache.os, step, _fail_with_enospc)
    with pytest.raises(OSError, match="No space left on device"):
        _save(path, weight=np.ones(3))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"], "nothing half written is left"


def test_mode_of_the_file_is_the_usual_one(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    path = _save(tmp_path / "file")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_remove_partial_takes_only_its_own(tmp_path):
    for name in ("a[1].json", "a[1].json.00ff.partial", "a1.json.00ff.partial", "other.00ff.partial"):
        (tmp_path / name).write_bytes(b"")
    remove_partial(tmp_path / "a[1].json")
    assert sorted(os.listdir(tmp_path)) == ["a1.json.00ff.partial", "a[1].json", "other.00ff.partial"]


def test_write_makes_its_folder(tmp_path):
    write_atomically(tmp_path / "a" / "b", b"content")
    assert (tmp_path / "a" / "b").read_bytes() == b"content"
