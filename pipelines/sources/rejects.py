"""Rejects: items that get no row because of their file. The closed list of codes, and how each is reported."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

Stage = Literal["read", "decode", "resize"]
Code = Literal[
    "missing",  # the file is gone
    "unreadable",  # no permission, a folder, a socket, a loop of symbolic links
    "empty",  # zero bytes
    "not-an-image",  # no decoder recognizes the first bytes
    "truncated",  # the data ends before the image is complete
    "undecodable",  # damaged, or in an unsupported encoding
    "too-large",  # more pixels than `max_pixels`, or more bytes than MAX_ENCODED_BYTES
    "wrong-size",  # another size than the other images of a build with `resize_mode` none
    "crashed",  # the process that decoded this item alone died
    "timed-out",  # the decoder did not return
]
MAX_ENCODED_BYTES = 2**29 - 1  # the largest encoded image that DALI's CPU decoders take, too
_DETAIL_LENGTH = 200


@dataclass(frozen=True)
class Reject:
    """One line of rejects.jsonl."""

    path: str
    index: int
    stage: Stage
    code: Code
    detail: str

    def to_json(self) -> dict[str, Any]:
        """The reject as JSON values, in the order of the keys in rejects.jsonl."""
        return asdict(self)


class BadItem(Exception):
    """Raised while an item is read or decoded, to make it a reject; always caught inside the package."""

    def __init__(self, stage: Stage, code: Code, detail: str) -> None:
        super().__init__(detail)
        self.stage: Stage = stage
        self.code: Code = code
        self.detail = clean(detail)

    def of(self, path: str, index: int) -> Reject:
        """The reject for the item at `path`."""
        return Reject(path, index, self.stage, self.code, self.detail)


def clean(detail: str) -> str:
    """A library's message without parts that differ between runs: addresses, absolute paths, control characters."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the file", detail)
    text = re.sub(r"\b0x[0-9a-fA-F]{6,}\b", "", text)
    text = re.sub(r"(?<![\w.])/(?:[^\s'\":/]+/)+[^\s'\":]*", "the file", text)
    text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split())[:_DETAIL_LENGTH]
