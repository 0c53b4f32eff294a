"""Runs: they learn, they repeat, and they continue from their state bit for bit."""

import dataclasses
import math

import numpy as np
import pytest

from gpu_layers.training import Settings, Trainer, load_npz
from tests.training.images import write_images

SETTINGS = Settings(
    device="cpu",
    dtype="float32",
    seed=3,
    epochs=4,
    batch_size=8,
    p=0.2,
    placement="after",
    optimizer="adam",
    lr=0.01,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    # 41 images in batches of 8: one remains, which batch norm alone would refuse.
    return load_npz(write_images(tmp_path_factory.mktemp("images") / "images.npz", train=41))


def _trained(dataset, **changes):
    trainer = Trainer(dataclasses.replace(SETTINGS, **changes), dataset)
    while not trainer.finished:
        trainer.train_epoch()
    return trainer


def _same_weights(first, second):
    a, b = first.weights(), second.weights()
    assert a.keys() == b.keys()
    return all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
        {"placement": "before"},
        {"optimizer": "sgd", "lr": 0.05},
        {"batch_size": 2},
        {"batch_size": 1000},
    ],
    ids=str,
)
def test_learns_and_repeats(dataset, changes):
    # All images in one batch: one step an epoch.
    epochs = 20 if changes.get("batch_size") == 1000 else 8
    first = _trained(dataset, epochs=epochs, **changes)
    # The label is the place of the one bright pixel: anything that learns gets most of nine right, chance three.
    assert first.history[-1]["test_accuracy"] >= 7 / 9
    assert _same_weights(first, _trained(dataset, epochs=epochs, **changes))
    wide = np.float64 if changes.get("dtype") == "float64" else np.float32
    assert {value.dtype for value in first.network.parameters.values()} == {np.dtype(wide)}


@pytest.mark.parametrize("change", [{"seed": 4}, {"p": 0.3}, {"lr": 0.02}, {"dtype": "float16"}, {"batch_size": 7}])
def test_every_setting_counts(dataset, change):
    assert not _same_weights(_trained(dataset), _trained(dataset, **change))


def test_placement_is_immaterial_with_relu(dataset):
    # max(k x, 0) = k max(x, 0) for the k >= 0 of a mask: only rounding differs, and here not even that.
    assert _same_weights(_trained(dataset, placement="after"), _trained(dataset, placement="before"))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_continues_bit_for_bit(dataset, stop, optimizer):
    whole = _trained(dataset, optimizer=optimizer)
    stopped = Trainer(dataclasses.replace(SETTINGS, optimizer=optimizer), dataset)
    for _ in range(stop):
        stopped.train_epoch()
    continued = Trainer(dataclasses.replace(SETTINGS, optimizer=optimizer), dataset)
    continued.restore(*stopped.state())
    assert continued.epoch == stop
    while not continued.finished:
        continued.train_epoch()
    assert _same_weights(whole, continued)
    timeless = [
        [{name: value for name, value in entry.items() if "second" not in name} for entry in trainer.history]
        for trainer in (whole, continued)
    ]
    assert timeless[0] == timeless[1]


def _blas_threads():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]


def test_products_run_on_one_thread(dataset):
    threads = []
    trainer = Trainer(SETTINGS, dataset)
    trainer.train_epoch(lambda progress: threads.extend(_blas_threads()))
    assert set(threads) == {1}, "an empty set would mean that threadpoolctl does not know NumPy's BLAS"


def test_refuses_a_state_of_other_settings(dataset, tmp_path):
    state = _trained(dataset, epochs=1).state()
    other = Trainer(dataclasses.replace(SETTINGS, epochs=1, lr=0.5, seed=9), dataset)
    with pytest.raises(ValueError, match=r"made with seed 3 instead of 9, lr 0\.01 instead of 0\.5$"):
        other.restore(*state)
    images = load_npz(write_images(tmp_path / "images.npz", train=40))
    with pytest.raises(ValueError, match="made with other data"):
        Trainer(dataclasses.replace(SETTINGS, epochs=1), images).restore(*state)


def test_says_when_it_diverges(dataset):
    trainer = Trainer(dataclasses.replace(SETTINGS, dtype="float16", lr=1e30), dataset)
    with pytest.raises(FloatingPointError, match="training diverged: the loss is"):
        trainer.train_epoch()


def test_reports_means_over_the_images_seen(dataset):
    reports = []
    trainer = Trainer(SETTINGS, dataset)
    entry = trainer.train_epoch(reports.append)
    assert [report.images for report in reports] == [8, 16, 24, 32, 41]
    assert reports[-1].loss == entry["train_loss"]
    assert reports[-1].accuracy == entry["train_accuracy"]
    assert math.isclose(entry["images_per_second"], 41 / entry["seconds"])


def test_evaluation_changes_nothing(dataset):
    trainer = Trainer(SETTINGS, dataset)
    trainer.train_epoch()
    before, _ = trainer.state()
    assert (
        trainer.evaluate()
        == trainer.evaluate()
        == (
            trainer.history[-1]["test_loss"],
            trainer.history[-1]["test_accuracy"],
        )
    )
    after, facts = trainer.state()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert [generator["offset"] for generator in facts["generators"]] == [5, 5, 5], "one per training batch"


@pytest.mark.gpu
def test_learns_on_a_gpu_and_repeats(dataset):
    first = _trained(dataset, device="cuda", epochs=8)
    assert first.history[-1]["test_accuracy"] >= 7 / 9
    assert _same_weights(first, _trained(dataset, device="cuda", epochs=8))
