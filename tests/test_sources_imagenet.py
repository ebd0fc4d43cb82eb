"""ILSVRC2012 as it is downloaded: images within tars within a tar, and where the labels of the val tar come from."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support import MakeDataset, items, labelled, opened, read_shards, refusal

import gpu_npz

Files = dict[str, bytes]


def tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tarred(files))
    return path


def tarred(files: Files) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


WNIDS = ("n01440764", "n01443537", "n02119789")


def train(path: Path, wnids: tuple[str, ...] = (WNIDS[1], WNIDS[0])) -> Path:
    inner = {
        f"{wnid}.tar": tarred({f"{wnid}_{number}.JPEG": f"{wnid} {number}".encode() for number in (7, 3)})
        for wnid in wnids
    }
    return tar(path, inner)


def test_the_train_tar_is_read_within_its_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = opened(train(tmp_path / "ILSVRC2012_img_train.tar"))
    assert (source.kind, source.class_names) == ("imagenet", (WNIDS[0], WNIDS[1]))
    assert labelled(source) == [
        (f"{wnid}/{wnid}_{number}.JPEG", label) for wnid, label in ((WNIDS[1], 1), (WNIDS[0], 0)) for number in (7, 3)
    ]
    assert source.read(items(source)[2]) == f"{WNIDS[0]} 7".encode()
    assert "has 4 images of 2 classes; ILSVRC2012's train tar has 1281167 of 1000" in caplog.text


def test_what_macos_puts_before_its_tars_is_passed_over(tmp_path: Path) -> None:
    inner = tarred({f"._{WNIDS[0]}_7.JPEG": b"x", f"{WNIDS[0]}_7.JPEG": b"y"})
    source = opened(tar(tmp_path / "t.tar", {f"._{WNIDS[0]}.tar": b"x", f"{WNIDS[0]}.tar": inner}))
    assert (source.kind, labelled(source)) == ("imagenet", [(f"{WNIDS[0]}/{WNIDS[0]}_7.JPEG", 0)])


def val(path: Path) -> Path:
    return tar(path, {f"ILSVRC2012_val_{number:08}.JPEG": b"%d" % number for number in (2, 1, 3)})


def test_the_val_tar_has_its_labels_from_the_devkit_or_a_table(tmp_path: Path) -> None:
    path = val(tmp_path / "ILSVRC2012_img_val.tar")
    data = tmp_path / "devkit" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n2\n")
    (data / "map_clsloc.txt").write_text(f"{WNIDS[2]} 1 kit_fox\n{WNIDS[0]} 3 tench\n{WNIDS[1]} 2 goldfish\n")
    expected = [("ILSVRC2012_val_00000002.JPEG", 0), ("ILSVRC2012_val_00000001.JPEG", 1)]
    source = opened(path, labels=str(tmp_path / "devkit"))
    assert source.class_names == WNIDS
    assert labelled(source)[:2] == expected
    io_ = pytest.importorskip("scipy.io")
    (data / "map_clsloc.txt").unlink()
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(1, WNIDS[2], "kit fox", "", 0), (2, WNIDS[1], "goldfish", "", 0), (3, WNIDS[0], "tench", "", 0)]
    rows.append((4, "n00001740", "entity", "", 3))
    io_.savemat(data / "meta.mat", {"synsets": np.array(rows, fields).reshape(-1, 1)})
    assert labelled(opened(path, labels=str(tmp_path / "devkit"))) == labelled(source)
    (tmp_path / "t.csv").write_text(
        "ImageId,PredictionString\n"
        + "".join(
            f"ILSVRC2012_val_{number:08},{wnid} 1 2 3 4\n"
            for number, wnid in ((1, WNIDS[1]), (2, WNIDS[0]), (3, WNIDS[1]))
        )
    )
    assert labelled(opened(path, labels=str(tmp_path / "t.csv")))[:2] == expected
    assert labelled(opened(path, [*WNIDS[::-1]], labels=str(tmp_path / "t.csv")))[:2] == [
        (expected[0][0], 2), (expected[1][0], 1),
    ]  # fmt: skip
    assert labelled(opened(path, labels="none"))[0] == (expected[0][0], None)


def test_what_the_val_tar_lacks_is_said(tmp_path: Path) -> None:
    path = val(tmp_path / "val.tar")
    assert "has no labels of its own; --labels DEVKIT" in refusal(path)
    assert "No such file" in refusal(path, labels=str(tmp_path / "gone.csv"))
    assert "has no data/ILSVRC2012_validation_ground_truth.txt" in refusal(path, labels=str(tmp_path))
    (tmp_path / "t.csv").write_text(f"1,{WNIDS[0]}\n2,dog\n")
    assert "line 2 is '2,dog'" in refusal(path, labels=str(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_text(f"1,{WNIDS[0]}\n2,{WNIDS[0]}\n")
    assert "has no label" in refusal(path, labels=str(tmp_path / "t.csv"))
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n9\n")
    (tmp_path / "map_clsloc.txt").write_text(f"{WNIDS[2]} 1 kit_fox\n")
    assert "line 2 has '9', which is no class of the 1 beside it" in refusal(path, labels=str(tmp_path))
    (tmp_path / "map_clsloc.txt").unlink()
    (tmp_path / "meta.mat").write_bytes(b"no MATLAB file" * 40)
    pytest.importorskip("scipy.io")
    assert "cannot be read" in refusal(path, labels=str(tmp_path))


@pytest.mark.parametrize("name", ["n01440764_10026.JPEG", "ILSVRC2012_test_00000001.JPEG", "x1", "1_2", "\u0661"])
def test_a_table_of_other_images_is_refused(tmp_path: Path, name: str) -> None:
    path, table = val(tmp_path / "ILSVRC2012_img_val.tar"), tmp_path / "t.csv"
    table.write_text(f"1,{WNIDS[0]}\nval/ILSVRC2012_val_00000002.JPEG,{WNIDS[1]}\n{name},{WNIDS[0]}\n", "utf-8")
    assert "line 3 is" in refusal(path, labels=str(table))


def test_a_train_tar_whose_inner_tar_is_cut_is_refused(tmp_path: Path) -> None:
    whole = tarred({"a_1.JPEG": bytes(2000)})
    message = refusal(tar(tmp_path / "t.tar", {f"{WNIDS[0]}.tar": whole[:1500]}), source="imagenet")
    assert f"{WNIDS[0]}.tar' is truncated" in message
    assert "for others say --source tar" in refusal(tar(tmp_path / "o.tar", {"a/1.jpg": b"1"}), source="imagenet")


def test_a_build_of_the_train_tar_is_that_of_its_folders(tree: Path, make_dataset: MakeDataset, tmp_path: Path) -> None:
    folders = sorted(path for path in tree.iterdir() if path.is_dir())
    inner, src = {}, tmp_path / "src"
    for number, folder in enumerate(folders):
        wnid = f"n{number + 1:08}"
        files = {f"{wnid}_{at}.JPEG": path.read_bytes() for at, path in enumerate(sorted(folder.rglob("*.*")))}
        inner[f"{wnid}.tar"] = tarred(files)
        (src / wnid).mkdir(parents=True)
        for name, content in files.items():
            (src / wnid / name).write_bytes(content)
    ours, plain = make_dataset(tar(tmp_path / "train.tar", inner), workers=1), make_dataset(src)
    order = [np.argsort(read_shards(out, "paths")) for out in (ours, plain)]
    for name in ("paths", "images", "labels", "source_bytes"):
        one, other = (read_shards(out, name)[rows] for out, rows in zip((ours, plain), order, strict=True))
        np.testing.assert_array_equal(one, other)
    assert gpu_npz.verify(ours).ok
