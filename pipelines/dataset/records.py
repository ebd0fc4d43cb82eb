"""Records and arrays of OUT, written in one step and checked when they are read: JSON and NPZ."""

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

# Of a record, which takes up to 30 times its size as values: 300,000 source files, or 500,000 classes, fit.
MAX_JSON_BYTES = 32 << 20
_MAX_JSON_VALUES = 1 << 21
_MAX_REJECT_BYTES = 32 << 10  # a path of 4096 bytes, all escaped, beside the rest
_MAX_REJECT_VALUES = 8
Record = TypeVar("Record", bound=BaseModel)


def store_arrays(storage: Storage, name: str, arrays: Mapping[str, NDArray[Any]], comment: str) -> None:
    """Writes a whole NPZ in one step: it is there whole or not at all."""
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
    """An NPZ of OUT, mapped; errors name it by its place in OUT. Raises OSError if it cannot be opened.

    `before` is as for `NpzReader`.
    """
    with storage.local(name) as path:
        try:
            reader = NpzReader(path, before)
        except FormatError as exc:
            raise FormatError(exc.problem, storage.path(name)) from exc
    reader.path = storage.path(name)
    return reader


def to_json(record: BaseModel) -> bytes:
    """A record as indented JSON in ASCII; names that are not UTF-8 become escaped lone surrogates."""
    return (json.dumps(record.model_dump(by_alias=True), indent=1) + "\n").encode("ascii")


def loads(content: bytes, rejects: int = 0) -> Any:
    """JSON's values; raises ValueError, too, where they would take more memory than any record with so many rejects."""
    values = content.count(b",") + content.count(b"[") + content.count(b"{")
    most_bytes = MAX_JSON_BYTES + rejects * _MAX_REJECT_BYTES
    most_values = _MAX_JSON_VALUES + rejects * _MAX_REJECT_VALUES
    if len(content) > most_bytes or values > most_values:
        raise ValueError(f"{len(content)} bytes with {values} values; at most {most_bytes} and {most_values} are read")
    return json.loads(content)


def read_json(storage: Storage, name: str) -> bytes | None:
    """The content of a file of JSON, None if there is none. Raises FormatError if it is larger than we write any."""
    size = storage.size(name)
    if size is not None and size > MAX_JSON_BYTES:
        raise FormatError(f"{storage.path(name)!r} has {size} bytes; at most {MAX_JSON_BYTES} are read: it is damaged")
    return None if size is None else storage.read(name)


def from_json(kind: type[Record], content: bytes, label: str, rejects: int = 0) -> Record:
    """A record from JSON, with so many rejects at most; unknown keys are ignored.

    Raises:
        FormatError: not JSON, or not such a record.
    """
    try:
        return kind(**loads(content, rejects))
    except (ValueError, TypeError, ValidationError, RecursionError) as exc:
        text = "; ".join(str(exc).splitlines()[:3])
        raise FormatError(f"{label}: {text}; the file is damaged") from exc
