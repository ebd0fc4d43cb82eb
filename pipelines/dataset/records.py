"""Reads and writes the JSON records and NPZ arrays of OUT: atomic writes, validated reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from ..errors import FormatError
from ..npz.reader import CachedDirectory, NpzReader
from ..npz.writer import NpzWriter
from ..storage.base import Storage

# Parsed JSON takes up to 30 times its size in memory. The limit allows 300,000 source files or 500,000 classes.
MAX_JSON_BYTES = 32 << 20
_MAX_JSON_VALUES = 1 << 21
_MAX_REJECT_BYTES = 32 << 10  # a path of 4096 bytes, all of them escaped, and the other fields
_MAX_REJECT_VALUES = 8
Record = TypeVar("Record", bound=BaseModel)


def store_arrays(storage: Storage, name: str, arrays: Mapping[str, NDArray[Any]], comment: str) -> None:
    """Writes an NPZ atomically.

    Args:
        storage: OUT.
        name: the name of the file.
        arrays: the arrays by name.
        comment: the ZIP comment.

    Raises:
        StorageError: the file cannot be written.
    """
    temporary = storage.temporary(name)
    try:
        with storage.explained(name), NpzWriter(temporary) as file:
            for member, array in arrays.items():
                file.add(member, array)
            file.close(comment)
        storage.publish(temporary, name)
    finally:
        storage.discard(temporary)


def open_npz(storage: Storage, name: str, before: CachedDirectory | None = None) -> NpzReader:
    """Memory-maps an NPZ of OUT.

    Args:
        storage: OUT.
        name: the name of the file.
        before: as for `NpzReader`.

    Raises:
        FormatError: the file is damaged; the message has its path or URL in OUT, even if a local copy was read.
        OSError: the file cannot be opened.
    """
    with storage.local(name) as path:
        try:
            reader = NpzReader(path, before)
        except FormatError as exc:
            raise FormatError(exc.problem, storage.path(name)) from exc
    reader.path = storage.path(name)
    return reader


def to_json(record: BaseModel) -> bytes:
    """Serializes a record as indented ASCII JSON. Bytes that are not UTF-8 become escaped lone surrogates."""
    return (json.dumps(record.model_dump(by_alias=True), indent=1) + "\n").encode("ascii")


def loads(content: bytes, rejects: int = 0) -> Any:
    """Parses JSON of limited size.

    Args:
        content: the JSON text.
        rejects: the largest number of rejects that it may contain; the limit grows with it.

    Raises:
        ValueError: the content is not JSON, or is larger than any record with so many rejects.
    """
    values = content.count(b",") + content.count(b"[") + content.count(b"{")
    most_bytes = MAX_JSON_BYTES + rejects * _MAX_REJECT_BYTES
    most_values = _MAX_JSON_VALUES + rejects * _MAX_REJECT_VALUES
    if len(content) > most_bytes or values > most_values:
        raise ValueError(f"{len(content)} bytes with {values} values; at most {most_bytes} and {most_values} are read")
    return json.loads(content)


def read_json(storage: Storage, name: str) -> bytes | None:
    """The content of a JSON file; None if it does not exist. Raises FormatError if it is larger than any valid one."""
    size = storage.size(name)
    if size is not None and size > MAX_JSON_BYTES:
        raise FormatError(f"{storage.path(name)!r} has {size} bytes; at most {MAX_JSON_BYTES} are read: it is damaged")
    return None if size is None else storage.read(name)


def from_json(kind: type[Record], content: bytes, label: str, rejects: int = 0) -> Record:
    """Parses a record from JSON. Unknown keys are ignored.

    Args:
        kind: the class of the record.
        content: the JSON text.
        label: the name of the file in error messages.
        rejects: the largest number of rejects that the record may contain.

    Raises:
        FormatError: the content is not JSON, is too large, or is not such a record.
    """
    try:
        return kind(**loads(content, rejects))
    except (ValueError, TypeError, ValidationError, RecursionError) as exc:
        text = "; ".join(str(exc).splitlines()[:3])
        raise FormatError(f"{label}: {text}; the file is damaged") from exc
