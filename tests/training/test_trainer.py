"""Runs: they learn, they repeat, and they continue from their state bit for bit."""

import dataclasses
import json
import math

import numpy as np
import pytest
import threadpoolctl

from gpu_layers.training import Settings, Trainer, load_npz
from tests.training.images import write_images

SETTINGS = Settings(
    device="cpu", dtype="float32", seed=3, epochs=4, batch_size=8, p=0.2, placement="after", optimizer="adam", lr=0.01
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


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_continues_bit_for_bit_from_any_batch(dataset, optimizer):
    """Stopped after every single batch, and carried on by another trainer from what a file keeps."""
    whole = _trained(dataset, optimizer=optimizer)
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer)
    trainer, stops = Trainer(settings, dataset), []
    while not trainer.finished:
        entry = trainer.train_epoch(stop=lambda: True)
        stops.append(trainer.batches_of_next_epoch)
        assert (entry is None) == (stops[-1] > 0)
        arrays, facts = trainer.state()
        trainer = Trainer(settings, dataset)
        assert trainer.restore(arrays, json.loads(json.dumps(facts))) == 4
        assert trainer.batches_of_next_epoch == stops[-1]
    assert stops == [1, 2, 3, 4, 0] * 4
    assert _same_weights(whole, trainer)
    timeless = [
        [{name: value for name, value in entry.items() if "second" not in name} for entry in one.history]
        for one in (whole, trainer)
    ]
    assert timeless[0] == timeless[1]


def test_a_stopped_epoch_reports_the_whole_of_it(dataset):
    reports = []
    trainer = Trainer(SETTINGS, dataset)
    assert trainer.train_epoch(stop=lambda: True) is None
    assert trainer.history == []
    entry = trainer.train_epoch(reports.append)
    assert [report.images for report in reports] == [16, 24, 32, 41]
    assert reports[-1].loss == entry["train_loss"] == _trained(dataset, epochs=4).history[0]["train_loss"]


def test_another_number_of_epochs(dataset):
    """The learning rate is that of the new number: half a cosine over eight epochs, at its fifth."""
    first = _trained(dataset)
    longer = Trainer(dataclasses.replace(SETTINGS, epochs=8), dataset)
    assert longer.restore(*first.state()) == 4
    longer.train_epoch(stop=lambda: True)
    assert longer.optimizer.lr == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 4 / 8)), rel=1e-12)
    shorter = Trainer(dataclasses.replace(SETTINGS, epochs=4), dataset)
    with pytest.raises(ValueError, match="the checkpoint is in or after epoch 5, beyond the 4 of this run"):
        shorter.restore(*longer.state())
    assert shorter.epoch == 0


def test_an_older_state_has_no_begun_epoch(dataset):
    first = Trainer(SETTINGS, dataset)
    first.train_epoch()
    arrays, facts = first.state()
    del facts["part"]
    trainer = Trainer(SETTINGS, dataset)
    trainer.restore(arrays, facts)
    assert (trainer.epoch, trainer.batches_of_next_epoch) == (1, 0)


def _blas_threads():
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
        == (trainer.history[-1]["test_loss"], trainer.history[-1]["test_accuracy"])
    )
    after, facts = trainer.state()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert [generator["offset"] for generator in facts["generators"]] == [5, 5, 5], "one per training batch"


@pytest.mark.gpu
def test_learns_on_a_gpu_and_repeats(dataset):
    first = _trained(dataset, device="cuda", epochs=8)
    assert first.history[-1]["test_accuracy"] >= 7 / 9
    assert _same_weights(first, _trained(dataset, device="cuda", epochs=8))
