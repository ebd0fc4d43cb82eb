"""Folder trees on an object store or another fsspec store, by the same rules as on a disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...config import BuildConfig
from ...errors import SourceError
from ..access.stores import READS_AT_ONCE, as_source_errors, ask_store, fetch, is_web, store_of
from ..base import Item, as_bytes, as_text, extension_of, is_hidden, is_image
from .folder import Scan, TreeSource


class RemoteSource(TreeSource):
    """The images below `s3://bucket/folder` and the like; see `TreeSource`.

    A folder is a common prefix of names; each is listed separately, page by page. Empty objects named like a folder,
    which web consoles create, are not items. Names that no folder could have (`a//b.jpg`, `a/./b.jpg`) are skipped with
    a warning.

    Raises:
        SourceError: no such folder, no permission to list it, no credentials, no answer, or as `TreeSource`.
    """

    reads_at_once = READS_AT_ONCE

    def __init__(self, location: str, config: BuildConfig | None = None, classes: Sequence[str] | None = None) -> None:
        if is_web(location):
            raise SourceError(
                f"{location!r}: a web server cannot list a folder; give a table of its images with --root "
                f"{location}, or a .tar or .zip that it has"
            )
        self._fs: Any = None
        super().__init__(location.rstrip("/"), classes, config.labels if config else None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None}

    @property
    def _store(self) -> Any:
        if self._fs is None:
            self._fs = store_of(self.location)
        return self._fs

    def _scan(self, folder: bytes) -> Scan:
        url = self._url(as_text(folder)).rstrip("/")
        with as_source_errors(url):
            start = self._store._strip_protocol(url).rstrip("/") + "/"
            entries = ask_store(lambda: self._store.ls(url, detail=True))
        names: list[tuple[bytes, int]] = []
        folders: set[bytes] = set()
        impossible: list[str] = []
        others: Counter[str] = Counter()
        for entry in entries:
            path = entry["name"].rstrip("/")
            if path + "/" == start and entry["type"] == "file":
                if entry["type"] == "file" and len(entries) == 1:
                    raise SourceError(f"{url!r} is a file; give SRC as a folder of class folders or of images")
                continue
            name = b"" if path + "/" == start else as_bytes(path.removeprefix(start))
            if name in (b"", b".", b"..") or b"/" in name:
                impossible.append(f"{entry['name']}/" if entry["type"] == "directory" else entry["name"])
            elif is_hidden(name):
                continue
            elif entry["type"] == "directory":
                folders.add(name)
            elif is_image(name):
                names.append((name, int(entry["size"])))
            elif entry["size"]:
                others[extension_of(name)] += 1
        names.sort()
        return Scan(
            [name for name, _ in names], sorted(folders), others, [size for _, size in names], impossible=impossible
        )

    def _identity(self, folder: bytes) -> bytes:
        return folder

    def read(self, item: Item) -> bytes:
        """All bytes of an object.

        Raises:
            OSError: ENOENT, EACCES, or EIO for anything that may be temporary.
            BadItem: larger than any image should be.
        """
        return fetch(self._store, self._url(item.path), item.place[0] if item.place else None)

    def check(self) -> None:
        """Raises SourceError if the bucket or the folder is gone or no longer readable."""
        with as_source_errors(self.location):
            ask_store(lambda: self._store.info(self.location))

    def _url(self, path: str) -> str:
        return f"{self.location}/{path}"
