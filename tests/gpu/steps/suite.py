"""The project's tests that need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from runner import Context

_TESTS = Path(__file__).parents[2]
_LINES = 60


def tests(context: Context) -> dict[str, Any]:
    """The tests marked `gpu`, except those of the benches, which have steps of their own.

    Files without such tests are left out, since they may need libraries that are not installed. Warnings are no errors,
    since another version of NumPy may have others.
    """
    files = [str(path) for path in sorted(_TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    files.remove(str(_TESTS / "test_bench.py"))
    options = ["-m", "gpu", "-q", "-s", "-p", "no:cacheprovider", "-W", "default"]
    environment = {
        **os.environ,
        "GPU_NPZ_REQUIRE_GPU": "1" if context.on_gpu else "0",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    program = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(
        program, cwd=_TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    if done.returncode:
        raise RuntimeError("\n".join(lines[-_LINES:]))
    return {"output": lines[-_LINES:], "summary": lines[-1:]}
