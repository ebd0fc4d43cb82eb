"""Several datasets as one, and some of their rows: every reader takes them as it takes a dataset."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import MakeDataset, file_bytes, read_shards, readme_example

import gpu_npz
from gpu_npz.errors import UsageError
from gpu_npz.readers.dali import source
from gpu_npz.readers.order import kept_rows
from gpu_npz.readers.views import Rows

os.environ.setdefault("KERAS_BACKEND", "torch")
Numbers = NDArray[np.int64]


def make_images(root: Path, counts: dict[str, int], bad: int = 0) -> Path:
    """Class folders with so many pictures each, of which the first `bad` of each class are damaged."""
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            content = file_bytes("half" if number < bad else "jpeg", seed=100 * seed + number, size=(40, 50))
            (root / name / f"{number:02d}.jpg").write_bytes(content)
    return root


@pytest.fixture(scope="module")
def a(make_dataset: MakeDataset) -> gpu_npz.Dataset:
    """40 rows in 6 shards, uint8: apples, berries, cherries. Read only, as all datasets here."""
    return gpu_npz.open_dataset(make_dataset(dtype="uint8"))


@pytest.fixture(scope="module")
def b(make_dataset: MakeDataset, tmp_path_factory: pytest.TempPathFactory) -> gpu_npz.Dataset:
    """20 rows in 3 shards, uint8, in another order: berries, apples, dates. Two are blank."""
    root = make_images(tmp_path_factory.mktemp("b"), {"apples": 6, "berries": 4, "dates": 10})
    (root / "dates" / "10.jpg").write_bytes(b"no image")
    (root / "apples" / "99.jpg").write_bytes(b"no image")
    listed = tmp_path_factory.mktemp("list") / "classes.txt"
    listed.write_text("berries\napples\ndates\n")
    return gpu_npz.open_dataset(
        make_dataset(root, dtype="uint8", on_reject="blank", classes_from=str(listed), shard_size=8)
    )


@pytest.fixture(scope="module")
def ages(make_dataset: MakeDataset, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> list[gpu_npz.Dataset]:
    """Two datasets of the same pictures with three label columns, whose order and classes differ; 40 rows each."""
    found = []
    paths = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
    for names, fruit in (("fruit,age,weight", str.lower), ("age,weight,fruit", str.upper)):
        table = tmp_path_factory.mktemp("labels") / "labels.csv"
        values = [
            {"fruit": fruit(path.split("/")[0][:1]), "age": number % 5, "weight": number / 4}
            for number, path in enumerate(paths)
        ]
        lines = [
            f"{path},{','.join(str(row[name]) for name in names.split(','))}"
            for path, row in zip(paths, values, strict=True)
        ]
        table.write_text(f"file,{names}\n" + "\n".join(lines) + "\n")
        columns = names.replace("fruit", "fruit:class").replace("weight", "weight:float")
        found.append(gpu_npz.open_dataset(make_dataset(tree, dtype="uint8", labels=f"{table}:{columns}")))
    return found


def names_of(data: Rows) -> list[str]:
    assert data.labels is not None
    assert data.class_names is not None
    return [data.class_names[label] for label in data.labels]


def assert_rows(data: Rows, images: NDArray[Any], names: list[str], paths: list[str]) -> None:
    """The view has these images, classes and paths, however it is asked for them."""
    count = len(images)
    assert len(data) == len(data.index) == count
    assert names_of(data) == names
    assert list(data.paths) == list(data.paths[:]) == paths
    assert int(data.shard_rows.sum()) == count
    np.testing.assert_array_equal(data[:], images)
    np.testing.assert_array_equal(np.array(list(data)).reshape(images.shape), images)
    rows = np.random.default_rng(0).integers(-count, count, 2 * count if count else 0)
    np.testing.assert_array_equal(data[rows], images[rows])
    np.testing.assert_array_equal(data.column("labels", rows), np.asarray(data.labels)[rows])
    for step in (slice(None, None, -3), slice(2, 9), slice(5, 5)):
        np.testing.assert_array_equal(data[step], images[step])
    rows = rows % max(count, 1)
    out = np.empty((len(rows), *data.image_shape), np.uint8)
    data.read(rows, out)
    np.testing.assert_array_equal(out, images[rows])
    values = np.empty(out.shape, np.float32)
    data.read(rows, values, normalize=True)
    np.testing.assert_array_equal(values, data.normalized(rows))


def expected(*parts: tuple[Rows, Any]) -> tuple[NDArray[Any], list[str], list[str]]:
    """Images, class names and paths of some rows of datasets, as NumPy finds them in the shards."""
    images = [read_shards(data.path)[rows] for data, rows in parts]
    names = [np.array(names_of(data), object)[rows] for data, rows in parts]
    paths = [read_shards(data.path, "paths")[rows] for data, rows in parts]
    return np.concatenate(images), np.concatenate(names).tolist(), np.concatenate(paths).tolist()


# Rows


def test_a_concatenation_has_all_rows_and_the_union_of_the_classes(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    both = gpu_npz.concat([a, Path(b.path)])
    assert both.class_names == ("apples", "berries", "cherries", "dates")
    assert_rows(both, *expected((a, slice(None)), (b, slice(None))))
    np.testing.assert_array_equal(both.labels[:40], a.labels)  # type: ignore[index]
    assert gpu_npz.concat([b, a]).class_names == ("berries", "apples", "dates", "cherries")
    assert both.valid is not None
    assert b.valid is not None
    np.testing.assert_array_equal(both.valid, [True] * 40 + b.valid.tolist())
    assert int((~both.valid).sum()) == 2
    np.testing.assert_array_equal(both.shard_rows, [*a.shard_rows, *b.shard_rows])
    np.testing.assert_array_equal(both.index, [*a.index, *b.index])
    assert not both.normalized(slice(None))[~both.valid].any()
    assert both.preprocess == a.preprocess
    assert (both.image_shape, both.dtype, both.layout) == ((3, 12, 16), np.uint8, "NCHW")
    assert repr(both) == f"<View of '{a.path} + {b.path}': 62 images (3, 12, 16) uint8>"


@pytest.mark.parametrize(
    "rows",
    [[3, 1, 2], [39, -1, 0, 0], [], range(5, 12), slice(30, 3, -4), np.arange(40) % 3 == 1, [True] + [False] * 39,
     np.arange(7, 14, dtype=np.uint8)],
    ids=["list", "double", "empty", "range", "slice", "mask", "bools", "uint8"],
)  # fmt: skip
def test_a_subset_is_what_numpy_makes_of_the_rows(a: gpu_npz.Dataset, rows: Any) -> None:
    numbers = np.arange(40)[rows if isinstance(rows, slice) or len(rows) else []]
    assert_rows(a.subset(rows), *expected((a, numbers)))


def test_a_subset_keeps_its_rows_when_the_array_changes(a: gpu_npz.Dataset) -> None:
    rows = np.arange(5)
    view = a.subset(rows)
    rows[:] = 0
    np.testing.assert_array_equal(view[:], a[:5])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([40], IndexError, "row 40 of a dataset with 40 rows"),
        ([0, -41], IndexError, "row -41 of a dataset with 40 rows"),
        (np.array([2**63], np.uint64), IndexError, "row 9223372036854775808 of"),
        ([True] * 39, IndexError, r"got bool \(39,\); allowed: bool \(40,\), one per row"),
        ([0.0, 1.0], TypeError, "got float64"),
        ([[1, 2]], TypeError, r"got int64 \(1, 2\)"),
        (3, TypeError, "got 3; allowed: a list of row numbers"),
        ({3, 4}, TypeError, "allowed: a list of row numbers"),
        ("12", TypeError, "got '12'"),
        (None, TypeError, "got None"),
    ],
)
def test_rows_that_a_subset_cannot_have_are_refused(
    a: gpu_npz.Dataset, rows: Any, error: type[Exception], message: str
) -> None:
    for data in (a, a.subset(slice(None)), gpu_npz.concat([a]).subset(range(40))):
        with pytest.raises(error, match=message):
            data.subset(rows)


def test_rows_of_a_view_out_of_range_are_refused_as_those_of_a_dataset(a: gpu_npz.Dataset) -> None:
    view = a.subset([5, 6])
    for row in (2, -3, 10**30, [0, 2]):
        with pytest.raises(IndexError, match="of a dataset with 2 rows"):
            view[row]  # type: ignore[index]
    for row in (1.0, None, "a", [0.5]):
        with pytest.raises(TypeError, match="allowed: an integer, a slice or a list of integers"):
            view[row]  # type: ignore[index]


def test_views_of_views_are_the_rows_that_are_left(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    both = gpu_npz.concat([a, b])
    rows = [61, 3, 40, 3, 39, 41, 0]
    assert_rows(both.subset(rows), *expected((b, [21]), (a, [3]), (b, [0]), (a, [3, 39]), (b, [1]), (a, [0])))
    assert_rows(both.subset(rows).subset([-1, 0]), *expected((a, [0]), (b, [21])))
    halves = gpu_npz.concat([b.subset([9, 2]), a.subset(slice(0, 40, 13)), b])
    assert_rows(halves, *expected((b, [9, 2]), (a, slice(0, 40, 13)), (b, slice(None))))
    assert halves.class_names == ("berries", "apples", "dates", "cherries")
    dates = gpu_npz.concat([both, a]).where(label="dates")
    chosen = [row for row, name in enumerate(names_of(b)) if name == "dates"]
    assert_rows(dates, *expected((b, chosen)))
    assert dates.class_names == both.class_names


def test_rows_that_follow_one_another_in_a_shard_are_views_of_its_map(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    view = gpu_npz.concat([b, a.subset(range(7, 21))])
    shard = a.shard(1)["images"]
    assert np.shares_memory(view[22], shard)
    assert np.shares_memory(view[22:29], shard)
    assert not np.shares_memory(view[21:23], shard)


def test_compressed_and_unfinished_datasets_are_joined_too(
    a: gpu_npz.Dataset, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    deflated = gpu_npz.open_dataset(make_dataset(dtype="uint8", compress="deflate", limit=9))
    unfinished = Path(shutil.copytree(a.path, tmp_path / "copy"))
    (unfinished / "dataset.json").unlink()
    partial = gpu_npz.open_dataset(unfinished, partial=True)
    view = gpu_npz.concat([deflated, a.subset([3]), partial]).subset(range(5, 20))
    assert_rows(view, *expected((deflated, slice(5, 9)), (a, [3]), (a, slice(0, 10))))
    assert_rows(pickle.loads(pickle.dumps(view)), *expected((deflated, slice(5, 9)), (a, [3]), (a, slice(0, 10))))


def test_a_view_takes_row_numbers_and_no_images(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    view = gpu_npz.concat([a, b]).subset([50, 3, 61])
    content = pickle.dumps(view)
    assert len(content) < 1500 + len(a.path) + len(b.path)
    again = pickle.loads(content)
    assert_rows(again, *expected((b, [10]), (a, [3]), (b, [21])))
    assert again.id == view.id
    assert len({view.id, a.id, a.subset(range(40)).id, a.subset(range(39)).id, gpu_npz.concat([a, b]).id}) == 5


# Labels


def test_where_chooses_classes_by_name_or_number(a: gpu_npz.Dataset) -> None:
    labels = np.asarray(a.labels)
    for wanted, numbers in [
        ("cherries", [2]),
        (2, [2]),
        (np.int8(2), [2]),
        (["cherries", "apples"], [0, 2]),
        ({"cherries", 0}, [0, 2]),
        (np.array([0, 2]), [0, 2]),
        ([], []),
    ]:
        view = a.where(label=wanted)
        np.testing.assert_array_equal(view.index, a.index[np.isin(labels, numbers)])
        assert view.class_names == a.class_names
        assert set(np.asarray(view.labels)) == set(numbers)


def test_where_chooses_by_the_names_of_columns(ages: list[gpu_npz.Dataset]) -> None:
    data = ages[0]
    fruit, age, weight = np.asarray(data.labels).T
    for wanted, mask in [
        ({"age": 3}, age == 3),
        ({"age": [0, 4], "fruit": "a"}, np.isin(age, [0, 4]) & (fruit == 0)),
        ({"weight": 0.25}, weight == 0.25),
        ({"weight": [1, 9.75]}, np.isin(weight, [1, 9.75])),
        ({"age": 99}, age == 99),
    ]:
        np.testing.assert_array_equal(data.where(**wanted).index, data.index[mask])
    assert len(data.where(age=3, fruit="b")) > 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": "pears"}, r"where\(label='pears'\): there is no such class; classes: 'apples', 'berries', "
         "'cherries', or their numbers, from 0 to 2"),
        ({"label": 3}, "from 0 to 2"),
        ({"label": -1}, "from 0 to 2"),
        ({"label": True}, r"where\(label=True\)"),
        ({"label": ["apples", 0.0]}, r"where\(label=0.0\)"),
        ({"label": None}, r"where\(label=None\)"),
        ({"fruit": "apples"}, r"where\(fruit=...\): there is no such column; columns: 'label'"),
        ({}, r"where: got no column; give one, such as where\(label=...\)"),
    ],
)  # fmt: skip
def test_where_names_what_there_is_instead(a: gpu_npz.Dataset, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        a.where(**columns)


def test_where_refuses_values_of_another_kind(
    ages: list[gpu_npz.Dataset], make_dataset: MakeDataset, tree: Path
) -> None:
    for columns in ({"age": 1.5}, {"age": "1"}, {"weight": "x"}, {"age": [1, None]}):
        with pytest.raises(UsageError, match=r"the labels are numbers of kind (integer|float); give one, or several"):
            ages[0].where(**columns)
    with pytest.raises(UsageError, match="columns: 'fruit', 'age', 'weight'"):
        ages[0].where(label=1)
    bare = gpu_npz.open_dataset(make_dataset(tree, labels="none"))
    with pytest.raises(UsageError, match="has no labels; choose rows by number, with subset"):
        bare.where(label=1)
    assert bare.subset([3, 4]).labels is None


def test_columns_are_joined_by_name(ages: list[gpu_npz.Dataset]) -> None:
    both = gpu_npz.concat(ages)
    assert both.class_names is None
    assert [(each.name, each.kind, each.classes) for each in both.label_columns] == [
        ("fruit", "class", ("a", "b", "c", "A", "B", "C")), ("age", "integer", None), ("weight", "float", None)
    ]  # fmt: skip
    first, second = np.split(np.asarray(both.labels), 2)
    np.testing.assert_array_equal(first, ages[0].labels)  # type: ignore[arg-type]
    np.testing.assert_array_equal(second, first + np.array([3, 0, 0]))
    assert both.labels is not None
    assert both.labels.dtype == np.float64


def test_datasets_that_differ_are_not_joined(
    a: gpu_npz.Dataset, ages: list[gpu_npz.Dataset], make_dataset: MakeDataset, tree: Path
) -> None:
    for settings, difference in [
        ({"size": 24}, "size: 12x16 and 24x24; build one of them again"),
        ({"normalize": "unit"}, r"mean: \(0.485, 0.456, 0.406\) and \(0.0, 0.0, 0.0\); std"),
        ({"dtype": "float32"}, "dtype: uint8 and float32"),
        ({"layout": "NHWC"}, "layout: NCHW and NHWC"),
        ({"channels": "bgr"}, "channels: rgb and bgr"),
    ]:
        other = make_dataset(tree, **{"dtype": "uint8", "limit": 3, **settings})
        join: Callable[[], object]
        for join in (lambda: gpu_npz.concat([a.subset([1]), other]), lambda: gpu_npz.mix({a: 1, other: 1})):  # noqa: B023
            with pytest.raises(
                UsageError, match=f"(concat|mix): '{a.path}' and '{other}' are preprocessed differently: .*{difference}"
            ):
                join()
    bare = make_dataset(tree, dtype="uint8", labels="none", limit=3)
    for pair, message in [
        ([a, bare], r"different label columns: label \(3 classes\); and none; build one of them again"),
        ([bare, a], r"different label columns: none; and label \(3 classes\)"),
        ([a, ages[0]], r"label \(3 classes\); and fruit \(3 classes\), age \(integer\), weight \(float\)"),
    ]:
        with pytest.raises(UsageError, match=message):
            gpu_npz.concat(pair)


@pytest.mark.parametrize("sources", [[], "/data/a", Path("/data/a")])
def test_what_is_no_list_of_datasets_is_refused(a: gpu_npz.Dataset, sources: Any) -> None:
    for given in (sources, a):
        with pytest.raises(UsageError, match=r"concat: got .*; allowed: a list of at least one path or dataset"):
            gpu_npz.concat(given)


# Mixes


def drawn(mixed: gpu_npz.Mix, epoch: int) -> tuple[list[int], list[int]]:
    """The rows of an epoch, by dataset: of the first 40 rows and of the others."""
    rows = mixed.epoch_rows(epoch).tolist()
    return [row for row in rows if row < 40], [row for row in rows if row >= 40]


def test_an_epoch_of_a_mix_has_the_proportions_and_no_row_twice(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    for weights, counts in [
        ((0.7, 0.3), [40, 17]),
        ((7, 3), [40, 17]),
        ((1, 1), [20, 20]),
        ((1, 4), [5, 20]),
        ((2, 1), [40, 20]),
        ((1e-1, 1e-1), [20, 20]),
    ]:
        mixed = gpu_npz.mix({a: weights[0], b.path: weights[1]})
        assert mixed.counts == counts
        for epoch in range(7):
            rows = drawn(mixed, epoch)
            assert [len(each) for each in rows] == counts
            assert all(each == sorted(set(each)) for each in rows)


def test_weights_are_the_decimal_numbers_that_are_written(a: gpu_npz.Dataset) -> None:
    mixed = gpu_npz.mix({a.subset(range(28)): 0.7, a.subset(range(28, 40)): 0.3})  # 12 / 0.3 is less than 40 in binary
    assert mixed.counts == [28, 12]


def test_the_epochs_of_a_mix_draw_all_rows_before_any_again(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    mixed = gpu_npz.mix({a: 1, b: 2}, seed=4)  # 10 of 40, and all 20 that are not blank
    assert mixed.counts == [10, 20]
    rounds = [[drawn(mixed, 4 * turn + epoch)[0] for epoch in range(4)] for turn in range(3)]
    for each in rounds:
        assert sorted(row for rows in each for row in rows) == list(range(40))
    assert rounds[0] != rounds[1] != rounds[2]
    assert np.asarray(gpu_npz.concat([a, b]).valid)[mixed.epoch_rows(9)].all()
    other = gpu_npz.mix({a: 1, b: 2}, seed=5)
    assert drawn(other, 0) != drawn(mixed, 0)
    assert drawn(pickle.loads(pickle.dumps(mixed)), 11) == drawn(mixed, 11)
    assert pickle.loads(pickle.dumps(mixed)).id == mixed.id != other.id


def test_the_proportions_hold_in_every_part_of_an_epoch(many_shards: Path, a: gpu_npz.Dataset) -> None:
    data = gpu_npz.open_dataset(many_shards)
    mixed = gpu_npz.mix({data.subset(range(1500)): 3, data.subset(range(1500, 2000)): 1, data: 1})
    assert mixed.counts == [1500, 500, 500]
    rows = mixed.epoch_rows(2)
    sources = np.searchsorted([1500, 2000], rows, side="right")
    for start, stop in itertools.combinations(range(0, 2501, 50), 2):
        found = np.bincount(sources[start:stop], minlength=3)
        assert (np.abs(found - (stop - start) * np.array([0.6, 0.2, 0.2])) <= 2).all()
    bounds = mixed.bounds(rows)
    assert len(bounds) == 2001
    assert set(np.diff(bounds)) == {1, 2}
    assert (bounds[0], bounds[-1]) == (0, 2500)


def test_a_mix_reads_shard_by_shard_whatever_the_order_of_a_view(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    order = np.random.default_rng(0).permutation(40)
    mixed = gpu_npz.mix({a.subset(order): 1, b: 1})
    rows = np.array(drawn(mixed, 1)[0])
    assert (np.diff(order[rows]) > 0).all()
    assert len(mixed.bounds(mixed.epoch_rows(1))) == 7
    np.testing.assert_array_equal(mixed[rows], a[order[rows]])


def test_a_mix_names_what_it_cannot_have(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    for weight in (0, -1, float("nan"), float("inf"), "1", None, True):
        with pytest.raises(UsageError, match=r"mix: got the weight .* for .*; allowed: a number above 0"):
            gpu_npz.mix({a: 1, b: weight})  # type: ignore[dict-item]
    for weights in ({}, [a, b], None):
        with pytest.raises(UsageError, match=r"mix: got .*; allowed: weights by dataset, such as {'/data/a': 0.7"):
            gpu_npz.mix(weights)  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match=f"mix: an epoch of 40 rows would have none of '{b.path}', which has 20 to draw"
    ):
        gpu_npz.mix({a: 1000, b: 1})
    with pytest.raises(UsageError, match=f"mix: '{b.path}' has no row to draw; omit it"):
        gpu_npz.mix({a: 1, b.subset([]): 1})
    for seed in (-1, None, 0.5, "x"):
        with pytest.raises(UsageError, match=f"mix: got the seed {seed!r}; allowed: an integer of 0 or more"):
            gpu_npz.mix({a: 1, b: 1}, seed=seed)  # type: ignore[arg-type]
    mixed = gpu_npz.mix({a: 1, b: 1})
    for change in (
        lambda: mixed.subset([0]),
        lambda: mixed.where(label="apples"),
        lambda: gpu_npz.concat([mixed]),
        lambda: gpu_npz.mix({mixed: 1}),
    ):
        with pytest.raises(UsageError, match=r"a mix.* has other rows in each epoch; (select|give)"):
            change()


# Readers

torch: Any = None
try:
    import torch
    from torch.utils.data import DataLoader

    from gpu_npz.readers.torch import ShardDataset, ShardIterable, collate, loader
except ImportError:
    pass
needs_torch = pytest.mark.skipif(torch is None, reason="NOT TESTED: torch is not installed")


def shuffled_view(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> gpu_npz.View:
    """Most rows of both in a random order, one of them twice."""
    rows = np.random.default_rng(1).permutation(62)[:50]
    return gpu_npz.concat([a, b]).subset([*rows, rows[0]])


def pairs_of(data: Rows, rows: Numbers) -> list[tuple[bytes, int]]:
    return [(data.normalized(int(row)).tobytes(), int(np.asarray(data.labels)[row])) for row in rows]


def seen(batches: Any) -> list[tuple[bytes, int]]:
    return [
        (image.numpy().tobytes(), int(label))
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    ]


@needs_torch
def test_pytorch_s_readers_take_views_as_datasets(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    view = shuffled_view(a, b)
    rows = kept_rows(view, False)
    assert 47 <= len(rows) < 51
    pairs = pairs_of(view, rows)
    dataset = ShardDataset(view)
    assert dataset.classes == ["apples", "berries", "cherries", "dates"]
    assert dataset.targets == [label for _, label in pairs]
    assert seen(DataLoader(dataset, 7)) == seen(DataLoader(ShardIterable(view), 7)) == pairs
    assert seen([([image], [label]) for image, label in dataset]) == pairs
    assert seen(loader(view, 7, device="cpu")) == pairs
    for batches in (
        loader(view, 7, device="cpu", shuffle=True),
        DataLoader(ShardIterable(view, shuffle=True, buffer=9), 7),
        DataLoader(ShardIterable(view, shuffle=True, global_batch=8), None),
    ):
        found = seen(batches)
        assert found != pairs
        assert Counter(found) == Counter(pairs)
    assert len(seen(DataLoader(ShardDataset(view, keep_blank=True), 7))) == 51


@needs_torch
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_take_views_and_the_epochs_of_a_mix(a: gpu_npz.Dataset, b: gpu_npz.Dataset, method: str) -> None:
    options = {"num_workers": 1, "multiprocessing_context": method, "persistent_workers": True}
    view = shuffled_view(a, b)
    assert seen(DataLoader(ShardDataset(view), 7, collate_fn=collate, **options)) == pairs_of(
        view, kept_rows(view, False)
    )
    mixed = gpu_npz.mix({a: 1, b: 2})
    dataset = ShardDataset(mixed)
    batches = DataLoader(dataset, 7, **options)
    for epoch in (0, 3, 0):
        dataset.set_epoch(epoch)
        pairs = pairs_of(mixed, mixed.epoch_rows(epoch))
        assert seen(batches) == pairs
        assert dataset.targets == [label for _, label in pairs]


@needs_torch
def test_each_epoch_of_a_mix_comes_from_every_reader_of_pytorch(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    mixed = gpu_npz.mix({a: 1, b: 2})
    loaders = [loader(mixed, 4, device="cpu", shuffle=shuffle) for shuffle in (False, True)]
    dataset = ShardDataset(mixed)
    streams = [
        ShardIterable(mixed, shuffle=shuffle, rank=0, world_size=1, **options)
        for shuffle in (False, True)
        for options in ({}, {"global_batch": 8})
    ]
    assert len(dataset) == len(streams[0]) == 30
    for epoch in range(5):
        pairs = pairs_of(mixed, mixed.epoch_rows(epoch))
        dataset.set_epoch(epoch)
        assert seen(DataLoader(dataset, 7)) == pairs
        assert seen(loaders[0]) == pairs
        assert Counter(seen(loaders[1])) == Counter(pairs)
        for number, stream in enumerate(streams):
            stream.set_epoch(epoch)
            found = seen(DataLoader(stream, None if number % 2 else 7))
            assert Counter(found) == Counter(pairs)
            assert (found == pairs) is (number == 0)


@needs_torch
def test_a_stream_of_a_mix_resumes_in_its_epoch(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    mixed = gpu_npz.mix({a: 1, b: 2})

    def make() -> Any:
        return ShardIterable(mixed, shuffle=True, buffer=8, rank=0, world_size=1)

    stream = make()
    stream.set_epoch(3)
    whole = [image.numpy().tobytes() for image, _ in stream]
    iteration = iter(stream)
    for _ in range(11):
        next(iteration)
    resumed = make()
    resumed.load_state_dict(stream.state_dict())
    assert [image.numpy().tobytes() for image, _ in resumed] == whole[11:]
    for other in (gpu_npz.mix({a: 1, b: 2}, seed=1), gpu_npz.mix({a: 1, b: 2.001}), gpu_npz.concat([a, b])):
        resumed = ShardIterable(other, shuffle=True, buffer=8, rank=0, world_size=1)
        resumed.load_state_dict(stream.state_dict())
        with pytest.raises(UsageError, match="a state of another stream"):
            iter(resumed)


@needs_torch
def test_a_shuffled_stream_reads_a_view_shard_by_shard(many_shards: Path) -> None:
    data = gpu_npz.open_dataset(many_shards)
    view = gpu_npz.concat([data, data]).subset(np.random.default_rng(0).permutation(4000))
    np.testing.assert_array_equal(view.shard_rows, np.ones(4000))
    rows = [row for first in range(0, 2000, 50) for row in range(first, first + 50) if row % 3]
    small = data.subset(np.random.default_rng(0).permutation(np.repeat(rows, 3)))
    stream = ShardIterable(small, shuffle=True, normalize=False)
    shards = stream.dataset.data.shard_rows
    np.testing.assert_array_equal(shards, np.full(len(rows), 3))
    assert sorted(image.numpy().tobytes() for image, _ in stream) == sorted(map(bytes, small[:]))


@needs_torch
def test_the_readme_s_example_runs(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    code = readme_example('a, b = gpu_npz.open_dataset("/data/train-npz"), gpu_npz.open_dataset("/data/more-npz")')
    for written, to in (
        ("/data/train-npz", a.path),
        ("/data/more-npz", b.path),
        ('"cats"', '"apples"'),
        ('"lions"', '"dates"'),
    ):
        code = code.replace(written, to)
    names: dict[str, Any] = {}
    exec(code, names)
    assert [len(names[name]) for name in ("both", "tenth", "stream")] == [62, 4, 57]
    assert set(names_of(names["cats"])) == {"apples", "dates"}


@needs_torch
def test_readers_of_an_empty_view_give_nothing(a: gpu_npz.Dataset) -> None:
    view = a.subset([])
    for reader in (
        ShardDataset(view),
        ShardIterable(view, shuffle=True),
        loader(view, 3, device="cpu"),
        ShardIterable(view, global_batch=8),
    ):
        assert list(reader) == []


def test_keras_takes_views_and_the_epochs_of_a_mix(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    pytest.importorskip("keras", reason="NOT TESTED: Keras is not installed", exc_type=ImportError)
    from gpu_npz.readers.keras import ShardDataset as KerasDataset

    view, mixed = shuffled_view(a, b), gpu_npz.mix({a: 1, b: 2})
    for data, rows_of in ((view, lambda epoch: kept_rows(view, False)), (mixed, mixed.epoch_rows)):
        batches = KerasDataset(data, 8)
        for epoch in range(3):
            images, labels = zip(*(batches[number] for number in range(len(batches))), strict=True)
            rows = rows_of(epoch)
            np.testing.assert_array_equal(np.concatenate(images), data.normalized(rows).transpose(0, 2, 3, 1))
            np.testing.assert_array_equal(np.concatenate(labels), np.asarray(data.labels)[rows])
            batches.on_epoch_end()


def test_dali_takes_views_and_the_epochs_of_a_mix(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    view, mixed = shuffled_view(a, b), gpu_npz.mix({a: 1, b: 2})
    for data, rows_of in ((view, lambda epoch: kept_rows(view, False)), (mixed, mixed.epoch_rows)):
        batches = source(data, 8)
        for epoch in range(3):
            rows = rows_of(epoch)
            pairs = [batches(SimpleNamespace(iteration=number, epoch_idx=epoch)) for number in range(len(batches))]
            images, labels = zip(*pairs, strict=True)
            np.testing.assert_array_equal(np.concatenate(images), data[rows])
            np.testing.assert_array_equal(np.concatenate(labels), np.asarray(data.labels)[rows])


def test_tensorflow_takes_views_and_the_epochs_of_a_mix(a: gpu_npz.Dataset, b: gpu_npz.Dataset) -> None:
    pytest.importorskip("tensorflow", reason="NOT TESTED: TensorFlow is not installed")
    from gpu_npz.readers.tensorflow import as_tf_dataset

    view, mixed = shuffled_view(a, b), gpu_npz.mix({a: 1, b: 2})
    for data, rows in ((view, kept_rows(view, False)), (mixed, mixed.epoch_rows(0))):
        images, labels = zip(*as_tf_dataset(data, 8).as_numpy_iterator(), strict=True)
        np.testing.assert_array_equal(np.concatenate(images), data.normalized(rows).transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(np.concatenate(labels), np.asarray(data.labels)[rows])
    epochs = as_tf_dataset(mixed, 8, shuffle=True)
    found = [np.concatenate([labels for _, labels in epochs.as_numpy_iterator()]) for _ in range(2)]
    assert [len(each) for each in found] == [30, 30]
