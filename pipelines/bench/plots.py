"""Plots the results of `storage` on linear and logarithmic axes."""

from __future__ import annotations

import os
from typing import Any

from ..errors import StorageError, UsageError
from .formats import OURS, OURS_DEFLATED
from .storage import IN_ORDER, RANDOM, StorageMeasurement

_STYLES: dict[
    str, dict[str, Any]
] = {  # our lines are thick and in color; the others are thin and gray, with a marker for each
    OURS.name: {"color": "tab:red", "linewidth": 3, "marker": "o", "zorder": 3},
    OURS_DEFLATED.name: {"color": "tab:orange", "linewidth": 3, "marker": "o", "zorder": 3},
}
_MARKERS = "s^vDPX*<>"


def draw(measured: StorageMeasurement, path: str | os.PathLike[str]) -> None:
    """Writes a PNG: write rates by number of images at the top, read rates at the bottom; linear left, log right.

    Raises:
        UsageError: matplotlib is missing.
        StorageError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    writes = [operation for operation in measured.operations if operation.name.startswith("write")]
    reads = [operation for operation in measured.operations if operation.name in (RANDOM, IN_ORDER)]
    names = [row.name for row in measured.operations[0].rows]
    figure = Figure(figsize=(14, 9), layout="constrained")
    for column, scale in enumerate(("linear", "log")):
        above, below = (figure.add_subplot(2, 2, 2 * line + column + 1) for line in range(2))
        for place, name in enumerate(names):
            rates = [operation.rows[place].median for operation in writes]
            style: dict[str, Any] = _STYLES.get(name) or {
                "color": "0.5",
                "marker": _MARKERS[place % len(_MARKERS)],
                "linewidth": 1,
            }
            above.plot([operation.images for operation in writes], rates, label=name, **style)
        for number, operation in enumerate(reads):
            spots = [place + (number - 0.5) * 0.4 for place in range(len(names))]
            below.bar(spots, [row.median for row in operation.rows], 0.4, label=operation.name)
        below.set_xticks(range(len(names)), names, rotation=30, ha="right")
        for label, name in zip(below.get_xticklabels(), names, strict=True):
            label.set_fontweight("bold" if name in _STYLES else "normal")
        above.set(title=f"write ({scale})", xlabel="images in a store", ylabel="images/s", xscale=scale, yscale=scale)
        below.set(title=f"read ({scale})", ylabel="images/s", yscale=scale)
        below.margins(y=0.2)  # room for the legend
        below.legend()
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=len(names))
    try:
        figure.savefig(path, format="png")
    except OSError as exc:
        raise StorageError(f"{os.fspath(path)!r}: {exc.strerror}; give --plot a file that can be written") from exc


def require_matplotlib() -> None:
    """Raises UsageError if matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401  # only whether it can be imported
    except ImportError as exc:
        raise UsageError(f"--plot needs matplotlib ({exc}); run: pip install matplotlib") from exc
