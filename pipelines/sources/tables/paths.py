"""Paths in tables: the root that they are relative to, and advice about paths that are not below it."""

from __future__ import annotations

import functools
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from shlex import quote
from typing import Any, Literal
from urllib.parse import unquote

from ...storage.base import is_remote
from ..access.local import Inside
from ..access.stores import is_web
from ..base import as_bytes

_FILE = "file://"
_DRIVE = re.compile(r"[A-Za-z]:/|//")  # a Windows drive or network share, with slashes
_SED = (".csv", ".tsv")  # formats in which a backslash is not an escape, so that sed can replace it
_SPECIAL = re.compile(r"([][\\.*^$+?(){}|#])")  # characters to escape in sed -E between #


class ForeignPath(ValueError):
    """A path that no file below the root has: an absolute path elsewhere, or a Windows path."""

    def __init__(self, message: str, root: TableRoot) -> None:
        super().__init__(message)
        self.root = root


@dataclass(frozen=True)
class TableRoot:
    """The folder that the paths of a table are relative to.

    Attributes:
        root: an absolute path or a URL.
        option: the option that names another root; None if SRC itself is the root.
        follow_links: whether symbolic links may lead out of the root; always true for a URL.
    """

    root: str
    option: str | None = "--root"
    follow_links: bool = True

    def path(self, text: str) -> bytes:
        """A path of the table, relative to the root; see `relative_path`.

        Raises:
            ValueError: it is not below the root. ForeignPath if `advice` can say what to do.
        """
        form, _ = _form(text)
        if form == "windows" and (is_remote(self.root) or not os.path.lexists(os.path.join(self.root, text))):
            raise ForeignPath(f"has the path {text[:200]!r}, which is a Windows path", self)
        if form == "full" and _below_root(self.root, text) is None:
            raise ForeignPath(f"has the path {text[:200]!r}, which is not below {self.root!r}", self)
        path = relative_path(text, self.root)
        if not self.follow_links and not self._inside.holds(path):
            real = os.path.realpath(os.path.join(os.fsencode(self.root), path))
            raise ValueError(
                f"has the path {text[:200]!r}, which leads out of {self.root!r} by a symbolic link, to "
                f"{os.fsdecode(real)!r}; copy what it needs into that folder, or say --follow-links"
            )
        return path

    @functools.cached_property
    def _inside(self) -> Inside:
        return Inside(os.fsencode(self.root))

    def advice(self, table: str, texts: Iterable[Any]) -> str:
        """What to do about a table with foreign paths.

        Args:
            table: the table's path or URL.
            texts: all values of its path column.
        """
        forms: Counter[str] = Counter()
        shared = None
        for text in texts:
            if isinstance(text, str):
                form, path = _form(text)
                forms[form] += 1
                if form != "relative":
                    shared = _shared_folder(path, shared)
        if forms["windows"]:
            found = f"{forms['windows']} of {forms.total()} paths are Windows paths"
        elif forms["relative"]:
            found = f"{forms['full']} of {forms.total()} paths are absolute and {forms['relative']} are relative"
        elif not shared:
            return f"the {forms.total()} paths have no folder in common; make a table for each place"
        else:
            found = f"all {forms.total()} paths are below {shared!r}"
            if is_remote(shared) or os.path.isdir(shared):
                return f"{found}; " + (
                    "give that folder as SRC" if self.option is None else f"say {self.option} {quote(shared)}"
                )
            found += ", which is not there"
        advice = f"{found}; write all of them with slashes, relative to "
        advice += "SRC" if self.option is None else f"the folder that {self.option} names"
        if forms["relative"] or is_remote(table) or not table.endswith(_SED):
            return advice
        steps = [r"s#\\#/#g"] if forms["windows"] else []
        if shared:
            pattern = _SPECIAL.sub(r"\\\1", f"{shared}/")
            steps.append(f"s#(file:///?)?{pattern}##g")
        stem, extension = os.path.splitext(table)
        command = f"sed -E {quote('; '.join(steps))} {quote(table)} > {quote(f'{stem}-relative{extension}')}"
        return f"{advice}, for example with: {command}"


def _form(text: str) -> tuple[Literal["windows", "full", "relative"], str]:
    """The kind of a path, and the path with forward slashes and without `file://`."""
    slashed = text.removeprefix(f"{_FILE}/").replace("\\", "/")
    if "\\" in text or (_DRIVE.match(slashed) and slashed[0] != "/"):
        return "windows", slashed
    if text.startswith(("/", _FILE)) or is_remote(text):
        return "full", text.removeprefix(_FILE) if text.startswith(f"{_FILE}/") else text
    return "relative", text


def _shared_folder(path: str, others: str | None) -> str:
    """The deepest folder of an absolute path that contains `others`, the folder shared so far; empty if none does."""
    if not (path.startswith("/") or _DRIVE.match(path) or is_remote(path)):
        return ""
    folder = posixpath.dirname(path if is_remote(path) else posixpath.normpath(path))
    shared = folder if others is None else others
    while not f"{folder}/".startswith(f"{shared.rstrip('/')}/"):
        above = posixpath.dirname(shared)
        if above == shared or is_remote(shared) > is_remote(above):
            return ""
        shared = above
    return shared


def _below_root(root: str, text: str) -> str | None:
    """An absolute path or a URL, relative to the root; None if it is not below it."""
    path = text.removeprefix(_FILE) if text.startswith(f"{_FILE}/") else text
    path, start = path if is_remote(path) else os.path.normpath(path), root.rstrip("/") + "/"
    return path[len(start) :] if path.startswith(start) else None


def _leads_out(path: str) -> bool:
    path = os.path.normpath(path)
    return path in (".", "..") or path.startswith(("../", "/"))


def relative_path(text: str, root: str) -> bytes:
    """A path, made relative to `root`, an absolute path or a URL.

    Args:
        text: a relative path, or an absolute path (also after `file://`, taken verbatim) or URL below `root`.
        root: an absolute path or a URL.

    Raises:
        ValueError: the path leads out of `root`, or is not a path.
    """
    shown = f"has the path {text[:200]!r}"
    if "\0" in text:
        raise ValueError(f"{shown} with a NUL byte; fix it")
    path = _below_root(root, text) if is_remote(text) or text.startswith(("/", _FILE)) else text
    if path is None:
        raise ValueError(f"{shown}, which is not below {root!r}")
    path = os.path.normpath(path)
    # A web server may read %2e%2e as two dots.
    if any(_leads_out(each) for each in ([path, unquote(path)] if is_web(root) else [path])):
        raise ValueError(f"{shown}, which leads out of {root!r}; write it relative to that folder")
    try:
        return as_bytes(path)
    except UnicodeEncodeError as exc:
        raise ValueError(f"{shown}, which is no text; fix it") from exc
