"""Reads what libraries write to a worker's stdout and stderr: known messages are counted, all others are logged.

Libraries written in C know neither file names nor `logging`. The known messages are those about images in jerror.h of
libjpeg-turbo 3.1, and those of the parsers in nvImageCodec, which DALI uses.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import IO

log = logging.getLogger(__name__)
_READ_BYTES = 1 << 16
_READS = 16  # at a time: more than a pipe holds, but limited, since a process may never stop writing
_MOST_LINES = 1000  # logged at a time
_LAST_LINES = 10
_EOF_S = 1.0  # how long to read after a process ended; its own children may keep the pipe open
_STYLE = re.compile(r"\x1b\[[\d;]*m")
_NUMBER = re.compile(r"0x[\da-fA-F]+|\d+(\.\d+)?")
_OTHERS = re.compile(r"\[(ERROR|WARNING)\] \[[\w#]+_parser\] .+|libpng (error|warning): .+")
_LIBJPEG = frozenset(
    {
        "Application transferred too many scanlines", "Arithmetic table # was not defined", "Bogus DAC index #",
        "Bogus DAC value #", "Bogus DHT index #", "Bogus DQT index #", "Bogus Huffman table definition",
        "Bogus JPEG colorspace", "Bogus marker length", "Bogus sampling factors",
        "Corrupt JPEG data: # extraneous bytes before marker #", "Corrupt JPEG data: bad Huffman code",
        "Corrupt JPEG data: bad ICC marker", "Corrupt JPEG data: bad arithmetic code",
        "Corrupt JPEG data: found marker # instead of RST#", "Corrupt JPEG data: premature end of data segment",
        "DCT coefficient (lossy) or spatial difference (lossless) out of range", "DCT coefficient out of range",
        "Didn't expect more than one scan", "Empty JPEG image (DNL not supported)", "Empty input file",
        "Fractional sampling not implemented yet", "Huffman code size table overflow",
        "Huffman table # was not defined", "IDCT output block size # not supported",
        "Image too wide for this implementation", "Inconsistent progression sequence for component # coefficient #",
        "Invalid JPEG file structure: SOS before SOF", "Invalid JPEG file structure: missing SOS marker",
        "Invalid JPEG file structure: two SOF markers", "Invalid JPEG file structure: two SOI markers",
        "Invalid SOS parameters for sequential JPEG", "Invalid component ID # in SOS",
        "Invalid progressive/lossless parameters Ss=# Se=# Ah=# Al=#",
        "Invalid restart interval #; must be an integer multiple of the number of MCUs in an MCU row (#)",
        "JPEG datastream contains no image",
        "Maximum supported image dimension is # pixels", "Missing Huffman code table entry",
        "Not a JPEG file: starts with # #", "Premature end of JPEG file", "Premature end of input file",
        "Quantization table # was not defined", "Sampling factors too large for interleaved scan",
        "Sorry, arithmetic coding is not implemented", "Too many color components: #, max #",
        "Unknown Adobe color transform code #", "Unsupported JPEG data precision #",
        "Unsupported JPEG process: SOF type #", "Unsupported color conversion request", "Unsupported marker type #",
        "Warning: unknown JFIF revision number #",
    }
)  # fmt: skip


@functools.lru_cache(256)
def known(line: str) -> str | None:
    """The known message that a line contains, with # for numbers; None for any other line."""
    text = _NUMBER.sub("#", line)
    return text if text in _LIBJPEG or _OTHERS.fullmatch(text) else None


@dataclass(frozen=True)
class DecoderMessages:
    """Known messages that decoders have newly written.

    Attributes:
        counts: how often each message was written.
        paths: the paths of the items that each message is about.
        all_paths: whether no paths are missing.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    paths: Mapping[str, Sequence[str]] = field(default_factory=dict)
    all_paths: bool = False


@dataclass(frozen=True)
class Message:
    """A known message that decoders have written in a build.

    Attributes:
        text: the message, with # for numbers.
        count: how often it was written. A library may write it several times for one file.
        files: the paths of items that it is about.
        all_files: whether these are all. They are found by decoding items again, which stops if there are too many.
    """

    text: str
    count: int
    files: tuple[str, ...]
    all_files: bool


class Messages:
    """Collects the known messages of a build."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._paths: defaultdict[str, list[str]] = defaultdict(list)
        self._all = False

    def add(self, heard: DecoderMessages) -> None:
        """Adds new messages."""
        self._counts.update(heard.counts)
        for text, paths in heard.paths.items():
            self._paths[text] += paths
        self._all = self._all or heard.all_paths

    def found(self) -> tuple[Message, ...]:
        """All messages, the most frequent first."""
        return tuple(
            Message(text, count, tuple(self._paths[text]), self._all) for text, count in self._counts.most_common()
        )


class Output:
    """The output of another process, read from a pipe by a thread, so that the process never blocks on a full pipe."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        os.set_blocking(pipe.fileno(), False)
        self._lock = threading.Lock()
        self._rest = b""  # an incomplete line
        self._counts: Counter[str] = Counter()
        self._others: list[str] = []
        self._more = 0  # lines beyond _MOST_LINES, which are only counted
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._thread = threading.Thread(target=self._follow, name="gpu-npz-output", daemon=True)
        self._thread.start()

    @property
    def unread(self) -> bool:
        """Whether `known` has something new."""
        return bool(self._counts or self._others)

    @property
    def last_words(self) -> str:
        """The last lines that were read from the pipe, known or not, to be appended to a message about the process."""
        return f"\nIt wrote last:{_indented(self._last)}" if self._last else ""

    def known(self) -> Counter[str]:
        """The known messages that were written since the last call; logs all other lines."""
        self._read()
        return self._taken()

    def close(self, *, died: bool = False) -> Counter[str]:
        """Reads and returns the rest, as `known`, and closes the pipe. Call it when the process has ended.

        Args:
            died: whether `last_words` will be shown, so that those lines need not be logged.
        """
        self._thread.join(_EOF_S)
        self._read()
        with self._lock:
            self._pipe.close()
            self._add(self._rest)
            self._rest = b""
            if died:
                del self._others[max(0, len(self._others) - sum(known(line) is None for line in self._last)) :]
        return self._taken()

    def _taken(self) -> Counter[str]:
        with self._lock:
            counts, others, more = self._counts, self._others, self._more
            self._counts, self._others, self._more = Counter(), [], 0
        if more:
            others.append(f"(and {more} more lines)")
        if others:
            log.warning("output of a worker process:%s", _indented(others))
        return counts

    def _follow(self) -> None:
        with contextlib.suppress(ValueError):  # `close` was called, while a child of the process holds the pipe open
            while wait([self._pipe.fileno()]) and self._read():
                pass

    def _read(self) -> bool:
        """Reads what is in the pipe; returns whether more may come."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._pipe.closed:
                return False
            for _ in range(_READS):
                data = os.read(self._pipe.fileno(), _READ_BYTES)
                if not data:
                    return False
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self._add(line)
                if len(self._rest) > _READ_BYTES:
                    self._add(self._rest)
                    self._rest = b""
        return True

    def _add(self, line: bytes) -> None:
        text = _STYLE.sub("", line.decode(errors="backslashreplace")).rstrip()
        if not text:
            return
        self._last.append(text)
        if message := known(text):
            self._counts[message] += 1
        elif len(self._others) < _MOST_LINES:
            self._others.append(text)
        else:
            self._more += 1


def _indented(lines: Iterable[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)
