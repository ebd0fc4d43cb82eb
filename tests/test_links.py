"""Symbolic links out of SRC: followed and counted in folders, refused in tables, and as the option says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from gpu_npz.config import BuildConfig
from gpu_npz.dataset.plan import Plan
from gpu_npz.dataset.selection import listed
from gpu_npz.errors import SourceError
from gpu_npz.sources import open_source


def paths(src: Path, **settings: Any) -> list[str]:
    config = BuildConfig(**settings)
    arrays = listed(open_source(src, config), config)
    return [item.path for item in Plan(arrays, 1).items(0, len(arrays["name_ends"]))]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Class `a` has two images, a link to one of them, a link to a file outside, and one to a folder outside."""
    root, outside = tmp_path / "src", tmp_path / "outside" / "photos"
    for folder in (root / "a", outside):
        folder.mkdir(parents=True)
    for name in ("a/1.jpg", "a/2.jpg"):
        (root / name).write_bytes(b"x")
    for name in ("secret.jpg", "other.jpg"):
        (outside / name).write_bytes(b"x")
    (root / "a" / "inner.jpg").symlink_to("2.jpg")
    (root / "a" / "outer.jpg").symlink_to(outside / "secret.jpg")
    (root / "a" / "more").symlink_to(outside)
    return root


def table(src: Path, *cells: str) -> Path:
    (src / "t.csv").write_text("\n".join(["path", *cells]))
    return src / "t.csv"


def test_a_folder_follows_links_and_says_once_how_many_items_lie_outside(
    src: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = paths(src)
    assert found == [
        "a/1.jpg", "a/2.jpg", "a/inner.jpg", "a/outer.jpg", "a/more/other.jpg", "a/more/secret.jpg",
    ]  # fmt: skip
    (said,) = [record.getMessage() for record in caplog.records if "outside" in record.getMessage()]
    assert said.endswith("3 items are outside of it, behind symbolic links; use --no-follow-links to omit them")


@pytest.mark.usefixtures("src")
def test_a_folder_that_is_reached_by_a_link_has_nothing_outside(
    src: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    assert paths(tmp_path / "link") == ["photos/other.jpg", "photos/secret.jpg"]
    assert not [record for record in caplog.records if "lie outside" in record.getMessage()]


def test_no_follow_links_leaves_all_links_out_and_says_how_many(src: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert paths(src, follow_links=False) == ["a/1.jpg", "a/2.jpg"]
    (said,) = [record.getMessage() for record in caplog.records if "links" in record.getMessage()]
    assert said.endswith("3 symbolic links are omitted (--no-follow-links)")


@pytest.mark.parametrize("cell", ["a/outer.jpg", "a/more/secret.jpg", "a/more/../outer.jpg"])
@pytest.mark.parametrize("follow_links", [None, False])
def test_a_table_does_not_lead_out_of_its_folder_by_a_link(src: Path, cell: str, follow_links: bool | None) -> None:
    named = table(src, "a/1.jpg", cell)
    with pytest.raises(SourceError, match=r"row 2 has the path .* by a symbolic link, to .*/photos/secret\.jpg"):
        paths(named, follow_links=follow_links)
    assert len(paths(named, follow_links=True)) == 2


def test_a_table_may_name_links_that_stay_in_its_folder(src: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(src)
    (src / "b").symlink_to("a")
    cells = ["a/1.jpg", "a/inner.jpg", "b/2.jpg", "a/gone.jpg", "gone/1.jpg"]
    table(src, *cells)
    assert paths(tmp_path / "link" / "t.csv") == cells


@pytest.mark.parametrize("labels", ["FILE", "csv:labels.csv"])
def test_labels_beside_a_folder_follow_links_as_the_folder_does(src: Path, tmp_path: Path, labels: str) -> None:
    where = src / "a" if labels == "csv:labels.csv" else tmp_path
    before = "" if labels == "csv:labels.csv" else "a/"
    for name in ("more", "inner.jpg"):
        (src / "a" / name).unlink()
    (where / "labels.csv").write_text(f"path,label\n{before}1.jpg,x\n{before}2.jpg,y\n{before}outer.jpg,x\n")
    labels = labels.replace("FILE", str(where / "labels.csv"))
    assert paths(src, labels=labels) == ["a/1.jpg", "a/2.jpg", "a/outer.jpg"]
    with pytest.raises(SourceError, match=r"leads out of .* by a symbolic link"):
        paths(src, labels=labels, follow_links=False)
