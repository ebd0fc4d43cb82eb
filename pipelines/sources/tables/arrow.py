"""Reads untrusted Parquet files (https://parquet.apache.org/docs/file-format/) with pyarrow, within limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import SourceError, install_command
from ..access.files import FileOf, Files
from ..access.stores import BLOCK_BYTES

# Without a buffer of this size, and with `pre_buffer`, Arrow reads the whole column of a row group at once.
_BUFFER_BYTES = 1 << 20
# A few bytes of a file can encode a long text for every row. So batches are limited to as many rows as would take
# _BATCH_BYTES if each row had the size of the whole columns, and to few rows, since a footer may lie about sizes.
_BATCH_BYTES = 256 << 20
_BATCH_ROWS = 64
_MAX_TEXT_BYTES = 128 << 10  # as in csv
_MOST_ROWS = 32  # per byte of the file; numbered paths, with DELTA_BYTE_ARRAY and zstd, reach 11


def open_parquet(files: Files, number: int) -> Any:
    """Opens a file as a `pyarrow.parquet.ParquetFile`.

    Raises:
        SourceError: not Parquet, truncated, or with an implausible footer; or pyarrow is missing.
    """
    try:
        from pyarrow import parquet
    except ImportError as exc:
        raise SourceError(f"{files.path(number)!r} needs pyarrow; run: {install_command('parquet')}") from exc
    buffer_bytes = _BUFFER_BYTES if files.reads_at_once == 1 else BLOCK_BYTES
    with explained(files.path(number)):
        file = parquet.ParquetFile(FileOf(files, number), buffer_size=buffer_bytes, pre_buffer=False)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        names = file.schema_arrow.names
    claimed, size = file.metadata.num_rows, files.size(number)
    if min(rows, default=0) < 0 or sum(rows) != claimed or claimed > _MOST_ROWS * size:
        raise SourceError(
            f"{files.path(number)!r} says that it has {claimed} rows, {sum(rows)} in its row groups, in {size} bytes; "
            "it is damaged: get or write it again"
        )
    if len({*names}) < len(names):
        raise SourceError(f"{files.path(number)!r} has two columns of one name, of {', '.join(names)}; write it again")
    return file


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Raises Arrow's errors for a damaged file, and the system's for an unreadable one, as SourceError."""
    try:
        yield
    # Arrow's errors are ValueErrors, OSErrors, and other subclasses of ArrowException, an Exception.
    except (SourceError, MemoryError):
        raise
    except Exception as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise SourceError(f"{path!r}: {exc.strerror or exc}; make it readable") from exc
        text = str(exc).splitlines()[0][:200] if str(exc) else type(exc).__name__
        raise SourceError(f"{path!r}: {text}; it is no whole Parquet file: get or write it again") from exc


def rows(file: Any, path: str, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of some columns of text or numbers, one tuple per row, read in small batches.

    Raises:
        SourceError: a column contains anything else, or a text of more than 128 KiB; or the file is damaged.
    """
    from pyarrow import types

    for name in names:
        kind = file.schema_arrow.field(name).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        if not (is_text(kind) or types.is_integer(value) or types.is_floating(value) or types.is_boolean(value)):
            raise SourceError(f"{path!r}: column {name!r} is of the type {kind}; allowed: texts and numbers")
    for group in range(file.num_row_groups):
        count = 0
        with explained(path):
            for batch in file.iter_batches(
                _batch_rows(file.metadata.row_group(group), names),
                row_groups=[group],
                columns=list(names),
                use_threads=False,
            ):
                count += batch.num_rows
                for name in names:
                    _require_short(batch.column(name), name, path)
                yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
        if count != file.metadata.row_group(group).num_rows:
            raise SourceError(f"{path!r}: row group {group} has {count} rows, not as many as it says; write it again")


def _batch_rows(group: Any, names: Sequence[str]) -> int:
    """How many rows of a row group to read at a time."""
    columns = (group.column(number) for number in range(group.num_columns))
    held = sum(max(0, each.total_uncompressed_size) for each in columns if each.path_in_schema in names)
    return int(max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, held))))


def _require_short(column: Any, name: str, path: str) -> None:
    """Raises SourceError if a column has a text too long for a path or a label."""
    from pyarrow import compute, types

    values = column.dictionary if types.is_dictionary(column.type) else column
    if is_text(values.type):
        if not (types.is_string(values.type) or types.is_large_string(values.type)):
            values = values.cast("string")  # Arrow has no lengths of string views
        longest = compute.max(compute.binary_length(values)).as_py() or 0
        if longest > _MAX_TEXT_BYTES:
            raise SourceError(
                f"{path!r}: column {name!r} has a text of {longest} bytes; at most {_MAX_TEXT_BYTES} are read; name "
                "another column, or write paths or labels there"
            )


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is a string type."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    view = getattr(types, "is_string_view", None)  # since pyarrow 16
    return types.is_string(kind) or types.is_large_string(kind) or bool(view and view(kind))
