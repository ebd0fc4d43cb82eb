"""A dataset as NumPy arrays: however rows are asked for, they are those of the shards; damage is named."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import MakeDataset, MakeTree, build_cpu, edit_json, file_bytes, python, read_shards

import gpu_npz
from gpu_npz.audit.compare import compare
from gpu_npz.audit.preview import preview
from gpu_npz.audit.stats import of_dataset
from gpu_npz.errors import FormatError, IncompleteError, RejectLimitError
from gpu_npz.npz.reader import NpzReader
from gpu_npz.npz.writer import NpzWriter
from gpu_npz.preprocess import normalize

Edit = Callable[[dict[str, Any]], object]


def build(src: Path, out: Path, **settings: Any) -> gpu_npz.Dataset:
    settings = {"shard_size": 7, "size": "12x16", "max_rejects": "100%", **settings}
    return gpu_npz.open_dataset(build_cpu(src, out, **settings))


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> gpu_npz.Dataset:
    """40 rows in 6 shards, float32 NCHW. Read only."""
    return build(tree, tmp_path_factory.mktemp("built") / "out")


@pytest.fixture
def dataset(built: gpu_npz.Dataset) -> gpu_npz.Dataset:
    """The same, freshly opened."""
    return gpu_npz.open_dataset(built.path)


@pytest.fixture
def copy(built: gpu_npz.Dataset, tmp_path: Path) -> Path:
    """The same in a folder that may be damaged."""
    return Path(shutil.copytree(built.path, tmp_path / "copy"))


# Rows


def test_every_row_is_what_numpy_load_finds(dataset: gpu_npz.Dataset) -> None:
    images = read_shards(dataset.path)
    assert len(dataset) == len(images) == 40
    assert dataset.manifest.counts.shards == 6
    assert (dataset.image_shape, dataset.dtype) == ((3, 12, 16), np.dtype(np.float32))
    for row in range(40):
        assert dataset[row].shape == (3, 12, 16)
        np.testing.assert_array_equal(dataset[row], images[row])
        np.testing.assert_array_equal(dataset[row - 40], images[row])
        np.testing.assert_array_equal(dataset[np.int32(row)], images[row])
    np.testing.assert_array_equal(list(dataset), images)


def test_labels_classes_paths_and_places_belong_to_the_rows(dataset: gpu_npz.Dataset, tree: Path) -> None:
    assert dataset.class_names == ("apples", "berries", "cherries")
    assert dataset.labels is not None
    assert dataset.valid is None
    assert len(dataset.paths) == 40
    for row, path in enumerate(dataset.paths):
        assert (tree / path).is_file()
        assert path.split("/")[0] == dataset.class_names[dataset.labels[row]]
    assert sorted(dataset.paths) == sorted(str(path.relative_to(tree)) for path in tree.rglob("*.jpg"))
    assert dataset.paths[3:30:5] == read_shards(dataset.path, "paths")[3:30:5].tolist()
    assert dataset.paths[-1] == read_shards(dataset.path, "paths")[-1]
    np.testing.assert_array_equal(dataset.index, range(40))
    np.testing.assert_array_equal(dataset.labels, read_shards(dataset.path, "labels"))
    sizes = [(tree / path).stat().st_size for path in dataset.paths]
    np.testing.assert_array_equal(dataset.column("source_bytes", slice(None)), sizes)


def test_slices_with_any_bounds_and_steps_are_numpy_s(dataset: gpu_npz.Dataset) -> None:
    images = read_shards(dataset.path)
    bounds = [None, -50, -40, -9, 0, 3, 7, 14, 39, 40, 50]
    for start in bounds:
        for stop in bounds:
            for step in (None, 1, 2, 7, 50, -1, -3):
                rows = slice(start, stop, step)
                found = dataset[rows]
                assert found.shape == images[rows].shape, rows
                assert found.dtype == images.dtype, rows
                assert np.array_equal(found, images[rows]), rows


@pytest.mark.parametrize("rows", [[0], [39, 0, 7, 7, -1], [-40, 20], list(range(40)), []])
def test_lists_and_arrays_of_row_numbers_are_copies_in_that_order(dataset: gpu_npz.Dataset, rows: list[int]) -> None:
    expected = read_shards(dataset.path)[np.array(rows, int)]
    for kind in (list, tuple, np.array, lambda rows: np.array(rows, np.int16)):
        found = dataset[kind(rows)]
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)
        assert found.flags.owndata


@pytest.mark.parametrize("row", [40, -41, 10**30, [3, 40], [-41]])
def test_rows_that_are_not_there_raise_index_error(dataset: gpu_npz.Dataset, row: Any) -> None:
    with pytest.raises(IndexError, match="of a dataset with 40 rows"):
        dataset[row]


@pytest.mark.parametrize("rows", [1.0, "3", None, [0.5], [[1, 2]], np.ones(40, bool), ["a"]])
def test_rows_that_are_no_integers_raise_type_error(dataset: gpu_npz.Dataset, rows: Any) -> None:
    with pytest.raises(TypeError, match="allowed: an integer, a slice or a list of integers"):
        dataset[rows]


def test_rows_of_one_shard_are_views_of_its_map(dataset: gpu_npz.Dataset) -> None:
    third = dataset.shard(2)["images"]
    assert np.shares_memory(dataset[14], third)
    assert np.shares_memory(dataset[14:21], third)
    assert np.shares_memory(dataset[15:16], third)
    assert not np.shares_memory(dataset[13:15], third)
    assert not np.shares_memory(dataset[[14, 15]], third)


def test_what_is_written_to_a_row_stays_in_this_process(dataset: gpu_npz.Dataset, built: gpu_npz.Dataset) -> None:
    before = built[0].copy()
    dataset[0][:] = 5
    assert (dataset[0] == 5).all()
    np.testing.assert_array_equal(gpu_npz.open_dataset(built.path)[0], before)
    np.testing.assert_array_equal(read_shards(built.path)[0], before)


def test_torch_takes_a_row_without_a_copy_or_a_warning(dataset: gpu_npz.Dataset) -> None:
    torch = pytest.importorskip("torch", reason="NOT TESTED: torch is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that cannot be written to
        tensor = torch.from_numpy(dataset[8])
    assert np.shares_memory(tensor.numpy(), dataset.shard(1)["images"])
    np.testing.assert_array_equal(tensor.numpy(), dataset[8])


def test_torch_s_tensors_are_row_numbers_too(dataset: gpu_npz.Dataset) -> None:
    torch = pytest.importorskip("torch", reason="NOT TESTED: torch is not installed")
    np.testing.assert_array_equal(dataset[torch.tensor(9)], read_shards(dataset.path)[9])
    np.testing.assert_array_equal(dataset[torch.tensor([39, 0, -3])], read_shards(dataset.path)[[39, 0, -3]])


def test_it_pickles_as_its_path(dataset: gpu_npz.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dataset[:].copy()
    content = pickle.dumps(dataset)
    assert len(content) < 500 + len(dataset.path)
    monkeypatch.chdir("/")
    reopened = pickle.loads(content)
    np.testing.assert_array_equal(reopened[:], expected)
    np.testing.assert_array_equal(reopened.labels, dataset.labels)


def test_a_relative_path_goes_on_to_mean_the_same_folder(
    built: gpu_npz.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(os.path.dirname(built.path))
    dataset = gpu_npz.open_dataset("out")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(dataset[39], built[39])


class SlowDict(dict[int, NpzReader]):
    """Lets other threads in between finding a shard open and taking it."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        time.sleep(0.001)
        return found


def test_threads_may_share_it_although_few_shards_stay_open(
    dataset: gpu_npz.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.readers.dataset._OPEN_SHARDS", 2)
    images = read_shards(dataset.path)
    rows = np.random.default_rng(0).integers(0, 40, 200)
    monkeypatch.setattr(dataset, "_shards", SlowDict())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: dataset[int(row)].copy(), rows))
    np.testing.assert_array_equal(found, images[rows])


def test_a_shard_that_changes_while_it_is_closed_is_looked_at_again(
    dataset: gpu_npz.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_npz.readers.dataset._OPEN_SHARDS", 1)
    images = read_shards(dataset.path)
    copy = gpu_npz.open_dataset(shutil.copytree(dataset.path, tmp_path / "copy"))
    last = len(copy) - 1
    for row in (0, last, 0, last):
        np.testing.assert_array_equal(copy[row], images[row])
    shard = Path(copy.path) / "shard-00000.npz"
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content)  # the same again, which is no trouble
    np.testing.assert_array_equal(copy[0], images[0])
    np.testing.assert_array_equal(copy[last], images[last])
    content[30] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FormatError, match=r"shard-00000\.npz"):
        copy[0]


def test_it_introduces_itself(dataset: gpu_npz.Dataset) -> None:
    assert repr(dataset) == f"<Dataset {dataset.path!r}: 40 images (3, 12, 16) float32>"


# Values


@pytest.mark.parametrize(
    "settings",
    [{}, {"layout": "NHWC"}, {"channels": "bgr"}, {"channels": "gray", "normalize": "unit"}, {"normalize": "none"}],
    ids=["NCHW", "NHWC", "bgr", "gray", "none"],
)
def test_uint8_normalized_gives_the_bits_of_a_float32_build(
    tree: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    floats = build(tree, tmp_path / "float32", limit=17, **settings)
    bytes_ = build(tree, tmp_path / "uint8", limit=17, dtype="uint8", **settings)
    assert bytes_.dtype == np.uint8
    for rows in (3, -1, slice(None), slice(5, 9), slice(None, None, -4), [8, 0, 16], []):
        found = bytes_.normalized(rows)  # type: ignore[arg-type]
        assert found.dtype == np.float32
        assert found.shape == floats[rows].shape  # type: ignore[index]
        assert found.tobytes() == np.ascontiguousarray(floats[rows]).tobytes()  # type: ignore[index]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_float_images_are_normalized_already(tree: Path, tmp_path: Path, dtype: str) -> None:
    dataset = build(tree, tmp_path / "out", limit=5, dtype=dtype)
    assert dataset.normalized(slice(None)).dtype == np.float32
    np.testing.assert_array_equal(dataset.normalized(slice(None)), dataset[:].astype(np.float32))


SOME_BAD = {
    "a/0.jpg": "jpeg",
    "a/1.jpg": "half",
    "a/2.jpg": "text",
    "a/3.jpg": "empty",
    "b/4.jpg": "cmyk",
    "b/5.jpg": "jpeg",
    "b/6.jpg": "zeros",
}


def test_rejected_items_leave_gaps_in_the_index_and_shards_may_be_empty(make_tree: MakeTree, tmp_path: Path) -> None:
    dataset = build(make_tree(SOME_BAD), tmp_path / "out", shard_size=2)
    assert [len(dataset.shard(shard)["images"]) for shard in range(4)] == [1, 0, 2, 0]
    np.testing.assert_array_equal(dataset.index, [0, 4, 5])
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.paths[:] == ["a/0.jpg", "b/4.jpg", "b/5.jpg"]
    images = read_shards(dataset.path)
    for rows in (slice(None), slice(1, None), slice(0, 2), slice(None, None, -1), [2, 0], [], slice(3, 9)):
        np.testing.assert_array_equal(dataset[rows], images[rows])  # type: ignore[index]


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_blank_rows_are_zero_and_marked(make_tree: MakeTree, tmp_path: Path, dtype: str) -> None:
    dataset = build(make_tree(SOME_BAD), tmp_path / "out", shard_size=2, on_reject="blank", dtype=dtype)
    assert len(dataset) == 7
    assert dataset.valid is not None
    assert dataset.valid.tolist() == [True, False, False, False, True, True, False]
    np.testing.assert_array_equal(dataset.valid, read_shards(dataset.path, "valid"))
    for row, valid in enumerate(dataset.valid.tolist()):
        assert dataset[row].any() == valid
        assert dataset.normalized(row).any() == valid
    assert dataset.paths[:] == list(SOME_BAD)


def test_normalized_blank_rows_have_the_bits_of_a_float32_build(make_tree: MakeTree, tmp_path: Path) -> None:
    src = make_tree(SOME_BAD)
    floats = build(src, tmp_path / "float32", on_reject="blank")
    bytes_ = build(src, tmp_path / "uint8", on_reject="blank", dtype="uint8")
    for rows in (0, 1, -1, np.int64(2), slice(None), slice(4, 1, -1), [6, 4, 1], np.array([0, 1]), []):
        found = bytes_.normalized(rows)  # type: ignore[arg-type]
        assert found.tobytes() == np.ascontiguousarray(floats[rows]).tobytes()  # type: ignore[index]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("large_plane", [1, 1 << 30], ids=["image by image", "images together"])
@pytest.mark.parametrize("bits", [8, 16])
def test_reading_into_memory_gives_the_values_of_the_table_in_any_order_and_blank_rows_as_zeros(
    layout: str, large_plane: int, bits: int, make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalize, "_LARGE_PLANE", large_plane)
    monkeypatch.setattr(normalize, "_PIXELS_TOGETHER", 3 * 12 * 16 * 3)  # three images
    given = {"layout": layout, "bit_depth": bits, "dtype": f"uint{bits}", "on_reject": "blank", "shard_size": 2}
    dataset = build(make_tree(SOME_BAD), tmp_path / "out", size="12x16", **given)
    assert dataset.valid is not None
    rows = np.random.default_rng(0).permutation(np.tile(np.arange(len(dataset)), 3))
    tables = dataset.preprocess.tables(dataset[0])
    expected = np.empty((len(rows), *dataset.image_shape), np.float32)
    for place, row in enumerate(rows.tolist()):
        channels, image = np.moveaxis(expected[place], -1 if layout == "NHWC" else 0, 0), dataset[row]
        for channel, pixels in enumerate(np.moveaxis(image, -1 if layout == "NHWC" else 0, 0)):
            channels[channel] = tables[channel][pixels] if dataset.valid[row] else 0
    for threads in (1, 3, 100):
        out = np.full_like(expected, np.nan)
        dataset.read(rows, out, normalize=True, threads=threads)
        assert np.array_equal(out, expected)
    strided = np.full((*expected.shape, 2), np.nan, np.float32)
    dataset.read(rows, strided[..., 0], normalize=True)
    assert np.array_equal(strided[..., 0], expected)
    assert np.isnan(strided[..., 1]).all()
    dataset.read(rows[:0], out[:0], normalize=True, threads=2)
    halves = np.empty(expected.shape, np.float16)
    dataset.read(rows, halves, normalize=True)
    assert np.allclose(halves, expected, atol=2e-3)
    np.testing.assert_array_equal(dataset.normalized(rows), expected)


def test_a_dataset_without_a_single_row_is_empty(make_tree: MakeTree, tmp_path: Path) -> None:
    bad = {path: kind for path, kind in SOME_BAD.items() if kind in ("half", "text", "empty", "zeros")}
    dataset = build(make_tree(bad), tmp_path / "out", shard_size=2)
    assert len(dataset) == len(dataset.paths) == 0
    assert dataset[:].shape == dataset[[]].shape == dataset[::-1].shape == (0, 3, 12, 16)
    assert dataset.normalized(slice(None)).shape == (0, 3, 12, 16)
    assert list(dataset) == []
    assert dataset.paths[:] == []
    with pytest.raises(IndexError):
        dataset[0]


def test_a_flat_folder_gives_images_without_labels(make_tree: MakeTree, tmp_path: Path) -> None:
    dataset = build(make_tree({"b.jpg": "jpeg", "a.png": "jpeg", "c.webp": "jpeg"}), tmp_path / "out", shard_size=2)
    assert dataset.labels is None
    assert dataset.class_names is None
    assert dataset.paths[:] == ["a.png", "b.jpg", "c.webp"]
    with pytest.raises(FormatError, match=r"no array 'labels'; it holds images, paths, index, source_bytes"):
        dataset.column("labels", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="names on macOS are always UTF-8")
def test_paths_of_every_length_and_alphabet_come_back(tmp_path: Path) -> None:
    names = [b"a.jpg", b"b" * 200 + b".jpg", "\u65e5\u672c.jpg".encode(), b"\xff\xfe\x80.jpg"]
    folder = os.fsencode(tmp_path / "images")
    os.mkdir(folder)
    for name in names:
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes(file_bytes("jpeg"))
    dataset = build(Path(os.fsdecode(folder)), tmp_path / "out", shard_size=1)
    expected = [os.fsdecode(name) for name in sorted(names)]
    assert list(dataset.paths) == expected
    assert dataset.paths[:] == expected
    assert dataset.paths[::-1] == expected[::-1]
    assert [os.fsencode(path) for path in dataset.paths] == sorted(names)


# Many shards


MANY_ROWS = """
import random, resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import gpu_npz
from gpu_npz.errors import StorageError

dataset = gpu_npz.open_dataset(sys.argv[1])
order = list(range(len(dataset)))
random.Random(0).shuffle(order)
whole = dataset[:]
gathered = dataset[order]
for place, row in enumerate(order):
    assert np.array_equal(dataset[row], gathered[place])
    assert np.array_equal(dataset[row], whole[row])
paths = dataset.paths[:]
assert all(dataset.paths[row] == paths[row] for row in order)
assert np.array_equal(dataset[::-3], whole[::-3])
print(int(gathered.sum()))
try:
    held = [dataset[row] for row in order]
except StorageError as exc:
    assert sys.version_info < (3, 13), "there, a map holds no descriptor"
    assert "ulimit -n" in str(exc)
    print("refused")
else:
    print("held")
"""


def test_all_rows_of_2000_shards_are_read_with_few_file_descriptors(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 3), np.uint8)
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(folder / f"{number:04d}.png", compress_level=1)
    dataset = build(folder, tmp_path / "out", shard_size=1, size=8, dtype="uint8")
    assert dataset.manifest.counts.shards == 2000
    np.testing.assert_array_equal(dataset[:], values.transpose(0, 3, 1, 2))
    result = python("-c", MANY_ROWS, dataset.path)
    assert result.stdout.split() == [str(values.sum()), "refused" if sys.version_info < (3, 13) else "held"]


# What is not a sound dataset


def edited(folder: Path, edit: Edit) -> Path:
    """The folder, whose manifest was changed."""
    edit_json(folder / "dataset.json", edit)
    return folder


def test_a_build_that_has_not_ended_is_incomplete_and_says_how_far_it_is(copy: Path) -> None:
    (copy / "dataset.json").unlink()
    (copy / "shard-00003.npz").unlink()
    (copy / ".gpu-npz/commits/shard-00001.json").unlink()
    with pytest.raises(IncompleteError, match=r"is not complete: 4 of 6 shards; run the same gpu-npz build again"):
        gpu_npz.open_dataset(copy)


def test_a_build_with_too_many_rejects_is_incomplete(make_tree: MakeTree, tmp_path: Path) -> None:
    src = make_tree(SOME_BAD)
    with pytest.raises(RejectLimitError):
        build(src, tmp_path / "out", shard_size=2, max_rejects="3")
    with pytest.raises(IncompleteError, match="4 of 4 shards"):
        gpu_npz.open_dataset(tmp_path / "out")
    assert len(build(src, tmp_path / "out", shard_size=2, max_rejects="4")) == 3


@pytest.mark.parametrize(
    "make",
    [lambda folder: folder.mkdir(), lambda folder: folder.write_bytes(b""), lambda folder: None],
    ids=["empty folder", "file", "nothing"],
)
def test_what_no_build_has_made_is_no_dataset(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "out")
    with pytest.raises(FormatError, match=r"is not a dataset \((dataset\.json is missing|it does not exist)\)"):
        gpu_npz.open_dataset(tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "fault"),
    [({"version": 2}, "format version 2 is newer"), ({"requires": ["zstd"]}, r"with \['zstd'\] is newer")],
)
def test_what_a_later_version_made_is_refused(copy: Path, values: dict[str, Any], fault: str) -> None:
    edited(copy, lambda manifest: manifest.update(values))
    with pytest.raises(FormatError, match=rf"dataset\.json: .*{fault}.*install a newer gpu-npz"):
        gpu_npz.open_dataset(copy)


def test_keys_that_a_later_version_added_are_ignored(copy: Path, built: gpu_npz.Dataset) -> None:
    def add(manifest: dict[str, Any]) -> None:
        for part in (manifest, manifest["images"], manifest["counts"], manifest["settings"]):
            part["new_in_a_later_version"] = {"some": ["thing"]}

    dataset = gpu_npz.open_dataset(edited(copy, add))
    np.testing.assert_array_equal(dataset[:], built[:])
    assert dataset.normalized(0).dtype == np.float32


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"{}", b"null", b'{"version": 1}', b'{"version": "one"}', b"\xff\xfe", b'{"version": []}'],
)
def test_a_damaged_manifest_is_named(copy: Path, content: bytes) -> None:
    (copy / "dataset.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"copy/dataset\.json: .*damaged"):
        gpu_npz.open_dataset(copy)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "No such file or directory"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 100), "cut off|missing"),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "no end record"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "no end record"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    "of another dataset": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"dataset=", b"dataset=0")[:-1]),
        "missing or left over|belongs here",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_named_when_the_dataset_is_opened(copy: Path, damage: str) -> None:
    make, fault = DAMAGE[damage]
    make(copy / "index.npz")
    with pytest.raises(FormatError, match=rf"copy/index\.npz: .*({fault})"):
        gpu_npz.open_dataset(copy)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_when_a_row_of_it_is_read(copy: Path, damage: str) -> None:
    make, fault = DAMAGE[damage]
    make(copy / "shard-00002.npz")
    dataset = gpu_npz.open_dataset(copy)
    for rows in (14, slice(10, 18), [0, 20]):
        with pytest.raises(FormatError, match=rf"copy/shard-00002\.npz: .*({fault})"):
            dataset[rows]  # type: ignore[index]
    np.testing.assert_array_equal(dataset[21:28], dataset.shard(3)["images"])


def test_shards_and_indexes_of_another_dataset_are_refused(tree: Path, tmp_path: Path, copy: Path) -> None:
    build(tree, tmp_path / "other", shuffle=1)  # the same shapes, sizes and numbers
    for name in ("shard-00004.npz", "index.npz"):
        shutil.copy(tmp_path / "other" / name, copy / name)
    with pytest.raises(FormatError, match=r"index\.npz: it is 'gpu-npz 1 dataset=\w+ index', but '.*' belongs here"):
        gpu_npz.open_dataset(copy)
    shutil.copy(tmp_path / "other/dataset.json", copy)
    with pytest.raises(FormatError, match=r"shard-00000\.npz: it is '.* shard=0', but '.* shard=0' belongs here"):
        gpu_npz.open_dataset(copy)[0]
    assert gpu_npz.open_dataset(copy)[28].shape == (3, 12, 16)


def test_swapped_shards_are_refused(copy: Path) -> None:
    os.rename(copy / "shard-00001.npz", copy / "one")
    os.rename(copy / "shard-00002.npz", copy / "shard-00001.npz")
    os.rename(copy / "one", copy / "shard-00002.npz")
    dataset = gpu_npz.open_dataset(copy)
    with pytest.raises(FormatError, match=r"shard-00001\.npz: it is '.* shard=2', but '.* shard=1' belongs here"):
        dataset[7]
    with pytest.raises(FormatError, match=r"shard-00002\.npz: it is '.* shard=1', but '.* shard=2' belongs here"):
        dataset[14]
    assert dataset[0].shape == (3, 12, 16)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"shape": [3, 16, 12]}, r"float32 \(N, 3, 16, 12\)"),
        ({"dtype": "uint8"}, "uint8"),
        ({"dtype": "flout32"}, "flout32"),
    ],
)
def test_a_shard_that_contradicts_the_manifest_is_named(copy: Path, values: dict[str, Any], fault: str) -> None:
    dataset = gpu_npz.open_dataset(edited(copy, lambda manifest: manifest["images"].update(values)))
    with pytest.raises(FormatError, match=rf"shard-00000\.npz: images are float32 .*; the manifest says {fault}"):
        dataset[0]


@pytest.mark.parametrize("values", [{"rows": 39}, {"shards": 5}, {"shards": 0}], ids=str)
def test_an_index_that_contradicts_the_manifest_is_named(copy: Path, values: dict[str, int]) -> None:
    edited(copy, lambda manifest: manifest["counts"].update(values))
    with pytest.raises(FormatError, match=r"index\.npz does not fit the manifest; run gpu-npz verify"):
        gpu_npz.open_dataset(copy)


def test_an_index_without_a_single_shard_is_named(copy: Path) -> None:
    reader = NpzReader(copy / "index.npz")
    arrays = {name: reader[name][:0] for name in reader.directory.members}
    with NpzWriter(copy / "index.npz") as file:
        for name, array in arrays.items():
            file.add(name, array)
        file.close(reader.directory.comment)
    edited(copy, lambda manifest: manifest["counts"].update(rows=0, shards=0))
    with pytest.raises(FormatError, match=r"index\.npz does not fit the manifest"):
        gpu_npz.open_dataset(copy)


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("shard_digest", lambda array: array[:, 0], r"shard_digest is uint8 \(\d+,\), not uint8 \(N, 32\)"),
        ("shard_digest", lambda array: array[:, :5], r"shard_digest is uint8 \(\d+, 5\), not uint8 \(N, 32\)"),
        ("labels", lambda array: array[:, None], r"labels is int64 \(\d+, 1\), not int64 \(N\)"),
        ("labels", lambda array: array[:5], "index.npz does not fit the manifest"),
        ("labels", lambda array: array + 2**40, None),
        ("shard_rows", lambda array: array * -1, "index.npz does not fit the manifest"),
        ("shard_rows", lambda array: array[:1], "index.npz does not fit the manifest"),
    ],
    ids=[
        "no digests",
        "short digests",
        "a column of labels",
        "few labels",
        "labels of no class",
        "negative rows",
        "few shards",
    ],
)
def test_arrays_of_an_index_that_cannot_be_are_refused(
    copy: Path, tmp_path: Path, name: str, change: Callable[[Any], Any], fault: str | None
) -> None:
    reader = NpzReader(copy / "index.npz")
    arrays = {each: reader[each].copy() for each in reader.directory.members}
    with NpzWriter(copy / "index.npz") as file:
        for each, array in arrays.items():
            file.add(each, np.asarray(change(array)) if each == name else array)
        file.close(reader.directory.comment)
    if fault is None:
        with pytest.raises(FormatError, match=r"has label 109951\d+ of 3 classes; run gpu-npz verify"):
            preview(copy, tmp_path / "sheet.png")
    else:
        for read in (gpu_npz.open_dataset, of_dataset):
            with pytest.raises(FormatError, match=fault):
                read(copy)
    assert not gpu_npz.verify(copy).ok


@pytest.mark.parametrize("shards", [10**10, 10**30, -1])
def test_counts_that_cannot_be_are_refused_at_once(copy: Path, shards: int) -> None:
    edited(copy, lambda manifest: manifest["counts"].update(shards=shards))
    for read in (gpu_npz.open_dataset, of_dataset, gpu_npz.verify):
        with pytest.raises(FormatError):
            read(copy)


@pytest.mark.parametrize("entries", [0, 3, 9])
def test_a_column_with_other_than_an_entry_for_each_image_is_refused(make_dataset: MakeDataset, entries: int) -> None:
    shard = (out := make_dataset()) / "shard-00001.npz"
    reader = NpzReader(shard)
    arrays = {name: reader[name].copy() for name in reader.directory.members}
    with NpzWriter(shard) as file:
        for name, array in arrays.items():
            file.add(name, np.zeros(entries, np.int64) if name == "source_bytes" else array)
        file.close(reader.directory.comment)
    dataset = gpu_npz.open_dataset(out)
    for rows in (9, slice(8, 11), slice(2, 12), [1, 12]):
        with pytest.raises(FormatError, match=rf"source_bytes is \({entries},\) beside 7 images"):
            dataset.column("source_bytes", rows)
    with NpzWriter(shard) as file:
        for name, array in arrays.items():
            file.add(name, np.stack([array] * 2, axis=1) if name == "paths" else array)
        file.close(reader.directory.comment)
    with pytest.raises(FormatError, match=r"paths is \(7, 2\) beside 7 images"):
        _ = gpu_npz.open_dataset(out).paths[:]
    assert [problem.file for problem in compare(out, 100).problems] == ["shard-00001.npz"]


@pytest.mark.parametrize("text", ["\U00010000", "a/\U00010000.jpg"])
def test_a_path_with_code_points_beyond_unicode_is_no_text(make_dataset: MakeDataset, text: str) -> None:
    shard = (out := make_dataset()) / "shard-00001.npz"
    reader = NpzReader(shard)
    arrays = {name: reader[name].copy() for name in reader.directory.members}
    arrays["paths"][3] = text
    codes = arrays["paths"].view(np.uint32)
    codes[codes == 0x10000] = 0x110000
    with NpzWriter(shard) as file:
        for name, array in arrays.items():
            file.add(name, array)
        file.close(reader.directory.comment)
    dataset = gpu_npz.open_dataset(out)
    assert dataset.paths[9] == str(arrays["paths"][2])
    for data, rows in ((dataset, 10), (dataset, slice(2, 12)), (dataset.subset([10, 0]), 0)):
        with pytest.raises(FormatError, match=r"out: a path is no text; run gpu-npz verify"):
            _ = data.paths[rows]
    problems = [problem.what for problem in gpu_npz.verify(out).problems if problem.file == shard.name]
    assert "paths has code points that are not in Unicode" in problems


# A build that goes on


@pytest.mark.parametrize("on_reject", ["skip", "blank"])
def test_the_committed_shards_of_a_build_that_goes_on_can_be_read(tree: Path, tmp_path: Path, on_reject: str) -> None:
    whole = build(tree, tmp_path / "whole", on_reject=on_reject, shuffle=1)
    out = Path(shutil.copytree(whole.path, tmp_path / "out"))
    for name in ("dataset.json", "index.npz", "shard-00000.npz", "shard-00002.npz"):
        (out / name).unlink()
    shards = len(whole.shard_rows)
    with pytest.raises(IncompleteError, match=f"is not complete: {shards - 2} of {shards} shards"):
        gpu_npz.open_dataset(out)
    partial = gpu_npz.open_dataset(out, partial=True)
    ends = np.cumsum(whole.shard_rows)
    rows = [row for row in range(len(whole)) if np.searchsorted(ends, row, side="right") not in (0, 2)]
    assert partial.paths[:] == [whole.paths[row] for row in rows]
    np.testing.assert_array_equal(partial[:], whole[rows])
    np.testing.assert_array_equal(partial.labels, whole.labels[rows])
    np.testing.assert_array_equal(partial.index, whole.index[rows])
    if on_reject == "blank":
        np.testing.assert_array_equal(partial.valid, whole.valid[rows])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(partial))[-1], whole[rows[-1]])
    for path in out.glob("shard-*.npz"):
        path.unlink()
    with pytest.raises(IncompleteError, match=f"has none of its {shards} shards yet"):
        gpu_npz.open_dataset(out, partial=True)
    np.testing.assert_array_equal(gpu_npz.open_dataset(whole.path, partial=True)[:], whole[:])


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("log", "NCHW"), ("window", "NHWC"), ("standardize", "NCHW"), ("standardize", "NHWC"), ("minmax", "NHWC"),
        ("maxabs", "NCHW"), ("l2", "NHWC"),
    ],
)  # fmt: skip
def test_stored_pixels_are_read_as_a_float_build_of_any_kind_stores_them(
    make_dataset: MakeDataset, kind: str, layout: str, channels: str
) -> None:
    settings: dict[str, Any] = {"normalize": kind, "layout": layout, "channels": channels, "on_reject": "blank"}
    settings |= {"window": (20, 150.5)} if kind == "window" else {}
    stored, floats = (gpu_npz.open_dataset(make_dataset(dtype=dtype, **settings)) for dtype in ("uint8", "float32"))
    np.testing.assert_array_equal(stored.normalized(slice(None)), floats[:], strict=True)
    np.testing.assert_array_equal(stored.normalized([3, 1]), floats[[3, 1]], strict=True)
    np.testing.assert_array_equal(stored.normalized(5), floats[5], strict=True)
