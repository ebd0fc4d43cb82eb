"""16 bits a channel: no bit of a file is lost, and all else is as in 8 bits."""

from __future__ import annotations

import functools
import io
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support import file_bytes, pillow_of

import gpu_npz
from gpu_npz import BuildConfig, Preprocess
from gpu_npz.audit.compare import compare
from gpu_npz.audit.preview import preview
from gpu_npz.audit.stats import of_dataset, of_source
from gpu_npz.builder.estimate import estimate
from gpu_npz.cli.main import run
from gpu_npz.errors import BackendError, ImageError, ShardError
from gpu_npz.machine.environment import Machine, choose
from gpu_npz.sources.rejects import BadItem

Samples = NDArray[np.uint16]
HEIGHT, WIDTH = 14, 18


def noise(channels: int, seed: int = 0) -> Samples:
    samples = np.random.default_rng(seed).integers(0, 65536, (HEIGHT, WIDTH, channels), np.uint16)
    samples[0, 0], samples[0, 1], samples[0, 2, -1] = 0, 65535, 65535
    return samples


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: Samples, more: bytes = b"") -> bytes:
    """A 16-bit PNG of gray, gray and alpha, RGB or RGBA, with no filter (PNG, third edition, 11.2.1)."""
    height, width, channels = samples.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(samples: Samples, orientation: int = 1, alpha: int | None = None) -> bytes:
    """A 16-bit TIFF in one strip, little-endian (TIFF 6.0); `alpha` is its ExtraSamples."""
    height, width, channels = samples.shape
    data = samples.astype("<u2").tobytes()
    fields: dict[int, tuple[int, list[int]]] = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [16] * channels), 259: (3, [1]),
        262: (3, [1 if channels == 1 else 2]), 273: (4, [8]), 274: (3, [orientation]), 277: (3, [channels]),
        278: (3, [height]), 279: (4, [len(data)]), 284: (3, [1]),
    }  # fmt: skip
    if alpha is not None:
        fields[338] = (3, [alpha])
    entries, behind = b"", b""
    start = 8 + len(data) + 2 + 12 * len(fields) + 4
    for tag, (kind, values) in sorted(fields.items()):
        raw = struct.pack("<" + {3: "H", 4: "I"}[kind] * len(values), *values)
        if len(raw) > 4:
            raw, behind = struct.pack("<I", start + len(behind)), behind + raw
        entries += struct.pack("<HHI", tag, kind, len(values)) + raw.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(fields)) + entries + bytes(4) + behind


def pnm(samples: Samples, most: int = 65535) -> bytes:
    height, width, channels = samples.shape
    head = f"P{5 if channels == 1 else 6}\n# a comment\n{width} {height}\n{most}\n".encode()
    return head + samples.astype(">u2").tobytes()


decoder_of = functools.partial(pillow_of, bit_depth=16, size=(HEIGHT, WIDTH))


def decoded(data: bytes, **settings: Any) -> Samples:
    with decoder_of(**settings) as decoder:
        pixels = decoder.decode_image(data, "image")
    assert pixels.dtype == np.uint16
    return pixels


@pytest.mark.parametrize("make", [png, tiff, pnm])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_bit_of_16_bit_files_comes_through(make: Callable[[Samples], bytes], channels: int) -> None:
    samples = noise(channels)
    np.testing.assert_array_equal(decoded(make(samples)), np.broadcast_to(samples, (HEIGHT, WIDTH, 3)))
    if channels == 1:
        np.testing.assert_array_equal(decoded(make(samples), channels="gray"), samples)


@pytest.mark.parametrize("most", [256, 1023, 4095, 65534])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pnm_is_scaled_by_its_largest_value(channels: int, most: int) -> None:
    samples = noise(channels) % (most + 1)
    expected = np.rint(samples.astype(np.float64) * 65535 / most)
    np.testing.assert_array_equal(decoded(pnm(samples, most)), np.broadcast_to(expected, (HEIGHT, WIDTH, 3)))


def test_samples_of_8_bits_are_scaled_by_257(good_kinds: tuple[str, ...]) -> None:
    size = (90, 120)
    for kind in good_kinds:
        if kind in ("exif-6", "gray16", "1x1"):
            continue
        data = file_bytes(kind, size=size)
        expected = decoded_in_8_bits(data, size)
        np.testing.assert_array_equal(decoded(data, size=size), expected * np.uint16(257), err_msg=kind)
    data = b"P6 3 2 255\n" + bytes(range(18))
    expected = np.arange(18).reshape(2, 3, 3) * 257
    np.testing.assert_array_equal(decoded(data, size=(2, 3)), expected)


def decoded_in_8_bits(data: bytes, size: tuple[int, int], **settings: Any) -> NDArray[np.uint8]:
    with decoder_of(size=size, bit_depth=8, **settings) as decoder:
        return decoder.decode_image(data, "image")


def turned(samples: NDArray[Any], orientation: int) -> NDArray[Any]:
    """As Exif 2.32, table 6 says where the stored row 0 and column 0 belong."""
    if orientation >= 5:
        samples = samples.transpose(1, 0, 2)
    vertical, horizontal = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return samples[:: -1 if vertical else 1, :: -1 if horizontal else 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_turned_upright(channels: int, orientation: int) -> None:
    samples, exif = noise(channels), Image.Exif()
    exif[0x0112] = orientation
    block = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    expected = np.broadcast_to(upright := turned(samples, orientation), (*upright.shape[:2], 3))
    for data in (png(samples, block), tiff(samples, orientation)):
        np.testing.assert_array_equal(decoded(data, size=upright.shape[:2]), expected)
    np.testing.assert_array_equal(
        decoded(png(samples, block), exif_orientation=False), np.broadcast_to(samples, (HEIGHT, WIDTH, 3))
    )


@pytest.mark.parametrize("background", [(0, 0, 0), (9, 100, 255)])
def test_transparent_pixels_lie_on_the_background(background: tuple[int, int, int]) -> None:
    samples = noise(4)
    colours, alpha = samples[..., :3].astype(np.int64), samples[..., 3:].astype(np.int64)
    behind = 257 * np.array(background, np.int64)
    expected = np.rint((colours * alpha + behind * (65535 - alpha)) / 65535)
    for data in (png(samples), tiff(samples, alpha=2)):
        np.testing.assert_array_equal(decoded(data, background=background), expected)
    gray = np.rint((noise(2)[..., :1] * (a := noise(2)[..., 1:] / 65535)) + behind * (1 - a))
    np.testing.assert_array_equal(decoded(png(noise(2)), background=background), gray)
    premultiplied = samples.copy()
    premultiplied[..., :3] = np.rint(colours * alpha / 65535)
    found = decoded(tiff(premultiplied, alpha=1), background=background).astype(np.int64)
    assert np.abs(found - expected).max() <= 1
    np.testing.assert_array_equal(decoded(tiff(samples, alpha=0), background=background), samples[..., :3])


def test_one_colour_of_a_png_may_be_transparent() -> None:
    samples = noise(3)
    data = png(samples, chunk(b"tRNS", struct.pack(">HHH", *samples[5, 5].tolist())))
    expected = samples.copy()
    expected[5, 5] = (257, 514, 771)
    np.testing.assert_array_equal(decoded(data, background="1,2,3"), expected)


def test_gray_weighs_the_colours_as_itu_r_bt_601() -> None:
    samples = noise(3)
    red, green, blue = (samples[..., channel].astype(np.int64) for channel in range(3))
    expected = (299 * red + 587 * green + 114 * blue + 500) // 1000
    for data in (png(samples), tiff(samples), pnm(samples)):
        np.testing.assert_array_equal(decoded(data, channels="gray")[..., 0], expected)


def weights(before: int, after: int) -> NDArray[np.float64]:
    """Pillow's antialiased bilinear filter (Resample.c, precompute_coeffs), (after, before)."""
    scale = max(before / after, 1.0)
    centres, places = (np.arange(after) + 0.5) * before / after, np.arange(before) + 0.5
    triangle = np.clip(1 - np.abs(places[None] - centres[:, None]) / scale, 0, None)
    return np.asarray(triangle / triangle.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("size", [(7, 9), (5, 16), (30, 40)], ids=str)
def test_resizing_keeps_16_bits(size: tuple[int, int]) -> None:
    samples = noise(3)
    exact = np.einsum("ai,bj,ijc->abc", weights(HEIGHT, size[0]), weights(WIDTH, size[1]), samples.astype(np.float64))
    difference = decoded(png(samples), size=size) - exact
    # Half a level for rounding; and Pillow keeps 32-bit floats between the two passes.
    assert np.abs(difference).max() < 0.52


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("mode", ["stretch", "center-crop", "pad"])
def test_places_and_filters_are_those_of_8_bits(mode: str, interpolation: str) -> None:
    settings = {"size": (24, 32), "resize_mode": mode, "interpolation": interpolation, "pad_value": 77}
    for kind in ("jpeg", "exif-6", "palette", "gray16"):
        data = file_bytes(kind, size=(90, 70))
        eight = decoded_in_8_bits(data, **settings).astype(np.float64)
        # 8 bits are rounded after each of two passes; gray16 before them, too.
        assert np.abs(decoded(data, **settings) / 257 - eight).max() <= 2, kind
    if mode == "pad":
        assert (decoded(png(noise(3)), **settings)[:, -1] == 77 * 257).all()
        assert (decoded(png(noise(3)), **settings)[:, -2] != 77 * 257).all()


def test_what_overshoots_is_cut_off() -> None:
    samples = np.zeros((HEIGHT, WIDTH, 1), np.uint16)
    samples[:, WIDTH // 2 :] = 65535
    found = decoded(png(samples), size=(HEIGHT, 2 * WIDTH), interpolation="lanczos")
    assert (found.min(), found.max()) == (0, 65535)
    assert found[:, : WIDTH - 4].max() < 5000 < 60000 < found[:, WIDTH + 4 :].min()  # nothing has gone round


def test_bad_files_have_the_codes_of_8_bits(bad_kinds: dict[str, tuple[str, str]]) -> None:
    whole = {"png": png(noise(3)), "tiff": tiff(noise(3)), "pnm": pnm(noise(3))}
    files = {kind: file_bytes(kind) for kind in bad_kinds if kind != "empty"}
    files |= {f"half-{kind}": data[: len(data) // 2] for kind, data in whole.items()}
    for kind, data in files.items():
        verdicts = []
        for depth in (8, 16):
            with decoder_of(bit_depth=depth) as decoder, pytest.raises(BadItem) as caught:
                decoder.decode_image(data, "image")
            verdicts.append((caught.value.stage, caught.value.code))
        assert verdicts[0] == verdicts[1], kind
    with pytest.raises(BadItem, match="expected 9 x 9"):
        decoded(png(noise(3)), size=(9, 9), resize_mode="none")
    with pytest.raises(BadItem, match="at most 100"):
        decoded(png(noise(3)), size=(9, 9), max_pixels=100)


@pytest.mark.parametrize("library", ["imagecodecs", "tifffile"])
@pytest.mark.parametrize(("trouble", "error"), [(MemoryError("trouble"), ShardError), (ValueError("trouble"), BadItem)])
def test_trouble_of_a_library_is_the_file_s_unless_memory_is_short(
    library: str, trouble: Exception, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise trouble

    module = pytest.importorskip(library)
    monkeypatch.setattr(*((module, "png_decode") if library == "imagecodecs" else (module.TiffPage, "asarray")), fail)
    with pytest.raises(error):
        decoded(png(noise(3)) if library == "imagecodecs" else tiff(noise(3)))


@pytest.mark.parametrize("library", ["imagecodecs", "tifffile"])
def test_without_its_libraries_the_setting_is_refused_with_what_to_install(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    message = r"--bit-depth 16 needs tifffile and imagecodecs \(.*\); run: pip install 'tifffile>=.*' 'imagecodecs>=.*'"
    with pytest.raises(BackendError, match=message):
        choose(BuildConfig(bit_depth=16), Machine(0, None, None, None, None))
    with pytest.raises(BackendError, match=message):
        Preprocess(BuildConfig(bit_depth=16), (8, 8))(np.zeros((8, 8), np.uint8))


def text_pnm(samples: Samples, most: int) -> bytes:
    height, width, _ = samples.shape
    lines = (" ".join(map(str, line)) + "  # a comment" for line in samples.reshape(height, -1))
    return f"P3\n# a comment\n{width} {height} # another\n{most}\n".encode() + "\n".join(lines).encode() + b"\n"


@pytest.mark.parametrize("most", [255, 1023, 65535])
def test_samples_of_a_ppm_may_be_written_as_text(most: int) -> None:
    samples = np.minimum(noise(3), most)
    in_8_bits = np.rint(samples / most * 255)
    expected = np.rint(samples.astype(np.float64) * 65535 / most) if most > 255 else in_8_bits * 257
    np.testing.assert_array_equal(decoded(text_pnm(samples, most)), expected)
    np.testing.assert_array_equal(decoded_in_8_bits(text_pnm(samples, most), (HEIGHT, WIDTH)), in_8_bits)


def test_samples_above_the_white_of_a_pnm_are_white() -> None:
    samples = noise(3) // 2
    data = pnm(samples, 1000)
    expected = np.floor(np.minimum(samples, 1000) * (65535 / 1000) + 0.5)
    np.testing.assert_array_equal(decoded(data), expected)


def test_a_gpu_is_left_alone_with_a_warning() -> None:
    machine = Machine(1, 13_000, None, None, None)
    choice = choose(BuildConfig(bit_depth=16), machine)
    assert (choice.backend, choice.device) == ("pillow", "cpu")
    assert "decoding on the CPU with pillow, because" in str(choice.warning)
    assert choose(BuildConfig(bit_depth=16, device="cpu"), machine).warning is None


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deep")
    files = {
        "a/0.png": png(noise(3, 0)), "a/1.tif": tiff(noise(1, 1)), "a/2.png": png(noise(4, 2)),
        "b/3.ppm": pnm(noise(3, 3)), "b/4.jpg": file_bytes("jpeg"), "b/5.png": png(noise(3, 5))[:200],
    }  # fmt: skip
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


def build(src: Path, out: Path, **values: Any) -> gpu_npz.Dataset:
    common = {"device": "cpu", "workers": 0, "size": (HEIGHT, WIDTH), "shard_size": 2, "bit_depth": 16}
    gpu_npz.build(src, out, BuildConfig(**{**common, **values}))
    return gpu_npz.open_dataset(out)


@pytest.mark.parametrize("make", [png, tiff, pnm])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_build_in_8_bits_of_files_in_16_says_so_and_one_in_16_does_not(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Samples], bytes],
    channels: int,
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for name, data in {"0.jpg": b"text", "1.png": file_bytes("gray"), "2.png": make(noise(channels))}.items():
        (src / name).write_bytes(data)
    build(src, tmp_path / "deep")
    assert "16 bits" not in caplog.text
    doubt = "'2.png', for one, has 16 bits per channel, of which 8 are kept; --bit-depth 16 keeps all of them"
    build(src, tmp_path / "out", bit_depth=8)
    assert [record.getMessage() for record in caplog.records].count(doubt) == 1
    sampled = "1 of 3 sampled images have 16 bits per channel, of which 8 are kept; --bit-depth 16 keeps all of them"
    assert sampled in estimate(src, BuildConfig(device="cpu", size=8), seconds=0).warnings
    (src / "2.png").unlink()
    assert not any("16 bits" in each for each in estimate(src, BuildConfig(device="cpu", size=8), seconds=0).warnings)


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("kind", ["unit", "log", "standardize"])
def test_a_build_of_16_bits_is_read_verified_and_looked_at(src: Path, tmp_path: Path, channels: str, kind: str) -> None:
    settings = {"channels": channels, "normalize": kind}
    stored = build(src, tmp_path / "stored", dtype="uint16", layout="NHWC", **settings)
    floats = build(src, tmp_path / "floats", **settings)
    np.testing.assert_array_equal(stored.normalized(slice(None)).transpose(0, 3, 1, 2), floats[:], strict=True)
    assert stored.dtype == np.uint16
    if channels == "rgb":
        np.testing.assert_array_equal(stored[0], noise(3, 0))
        np.testing.assert_array_equal(stored[3], noise(3, 3))
    for data in (stored, floats):
        assert gpu_npz.verify(data.path).ok
        found = compare(data.path, 100)
        assert (found.exact, found.rows, found.problems) == (True, 5, ())
        preprocess = Preprocess.from_dataset(data.path)
        for row, path in enumerate(data.paths[:]):
            np.testing.assert_array_equal(preprocess(src / path), data[row])
            np.testing.assert_array_equal(preprocess.normalized(src / path), data.normalized(row))
    counts = of_source(src, stored.manifest.config).histograms
    assert of_dataset(stored.path).histograms == counts
    if kind != "standardize":
        assert of_dataset(floats.path).histograms == counts
    assert len(counts[0]) == 65536
    planes = stored[:].reshape(-1, stored.image_shape[2])[:, :: -1 if channels == "bgr" else 1]
    assert counts[0] == tuple(np.bincount(planes[:, 0], minlength=65536).tolist())
    assert of_dataset(stored.path).mean[0] == pytest.approx(planes[:, 0].mean() / 65535, rel=1e-12)
    assert of_dataset(stored.path).max[0] == planes[:, 0].max()
    sheet = preview(stored.path, tmp_path / "sheet.png", tile=WIDTH)
    with Image.open(tmp_path / "sheet.png") as image:
        square = np.asarray(image)[6 : 6 + HEIGHT, 6 : 6 + WIDTH]  # a cell has the size of an image
    shown = np.rint(stored[sheet.tiles[0].row or 0] / 257)[..., :: -1 if channels == "bgr" else 1]
    np.testing.assert_array_equal(square, np.broadcast_to(shown, square.shape))


def test_mean_and_std_of_the_dataset_itself_are_measured_in_16_bits(src: Path, tmp_path: Path) -> None:
    values = build(src, tmp_path / "out", normalize="dataset")[:].astype(np.float64)
    np.testing.assert_allclose(values.mean(axis=(0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(values.std(axis=(0, 2, 3)), 1, atol=1e-6)


def test_torch_reads_them(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(
        "gpu_npz.readers.contract._seen", {}
    )  # which other datasets were opened is none of its business
    from gpu_npz.readers.torch import loader, look_up

    data = build(src, tmp_path / "out", dtype="uint16", normalize="minmax")
    ((images, _),) = loader(data.path, 8, device="cpu")
    np.testing.assert_array_equal(images.numpy(), data.normalized(slice(None)), strict=True)
    stored = torch.from_numpy(data[:])
    np.testing.assert_array_equal(look_up(torch.from_numpy(data.preprocess.tables(data[:])), stored), images)
    ((plain, _),) = loader(data.path, 8, device="cpu", normalize=False)
    assert plain.dtype == torch.uint16


def test_pixels_and_open_images_give_what_a_file_of_them_gives() -> None:
    preprocess = Preprocess(BuildConfig(bit_depth=16, dtype="uint16", size="9x11", background="3,4,5"), (9, 11))
    for channels in (1, 3, 4):
        samples = noise(channels)
        expected = preprocess(png(samples))
        np.testing.assert_array_equal(preprocess(samples), expected)
        for data in (png(samples), tiff(samples, alpha=2 if channels == 4 else None)):
            with Image.open(io.BytesIO(data)) as picture:
                np.testing.assert_array_equal(preprocess(picture), expected)
    np.testing.assert_array_equal(preprocess(noise(1)[..., 0]), preprocess(noise(1)))
    eight = (noise(3) // 257).astype(np.uint8)
    np.testing.assert_array_equal(preprocess(eight), preprocess(eight * np.uint16(257)))
    with pytest.raises(ImageError, match="too-large"):
        Preprocess(BuildConfig(bit_depth=16, size=4, max_pixels=20), (4, 4))(noise(3))


def test_its_description_and_its_contract_name_the_depth() -> None:
    deep = Preprocess(BuildConfig(bit_depth=16, normalize="unit", dtype="uint16"), (8, 8))
    assert "16 bits per channel, red, green, blue" in deep.describe()
    assert "levels of 0 to 65535 are stored; read as (level / 65535 - mean) / std" in deep.describe()
    assert deep.differences(Preprocess(BuildConfig(normalize="unit"), (8, 8))) == ["bit-depth: 16 and 8"]


def test_the_command_counts_65536_levels(src: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bit-depth", "16", "--device", "cpu", "--workers", "0", "--size", f"{HEIGHT}x{WIDTH}"]
    assert run(["stats", str(src), *options]) == 0
    assert "levels 0 to 65535" in capsys.readouterr().out
    assert run(["stats", str(src), *options, "--json"]) == 0
    (red, *_) = json.loads(capsys.readouterr().out)["channels"]
    assert (red["min"], red["max"], len(red["histogram"])) == (0, 65535, 65536)
