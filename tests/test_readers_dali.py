"""A source for DALI: in each epoch, DALI gets every row that numpy.load finds, once, and normalizes as the dataset."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import MakeDataset, MakeTree, python, read_shards, readme_example

import gpu_npz
from gpu_npz.errors import FormatError, UsageError
from gpu_npz.readers.dali import Source, source

pytest.importorskip("nvidia.dali", reason="NOT TESTED: DALI is not installed")

from nvidia.dali import fn, pipeline_def  # after the skip

# DALI computes in float32, where the dataset's values are correctly rounded: at most 2 units in the last place apart.
NORMALIZED = 5e-7


@pytest.fixture(scope="module", params=["NCHW", "NHWC"])
def pixels(make_dataset: MakeDataset, request: pytest.FixtureRequest) -> Path:
    """40 rows in 6 shards, uint8 in either layout. Read only."""
    return make_dataset(dtype="uint8", layout=request.param)


@pytest.fixture(params=[None, pytest.param(0, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> int | None:
    device: int | None = request.param
    return device


def pipeline(
    batches: Source, device: int | None = None, graph: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """A pipeline that gives what `graph` makes of the batches, or the batches as they are."""

    @pipeline_def(batch_size=batches.batch_size, num_threads=2, device_id=device)
    def define() -> Any:
        outputs = fn.external_source(batches, **batches.options, **options)
        return tuple(outputs) if graph is None else graph(*outputs)

    return define()


def epoch(pipe: Any) -> list[list[NDArray[Any]]]:
    """For each batch of one epoch, its outputs."""
    found = []
    while True:
        try:
            outputs = pipe.run()
        except StopIteration:
            pipe.reset()
            return found
        found.append([output.as_cpu().as_array() for output in outputs])


def joined(pipe: Any) -> list[NDArray[Any]]:
    """The outputs of one epoch."""
    return [np.concatenate(arrays) for arrays in zip(*epoch(pipe), strict=True)]


def test_dali_gets_all_rows_as_they_are_stored(pixels: Path, make_dataset: MakeDataset) -> None:
    for path in (pixels, make_dataset(dtype="float16"), make_dataset()):
        batches = source(path, 16)
        layout = batches.data.manifest.images.layout
        found = epoch(pipe := pipeline(batches))
        assert len(batches) == 3
        assert [(len(images), len(labels)) for images, labels in found] == [(16, 16), (16, 16), (8, 8)]
        images, labels = joined(pipe)
        assert images.dtype == gpu_npz.open_dataset(path).dtype
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(images, read_shards(path))
        np.testing.assert_array_equal(labels, read_shards(path, "labels"))
        assert pipe.run()[0].layout() == layout[1:]


def test_dali_normalizes_and_augments_them(pixels: Path, device: int | None) -> None:
    batches = source(pixels, 16, shuffle=True)
    normalization = batches.data.manifest.normalization
    assert normalization is not None
    mean, std = ([255 * value for value in values] for values in (normalization.mean, normalization.std))

    def augment(images: Any, labels: Any) -> Any:
        images = images if device is None else images.gpu()
        mirror = fn.random.coin_flip(seed=1)
        return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, output_layout="CHW"), labels, mirror

    values, labels, mirrored = joined(pipeline(batches, device, augment))
    order = np.random.default_rng((0, 0)).permutation(40)
    expected = batches.data.normalized(order)
    expected = expected.transpose(0, 3, 1, 2) if batches.data.manifest.images.layout == "NHWC" else expected
    expected = np.where(mirrored[:, None, None, None], expected[..., ::-1], expected)
    assert 0 < mirrored.sum() < 40
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, rtol=0, atol=NORMALIZED)
    np.testing.assert_array_equal(labels, batches.data.labels[order])


def test_operators_that_need_hwc_get_it(pixels: Path) -> None:
    def turn(images: Any, labels: Any) -> Any:
        if batches.options["layout"] == ["CHW"]:
            images = fn.transpose(images, perm=[1, 2, 0])
        return fn.rotate(images, angle=180.0), labels

    batches = source(pixels, 40)
    ((turned, _),) = epoch(pipeline(batches, graph=turn))
    images = read_shards(pixels)
    images = images.transpose(0, 2, 3, 1) if batches.options["layout"] == ["CHW"] else images
    np.testing.assert_array_equal(turned, images[:, ::-1, ::-1])


def test_each_epoch_has_an_order_of_its_own_by_seed(pixels: Path) -> None:
    images = read_shards(pixels)
    pipe = pipeline(source(pixels, 16, shuffle=True, seed=1))
    for number in range(3):
        order = np.random.default_rng((1, number)).permutation(40)
        np.testing.assert_array_equal(joined(pipe)[0], images[order])
    first = joined(pipeline(source(pixels, 7, shuffle=True, seed=2)))[0]
    np.testing.assert_array_equal(first, images[np.random.default_rng((2, 0)).permutation(40)])


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_each_epoch(pixels: Path, drop_last: bool) -> None:
    ranks = [source(pixels, 4, shuffle=True, rank=rank, world_size=3, drop_last=drop_last) for rank in range(3)]
    pipes = [pipeline(each) for each in ranks]
    for _ in range(2):
        found = [epoch(pipe) for pipe in pipes]
        assert [len(batches) for batches in found] == [len(each) for each in ranks]
        sizes = [[len(images) for images, _ in batches] for batches in found]
        assert sizes == [[4, 4, 4]] * 3 if drop_last else [[4, 4, 4, 1], [4, 4, 4, 1], [4, 4, 4, 2]]
        rows = [image.tobytes() for batches in found for images, _ in batches for image in images]
        assert len(set(rows)) == len(rows) == (36 if drop_last else 40)


def test_images_do_not_change_while_dali_has_them(pixels: Path) -> None:
    batches = source(pixels, 3, shuffle=True)
    for options in ({}, {"no_copy": True}):  # with no_copy, DALI's outputs are the memory that it was given
        pipe = pipeline(batches, **options)
        kept = [pipe.run()[0] for _ in range(len(batches))]
        found = np.concatenate([each.as_array() for each in kept])
        np.testing.assert_array_equal(found, read_shards(pixels)[np.random.default_rng((0, 0)).permutation(40)])


IN_PROCESSES = """
import sys
import numpy as np
from nvidia.dali import fn, pipeline_def
from gpu_npz.readers.dali import source

if __name__ == "__main__":
    batches = source(sys.argv[1], 3, shuffle=True)

    @pipeline_def(batch_size=3, num_threads=2, device_id=None, py_num_workers=2, py_start_method=sys.argv[2])
    def define():
        return tuple(fn.external_source(batches, **batches.options, parallel=True, prefetch_queue_depth=3))

    pipe = define()
    for epoch in range(3):
        kept = []
        while True:
            try:
                kept.append([output.as_array() for output in pipe.run()])
            except StopIteration:
                pipe.reset()
                break
        order = np.random.default_rng((0, epoch)).permutation(len(batches.data))
        for found, expected in zip(zip(*kept), (batches.data[order], batches.data.labels[order])):
            np.testing.assert_array_equal(np.concatenate(found), expected)
    print("all of them")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_dali_read_the_same_batches(pixels: Path, tmp_path: Path, method: str) -> None:
    (tmp_path / "program.py").write_text(IN_PROCESSES)  # spawn imports the program again
    assert python(tmp_path / "program.py", pixels, method, timeout=120).stdout == "all of them\n"


def test_dali_s_iterator_for_pytorch_restarts_it(pixels: Path) -> None:
    pytest.importorskip("torch")
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    pipe = pipeline(source(pixels, 16, shuffle=True))
    names, last = ["images", "labels"], LastBatchPolicy.PARTIAL
    batches = DALIGenericIterator(pipe, names, auto_reset=True, last_batch_policy=last)
    for number in range(2):
        found = [batch["images"].numpy().copy() for (batch,) in batches]
        order = np.random.default_rng((0, number)).permutation(40)
        np.testing.assert_array_equal(np.concatenate(found), read_shards(pixels)[order])


def test_a_checkpoint_of_dali_resumes_an_epoch(pixels: Path) -> None:
    batches = source(pixels, 8, shuffle=True)

    @pipeline_def(batch_size=8, num_threads=2, device_id=None, enable_checkpointing=True)
    def define() -> Any:
        return tuple(fn.external_source(batches, **batches.options))

    pipe = define()
    epoch(pipe)
    pipe.run()
    resumed = define(checkpoint=pipe.checkpoint())
    rest = epoch(resumed)
    assert len(rest) == 4
    order = np.random.default_rng((0, 1)).permutation(40)
    np.testing.assert_array_equal(np.concatenate([images for images, _ in rest]), read_shards(pixels)[order[8:]])


def test_labels_are_none_one_or_several(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    tree = make_tree({f"{name}.jpg": "jpeg" for name in "abc"})
    ((images,),) = epoch(pipeline(source(make_dataset(tree), 4)))
    assert images.shape == (3, 3, 12, 16)
    (tree / "labels.csv").write_text("path,grade,age\na.jpg,0,1.5\nb.jpg,1,2.5\nc.jpg,1,3\n")
    ((_, labels),) = epoch(pipeline(source(make_dataset(tree / "labels.csv", labels="grade,age"), 4)))
    assert labels.tolist() == [[0, 1.5], [1, 2.5], [1, 3]]


def test_blank_rows_are_left_out_unless_wanted(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    tree = make_tree({"a/0.jpg": "jpeg", "a/1.jpg": "half", "b/2.jpg": "jpeg"})
    path = make_dataset(tree, on_reject="blank", dtype="uint8")
    assert joined(pipeline(source(path, 2)))[1].tolist() == [0, 1]
    assert joined(pipeline(source(path, 2, keep_blank=True)))[1].tolist() == [0, 0, 1]


def test_a_dataset_without_a_row_has_no_batches(make_tree: MakeTree, make_dataset: MakeDataset) -> None:
    batches = source(make_dataset(make_tree({"a/1.jpg": "half"})), 4, shuffle=True)
    assert len(batches) == 0
    assert epoch(pipeline(batches)) == []


def test_the_readme_s_example_runs(pixels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    code = readme_example("from gpu_npz.readers.dali import source").replace("/data/train-npz", str(pixels))
    exec(code.replace("device_id=0", "device_id=None").replace(".gpu()", ""), {})
    assert capsys.readouterr().out == "torch.Size([40, 3, 12, 16]) torch.Size([40])\n" * 2


def test_what_is_wrong_is_named(pixels: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pixels, tmp_path / "copy"))
    os.truncate(copy / "shard-00002.npz", 9000)
    with pytest.raises(FormatError, match=r"copy/shard-00002\.npz: "):
        epoch(pipeline(source(copy, 8)))
    batches = source(pixels, 8)

    @pipeline_def(batch_size=8, num_threads=2, device_id=None)
    def without_options() -> Any:
        return tuple(fn.external_source(batches, num_outputs=2))

    with pytest.raises(UsageError, match=r"got 0; .* call fn.external_source\(batches, \*\*batches.options\)"):
        without_options().run()
    with pytest.raises(UsageError, match="batch_size: got 0"):
        source(pixels, 0)
    with pytest.raises(UsageError, match="rank 2, world_size 2: "):
        source(pixels, 8, rank=2, world_size=2)
