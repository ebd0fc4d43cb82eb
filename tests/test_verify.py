"""verify(): a sound dataset passes; whatever is done to one is found, and the file is named."""

from __future__ import annotations

import functools
import json
import operator
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import arrays_of, build_cpu, edit_json, file_bytes, flip_bit

import gpu_npz
from gpu_npz.cli.main import run
from gpu_npz.dataset.manifest import shard_table_digest
from gpu_npz.errors import FormatError, IncompleteError
from gpu_npz.npz.format import Directory
from gpu_npz.npz.reader import NpzReader
from gpu_npz.npz.writer import NpzWriter

Arrays = dict[str, NDArray[Any]]
Change = Callable[[Arrays], object]

KINDS = {
    "a/0.jpg": "jpeg",
    "a/1.jpg": "half",
    "a/2.jpg": "cmyk",
    "a/3.jpg": "jpeg",
    "b/4.jpg": "gray",
    "b/5.jpg": "empty",
    "b/6.jpg": "jpeg",
    "b/7.jpg": "half",
    "c/8.jpg": "jpeg",
    "c/9.jpg": "jpeg",
}
SHARD = "shard-00001.npz"  # its items are 4 to 7, its rows those of 4 and 6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 files in three classes, 7 of which can be decoded."""
    root = tmp_path_factory.mktemp("verification") / "images"
    for seed, (path, kind) in enumerate(KINDS.items()):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(file_bytes(kind, seed=seed))
    return root


build = functools.partial(build_cpu, size="12x16", shard_size=4)


@pytest.fixture(scope="module")
def built(images: Path) -> Path:
    """Three shards, float32. Read only."""
    return build(images, images.parent / "out")


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(built, tmp_path / "out"))


@pytest.fixture
def other(images: Path, tmp_path: Path) -> Path:
    """A sound dataset of the same images, with shards of the same shapes and names."""
    return build(images, tmp_path / "other", shuffle=3)


def problems(out: Path) -> dict[str, str]:
    """What verify finds, by file."""
    result = gpu_npz.verify(out)
    assert result.ok == (not result.problems)
    found: dict[str, str] = {}
    for problem in result.problems:
        found[problem.file] = "\n".join([*found.get(problem.file, "").splitlines(), problem.what])
    return found


def rewrite(path: Path, change: Change) -> Directory:
    """Replaces a file by a whole one with other content and the same comment."""
    comment, arrays = NpzReader(path).directory.comment, arrays_of(path)
    change(arrays)
    with NpzWriter(path) as file:
        for name, array in arrays.items():
            file.add(name, array)
        return file.close(comment)


def recommit(out: Path, change: Change) -> None:
    """Alters SHARD and makes the index and the manifest agree, so that nothing but the values themselves is wrong."""
    directory = rewrite(out / SHARD, change)

    def enter(index: Arrays) -> None:
        index["shard_bytes"][1] = directory.file_bytes
        index["shard_digest"][1] = np.frombuffer(bytes.fromhex(directory.digest), np.uint8)
        shards = [arrays_of(path) for path in sorted(out.glob("shard-*.npz"))]
        index["labels"] = np.concatenate([shard["labels"] for shard in shards])

    rewrite(out / "index.npz", enter)
    digest = shard_table_digest(NpzReader(out / "index.npz"))
    edit_json(out / "dataset.json", lambda manifest: manifest.update(shard_table_digest=digest))


# Sound datasets


def test_a_sound_dataset_passes_and_is_counted(built: Path) -> None:
    seen = []
    result = gpu_npz.verify(built, progress=lambda done, shards: seen.append((done, shards)))
    assert result.ok
    assert result.problems == ()
    assert (result.path, result.shards, result.rows) == (str(built), 3, 7)
    assert result.bytes == sum(path.stat().st_size for path in built.glob("shard-*.npz"))
    assert result.to_json()["ok"] is True
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float16", "layout": "NHWC"},
        {"dtype": "uint8"},
        {"on_reject": "blank"},
        {"on_reject": "blank", "dtype": "uint8", "channels": "bgr"},
        {"channels": "gray", "normalize": "signed", "shuffle": 1},
        {"normalize": "none", "limit": 5},
        {"mean": "0.1,0.2,0.3", "std": "0.4,0.5,0.6", "shard_size": 1},
        {"resize_mode": "none", "size": None},
        {"normalize": "log", "dtype": "float16", "channels": "bgr"},
        {"window": "20.5,99", "channels": "gray"},
        {"normalize": "standardize", "on_reject": "blank"},
        {"normalize": "l2", "dtype": "uint8"},
        {"mean": "0,0,0", "std": "1,1,0.00001", "dtype": "float16", "clip": True},
    ],
    ids=str,
)
def test_a_dataset_of_any_settings_passes(images: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert problems(build(images, tmp_path / "out", max_rejects="100%", **settings)) == {}


def test_datasets_without_labels_and_without_rows_pass(images: Path, tmp_path: Path) -> None:
    assert problems(build(images / "b", tmp_path / "flat")) == {}
    assert gpu_npz.open_dataset(tmp_path / "flat").labels is None
    bad = tmp_path / "bad/a"
    bad.mkdir(parents=True)
    for name in "xyz":
        shutil.copy(images / "a/1.jpg", bad / f"{name}.jpg")
    assert problems(build(bad.parent, tmp_path / "no rows", shard_size=2, max_rejects="100%")) == {}
    assert len(gpu_npz.open_dataset(tmp_path / "no rows")) == 0


def test_a_copy_without_the_private_folder_passes(out: Path) -> None:
    shutil.rmtree(out / ".gpu-npz")
    assert problems(out) == {}
    flip_bit(out / SHARD, 5000)
    assert list(problems(out)) == [SHARD]


def test_a_build_that_has_not_ended_is_no_damage(out: Path) -> None:
    (out / "dataset.json").unlink()
    with pytest.raises(IncompleteError, match="3 of 3 shards"):
        gpu_npz.verify(out)


# The command line


def test_the_command_ends_with_0_for_a_sound_dataset(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(built)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("OK")
    assert run(["verify", "--json", str(built)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(gpu_npz.verify(built).to_json()))


def test_the_command_ends_with_1_and_names_the_file(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(out / SHARD, 4096)
    assert run(["verify", str(out)]) == 1
    shown = capsys.readouterr().out
    assert f"{SHARD}: damaged: the CRC-32 of images does not match" in shown
    assert "DAMAGED, 1 problem" in shown
    assert run(["verify", "--json", str(out)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False
    assert [problem["file"] for problem in result["problems"]] == [SHARD]


def test_the_command_ends_with_1_where_the_manifest_is_damaged(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "dataset.json").write_text("{")
    assert run(["verify", str(out)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "dataset.json" in shown.err
    assert "damaged" in shown.err


# A byte


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        (("images", "data"), "the CRC-32 of images does not match"),
        (("images", "end"), "the CRC-32 of images does not match"),
        (("labels", "data"), "the CRC-32 of labels does not match"),
        (("paths", "data"), "the CRC-32 of paths does not match"),
        (("images", "local header"), "wrong header of images.npy"),
        (("images", "padding"), "wrong header of images.npy"),
        (("images", "NPY header"), "wrong NPY header of images.npy"),
        (("labels", "local header"), "wrong header of labels.npy"),
        (("source_bytes", "NPY header"), "wrong"),
        (("", "directory"), "wrong header of images.npy"),
        (("", "end record"), "wrong"),
        (("", "comment"), "belongs here"),
    ],
    ids=" ".join,
)
def test_a_changed_byte_is_found(out: Path, place: tuple[str, str], fault: str) -> None:
    directory = NpzReader(out / SHARD).directory
    if place[0]:
        member = directory.members[place[0]]
        position = {
            "data": member.data_offset,
            "end": member.data_offset + member.data_bytes - 1,
            "local header": member.header_offset + 10,
            "padding": member.data_offset - 500,
            "NPY header": member.data_offset - 128 + 12,
        }[place[1]]
    else:
        end = directory.file_bytes - len(directory.comment)
        position = {"directory": directory.offset + 16, "end record": end - 10, "comment": end + 30}[place[1]]
    flip_bit(out / SHARD, position)
    found = problems(out)
    assert list(found) == [SHARD]
    assert fault in found[SHARD]


def test_a_changed_byte_is_found_wherever_it_lies(out: Path) -> None:
    size, seeded = (out / SHARD).stat().st_size, random.Random(0)
    positions = [0, size - 1, *(seeded.randrange(size) for _ in range(40))]
    for position in positions:
        flip_bit(out / SHARD, position)
        assert list(problems(out)) == [SHARD], position
        flip_bit(out / SHARD, position)
    assert problems(out) == {}


def test_every_damaged_shard_is_named_in_order(out: Path) -> None:
    for name in ("shard-00002.npz", "shard-00000.npz"):
        flip_bit(out / name, 4200)
    assert list(problems(out)) == ["shard-00000.npz", "shard-00002.npz"]


# A shard


def test_a_missing_shard_is_found(out: Path) -> None:
    (out / SHARD).unlink()
    assert problems(out) == {
        SHARD: f"No such file or directory; restore the file, or run: gpu-npz verify {out} --repair"
    }


@pytest.mark.parametrize("kept", [0, 1, 100, 4096, -1000, -1])
def test_a_shard_that_was_cut_off_is_found(out: Path, kept: int) -> None:
    size = (out / SHARD).stat().st_size
    os.truncate(out / SHARD, kept if kept >= 0 else size + kept)
    found = problems(out)
    assert list(found) == [SHARD]
    assert "empty" in found[SHARD] or "cut off" in found[SHARD] or "missing" in found[SHARD]


def test_another_dataset_s_shard_is_found(out: Path, other: Path) -> None:
    assert problems(other) == {}
    shutil.copy(other / SHARD, out / SHARD)
    found = problems(out)
    assert list(found) == [SHARD]
    assert f"dataset={gpu_npz.Manifest.load(out).id} shard=1' belongs here" in found[SHARD]


def test_swapped_shards_are_both_found(out: Path) -> None:
    os.rename(out / SHARD, out / "one")
    os.rename(out / "shard-00000.npz", out / SHARD)
    os.rename(out / "one", out / "shard-00000.npz")
    found = problems(out)
    assert list(found) == ["shard-00000.npz", SHARD]
    assert all("belongs here; copy it again" in what for what in found.values())


def test_a_file_with_a_shard_s_name_that_is_none_of_them_is_found(out: Path) -> None:
    shutil.copy(out / SHARD, out / "shard-00003.npz")
    (out / "07").mkdir()
    shutil.copy(out / SHARD, out / "07/shard-00001.npz")
    (out / "notes.txt").write_text("This one may be here.")
    assert problems(out) == {
        "shard-00003.npz": "not a shard of this dataset; move it away",
        "07/shard-00001.npz": "not a shard of this dataset; move it away",
    }


def change_pixel(arrays: Arrays) -> None:
    arrays["images"][0, 0, 0, 0] = arrays["images"][0, 0, 0, 1] + 0.01


REPLACED: dict[str, tuple[Change, str]] = {
    "a pixel": (change_pixel, "the file was replaced by another intact file"),
    "a path": (lambda arrays: arrays["paths"].__setitem__(0, "b/X.jpg"), "was replaced by another intact file"),
    "a label": (lambda arrays: arrays["labels"].__setitem__(0, 2), "labels differs from the index"),
    "a place": (lambda arrays: arrays["index"].__setitem__(0, 5), "index differs from the index"),
    "a row less": (
        lambda arrays: arrays.update({name: array[:-1] for name, array in arrays.items()}),
        "1 rows; the index says 2",
    ),
    "an array more": (lambda arrays: arrays.update(valid=np.ones(2, bool)), "valid is there, unlike in the index"),
    "an array less": (lambda arrays: arrays.pop("labels"), "no array 'labels'"),
    "no images": (lambda arrays: arrays.pop("images"), "no array 'images'"),
    "other images": (lambda arrays: arrays.update(images=arrays["images"].astype("f2")), "the manifest says float32"),
    "labels as text": (lambda arrays: arrays.update(labels=np.array(["b", "b"])), "labels is <U1 (2,)"),
    "too few labels": (lambda arrays: arrays.update(labels=arrays["labels"][:1]), "labels is int64 (1,)"),
    "marks of a wrong kind": (lambda arrays: arrays.update(valid=np.ones((3, 3))), "valid is float64 (3, 3)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REPLACED)
def test_a_whole_shard_with_other_content_is_found(out: Path, what: str) -> None:
    change, fault = REPLACED[what]
    rewrite(out / SHARD, change)
    found = problems(out)
    assert list(found) == [SHARD]
    assert fault in found[SHARD]


def test_a_whole_shard_with_equal_content_is_the_same_shard(out: Path) -> None:
    content = (out / SHARD).read_bytes()
    rewrite(out / SHARD, lambda arrays: None)
    assert (out / SHARD).read_bytes() == content
    assert problems(out) == {}


# Values that no settings give, in files that all agree


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.0, -2.2], ids=str)
def test_values_that_the_settings_cannot_give_are_found(out: Path, value: float) -> None:
    recommit(out, lambda arrays: arrays["images"].__setitem__((1, 1, 5, 5), value))
    found = problems(out)
    assert list(found) == [SHARD]
    assert found[SHARD].startswith("channel 1 of rows 0 to 1 has values from ")
    assert found[SHARD].endswith("the settings give -2.03571 to 2.42857")


@pytest.mark.parametrize(("kind", "value", "least"), [("minmax", 1.01, "0"), ("standardize", -25.0, "-24")])
def test_values_that_no_statistics_of_an_image_give_are_found(
    images: Path, tmp_path: Path, kind: str, value: float, least: str
) -> None:
    out = build(images, tmp_path / "own", normalize=kind)
    recommit(out, lambda arrays: arrays["images"].__setitem__((1, 1, 5, 5), value))
    assert f"the settings give {least} to " in problems(out)[SHARD]


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_are_no_class_are_found(out: Path, label: int) -> None:
    recommit(out, lambda arrays: arrays["labels"].__setitem__(0, label))
    found = problems(out)
    assert list(found) == [SHARD]
    assert found[SHARD] == f"labels {min(label, 1)} to {max(label, 1)}; there are 3 classes"


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_blank_row_that_is_not_zero_is_found(images: Path, tmp_path: Path, dtype: str) -> None:
    out = build(images, tmp_path / "out", on_reject="blank", dtype=dtype)
    recommit(out, lambda arrays: arrays["images"].__setitem__((1, 2, 3, 4), 1))
    assert problems(out) == {SHARD: "a blank row among rows 0 to 3 is not zero"}


# The index


def test_a_damaged_index_is_found_and_the_shards_are_checked_all_the_same(out: Path) -> None:
    directory = NpzReader(out / "index.npz").directory
    flip_bit(out / "index.npz", directory.members["labels"].data_offset)
    flip_bit(out / SHARD, 4096)
    assert problems(out) == {
        "index.npz": "damaged: the CRC-32 of labels does not match",
        SHARD: "damaged: the CRC-32 of images does not match its data",
    }


def test_a_missing_or_cut_or_foreign_index_is_found(out: Path, other: Path) -> None:
    size = (out / "index.npz").stat().st_size
    os.truncate(out / "index.npz", size - 1)
    assert problems(out)["index.npz"].startswith("bytes are missing or left over behind the end record")
    os.truncate(out / "index.npz", 0)
    assert problems(out)["index.npz"].startswith("the file is empty")
    (out / "index.npz").unlink()
    assert problems(out)["index.npz"].startswith("No such file or directory")
    shutil.copy(other / "index.npz", out)
    found = problems(out)
    assert list(found) == ["index.npz"]
    assert "belongs here; copy it again" in found["index.npz"]


INDEXES: dict[str, tuple[Change, str]] = {
    "a shard's size": (lambda index: index["shard_bytes"].__setitem__(1, 1), "its table of shards is not the manifest"),
    "a shard's digest": (lambda index: operator.ixor(index["shard_digest"][1, :1], 1), "table of shards is not"),
    "a shard less": (lambda index: index.update(shard_bytes=index["shard_bytes"][:2]), "it does not have 3 shards"),
    "a row less": (lambda index: index.update(index=index["index"][:-1]), "6 or 7 rows; the manifest says 7"),
    "a label less": (lambda index: index.update(labels=index["labels"][:-1]), "6 or 7 rows; the manifest says 7"),
    "no labels": (lambda index: index.pop("labels"), "labels and the manifest's classes contradict each other"),
    "no table": (lambda index: index.pop("shard_digest"), "no array 'shard_digest'"),
    "a place twice": (lambda index: index["index"].__setitem__(1, 0), "not ascending within the plan's 10 items"),
    "a place outside": (lambda index: index["index"].__setitem__(-1, 10), "not ascending within the plan's 10 items"),
    "other types": (lambda index: index.update(labels=index["labels"].astype("f8")), "labels is float64 (7,)"),
}  # fmt: skip


@pytest.mark.parametrize("what", INDEXES)
def test_a_whole_index_with_other_content_is_found(out: Path, what: str) -> None:
    change, fault = INDEXES[what]
    rewrite(out / "index.npz", change)
    assert fault in problems(out)["index.npz"]


def test_labels_that_only_the_index_has_changed_are_found(out: Path) -> None:
    rewrite(out / "index.npz", lambda index: index["labels"].__setitem__(4, 0))
    assert problems(out) == {SHARD: "labels differs from the index"}


# The rejects


REJECTS: dict[str, tuple[Callable[[list[str]], object], str]] = {
    "a line less": (lambda lines: lines.pop(), "2 lines; the manifest says 3\nitem 7 of 10 in the plan does not"),
    "a line doubled": (lambda lines: lines.append(lines[0]), "4 lines; the manifest says 3\nitem 1 of 10 in the plan"),
    "a line for another": (lambda lines: lines.__setitem__(0, lines[1]), "item 1 of 10 in the plan does not have"),
    "an item that has a row": (lambda lines: edit_line(lines, index=2), "item 1 of 10 in the plan"),
    "an item that is none": (lambda lines: edit_line(lines, index=10), "item 1 of 10 in the plan"),
    "a negative item": (lambda lines: edit_line(lines, index=-1), "item -1 of 10 in the plan"),
    "a huge item": (lambda lines: edit_line(lines, index=10**30), "not one reject per line"),
    "another code": (lambda lines: edit_line(lines, code="missing"), "codes {'empty': 1, 'missing': 1, "),
    "no code": (lambda lines: lines.__setitem__(0, '{"index": 1}'), "not one reject per line: "),
    "codes of two kinds": (lambda lines: edit_line(lines, code=None), "not one reject per line: "),
    "no JSON": (lambda lines: lines.__setitem__(0, "truncated"), "not one reject per line"),
    "no object": (lambda lines: lines.__setitem__(0, "[3]"), "not one reject per line"),
    "an empty line": (lambda lines: lines.insert(0, ""), "not one reject per line"),
}  # fmt: skip


def edit_line(lines: list[str], **values: Any) -> None:
    lines[0] = json.dumps({**json.loads(lines[0]), **values})


@pytest.mark.parametrize("what", REJECTS)
def test_rejects_that_are_not_those_of_the_plan_are_found(out: Path, what: str) -> None:
    change, fault = REJECTS[what]
    lines = (out / "rejects.jsonl").read_text().splitlines()
    change(lines)
    (out / "rejects.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found = problems(out)
    assert list(found) == ["rejects.jsonl"]
    assert fault in found["rejects.jsonl"]


def test_a_last_item_that_nobody_has_is_found(images: Path, tmp_path: Path) -> None:
    out = build(images / "b", tmp_path / "out")
    lines = (out / "rejects.jsonl").read_text().splitlines(keepends=True)
    (out / "rejects.jsonl").write_text(lines[0])
    assert problems(out)["rejects.jsonl"].endswith(
        "item 3 of 4 in the plan does not have exactly one row or one reject"
    )


def test_a_missing_list_of_rejects_is_found(out: Path) -> None:
    (out / "rejects.jsonl").unlink()
    assert problems(out) == {"rejects.jsonl": "missing"}


def test_rejects_of_a_dataset_with_blank_rows_are_counted_as_well(images: Path, tmp_path: Path) -> None:
    out = build(images, tmp_path / "out", on_reject="blank")
    lines = (out / "rejects.jsonl").read_text().splitlines(keepends=True)
    (out / "rejects.jsonl").write_text("".join(lines[1:]))
    assert problems(out) == {
        "rejects.jsonl": "2 lines; the manifest says 3\n"
        "item 1 of 10 in the plan does not have exactly one row or one reject"
    }


# The manifest


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a count of rows": (lambda manifest: manifest["counts"].update(rows=8), "contradicts itself"),
    "a count of rejects": (lambda manifest: manifest["counts"].update(rejects=4), "contradicts itself"),
    "a count of codes": (lambda manifest: manifest["counts"]["rejects_by_code"].update(empty=2), "contradicts itself"),
    "a count of shards": (lambda manifest: manifest["counts"].update(shards=10**15), "contradicts itself"),
    "a count of items": (lambda manifest: manifest["counts"].update(items=10**15), "contradicts itself"),
    "no items a shard": (lambda manifest: manifest.update(shard_items=0), "contradicts itself"),
    "a shape": (lambda manifest: manifest["images"].update(shape=[3, 16, 12]), "contradicts the settings"),
    "a type": (lambda manifest: manifest["images"].update(dtype="float16"), "contradicts the settings"),
    "a type that is none": (lambda manifest: manifest["images"].update(dtype="flout"), "contradicts the settings"),
    "a layout": (lambda manifest: manifest["images"].update(layout="NHWC"), "contradicts the settings"),
    "a mean": (lambda manifest: manifest["normalization"]["mean"].__setitem__(0, 0.48), "contradicts the settings"),
    "statistics of none": (lambda manifest: manifest["settings"].update(normalize="none"), "contradicts the settings"),
    "a setting": (lambda manifest: manifest["settings"].update(channels="gray"), "settings: normalize imagenet has"),
    "a setting that is none": (lambda manifest: manifest["settings"].update(layout="HWC"), "layout: got 'HWC'"),
    "values without a type": (
        lambda manifest: (
            manifest["settings"].update(normalize="mean-std", mean=[0, 0, 0], std=[1e-8] * 3, dtype="float16")
        ),
        "settings: float16 cannot hold 1e+08",
    ),
    "a part less": (lambda manifest: manifest.pop("images"), "images"),
}  # fmt: skip


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_contradicts_itself_is_damaged(out: Path, what: str) -> None:
    change, fault = MANIFESTS[what]
    edit_json(out / "dataset.json", change)
    with pytest.raises(FormatError, match=r"dataset\.json: (.|\n)*damaged") as caught:
        gpu_npz.verify(out)
    assert fault in str(caught.value)
    assert run(["verify", str(out)]) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", "no JSON", '{"version": 1}'])
def test_a_manifest_that_cannot_be_read_is_named(out: Path, content: str) -> None:
    (out / "dataset.json").write_text(content)
    with pytest.raises(FormatError, match=r"out/dataset\.json: .*damaged"):
        gpu_npz.verify(out)


def test_a_manifest_of_another_dataset_contradicts_everything(out: Path, other: Path) -> None:
    shutil.copy(other / "dataset.json", out)
    found = problems(out)
    assert found.pop("rejects.jsonl")
    assert sorted(found) == ["index.npz", "shard-00000.npz", SHARD, "shard-00002.npz"]
    assert all("belongs here" in what for what in found.values())


@pytest.mark.parametrize(
    "change",
    [{"classes": ["a", "b"]}, {"classes": None}, {"plan_digest": "0" * 64}],
    ids=["fewer classes", "no classes", "another plan"],
)
def test_a_manifest_whose_classes_or_plan_were_altered_is_not_the_one_of_its_id(
    out: Path, change: dict[str, Any]
) -> None:
    edit_json(out / "dataset.json", lambda manifest: manifest.update(change))
    with pytest.raises(FormatError, match="its id is not that of these settings, classes and plan"):
        gpu_npz.verify(out)


def test_a_renamed_class_and_an_altered_setting_are_found(out: Path) -> None:
    for change in (
        lambda manifest: manifest["classes"].__setitem__(0, "renamed"),
        lambda manifest: manifest["settings"].update(interpolation="lanczos"),
    ):
        before = (out / "dataset.json").read_bytes()
        edit_json(out / "dataset.json", change)
        with pytest.raises(FormatError, match="its id is not that of"):
            gpu_npz.verify(out)
        (out / "dataset.json").write_bytes(before)


def test_an_altered_text_in_a_reject_is_found(out: Path) -> None:
    content = (out / "rejects.jsonl").read_bytes()
    (out / "rejects.jsonl").write_bytes(content.replace(b'"detail": "', b'"detail": "x', 1))
    assert problems(out) == {"rejects.jsonl": "its text was altered: the SHA-256 is not the manifest's"}


def test_a_changed_table_digest_is_found(out: Path) -> None:
    edit_json(out / "dataset.json", lambda manifest: manifest.update(shard_table_digest="0" * 64))
    assert problems(out) == {
        "index.npz": "its table of shards is not the manifest's: one of the two files belongs to another dataset"
    }
