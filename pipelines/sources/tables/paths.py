"""Paths that stand in tables: what they are relative to, and what to do about those that are not."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from shlex import quote
from typing import Any, Literal
from urllib.parse import unquote

from ...storage.base import is_remote
from ..access.local import Inside
from ..access.stores import is_web
from ..base import as_bytes

_FILE = "file://"
_DRIVE = re.compile(r"[A-Za-z]:/|//")  # of Windows, with slashes; or a share
_SED = (".csv", ".tsv")  # of these a backslash is nothing but one
_SPECIAL = re.compile(r"([][\\.*^$+?(){}|#])")  # in an extended regular expression of sed, between #


class ForeignPath(ValueError):
    """A path that no file of a folder has: a full one that is not below it, or one of Windows."""

    def __init__(self, message: str, base: Base) -> None:
        super().__init__(message)
        self.base = base


@dataclass(frozen=True)
class Base:
    """The folder that the paths of a table are relative to.

    Attributes:
        root: an absolute path or a URL.
        option: what names another one; None where SRC does.
    """

    root: str
    option: str | None = "--root"

    def path(self, text: str) -> bytes:
        """As `below`. Raises ValueError; of it `ForeignPath` where all paths of the table tell what to do."""
        form, _ = _form(text)
        if form == "windows" and (is_remote(self.root) or not os.path.lexists(os.path.join(self.root, text))):
            raise ForeignPath(f"has the path {text[:200]!r}, which is a Windows path", self)
        if form == "full" and _under(self.root, text) is None:
            raise ForeignPath(f"has the path {text[:200]!r}, which is not below {self.root!r}", self)
        return below(text, self.root)

    def advice(self, table: str, texts: Iterable[Any]) -> str:
        """What to do about a table some of whose paths are foreign.

        Args:
            table: its place.
            texts: what it has for paths.
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


def within(base: Base) -> Callable[[str], bytes]:
    """As `base.path`, but raises ValueError, too, where a symbolic link leads out of the folder."""
    root = os.fsencode(base.root)
    inside = Inside(root)

    def path_of(text: str) -> bytes:
        path = base.path(text)
        if not inside.holds(path):
            real = os.path.realpath(os.path.join(root, path))
            raise ValueError(
                f"has the path {text[:200]!r}, which leads out of {base.root!r} by a symbolic link, to "
                f"{os.fsdecode(real)!r}; copy what it needs into that folder, or say --follow-links"
            )
        return path

    return path_of


def _form(text: str) -> tuple[Literal["windows", "full", "relative"], str]:
    """What kind of path a text is, and the path with slashes and without `file://`."""
    slashed = text.removeprefix(f"{_FILE}/").replace("\\", "/")
    if "\\" in text or (_DRIVE.match(slashed) and slashed[0] != "/"):
        return "windows", slashed
    if text.startswith(("/", _FILE)) or is_remote(text):
        return "full", text.removeprefix(_FILE) if text.startswith(f"{_FILE}/") else text
    return "relative", text


def _shared_folder(path: str, others: str | None) -> str:
    """The deepest folder of a full path that others share, of which there may be none; empty if they share none."""
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


def _under(root: str, text: str) -> str | None:
    """A full path or a URL, relative to a folder; None if it is not below it."""
    path = text.removeprefix(_FILE) if text.startswith(f"{_FILE}/") else text
    path, within = path if is_remote(path) else os.path.normpath(path), root.rstrip("/") + "/"
    return path[len(within) :] if path.startswith(within) else None


def _leads_out(path: str) -> bool:
    path = os.path.normpath(path)
    return path in (".", "..") or path.startswith(("../", "/"))


def below(text: str, root: str) -> bytes:
    """A path of a table, relative to `root`, an absolute path or a URL.

    A full path, a URL, or a full path behind `file://`, which is taken as it stands there, must lie below `root`.

    Raises:
        ValueError: it leads out of it, or is no path at all.
    """
    shown = f"has the path {text[:200]!r}"
    if "\0" in text:
        raise ValueError(f"{shown} with a NUL byte; fix it")
    path = _under(root, text) if is_remote(text) or text.startswith(("/", _FILE)) else text
    if path is None:
        raise ValueError(f"{shown}, which is not below {root!r}")
    path = os.path.normpath(path)
    # A web server may take %2e%2e for two dots.
    if any(_leads_out(each) for each in ([path, unquote(path)] if is_web(root) else [path])):
        raise ValueError(f"{shown}, which leads out of {root!r}; write it relative to that folder")
    try:
        return as_bytes(path)
    except UnicodeEncodeError as exc:
        raise ValueError(f"{shown}, which is no text; fix it") from exc
