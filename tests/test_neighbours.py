"""No file changes another one's row, ends its worker, or becomes a row that no other decoder makes of it.

`tests/faults/neighbours` looks for such files, with guard pages, for as long as one likes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import headers
import numpy as np
import pytest
from headers import adobe, exif, frame, joined, jpeg, segments
from PIL import Image
from support import reject_lines

import gpu_npz

pytest.importorskip("nvidia.dali")
INTACT = {f"{number:02}.jpg": jpeg(120, 160, number, quality=95) for number in range(20)}
FARTHEST = 1.0  # of means, in levels, from Pillow's row: the two differ by the rounding of their resizers


def build(folder: Path, files: dict[str, bytes], backend: str = "dali", **settings: object) -> dict[str, np.ndarray]:
    """The rows of a whole build of `files` among the intact ones, by path."""
    (folder / "src").mkdir(parents=True)
    for name, data in files.items():
        (folder / "src" / name).write_bytes(data)
    config = gpu_npz.BuildConfig(
        **{"size": 96, "dtype": "uint8", "device": "cpu", "backend": backend, "max_rejects": "100%", **settings}
    )
    gpu_npz.build(folder / "src", folder / "out", config)
    assert gpu_npz.verify(folder / "out").ok
    assert not {reject["path"] for reject in reject_lines(folder / "out") if reject["code"] in ("crashed", "timed-out")}
    data = gpu_npz.open_dataset(folder / "out")
    return dict(zip(data.paths, data[:], strict=True))


def among(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files, each behind an intact one."""
    return {f"{number % len(INTACT):02}-{name}": data for number, (name, data) in enumerate(files.items())} | INTACT


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The rows of the intact files without any others."""
    return build(tmp_path_factory.mktemp("alone"), INTACT)


def assert_unchanged(alone: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> None:
    assert [path for path, row in alone.items() if path not in rows or not np.array_equal(rows[path], row)] == []


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("size", [(48, 64), (384, 512)], ids=["small", "large"])
def test_two_exif_segments_of_any_orientations_change_no_neighbour_and_the_first_counts(
    size: tuple[int, int], upright: bool, alone: dict[str, np.ndarray], tmp_path: Path
) -> None:
    plain = segments(jpeg(*size, 2))
    single = {f"{each}.jpg": joined([(0xE1, exif(each)), *plain]) for each in range(1, 9)}
    expected = build(tmp_path / "single", single, exif_orientation=upright)
    assert len({row.tobytes() for row in expected.values()}) == (8 if upright else 1)
    both = {f"{first}{second}.jpg": data for first, second, data in headers.pairs(*size)}
    rows = build(tmp_path / "pairs", among(both), exif_orientation=upright)
    assert_unchanged(alone, rows)
    found = {path[3:]: row for path, row in rows.items() if path not in alone}
    assert found.keys() == both.keys()
    assert [name for name, row in found.items() if not np.array_equal(row, expected[f"{name[0]}.jpg"])] == []


@pytest.mark.parametrize(("batch_size", "mode"), [(64, "stretch"), (7, "center-crop"), (24, "pad")])
def test_300_files_with_mutated_headers_change_no_neighbour(
    batch_size: int, mode: str, tmp_path: Path, alone: dict[str, np.ndarray]
) -> None:
    mutated = among({f"{seed}.jpg": headers.mutated(seed) for seed in range(300)})
    if mode != "stretch":
        alone = build(tmp_path / "intact", INTACT, resize_mode=mode)
    rows = build(tmp_path / "mixed", mutated, batch_size=batch_size, resize_mode=mode)
    assert_unchanged(alone, rows)
    by_pillow = build(tmp_path / "pillow", mutated, "pillow", resize_mode=mode, size=96)
    assert rows.keys() == by_pillow.keys()
    assert len(rows) > 120
    differences = {path: np.abs(row.astype(int) - by_pillow[path]).mean() for path, row in rows.items()}
    assert {path: mean for path, mean in differences.items() if mean > FARTHEST} == {}


def hidden(kind: int, height: int, width: int, marker: int = 0x01) -> bytes:
    """A JPEG of 64 x 96 whose size another parser finds in a frame that a marker without a length hides."""
    body = b"\xff" + bytes([kind]) + b"\x00\x11" + frame(height, width)
    parts = segments(jpeg(64, 96, 9))
    parts[1:1] = [(marker, b""), (0xE5, b"\0\0" + body)]
    return joined(parts)


def in_scan(marker: int, body: bytes) -> bytes:
    parts = segments(jpeg(64, 96, 9))
    kind, scan = parts[-1]
    half = len(scan) // 2
    inner = b"\xff" + bytes([marker]) + (len(body) + 2).to_bytes(2, "big") + body
    parts[-1] = kind, scan[:half] + inner + scan[half:]
    return joined(parts)


def mpo() -> bytes:
    file = io.BytesIO()
    first, second = (Image.fromarray(headers.picture(*size, 9)) for size in ((64, 96), (200, 300)))
    first.save(file, "MPO", save_all=True, append_images=[second], exif=exif(6))
    return file.getvalue()


CRAFTED: dict[str, Callable[[], bytes]] = {
    "a smaller lossless frame hidden": lambda: hidden(0xC3, 32, 48),
    "a smaller baseline frame hidden": lambda: hidden(0xC0, 32, 48),
    "a larger baseline frame hidden": lambda: hidden(0xC0, 128, 192),
    "a larger lossless frame hidden": lambda: hidden(0xC3, 128, 192, 0xD3),
    "another frame in the scan": lambda: in_scan(0xC0, frame(128, 192)),
    "a second picture in the scan": lambda: in_scan(0xD8, b""),
    "DNL behind the scan": lambda: in_scan(0xDC, b"\0\x20"),
    "two pictures": lambda: jpeg(64, 96, 9) + jpeg(300, 400, 9),
    "a file of two pictures": lambda: mpo(),
    "a thumbnail": lambda: joined([(0xE1, exif(6) + jpeg(200, 300, 9)), *segments(jpeg(64, 96, 9))]),
    "CMYK": lambda: jpeg(64, 96, 9, "CMYK"),
    "CMYK without an Adobe marker": lambda: joined(
        [part for part in segments(jpeg(64, 96, 9, "CMYK")) if part[0] != 0xEE]
    ),
    "R, G, B by the Adobe marker": lambda: joined([(0xEE, adobe(0)), *segments(jpeg(64, 96, 9))[1:]]),
    "R, G, B by the Adobe marker, and JFIF": lambda: joined([(0xEE, adobe(0)), *segments(jpeg(64, 96, 9))]),
    "YCCK in three components": lambda: joined([(0xEE, adobe(2)), *segments(jpeg(64, 96, 9))[1:]]),
    "odd sampling factors": lambda: joined(
        [(kind, frame(64, 96, factors=b"\x31\x11\x11")) if kind == 0xC0 else (kind, body) for kind, body in
         segments(jpeg(64, 96, 9, subsampling=0))]
    ),
    "a short JFIF segment": lambda: joined([(0xE0, b"JFIF\0"), *segments(jpeg(64, 96, 9))[1:]]),
    "a short ICC segment": lambda: joined([(0xE2, b"ICC_PROFILE\0"), (0xE1, exif(6)), *segments(jpeg(64, 96, 9))]),
    "a short Photoshop segment": lambda: joined(
        [(0xED, b"Photoshop 3.0\x008BIM\0\0"), *segments(jpeg(64, 96, 9))]
    ),
    "restart markers": lambda: jpeg(64, 96, 9, restart_marker_blocks=1),
}  # fmt: skip


def test_headers_that_contradict_themselves_become_pillows_rows_or_rejects_in_six_builds(
    alone: dict[str, np.ndarray], tmp_path: Path
) -> None:
    crafted = among({f"{number}.jpg": make() for number, make in enumerate(CRAFTED.values())})
    by_pillow = build(tmp_path / "pillow", crafted, "pillow")
    for number in range(6):
        rows = build(tmp_path / f"{number}", crafted, batch_size=(4, 36)[number % 2], workers=number % 3)
        assert_unchanged(alone, rows)
        assert rows.keys() == by_pillow.keys()
        assert max(np.abs(row.astype(int) - by_pillow[path]).mean() for path, row in rows.items()) < FARTHEST
