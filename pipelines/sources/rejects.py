"""Items that get no row because of what their file is: the closed list of codes, and what is said of each."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

Stage = Literal["read", "decode", "resize"]
Code = Literal[
    "missing",  # no file of that name any more
    "unreadable",  # no permission, a folder, a socket, a loop of links
    "empty",  # zero bytes
    "not-an-image",  # no decoder knows the first bytes
    "truncated",  # the data ends before the image does
    "undecodable",  # damaged, or of a kind that cannot be decoded
    "too-large",  # more pixels than `max_pixels`, or more bytes than MAX_ENCODED_BYTES
    "wrong-size",  # not the one size of a build with `resize_mode` none
    "crashed",  # the process that decoded it, and nothing else, died of it
    "timed-out",  # the decoder did not come back from it
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
        """The reject as JSON values, in the order in which rejects.jsonl has them."""
        return asdict(self)


class BadItem(Exception):
    """Raised and caught inside a decoder to say why one item becomes a reject; it never reaches a caller."""

    def __init__(self, stage: Stage, code: Code, detail: str) -> None:
        super().__init__(detail)
        self.stage: Stage = stage
        self.code: Code = code
        self.detail = clean(detail)

    def of(self, path: str, index: int) -> Reject:
        """The reject that it makes of the item at `path`."""
        return Reject(path, index, self.stage, self.code, self.detail)


def clean(detail: str) -> str:
    """A library's message without what differs from run to run: addresses, absolute paths, control characters."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the file", detail)
    text = re.sub(r"\b0x[0-9a-fA-F]{6,}\b", "", text)
    text = re.sub(r"(?<![\w.])/(?:[^\s'\":/]+/)+[^\s'\":]*", "the file", text)
    text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split())[:_DETAIL_LENGTH]
