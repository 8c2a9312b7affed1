"""Accesses of NBD clients as columns, read from the text that nbdkit's log filter writes while they happen.

A request is two lines; only the first, written before the request is served, says what is asked for:

    2026-11-23 06:19:37.523103 connection=1 Read id=1 offset=0x0 count=0x1000 ...
    2026-11-23 06:19:37.523120 connection=1 ...Read id=1 return=0

Sources: nbdkit-log-filter(1), "LOG FILE FORMAT"; nbdkit filters/log/log.c and output.c (v1.32).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int
from virt_bmap.core.columns import stack, take
from virt_bmap.model import tables

LONGEST_LINE = 64 << 10
"""Bytes kept while waiting for a line's end.

Real lines have some 90; only export names, up to 4096 bytes, make longer ones.
"""
SLICE = 512 << 10
"""Bytes of lines that are taken apart at once: the arrays that this takes stay small, and in the processor's
cache."""
LONGEST_NUMBER = 20
"""Digits of the largest 64-bit number."""
_PAD = 64
"""Zero bytes after each batch, so that a gather of a few bytes at the last token stays inside."""


@dataclass(frozen=True)
class Accesses:
    """Requests in the order in which they were logged, as columns of one length.

    `op` holds codes of tables.OPS.
    """

    time_ns: Int
    connection: Int
    op: Int
    offset: Int
    length: Int

    def __len__(self) -> int:
        return len(self.offset)

    def take(self, keep: np.ndarray) -> "Accesses":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)

    def table(self, disk: int) -> pa.Table:
        """As the table `accesses`."""
        return tables.make(
            "accesses", disk=disk, time_ns=self.time_ns, connection=self.connection,
            op=self.op.astype(np.int8), offset=self.offset, length=self.length,
        )  # fmt: skip


class Ended(NamedTuple):
    """Ends of writes, trims and zeroes, by connection and number."""

    connection: Int
    number: Int
    time_ns: Int


NONE = Accesses(*(np.zeros(0, np.int64) for _ in range(5)))


class _Parsed(NamedTuple):
    """What some lines say: the accesses, the number of each in its connection, and the ends of writes."""

    accesses: Accesses
    numbers: Int
    ended: Ended


# the first four letters of an action tell it
_ACTIONS = {
    b"Read": "read",
    b"Writ": "write",
    b"Trim": "trim",
    b"Zero": "zero",
    b"Flus": "flush",
    b"Cach": "cache",
    b"Exte": None,
}
_WORDS = np.array([int.from_bytes(word, "little") for word in _ACTIONS], np.uint32)
_CODES = np.array([tables.OPS.index(op) if op else -1 for op in _ACTIONS.values()], np.int64)
_WRITES = _WORDS[[list(_ACTIONS).index(word) for word in (b"Writ", b"Trim", b"Zero")]]
_FLUSH = tables.OPS.index("flush")
_CONNECT, _DISCONNECT = (int.from_bytes(word, "little") for word in (b"Conn", b"Disc"))
_DOTS = int.from_bytes(b"...\0", "little")

_DIGIT = np.full(256, 255, np.uint8)
_DIGIT[ord("0") : ord("9") + 1] = np.arange(10)
_DIGIT[ord("a") : ord("f") + 1] = np.arange(10, 16)


class LogParser:
    """Turns the log of one nbdkit process into Accesses, in pieces as they come.

    `failed` counts requests that the server answered with an error, `unread` lines that are not as
    documented, and `lost` requests whose line never came: ids count up from 1 in each connection. Connections
    that ask for the export `own` are the watcher's, not the guest's, and are left out.
    """

    def __init__(self, own: str | None = None) -> None:
        self._own = f"export={own} ".encode() if own else None
        self._own_connections: set[int] = set()
        self.failed = 0
        self.unread = 0
        self.open_connections = 0
        self.numbers = EMPTY
        """Of the accesses that came last, each in its connection; and the ends of writes beside them."""
        self.ended = Ended(EMPTY, EMPTY, EMPTY)
        self._rest = b""
        self._highest = np.zeros(0, np.int64)
        self._seen = 0

    @property
    def lost(self) -> int:
        """Requests whose line is missing between the first and the last seen of their connection."""
        return max(0, int(self._highest.sum()) - self._seen)

    def feed(self, data: bytes) -> Accesses:
        """The accesses of all lines that are complete with this piece of the log."""
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if len(self._rest) > LONGEST_LINE:
            self._rest = b""
            self.unread += 1
        found: list[_Parsed] = []
        start = 0
        while start < end:
            stop = data.rfind(b"\n", start, start + SLICE) + 1 or data.find(b"\n", start) + 1
            buffer = np.frombuffer(data[start:stop] + bytes(_PAD), np.uint8)
            found.append(self._parse(buffer, stop - start))
            start = stop
        self.numbers = np.concatenate([EMPTY, *(part.numbers for part in found)])
        self.ended = stack(Ended, [part.ended for part in found])
        return stack(Accesses, [part.accesses for part in found])

    def _parse(self, buffer: Bytes, size: int) -> _Parsed:
        tokens = _Tokens(buffer, size)
        word = _four_bytes(buffer, tokens.start(3))
        connected = tokens.has(4) & (buffer[tokens.start(2)] == ord("c"))
        if self._own or self._own_connections:
            connected &= ~self._is_own(buffer, tokens, np.flatnonzero(connected & (word == _CONNECT)))
        self.open_connections += int((connected & (word == _CONNECT)).sum()) - int(
            (connected & (word == _DISCONNECT)).sum()
        )
        done = connected & ((word & 0xFFFFFF) == _DOTS) & tokens.has(6)
        self.failed += int((buffer[tokens.start(5) + len("return=")][done] == ord("-")).sum())

        ended = _ended(buffer, tokens, np.flatnonzero(done))
        action = np.argmax(word[:, None] == _WORDS, axis=1)
        asked = np.flatnonzero(connected & (word == _WORDS[action]))
        op = _CODES[action[asked]]
        has_range = op != _FLUSH
        lines = tokens.take(asked)
        connection, id_ = lines.number(2, "connection="), lines.number(4, "id=")
        offset, length = lines.number(5, "offset=0x", 16), lines.number(6, "count=0x", 16)
        offset, length = np.where(has_range, offset, 0), np.where(has_range, length, 0)
        time_ns = _times(buffer, lines.start(0))
        good = (connection > 0) & (id_ >= 0) & (offset >= 0) & (length >= 0) & (time_ns >= 0) & lines.has(5)
        self.unread += int((~good).sum())
        self._count(connection[good], id_[good])
        good &= op >= 0  # block status queries (Extents) move no bytes
        return _Parsed(Accesses(time_ns, connection, op, offset, length).take(good), id_[good], ended)

    def _is_own(self, buffer: Bytes, tokens: "_Tokens", connects: Int) -> Bool:
        """Which lines are of the watcher's own connections, the
        new ones among `connects` (line numbers) included."""
        new = tokens.take(connects)
        for start, connection in zip(
            new.start(4).tolist(), new.number(2, "connection=").tolist(), strict=True
        ):
            if self._own and buffer[start : start + len(self._own)].tobytes() == self._own:
                self._own_connections.add(connection)
        return np.isin(tokens.number(2, "connection="), list(self._own_connections))

    def _count(self, connection: Int, id_: Int) -> None:
        self._seen += len(id_)
        if len(id_):
            grown = np.zeros(max(len(self._highest), min(int(connection.max()), 1 << 20) + 1), np.int64)
            grown[: len(self._highest)] = self._highest
            np.maximum.at(grown, np.minimum(connection, len(grown) - 1), id_)
            self._highest = grown


class _Tokens:
    """The words of each line, by position: word 0 is the date, 1 the time.

    A word that a line lacks starts at the line's end.
    """

    def __init__(self, buffer: Bytes, size: int) -> None:
        self.buffer = buffer
        self.gaps = np.flatnonzero((buffer[:size] == ord(" ")) | (buffer[:size] == ord("\n")))
        self.last = np.flatnonzero(buffer[self.gaps] == ord("\n"))
        self.first = np.append(0, self.last[:-1] + 1)

    def take(self, keep: Int) -> "_Tokens":
        """Some of the lines."""
        result = object.__new__(_Tokens)
        result.buffer, result.gaps, result.last, result.first = (
            self.buffer,
            self.gaps,
            self.last[keep],
            self.first[keep],
        )
        return result

    def has(self, count: int) -> Bool:
        """Which lines have at least `count` words."""
        enough: Bool = self.last - self.first + 1 >= count
        return enough

    def start(self, nth: int) -> Int:
        """Where word `nth` starts in each line."""
        before = np.minimum(self.first + nth - 1, len(self.gaps) - 1)
        start = np.where(before >= 0, self.gaps[np.maximum(before, 0)] + 1, 0)
        return np.where(self.has(nth + 1), start, self.gaps[self.last])

    def number(self, nth: int, prefix: str, base: int = 10) -> Int:
        """The number after `prefix` (whose last letter is checked) in word `nth`; -1 where there is none, or
        one beyond 2**63."""
        start = self.start(nth) + len(prefix)
        width = self.gaps[np.minimum(self.first + nth, self.last)] - start
        valid = self.has(nth + 1) & (width > 0) & (width <= LONGEST_NUMBER)
        valid &= self.buffer[np.where(valid, start - 1, 0)] == ord(prefix[-1])
        value = np.zeros(len(start), np.int64)
        for column in range(int(width[valid].max(initial=0))):
            inside = valid & (column < width)
            digit = _DIGIT[self.buffer[np.where(inside, start + column, 0)]].astype(np.int64)
            valid &= ~inside | ((digit < base) & (value <= ((1 << 63) - 1 - 15) // base))
            inside &= valid
            value[inside] = value[inside] * base + digit[inside]
        return np.where(valid, value, -1)


def _ended(buffer: Bytes, tokens: _Tokens, done: Int) -> Ended:
    """What the lines `done` say of writes."""
    action = _four_bytes(buffer, tokens.start(3)[done] + len("..."))
    lines = tokens.take(done[np.isin(action, _WRITES)])
    return Ended(lines.number(2, "connection="), lines.number(4, "id="), _times(buffer, lines.start(0)))


def _four_bytes(buffer: Bytes, start: Int) -> np.ndarray:
    """The four bytes at each position as a little-endian number."""
    return np.ascontiguousarray(buffer[start[:, None] + np.arange(4)]).view("<u4")[:, 0]


def _times(buffer: Bytes, start: Int) -> Int:
    """`YYYY-MM-DD HH:MM:SS.uuuuuu` at each position as
    nanoseconds since 1970; -1 where it is something else."""
    digit = _DIGIT[buffer[start[:, None] + np.arange(26)]]
    places = [*range(4), 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, *range(20, 26)]
    valid = (digit[:, places] < 10).all(axis=1)
    digit[~valid] = 0

    def number(low: int, high: int) -> Int:
        value: Int = digit[:, low].astype(np.int64)
        for place in range(low + 1, high):
            value = value * 10 + digit[:, place]
        return value

    months = (number(0, 4) - 1970) * 12 + number(5, 7) - 1
    days = months.astype("M8[M]").astype("M8[D]").astype(np.int64) + number(8, 10) - 1
    seconds = ((days * 24 + number(11, 13)) * 60 + number(14, 16)) * 60 + number(17, 19)
    return np.where(valid, seconds * 10**9 + number(20, 26) * 1000, -1)
