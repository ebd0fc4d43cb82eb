"""A dataset for TensorFlow: each time it is iterated, every row that numpy.load finds, once.

TensorFlow is no part of the test extra; `.ci/run` runs this file in an environment that has it.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import MakeDataset, MakeTree, python, read_shards, readme_example

from gpu_npz.errors import FormatError, UsageError

tf = pytest.importorskip("tensorflow", reason="NOT TESTED: TensorFlow is not installed")

from gpu_npz.readers.tensorflow import as_tf_dataset  # noqa: E402  # after the skip


@pytest.fixture(scope="module")
def out(make_dataset: MakeDataset) -> Path:
    """40 rows in 6 shards, float32 NCHW. Read only."""
    return make_dataset()


@pytest.fixture(scope="module")
def pixels(make_dataset: MakeDataset) -> Path:
    """The same images as uint8 NHWC. Read only."""
    return make_dataset(dtype="uint8", layout="NHWC")


@pytest.fixture(scope="module")
def expected(out: Path) -> Counter[tuple[bytes, int]]:
    """Every row of the shards: the float32 image in H, W, C order, and its label."""
    return pairs([(read_shards(out).transpose(0, 2, 3, 1), read_shards(out, "labels"))])


def pairs(batches: Any) -> Counter[tuple[bytes, int]]:
    found: Counter[tuple[bytes, int]] = Counter()
    for images, labels in batches:
        found.update(zip((np.asarray(image).tobytes() for image in images), np.asarray(labels).tolist(), strict=True))
    return found


def order(batches: Any) -> bytes:
    return b"".join(images.numpy().tobytes() for images, _ in batches)


def test_batches_are_float32_nhwc_whatever_is_stored(out: Path, pixels: Path) -> None:
    for path in (out, pixels):
        batches = as_tf_dataset(path, 16)
        assert batches.element_spec == (tf.TensorSpec((None, 12, 16, 3), tf.float32), tf.TensorSpec((None,), tf.int64))
        assert len(batches) == 3
        assert [len(labels) for _, labels in batches] == [16, 16, 8]
        assert order(batches) == read_shards(out).transpose(0, 2, 3, 1).tobytes()
        assert np.concatenate([labels for _, labels in batches]).tolist() == read_shards(out, "labels").tolist()


def test_short_batches_can_be_dropped_and_stored_values_kept(pixels: Path) -> None:
    batches = as_tf_dataset(pixels, 16, drop_last=True, normalize=False)
    assert batches.element_spec == (tf.TensorSpec((16, 12, 16, 3), tf.uint8), tf.TensorSpec((16,), tf.int64))
    assert len(batches) == 2
    assert order(batches) == read_shards(pixels)[:32].tobytes()


def test_each_iteration_has_an_order_of_its_own_by_seed(out: Path, expected: Counter[tuple[bytes, int]]) -> None:
    batches = as_tf_dataset(out, 16, shuffle=True, seed=1)
    assert len(batches) == 3
    orders = [order(batches) for _ in range(3)]
    assert all(pairs(batches) == expected for _ in range(3))
    assert len(set(orders)) == 3
    again = as_tf_dataset(out, 9, shuffle=True, seed=1)
    assert [order(again) for _ in range(3)] == orders
    assert order(as_tf_dataset(out, 16, shuffle=True, seed=2)) not in orders


def test_without_labels_images_come_alone(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    batches = as_tf_dataset(make_dataset(make_tree({f"{name}.jpg": "jpeg" for name in "abc"})), 2)
    assert batches.element_spec == tf.TensorSpec((None, 12, 16, 3), tf.float32)
    assert [images.shape[0] for images in batches] == [2, 1]


def test_blank_rows_are_left_out_unless_wanted(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    tree = make_tree({"a/0.jpg": "jpeg", "a/1.jpg": "half", "b/2.jpg": "jpeg"})
    path = make_dataset(tree, on_reject="blank", dtype="uint8")
    assert [labels.numpy().tolist() for _, labels in as_tf_dataset(path, 3)] == [[0, 1]]
    ((images, labels),) = as_tf_dataset(path, 3, keep_blank=True)
    assert labels.numpy().tolist() == [0, 0, 1]
    assert images.numpy().any((1, 2, 3)).tolist() == [True, False, True]


def test_a_model_trains_on_what_the_shards_hold(pixels: Path, expected: Counter[tuple[bytes, int]]) -> None:
    tf.random.set_seed(0)
    filters = tf.Variable(tf.random.normal((3, 3, 3, 8), stddev=0.2))
    weights = tf.Variable(tf.random.normal((12 * 16 * 8, 3), stddev=0.02))
    losses, used = [], []
    for _ in range(6):
        for images, labels in as_tf_dataset(pixels, 8, shuffle=True):
            used.append((images, labels))
            with tf.GradientTape() as tape:
                features = tf.nn.relu(tf.nn.conv2d(images, filters, 1, "SAME"))
                logits = tf.reshape(features, (len(images), -1)) @ weights
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            for variable, gradient in zip((filters, weights), tape.gradient(loss, (filters, weights)), strict=True):
                variable.assign_sub(0.02 * gradient)
            losses.append(float(loss))
    assert pairs(used) == Counter(dict.fromkeys(expected, 6))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_keras_on_tensorflow_fits_it(out: Path) -> None:
    keras = pytest.importorskip("keras")
    if keras.config.backend() != "tensorflow":
        pytest.skip("NOT TESTED: Keras runs on another backend here")
    model = keras.Sequential([keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(as_tf_dataset(out, 16, shuffle=True), epochs=2, shuffle=False, verbose=0)
    assert len(history.history["loss"]) == 2


def test_the_readme_s_example_runs(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = readme_example("from gpu_npz.readers.tensorflow import as_tf_dataset")
    exec(code.replace("/data/train-npz", str(out)), {})
    assert capsys.readouterr().out == "(40, 12, 16, 3) <dtype: 'float32'> (40,)\n"


def test_damage_is_named(out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    os.truncate(copy / "shard-00002.npz", 9000)
    with pytest.raises(tf.errors.OpError, match=r"FormatError: .*copy/shard-00002\.npz: "):
        list(as_tf_dataset(copy, 8))
    (copy / "dataset.json").write_text("{}")
    with pytest.raises(FormatError, match=r"copy/dataset\.json"):
        as_tf_dataset(copy, 8)
    with pytest.raises(UsageError, match="batch_size: got 0"):
        as_tf_dataset(out, 0)


def test_a_dataset_without_a_row_has_no_batches(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    path = make_dataset(make_tree({"a/1.jpg": "half"}))
    for shuffle in (False, True):
        assert list(as_tf_dataset(path, 4, shuffle=shuffle)) == []


FEW_DESCRIPTORS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from gpu_npz.readers.tensorflow import as_tf_dataset

found = [label for _, labels in as_tf_dataset(sys.argv[1], 500, shuffle=True) for label in labels.numpy().tolist()]
assert [found.count(label) for label in range(10)] == [200] * 10
"""


def test_all_images_of_2000_shards_are_read_with_300_file_descriptors(many_shards: Path) -> None:
    python("-c", FEW_DESCRIPTORS, many_shards)


def test_without_tensorflow_the_error_says_what_to_install() -> None:
    result = python("-c", "import sys\nsys.modules['tensorflow'] = None\nimport gpu_npz.readers.tensorflow", status=1)
    assert "BackendError: gpu_npz.readers.tensorflow needs TensorFlow" in result.stderr
    assert "run: pip install 'tensorflow>=2.16'" in result.stderr
