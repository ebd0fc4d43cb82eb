"""Measures the figures of README.md, and writes them to figures.json beside this file and to the README's table.

    python .github/figures/measure.py SRC     # a folder of at least 1,500 photos; takes about an hour on 2 cores
    python .github/figures/measure.py         # only writes the table again

Run it in an environment with gpu-npz and PyTorch while nothing else uses the machine. In each round, all candidates run
once; every figure is the median of the rounds.
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
HEAD = "| images/s | gpu-npz | alternative | speedup |\n|---|---|---|---|\n"
BENCHES = {
    "pipeline": ["pipeline", "--device", "cpu", "--images", "1500", "--rounds", "3"],
    "storage": ["storage", "--dtype", "uint8", "--images", "1500", "--rounds", "3"],
}


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
    stages = {row["name"]: row["median"] for row in figures["pipeline"]["rows"]}
    operations = {each["name"]: each["rows"] for each in figures["storage"]["operations"]}
    stored = {
        name: {row["name"]: row["median"] for row in rows} for name, rows in operations.items() if name[:5] != "write"
    }
    loading = next(rates for name, rates in stored.items() if name.startswith("DataLoader"))
    loops = {name.split()[-1]: name for name in stages if " loops " in name}  # such as `2 loops uint8`
    compressed, savez = "usual script: Pillow, `np.savez_compressed`", "a loop per core with Pillow, `np.savez`"
    lines = [
        ("build float32 shards", "all cores float32", "usual script", stages, compressed),
        ("build float32 shards", "all cores float32", loops["float32"], stages, savez),
        ("build uint8 shards", "all cores uint8", loops["uint8"], stages, savez),
        ("write float32 arrays", "shard writer", "savez", stages, "`np.savez`"),
        ("read one image at random", "gpu-npz", "npz", stored["read one at random"], "`np.load`"),
        ("read all images in order", "gpu-npz", "npz", stored["read all in order"], "`np.load`"),
        ("an epoch of a PyTorch DataLoader", "gpu-npz", "image files", loading, "image files"),
    ]
    return HEAD + "".join(
        f"| {what} | {_rate(rates[ours])} | {_rate(rates[other])} ({instead}) | {rates[ours] / rates[other]:.1f} |\n"
        for what, ours, other, rates, instead in lines
    )


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
