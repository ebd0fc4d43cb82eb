"""What is published: an sdist and a wheel from which the README's commands work, and what they say of themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from support import python

from gpu_npz.config import load_toml

ROOT = Path(__file__).parent.parent
PROJECT = load_toml(ROOT / "pyproject.toml")["project"]


@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_runs_the_demo(tmp_path: Path) -> None:
    for tool in ("build", "twine"):
        pytest.importorskip(tool)
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "venv", "gpu-npz-demo")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    python("-m", "build", "--outdir", tmp_path, source)  # the wheel from what the sdist contains
    (sdist,) = tmp_path.glob("*.tar.gz")
    (wheel,) = tmp_path.glob("*.whl")
    python("-m", "twine", "check", "--strict", sdist, wheel)

    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        described = message_from_bytes(archive.read(metadata))
    modules = {f"gpu_npz/{path.relative_to(ROOT / 'pipelines')}" for path in (ROOT / "pipelines").rglob("*.py")}
    modules |= {f"gpu_npz/{path.relative_to(ROOT)}" for path in (ROOT / "cli").glob("*.py")}
    assert names == modules | {"gpu_npz/py.typed"}
    assert described["Version"] == PROJECT["version"]
    assert described.get_payload() == (ROOT / "README.md").read_text()

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([tmp_path / "venv/bin/pip", "install", "-q", f"{wheel}[simd]"], check=True, cwd=tmp_path)
    demo = [tmp_path / "venv/bin/gpu-npz", "demo"]
    done = subprocess.run(demo, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert "300 rows in 3 shards: OK" in done.stdout


def test_the_classifiers_name_the_versions_of_python_that_ci_runs() -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [f"3.{name.removeprefix(prefix)}" for name in PROJECT["classifiers"] if name.startswith(prefix)]
    (run,) = re.findall(r"python-version: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())
    assert run.replace('"', "").split(", ") == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_changelog_begins_with_what_is_unreleased_and_this_version() -> None:
    titles = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[:2] == ["Unreleased", PROJECT["version"]]


def test_links_of_the_readme_are_relative_until_the_package_names_its_repository() -> None:
    """A package index shows the README, where relative links lead nowhere."""
    links = re.findall(r"\]\(([^)#][^)]*)\)", (ROOT / "README.md").read_text())
    assert links
    relative = [link for link in links if "://" not in link]
    assert bool(relative) == ("urls" not in PROJECT), (
        f"make them absolute, with the address in project.urls: {relative}"
    )
