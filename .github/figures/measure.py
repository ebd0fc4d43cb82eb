"""Measures the figures of README.md, and writes them to figures.json beside this file and to the README's table.

    python .github/figures/measure.py SRC     # a folder of at least 300 photos; takes a quarter of an hour on 2 cores
    python .github/figures/measure.py         # only writes the table again

Run it while nothing else uses the machine, in an environment with `gpu-npz[simd,torch,bench]` and what is compared:
ffcv, litdata, mosaicml-streaming. In each round, all candidates run once; every figure is the median of the rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).with_name("figures.json")
README = Path(__file__).parents[2] / "README.md"
PLOT = README.parent / ".github" / "assets" / "storage.png"
HEAD = "| images/s | gpu-npz | others |\n|---|---|---|\n"
BENCHES = {
    "pipeline": ["pipeline", "--device", "cpu", "--images", "750", "--rounds", "3"],
    "writers": ["writers", "--images", "1500", "--rounds", "3"],
    "storage": ["storage", "--dtype", "uint8", "--images", "750", "--rounds", "3", "--plot", str(PLOT)],
    "loading": ["loading", "--images", "1536", "--rounds", "5"],
}
SCRIPT = "Pillow and `np.savez` on all cores"
# What is measured, the bench, its operation, and its candidates: ours first, the others with the names that are shown.
LINES: list[tuple[str, str, str, str, dict[str, str]]] = [
    (
        "build float32 shards",
        "pipeline",
        "",
        "all cores float32",
        {"usual script": "the usual script: Pillow, `np.savez_compressed`"},
    ),
    *(
        (
            f"build {dtype} shards",
            "writers",
            "",
            f"build {dtype}",
            {f"mds {dtype}": "MosaicML", f"litdata {dtype}": "LitData", f"savez {dtype}": SCRIPT},
        )
        for dtype in ("float32", "uint8")
    ),
    ("write float32 arrays", "pipeline", "", "shard writer", {"savez": "`np.savez`"}),
    (
        "read one image at random",
        "storage",
        "read one at random",
        "gpu-npz",
        {"npy": "`.npy`", "lmdb": "LMDB", "npz": "`np.load` of an `.npz`"},
    ),
    (
        "read all images in order",
        "storage",
        "read all in order",
        "gpu-npz",
        {"lmdb": "LMDB", "npy": "`.npy`", "npz": "`np.load` of an `.npz`"},
    ),
    (
        "deliver shuffled, normalized batches",
        "loading",
        "",
        "loader",
        {
            "FFCV": "FFCV",
            "MosaicML Streaming": "MosaicML",
            "LitData": "LitData",
            "image files": "a DataLoader over JPEGs",
        },
    ),
]


def measure(src: str) -> dict[str, Any]:
    """Runs the benches on a folder of images and returns their results by name."""
    gpu_npz = Path(sys.executable).with_name("gpu-npz")
    found = {}
    for name, (kind, *options) in BENCHES.items():
        command = [str(gpu_npz), "bench", kind, src, *options, "--json"]
        result = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, "NO_COLOR": "1"})
        found[name] = json.loads(result.stdout)
    return found


def table(figures: dict[str, Any]) -> str:
    """The README's table."""
    lines = []
    for what, bench, operation, ours, others in LINES:
        found = figures[bench]
        if operation:
            found = next(each for each in found["operations"] if each["name"] == operation)
        rates = {row["name"]: row["median"] for row in found["rows"]}
        compared = ", ".join(f"{_rate(rates[other])} ({name})" for other, name in others.items())
        lines.append(f"| {what} | {_rate(rates[ours])} | {compared} |\n")
    return HEAD + "".join(lines)


def _rate(value: float) -> str:
    digits = max(0, len(str(int(value))) - 2)
    return f"{round(value, -digits):,.0f}" if value >= 1 else f"{value:.2f}"


def main() -> None:
    if len(sys.argv) > 1:
        FIGURES.write_text(json.dumps(measure(sys.argv[1]), indent=1) + "\n")
    text = README.read_text()
    start = text.index(HEAD)
    end = text.index("\n\n", start) + 1
    README.write_text(text[:start] + table(json.loads(FIGURES.read_text())) + text[end:])


if __name__ == "__main__":
    main()
