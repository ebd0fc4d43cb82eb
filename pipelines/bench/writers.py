"""Builds compared with other ways to turn a folder of JPEGs into a dataset: litData, MosaicML's MDS, a short script.

All get the same files and as many workers as there are cores, and end with their output on the disk. Each runs in a
fresh process, see `peers.py`. The measure of all is decoding and resizing alone, by our decoder on all cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..config import BuildConfig
from ..errors import BackendError, UsageError
from ..machine.environment import choose, inspect, usable_cpus
from ..sources.folders.folder import FolderSource
from . import peers
from .cores import resized
from .rates import Measurement, Tick, Way, folder_of, in_turns, linked, machine
from .setup import Setup

IMAGES = 2_000
ROUNDS = 5
_DTYPES = ("uint8", "float32")
_RESIZE = "decode+resize"
_LAST_LINES = 5


def measure(
    src: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    python: str = sys.executable,
    images: int = IMAGES,
    rounds: int = ROUNDS,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Measures builds of uint8 and float32, and the other writers whose packages are installed.

    Args:
        src: a folder as for `build`, whose images can all be decoded; its files are linked until there are enough.
        config: the settings of the builds.
        python: the interpreter of the environment in which the other writers are installed.
        images: how many images.
        rounds: how often everything is measured; the writers take turns within a round.
        folder: where to write; the system's temporary folder if None. It needs 0.7 MB per image.
        say: called with the name of what is measured next.

    Raises:
        UsageError: there are too few images for the number of workers, or `python` is no interpreter.
        BackendError: a writer failed.
        SourceError: as `build`.
    """
    given = {"device": "cpu", "backend": "pillow", "workers": usable_cpus(), "max_rejects": 0}
    config = BuildConfig(**{**(config or BuildConfig()).model_dump(), **given})
    choice = choose(config, inspect(config))
    versions = _versions(python)
    missing = {name: [each for each in needed if each not in versions] for name, needed in peers.NEEDED.items()}
    found = [name for name, packages in missing.items() if not packages]
    with tempfile.TemporaryDirectory(prefix="gpu-npz-bench-", dir=folder) as name:
        place = Path(name)
        source = FolderSource(linked(src, place / "src", images))
        setup = Setup.of(config, choice, source, place)
        first = setup.tuning.workers * setup.tuning.batch_size
        if images <= first:
            raise UsageError(
                f"{images} images are too few for {setup.tuning.workers} workers, whose first {first} do not count; "
                "use more --images or a smaller --batch-size"
            )
        ways: dict[str, tuple[tuple[str, ...], Way]] = {_RESIZE: ((), partial(resized, setup=setup))}
        for dtype in _DTYPES:
            typed = Setup.of(config.model_copy(update={"dtype": dtype}), choice, source, place)
            others = [f"{other} {dtype}" for other in found]
            ways |= {
                f"{other} {dtype}": ((), partial(_write, python=python, name=other, setup=typed)) for other in found
            }
            ways[f"build {dtype}"] = (
                (*others, _RESIZE),
                partial(_write, python=sys.executable, name="build", setup=typed),
            )
        load = os.getloadavg()[0]
        rows = in_turns(ways, rounds, say)
        provenance = setup.decoder().provenance()
    left_out = tuple(
        f"{name} is left out, because {' and '.join(packages)} cannot be found; run: "
        f"{python} -m pip install {' '.join(packages)}, or use --peers PYTHON for another environment"
        for name, packages in missing.items()
        if packages
    )
    used = {"images": images, "size": config.size, "workers": setup.tuning.workers}
    theirs = {f"peers' {name}" if name in ("python", "numpy", "pillow") else name: versions[name] for name in versions}
    return Measurement(rows, used, {**machine(provenance), **theirs, "load before": round(load, 2)}, left_out)


def _versions(python: str) -> dict[str, str]:
    """The versions of `python` and of the packages in its environment, by name."""
    try:
        answer = subprocess.run([python, peers.__file__, "versions"], capture_output=True, text=True, check=True)
        versions: dict[str, str] = json.loads(answer.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as exc:
        raise UsageError(
            f"--peers {python}: cannot be run as a Python interpreter ({exc}); use one such as /path/to/venv/bin/python"
        ) from exc
    return versions


def _write(tick: Tick, python: str, name: str, setup: Setup) -> None:
    """Runs a writer of `peers.py` in a process of its own."""
    config, size = setup.config, setup.config.size
    assert size is not None
    with folder_of(setup.place / "out") as out, folder_of(setup.place / "scratch") as scratch:
        job = peers.Job(
            src=os.fspath(setup.source.location),
            out=os.fspath(out),
            scratch=os.fspath(scratch),
            workers=setup.tuning.workers,
            dtype=config.dtype,
            size=size,
            config=config.model_dump(mode="json"),
        )
        with subprocess.Popen(
            [python, peers.__file__, name, json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # the modules beside `peers.py` must hide none of a library's
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # the script and its workers
                raise
        if process.returncode:
            last = "\n".join(output.strip().splitlines()[-_LAST_LINES:])
            raise BackendError(
                f"{name} failed in {python} with exit status {process.returncode}; check its packages, and that every "
                f"image of SRC can be decoded. It wrote last:\n{last}"
            )
        span: peers.Span = json.loads((scratch / peers.SPAN).read_bytes())
        tick(0, span["first"])
        tick(span["images"], span["last"])
