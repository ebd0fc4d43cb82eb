"""Small inputs that expand to much, and the peak memory of the command that gets each."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

Command = list[str]
Row = Callable[[Path], "Command | AbstractContextManager[Command]"]
SIDE = 9450  # pixels; squared, the default of --max-pixels

# Runs a command, and prints its exit code, its peak memory and that of its children, and its last words.
_MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
print(json.dumps([done.returncode, peak, done.stderr]))
"""


@dataclass(frozen=True)
class Measured:
    """What came of a row: bytes of its input, the command's exit code, its peak memory, and the error or the reject."""

    input_bytes: int
    code: int
    peak_bytes: int
    said: str


def measured(row: Row, folder: Path) -> Measured:
    """Makes a row's input in a folder and runs its command in a process of its own."""
    made = row(folder)
    with made if not isinstance(made, list) else nullcontext(made) as command:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        answer = subprocess.run([sys.executable, "-c", _MEASURE, *command], stdout=subprocess.PIPE, check=True).stdout
    code, peak, errors = json.loads(answer)
    said = errors.strip().splitlines()[-1] if code and errors.strip() else "built"
    rejects = folder / "out" / "rejects.jsonl"
    if rejects.exists() and (lines := rejects.read_text().splitlines()):
        last = json.loads(lines[-1])
        said = f"{len(lines)} rejects: {last['code']}, {last['detail']}"
    return Measured(size, code, peak, said.replace(f"{folder}/", "").removeprefix("gpu-npz: ")[:120])


def build(src: Path | str, folder: Path, *options: str) -> Command:
    """A build by this process alone, with the default limit of pixels."""
    return [
        sys.executable, "-m", "gpu_npz", "build", str(src), str(folder / "out"), "--size", "32", "--workers", "0",
        "--device", "cpu", "--backend", "pillow", "--max-rejects", "100%", *options,
    ]  # fmt: skip


def image(folder: Path, data: bytes) -> Command:
    """One file beside a small good one."""
    (folder / "src" / "a").mkdir(parents=True)
    (folder / "src" / "a" / "1.png").write_bytes(data)
    (folder / "src" / "a" / "0.png").write_bytes(saved(Image.new("RGB", (8, 8)), "PNG"))
    return build(folder / "src", folder)


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def png_rgba16(side: int) -> bytes:
    """All zeros."""
    squeeze, row, data = zlib.compressobj(9), bytes(1 + side * 8), bytearray()
    for _ in range(side):
        data += squeeze.compress(row)
    data += squeeze.flush()

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", bytes(data)) + chunk(b"IEND", b"")


def tiff_with_tile(side: int) -> bytes:
    """10 x 10 pixels of RGB in one deflated tile of `side` x `side`."""
    squeeze, data, left = zlib.compressobj(9), bytearray(), side * side * 3
    while left > 0:
        data += squeeze.compress(bytes(min(left, 1 << 20)))
        left -= 1 << 20
    data += squeeze.flush()
    bits = 8 + len(data) + len(data) % 2
    tags = [
        (256, 4, 1, 10), (257, 4, 1, 10), (258, 3, 3, bits), (259, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, 3),
        (284, 3, 1, 1), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, len(data)),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    head = b"II*\0" + struct.pack("<I", bits + 6)
    return (head + bytes(data)).ljust(bits, b"\0") + struct.pack("<3H", 8, 8, 8) + directory


def parquet_label(folder: Path, text_bytes: int = 1_000_000, rows: int = 4096) -> Command:
    """One long label in every row, which a dictionary holds once."""
    import pyarrow as pa
    from pyarrow import parquet

    labels = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * text_bytes]))
    table = pa.table({"path": [f"a/{row}.jpg" for row in range(rows)], "label": labels})
    parquet.write_table(table, folder / "t.parquet", compression="zstd", store_schema=False)
    return build(folder / "t.parquet", folder, "--root", str(folder), "--labels", "label", "--source", "table")


def parquet_image(folder: Path, rows: int = 64) -> Command:
    """One image, padded to 50 MB, in every row."""
    import pyarrow as pa
    from pyarrow import parquet

    data = saved(Image.new("RGB", (8, 8)), "PNG").ljust(50_000_000, b"\0")
    images = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([data]))
    parquet.write_table(
        pa.table({"image": images}), folder / "t.parquet", compression="zstd", store_schema=False,
        dictionary_pagesize_limit=1 << 30,
    )  # fmt: skip
    return build(folder / "t.parquet", folder)


def pickled(folder: Path, opcode: bytes = b"}", count: int = 10 << 20) -> Command:
    """A file of CIFAR-10 with many opcodes that each make an object."""
    src = folder / "src"
    src.mkdir()
    (src / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a"] * 10}, 2))
    (src / "data_batch_1").write_bytes(b"\x80\x04" + opcode * count + b".")
    return build(src, folder)


def manifest(folder: Path) -> Command:
    """A dataset.json of 30 MB, all of it small values."""
    (folder / "dataset.json").write_text('{"format": "gpu-npz", "version": 1, "x": [' + "{}," * 10_000_000 + "{}]}")
    return [sys.executable, "-m", "gpu_npz", "info", str(folder)]


def long_name(folder: Path) -> Command:
    """One name of 4,000 bytes among 60,000 in a shard."""
    names = [f"{number}.jpg" for number in range(60_000)] + ["/".join(["x" * 200] * 20) + ".jpg"]
    (folder / "t.csv").write_text("\n".join(["path", *names]))
    return build(folder / "t.csv", folder, "--shard-size", "100000")


def csv_cell(folder: Path) -> Command:
    """A quoted cell of 300 MB, with line breaks."""
    with (folder / "t.csv").open("w") as file:
        file.write('path,label\na.jpg,"')
        for _ in range(300):
            file.write(("x" * 999 + "\n") * 1000)
        file.write('"\n')
    return build(folder / "t.csv", folder)


def json_line(folder: Path) -> Command:
    """A line of 300 MB."""
    with (folder / "t.jsonl").open("w") as file:
        file.write('{"path": "a.jpg", "label": "')
        for _ in range(300):
            file.write("x" * 1_000_000)
        file.write('"}\n')
    return build(folder / "t.jsonl", folder)


def tar_header(folder: Path) -> Command:
    """A PAX header of 300 MB."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 300_000_000
    with (folder / "src.tar").open("wb") as file:
        file.write(header.tobuf())
        file.truncate(512 + 300_000_256)
        file.seek(0, os.SEEK_END)
        file.write(tarfile.TarInfo("a/1.jpg").tobuf() + bytes(1024))
    return build(folder / "src.tar", folder)


def zip_directory(folder: Path) -> Command:
    """A hundred thousand members, each with a name of 4,000 bytes."""
    with zipfile.ZipFile(folder / "src.zip", "w") as file:
        for number in range(100_000):
            file.writestr(f"a/{number}{'x' * 3980}.jpg", b"")
    return build(folder / "src.zip", folder)


def endless_classes(folder: Path) -> Command:
    """A list of classes that does not end."""
    return [*image(folder, b"x"), "--classes-from", "/dev/zero"]


def endless_settings(folder: Path) -> Command:
    """A file of settings that does not end."""
    return [*image(folder, b"x"), "--config", "/dev/zero"]


@contextlib.contextmanager
def web(folder: Path, body: bytes, encoding: str = "", rows: int = 64) -> Iterator[Command]:
    """A table of images that a web server has, all of one content."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if encoding:
                self.send_header("Content-Encoding", encoding)
            self.end_headers()
            with contextlib.suppress(OSError):  # who asked may have seen enough
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    (folder / "t.csv").write_text("\n".join(["path", *(f"{row}.png" for row in range(rows))]))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_address[1]}"
        yield ["env", "no_proxy=127.0.0.1", *build(folder / "t.csv", folder, "--root", root)]
        server.shutdown()


def web_gzip(folder: Path) -> AbstractContextManager[Command]:
    """120 MB in 122 kB of gzip."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    return web(folder, squeeze.compress(bytes(120_000_000)) + squeeze.flush(), "gzip")


def web_large(folder: Path) -> AbstractContextManager[Command]:
    """Images of 100 MB, of which 16 are read at once."""
    return web(folder, saved(Image.new("RGB", (8, 8)), "PNG").ljust(100_000_000, b"\0"), rows=40)


ROWS: dict[str, Row] = {
    "Parquet, a label of 1 MB in 4,096 rows": parquet_label,
    "Parquet, an image of 50 MB in 64 rows": parquet_image,
    "TIFF, a tile of 26,000 x 26,000": lambda folder: image(folder, tiff_with_tile(26_000)),
    "web server, 122 kB of gzip for 120 MB": web_gzip,
    "web server, 40 images of 100 MB": web_large,
    "CIFAR, 10 MB of one-byte opcodes": pickled,
    "dataset.json of 30 MB": manifest,
    "table, a name of 4,000 bytes in a shard of 60,000": long_name,
    "CSV, a cell of 300 MB": csv_cell,
    "JSON lines, a line of 300 MB": json_line,
    "tar, a header of 300 MB": tar_header,
    "zip, a directory of 400 MB": zip_directory,
    "--classes-from that does not end": endless_classes,
    "--config that does not end": endless_settings,
    "PNG, 89 megapixels of RGBA in 16 bits": lambda folder: image(folder, png_rgba16(SIDE)),
    "GIF, 89 megapixels": lambda folder: image(folder, saved(Image.new("P", (SIDE, SIDE)), "GIF", transparency=0)),
    "WebP, 89 megapixels of RGBA": lambda folder: image(
        folder, saved(Image.new("RGBA", (16_383, 5461), (1, 2, 3, 4)), "WEBP", lossless=True, method=0)
    ),
    "JPEG, 89 megapixels, progressive CMYK": lambda folder: image(
        folder, saved(Image.new("CMYK", (SIDE, SIDE)), "JPEG", progressive=True)
    ),
    "JPEG, 89 megapixels": lambda folder: image(folder, saved(Image.new("RGB", (SIDE, SIDE)), "JPEG")),
}
