"""A dataset for Keras 3: in each epoch every row that numpy.load finds, once, in the layout that Keras has."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import MakeDataset, MakeTree, python, read_shards, readme_example

from gpu_npz.errors import FormatError, UsageError

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="NOT TESTED: Keras is not installed", exc_type=ImportError)

from gpu_npz.readers.keras import ShardDataset  # noqa: E402  # after the skip

# Keras' torch backend hands tensors to NumPy, whose __array__ knows no copy; Keras then goes on without.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module")
def out(make_dataset: MakeDataset) -> Path:
    """40 rows in 6 shards, float32 NCHW. Read only."""
    return make_dataset()


@pytest.fixture(scope="module")
def pixels(make_dataset: MakeDataset) -> Path:
    """The same images as uint8 NHWC. Read only."""
    return make_dataset(dtype="uint8", layout="NHWC")


@pytest.fixture
def channels_first() -> Iterator[None]:
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format("channels_last")


def pairs(images: NDArray[Any], labels: NDArray[Any]) -> Counter[tuple[bytes, int]]:
    return Counter(zip((image.tobytes() for image in images), labels.tolist(), strict=True))


def epoch(dataset: ShardDataset) -> tuple[NDArray[Any], NDArray[Any]]:
    """All images and labels of one epoch, after which it is over."""
    images, labels = zip(*(dataset[number] for number in range(len(dataset))), strict=True)
    dataset.on_epoch_end()
    return np.concatenate(images), np.concatenate(labels)


def test_batches_are_float32_in_keras_layout_whatever_is_stored(out: Path, pixels: Path) -> None:
    for path in (out, pixels):
        dataset = ShardDataset(path, 16)
        assert [len(dataset[number][0]) for number in range(len(dataset))] == [16, 16, 8]
        images, labels = epoch(dataset)
        assert (images.dtype, labels.dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(images, read_shards(out).transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(labels, read_shards(out, "labels"))
    stored, _ = epoch(ShardDataset(pixels, 16, normalize=False))
    np.testing.assert_array_equal(stored, read_shards(pixels))


@pytest.mark.usefixtures("channels_first")
def test_under_channels_first_so_are_the_batches(out: Path, pixels: Path) -> None:
    for path in (out, pixels):
        np.testing.assert_array_equal(epoch(ShardDataset(path, 16))[0], read_shards(out))


def test_each_epoch_has_an_order_of_its_own_by_seed(out: Path) -> None:
    dataset = ShardDataset(out, 16, shuffle=True, seed=1)
    epochs = [epoch(dataset) for _ in range(3)]
    expected = pairs(read_shards(out).transpose(0, 2, 3, 1), read_shards(out, "labels"))
    assert all(pairs(*each) == expected for each in epochs)
    assert len({images.tobytes() for images, _ in epochs}) == 3
    again = ShardDataset(out, 7, shuffle=True, seed=1)
    assert [epoch(again)[0].tobytes() for _ in range(3)] == [images.tobytes() for images, _ in epochs]
    assert epoch(ShardDataset(out, 7, shuffle=True, seed=2))[0].tobytes() != epochs[0][0].tobytes()


def test_without_labels_images_come_alone_and_are_predicted(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    dataset = ShardDataset(make_dataset(make_tree({f"{name}.jpg": "jpeg" for name in "abc"})), 2)
    assert [dataset[number].shape for number in range(2)] == [(2, 12, 16, 3), (1, 12, 16, 3)]
    model = keras.Sequential([keras.Input((12, 16, 3)), keras.layers.GlobalAveragePooling2D()])
    found = model.predict(dataset, verbose=0)
    np.testing.assert_allclose(found, np.concatenate([dataset[0], dataset[1]]).mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_blank_rows_are_left_out_unless_wanted(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    tree = make_tree({"a/0.jpg": "jpeg", "a/1.jpg": "half", "b/2.jpg": "jpeg"})
    path = make_dataset(tree, on_reject="blank", dtype="uint8")
    assert epoch(ShardDataset(path, 2))[1].tolist() == [0, 1]
    images, labels = epoch(ShardDataset(path, 2, keep_blank=True))
    assert labels.tolist() == [0, 0, 1]
    assert images.any((1, 2, 3)).tolist() == [True, False, True]


class Recorded(keras.Sequential):  # type: ignore[misc]  # keras is not looked into: its base is Any
    """Keeps the batches that it was trained on."""

    def train_step(self, data: Any) -> Any:
        self.__dict__.setdefault("used", []).append([np.array(values) for values in data[:2]])
        return super().train_step(data)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_model_trains_on_what_the_shards_hold(pixels: Path, out: Path, workers: int) -> None:
    keras.utils.set_random_seed(0)
    dataset = ShardDataset(pixels, 8, shuffle=True, workers=workers)
    model = Recorded(
        [keras.Input((12, 16, 3)), keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.Flatten(),
         keras.layers.Dense(3)]
    )  # fmt: skip
    model.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(dataset, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    expected = pairs(read_shards(out).transpose(0, 2, 3, 1), read_shards(out, "labels"))
    images, labels = (np.concatenate(arrays) for arrays in zip(*model.used, strict=True))
    assert len(images) == 200
    assert pairs(images, labels).keys() == expected.keys()
    if workers == 1:  # with more, Keras itself shifts the epochs by a batch: see ShardDataset
        for start in range(0, 200, 40):
            assert pairs(images[start : start + 40], labels[start : start + 40]) == expected


def test_the_readme_s_example_runs(out: Path) -> None:
    names: dict[str, Any] = {}
    exec(readme_example("from gpu_npz.readers.keras import ShardDataset").replace("/data/train-npz", str(out)), names)
    assert names["model"].output_shape[1] == 3


def test_damage_and_numbers_out_of_range_are_named(out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    os.truncate(copy / "shard-00002.npz", 9000)
    dataset = ShardDataset(copy, 8)
    assert len(dataset[0][0]) == 8
    with pytest.raises(FormatError, match=r"copy/shard-00002\.npz: "):
        dataset[1]
    for number in (5, -1):
        with pytest.raises(IndexError, match=f"batch {number} of a dataset with 5 batches"):
            dataset[number]
    with pytest.raises(UsageError, match="batch_size: got 0"):
        ShardDataset(out, 0)


def test_a_dataset_without_a_row_has_no_batches(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    dataset = ShardDataset(make_dataset(make_tree({"a/1.jpg": "half"})), 4, shuffle=True)
    assert len(dataset) == 0
    with pytest.raises(IndexError):
        dataset[0]


FEW_DESCRIPTORS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from gpu_npz.readers.keras import ShardDataset

dataset = ShardDataset(sys.argv[1], 500, shuffle=True)
batches = [dataset[number] for number in range(len(dataset))]
found = [label for _, labels in batches for label in labels.tolist()]
assert [found.count(label) for label in range(10)] == [200] * 10
"""


def test_all_images_of_2000_shards_are_read_with_300_file_descriptors(many_shards: Path) -> None:
    python("-c", FEW_DESCRIPTORS, many_shards)


def test_without_keras_the_error_says_what_to_install() -> None:
    result = python("-c", "import sys\nsys.modules['keras'] = None\nimport gpu_npz.readers.keras", status=1)
    assert "BackendError: gpu_npz.readers.keras needs Keras 3" in result.stderr
    assert "run: pip install 'keras>=3'" in result.stderr
