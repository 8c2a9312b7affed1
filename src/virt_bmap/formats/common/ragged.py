"""Columns of byte strings: all of them one after the other in one array, which costs no object for each.

Arrow has the same layout, but to take rows or to compare it loads its function library: a tenth of the time
of a whole map.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from virt_bmap.core.arrays import Bool, Bytes, Int
from virt_bmap.core.errors import Unsupported
from virt_bmap.model.tables import arrow

Lengths = NDArray[np.uint16]
MAX_BYTES = 2**31 - 1
"""Arrow's binary arrays count their bytes in int32."""


@dataclass(frozen=True)
class Ragged:
    """Byte string i is `lengths[i]` bytes of `data`, after the ones before it."""

    data: Bytes
    lengths: Lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Int:
        """Where each begins in `data`."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @staticmethod
    def cut(data: Bytes, starts: Int, lengths: NDArray[Any]) -> "Ragged":
        """The strings data[starts[i]:starts[i]+lengths[i]]."""
        lengths = lengths.astype(np.uint16)
        return Ragged(pieces(data, starts, lengths), lengths)

    @staticmethod
    def concat(parts: Sequence["Ragged"]) -> "Ragged":
        """One column after the other."""
        return Ragged(
            np.concatenate([part.data for part in parts]), np.concatenate([part.lengths for part in parts])
        )

    def take(self, rows: Int) -> "Ragged":
        """The strings of some rows."""
        return Ragged.cut(self.data, self.starts[rows], self.lengths[rows])

    def strings(self) -> list[bytes]:
        """The strings as Python's, for columns of a few."""
        data, ends = self.data.tobytes(), np.cumsum(self.lengths, dtype=np.int64).tolist()
        return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=False)]

    def equal(self, word: bytes) -> Bool:
        """Which of the strings are `word`."""
        result: Bool = self.lengths == len(word)
        rows = np.flatnonzero(result)
        found = self.data[self.starts[rows, None] + np.arange(len(word))]
        result[rows] = (found == np.frombuffer(word, np.uint8)).all(axis=1)
        return result

    def lower(self) -> "Ragged":
        """With the letters A to Z in lower case."""
        capital = (self.data >= ord("A")) & (self.data <= ord("Z"))
        return Ragged(np.where(capital, self.data | np.uint8(0x20), self.data), self.lengths)

    def distinct(self) -> tuple[Int, list[bytes]]:
        """(a number for each string, the strings that the numbers stand for); number 0 is the empty one."""
        number, words, starts = np.zeros(len(self), np.int64), [b""], self.starts
        for length, rows in by_length(self.lengths):
            found, which = np.unique(items(self.data, length)[starts[rows]], return_inverse=True)
            number[rows] = which.reshape(-1) + len(words)
            words += [item.tobytes() for item in found]
        return number, words

    def arrow(self) -> pa.Array:
        """As an Arrow array, without a copy of the bytes."""
        if len(self.data) > MAX_BYTES:
            raise Unsupported(
                f"names of {len(self.data)} bytes together; the most that a table can hold is {MAX_BYTES}"
            )
        offsets = np.zeros(len(self) + 1, np.int32)
        np.cumsum(self.lengths, out=offsets[1:])
        return pa.Array.from_buffers(
            pa.binary(), len(self), [None, arrow(offsets).buffers()[1], arrow(self.data).buffers()[1]]
        )


def by_length(lengths: Lengths) -> Iterator[tuple[int, Int]]:
    """(length, its rows) for each length that occurs, but 0."""
    order = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths)
    ends = np.cumsum(counts).tolist()
    for length in np.flatnonzero(counts).tolist():
        if length:
            yield length, order[ends[length] - int(counts[length]) : ends[length]]


def items(data: Bytes, size: int) -> NDArray[np.void]:
    """A view of `data` as opaque items of `size` bytes, one at every byte: these are copied whole, not byte
    by byte."""
    return np.ndarray((max(0, len(data) - size + 1),), f"V{size}", data, strides=(1,))


def pieces(data: Bytes, starts: Int, lengths: Lengths) -> Bytes:
    """The bytes data[starts[i]:starts[i]+lengths[i]], one after the other.

    All pieces of a length are moved at once.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    result = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    for length, rows in by_length(lengths):
        items(result, length)[ends[rows] - length] = items(data, length)[starts[rows]]
    return result
