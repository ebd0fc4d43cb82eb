"""Contact sheets: the pixels that were stored, in the right place, and captions that no name can upset."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageFont
from support import MakeTree, build_cpu, file_bytes

import gpu_npz
from gpu_npz.audit.preview import _CAPTION, _GAP, Sheet, Tile, _fitted, preview
from gpu_npz.cli.main import run
from gpu_npz.errors import FormatError, IncompleteError, SourceError, StorageError, UsageError

build = functools.partial(build_cpu, size=32, shard_size=5, max_rejects="100%")


def squares(path: Path, sheet: Sheet, side: int = 32) -> list[np.ndarray]:
    """The images of a sheet."""
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn)
    columns = (sheet.width - _GAP) // (side + _GAP)
    places = [
        (_GAP + at // columns * (side + _CAPTION + _GAP), _GAP + at % columns * (side + _GAP))
        for at in range(len(sheet.tiles))
    ]
    return [pixels[top : top + side, left : left + side] for top, left in places]


@pytest.fixture(scope="module")
def dataset(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in three classes."""
    return build(tree, tmp_path_factory.mktemp("previews") / "out")


@pytest.fixture
def rejecting(make_tree: MakeTree, tmp_path: Path) -> Path:
    """Rejects of several kinds."""
    kinds = ("jpeg", "half", "half-png", "text", "empty", "claims-65500", "zeros")
    return build(make_tree({f"a/{kind}.jpg": kind for kind in kinds}), tmp_path / "out")


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_an_image_has_the_pixels_that_were_decoded(
    make_tree: MakeTree, tmp_path: Path, channels: str, layout: str, dtype: str
) -> None:
    src = make_tree({"a/0.jpg": "jpeg"})
    plain = build(src, tmp_path / "plain", dtype="uint8", layout="NHWC", normalize="none", **_gray(channels))
    out = build(src, tmp_path / "out", channels=channels, layout=layout, dtype=dtype, normalize="signed")
    sheet = preview(out, tmp_path / "sheet.png", tile=32)
    expected = np.broadcast_to(gpu_npz.open_dataset(plain)[0], (32, 32, 3))
    np.testing.assert_array_equal(squares(tmp_path / "sheet.png", sheet)[0], expected)
    assert sheet.tiles == (Tile("a/0.jpg", 0, 0, "a"),)


@pytest.mark.parametrize("kind", ["standardize", "minmax", "maxabs", "l2"])
def test_values_by_an_image_s_own_statistics_are_drawn_from_black_to_white(
    make_tree: MakeTree, tmp_path: Path, kind: str
) -> None:
    src = make_tree({"a/0.jpg": "jpeg"})
    levels = gpu_npz.open_dataset(build(src, tmp_path / "plain", dtype="uint8", normalize="none"))[0].astype(float)
    out = build(src, tmp_path / "out", channels="bgr", normalize=kind)
    (square,) = squares(tmp_path / "sheet.png", preview(out, tmp_path / "sheet.png", tile=32))
    expected = np.rint((levels - levels.min()) * 255 / np.ptp(levels)).transpose(1, 2, 0)
    assert np.abs(square - expected).max() <= 1  # of a value in the middle
    assert (square.min(), square.max()) == (0, 255)


def _gray(channels: str) -> dict[str, str]:
    return {"channels": "gray"} if channels == "gray" else {}


def test_a_seed_chooses_rows_and_none_comes_twice(dataset: Path, tmp_path: Path) -> None:
    def rows(seed: int, count: int = 10) -> list[int | None]:
        return [tile.row for tile in preview(dataset, tmp_path / "sheet.jpg", count=count, seed=seed).tiles]

    assert rows(1) == rows(1) != rows(2)
    assert len(set(rows(1))) == 10
    assert rows(0, 1000) == list(range(40))
    data = gpu_npz.open_dataset(dataset)
    assert data.labels is not None
    for tile in preview(dataset, tmp_path / "sheet.png").tiles:
        assert tile.row is not None
        assert (tile.path, tile.label) == (data.paths[tile.row], data.labels[tile.row])


def test_by_class_each_class_has_its_place_and_what_does_not_fit_is_counted(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet = preview(dataset, tmp_path / "sheet.png", show="class", count=2, tile=32)
    assert [tile.class_name for tile in sheet.tiles] == ["apples"] * 2 + ["berries"] * 2 + ["cherries"] * 2
    assert sheet.left_out == 0
    assert sheet.width == _GAP + 2 * (32 + _GAP)
    monkeypatch.setattr("gpu_npz.audit.preview._SHEET_PIXELS", 4 * (32 + _GAP) * (32 + _GAP + _CAPTION))
    sheet = preview(dataset, tmp_path / "sheet.png", show="class", count=2, tile=32)
    assert ({tile.class_name for tile in sheet.tiles}, sheet.left_out) == ({"apples", "berries"}, 1)


def test_rejects_are_drawn_as_far_as_they_can_be_decoded(rejecting: Path, tmp_path: Path) -> None:
    sheet = preview(rejecting, tmp_path / "sheet.png", show="rejects", tile=32)
    codes = {tile.path: tile.code for tile in sheet.tiles}
    assert codes["a/half.jpg"] == "truncated"
    assert codes["a/claims-65500.jpg"] == "too-large"
    assert len(codes) == 6
    for tile, square in zip(sheet.tiles, squares(tmp_path / "sheet.png", sheet), strict=True):
        assert (len(np.unique(square)) == 1) == (tile.path not in ("a/half.jpg", "a/half-png.jpg")), tile
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert preview(rejecting, tmp_path / "sheet.png", show="rejects", count=2).left_out == 4


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({"path": "../secret.jpg", "index": 1_000_000}, "is said to be item 1000000 of|item -?\\d+ has the path "),
        ({"path": "/secret.jpg", "index": -100}, "is said to be item -100 of|item -?\\d+ has the path "),
        ({"path": "a\0.jpg", "index": 100}, "is said to be item 100 of|item -?\\d+ has the path "),
        ({"path": "a\ud800.jpg", "index": 100}, "is said to be item 100 of|item -?\\d+ has the path "),
        ({"path": 5}, "not one reject per line: .*path"),
        ({"code": 7}, "not one reject per line: .*code"),
    ],
)
def test_rejects_that_name_other_files_are_refused(
    rejecting: Path, tmp_path: Path, line: dict[str, Any], fault: str, planned: bool
) -> None:
    shutil.copy(tmp_path / "images/a/jpeg.jpg", tmp_path / "secret.jpg")
    reject = {"path": "a/half.jpg", "index": 0, "stage": "read", "code": "empty", "detail": "", **line}
    (rejecting / "rejects.jsonl").write_text(json.dumps(reject) + "\n")
    if not planned:
        shutil.rmtree(rejecting / ".gpu-npz")
    with pytest.raises(FormatError, match=fault):
        preview(rejecting, tmp_path / "sheet.png", show="rejects", source=tmp_path / "images")


def test_an_item_that_ended_its_decoder_is_not_opened(rejecting: Path, tmp_path: Path) -> None:
    rejects = rejecting / "rejects.jsonl"
    rejects.write_text(rejects.read_text().replace('"truncated"', '"crashed"'))
    source = tmp_path / "images/a"
    for path in source.iterdir():
        path.write_bytes((source / "jpeg.jpg").read_bytes())
    sheet = preview(rejecting, tmp_path / "sheet.png", show="rejects", tile=32)
    drawn = squares(tmp_path / "sheet.png", sheet)
    assert [len(np.unique(square)) == 1 for square in drawn] == [tile.code == "crashed" for tile in sheet.tiles]


@pytest.mark.parametrize("freetype", [True, False], ids=["FreeType", "Pillow's own font"])
def test_names_that_no_font_has_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freetype: bool
) -> None:
    names = ["猫", "naïve", "x" * 200, os.fsdecode(b"caf\xe9"), "two\nlines"]
    for number, name in enumerate(names):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / f"{name}.jpg").write_bytes(file_bytes("half" if number % 2 else "jpeg"))
    out = build(tmp_path / "images", tmp_path / "out")
    if not freetype:
        plain = getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)  # Pillow before 10.1 has one font
        monkeypatch.setattr(ImageFont, "load_default", plain)
    assert len(preview(out, tmp_path / "sheet.png", show="class").tiles) == 3
    assert len(preview(out, tmp_path / "sheet.png", show="rejects").tiles) == 2
    assert run(["preview", str(out), "-o", str(tmp_path / "sheet.png"), "--json"]) == 0


def test_a_long_text_is_cut_to_the_width_of_its_image_at_the_end_that_matters_less() -> None:
    font = ImageFont.load_default()
    name = _fitted("abcdefgh" * 100, 60, font, from_end=False)
    path = _fitted("folder/" * 100 + "1.jpg", 60, font, from_end=True)
    assert name.startswith("abc")
    assert name.endswith("..")
    assert path.startswith("..")
    assert path.endswith("1.jpg")
    assert max(font.getlength(name), font.getlength(path)) <= 60


def test_datasets_without_labels_and_with_blank_rows(make_tree: MakeTree, tmp_path: Path) -> None:
    out = build(make_tree({"0.jpg": "jpeg", "1.jpg": "half"}), tmp_path / "out", on_reject="blank")
    assert preview(out, tmp_path / "sheet.png").tiles == (Tile("0.jpg", 0),)
    with pytest.raises(UsageError, match="has no labels; leave --by class out"):
        preview(out, tmp_path / "sheet.png", show="class")


def test_whole_numbers_are_grouped_as_classes_are_and_other_labels_are_refused(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    make_tree({f"{number}.jpg": "half" if number == 3 else "jpeg" for number in range(4)})
    rows = [f"images/{number}.jpg,{label},0.5" for number, label in enumerate((41, -3, 41, 7))]
    (tmp_path / "table.csv").write_text("\n".join(["path,number,weight", *rows]))
    out = build(tmp_path / "table.csv", tmp_path / "out", labels="number", on_reject="blank")
    sheet = preview(out, tmp_path / "sheet.png", show="class")
    assert [(tile.label, tile.path) for tile in sheet.tiles] == [
        (-3, "images/1.jpg"),
        (41, "images/0.jpg"),
        (41, "images/2.jpg"),
    ]
    assert sheet.tiles[0].caption() == ("-3", "row 1")
    out = build(tmp_path / "table.csv", tmp_path / "several", labels="number,weight")
    with pytest.raises(
        UsageError, match=r"number \(integer\), weight \(float\); --by class takes one column of classes"
    ):
        preview(out, tmp_path / "sheet.png", show="class")
    assert preview(out, tmp_path / "sheet.png").tiles[0].caption() == ("images/0.jpg", "row 0")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown extension": ({"target": "sheet.tiff"}, r"must end with \.png or \.jpg or \.jpeg"),
    "no extension": ({"target": "sheet"}, "must end with"),
    "a huge count": ({"count": 10**12}, r"--count: got 1000000000000; allowed: 1 to \d+ tiles of 128 pixels"),
    "a count of none": ({"count": 0}, "--count: got 0"),
    "a huge tile": ({"tile": 10**6}, "--tile: got 1000000; allowed: 16 to 1024"),
    "no rejects": ({"show": "rejects"}, "was rejected; omit --rejects"),
    "a source for nothing": ({"source": "x"}, "--source requires --rejects"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_drawn_says_why_and_writes_nothing(dataset: Path, tmp_path: Path, case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(UsageError, match=message):
        preview(dataset, **{"target": tmp_path / "sheet.png", **given})
    assert os.listdir(tmp_path) == []


def test_datasets_that_are_empty_unfinished_or_damaged_say_so(make_tree: MakeTree, tmp_path: Path) -> None:
    def sheet(**given: Any) -> Sheet:
        return preview(out, tmp_path / "sheet.png", **given)

    out = build(make_tree({"a/0.jpg": "text"}), tmp_path / "out")
    for show in ("random", "class"):
        with pytest.raises(UsageError, match="all items were rejected; use --rejects"):
            sheet(show=show)
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(SourceError, match="give --source SRC"):
        sheet(show="rejects")
    assert len(sheet(show="rejects", source=tmp_path / "moved").tiles) == 1
    (out / ".gpu-npz/job.json").unlink()
    with pytest.raises(SourceError, match=r"job\.json.* is missing; give --source SRC"):
        sheet(show="rejects")
    (out / "rejects.jsonl").write_text("[]\n")
    with pytest.raises(FormatError, match="not one reject per line"):
        sheet(show="rejects")
    (tmp_path / "folder.png").mkdir()
    other = build(tmp_path / "moved", tmp_path / "other")
    with pytest.raises(StorageError, match="Is a directory"):
        preview(other, tmp_path / "folder.png", show="rejects")
    out = build(make_tree({"a/0.jpg": "jpeg"}), tmp_path / "cut")
    os.truncate(out / "shard-00000.npz", 5000)
    with pytest.raises(FormatError, match=r"shard-00000\.npz"):
        sheet()
    (out / "dataset.json").unlink()
    with pytest.raises(IncompleteError, match="is not complete"):
        sheet()
    with pytest.raises(FormatError, match="is not a dataset"):
        preview(tmp_path / "nothing", tmp_path / "sheet.png")


def test_the_command_says_what_it_drew(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "new/sheet.jpeg")
    assert run(["preview", str(dataset), "-o", target, "--by", "class", "--count", "2", "--tile", "32"]) == 0
    assert capsys.readouterr().out.startswith(f"{target}: 6 images, ")
    with Image.open(target) as sheet:
        assert sheet.format == "JPEG"
    assert run(["preview", str(dataset), "-o", target, "--count", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tiles"]) == 3
    assert run(["preview", str(dataset), "-o", target, "--rejects", "--by", "class"]) == 2
    assert os.listdir(tmp_path / "new") == ["sheet.jpeg"]
