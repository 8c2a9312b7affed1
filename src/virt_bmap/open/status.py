"""NBD exports that also tell the status of their blocks: what is zero, which layer of a chain holds it, what
a dirty bitmap calls changed.

Status needs structured replies, which cost every read a longer header; so only what asks for status opens an
export this way.

Sources: the NBD protocol, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md ("Structured
reply chunk message", "Metadata querying"); QEMU docs/interop/nbd.txt for the `qemu:` contexts.
"""

import socket
import struct
from bisect import bisect
from collections.abc import Callable, Sequence

import numpy as np

from virt_bmap.core.arrays import Int, expand, ints
from virt_bmap.core.errors import ImageError
from virt_bmap.open.nbd import OPTION_NAMES, REP_ERROR, SIMPLE_REPLY_MAGIC, NbdReader, refusal, string

OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 8, 9, 10
OPTION_NAMES |= {
    OPT_STRUCTURED_REPLY: "NBD_OPT_STRUCTURED_REPLY",
    OPT_LIST_META_CONTEXT: "NBD_OPT_LIST_META_CONTEXT",
    OPT_SET_META_CONTEXT: "NBD_OPT_SET_META_CONTEXT",
}
REP_META_CONTEXT = 4
STRUCTURED_REPLY_MAGIC, FLAG_DONE = 0x668E33EF, 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS, CHUNK_ERROR = 0, 1, 2, 5, 1 << 15
CMD_BLOCK_STATUS = 7

ALLOCATION, DEPTH, DIRTY = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:"
STATE_ZERO = 2
"""base:allocation: the extent reads as zeroes."""
STATE_DIRTY = 1

SPAN = 1 << 30
"""Bytes that one request asks the status of: requests are 32 bits, and replies to many of them can be under
way at once."""
MOST_SPANS, MOST_EXTENTS = 1 << 20, 1 << 24
"""Spans that are asked about (1 PiB), and extents that are kept: more than any image holds, and a server may
name one for each byte."""
MOST_ANSWERS = 1 << 18
"""Answers beyond one for each span.

Servers tell thousands of extents in one; one that tells a few bytes in each would be asked for ever.
"""
MAX_WORDS = 4096
"""Bytes of an error's own words."""
MAX_CHUNK = 32 << 20
"""Bytes of one reply: QEMU stops at 1 MiB of extents; the longest that any client must take."""


class StatusReader(NbdReader):
    """An export with the metadata contexts that were asked
    for and that the server has: `contexts`, by number.

    Raises ImageError where one of `wanted` is not there; `base:allocation` is used where the server has it.
    Without any wanted, a server that knows no structured replies is read as a plain one.
    """

    def __init__(
        self, uri: str, name: str | None = None, link: socket.socket | None = None, wanted: Sequence[str] = ()
    ) -> None:
        self._wanted = list(wanted)
        self._structured = False
        self.contexts: dict[int, str] = {}
        super().__init__(uri, name, link)

    def _negotiate(self, export: str) -> None:
        refused = [
            refusal(kind, data) for kind, data in self._option(OPT_STRUCTURED_REPLY, b"") if kind & REP_ERROR
        ]
        self._structured = not refused
        if refused and self._wanted:
            raise ImageError(
                f"{self.name}: the server can't tell {self._wanted[0]}: "
                f"it refuses structured replies: {refused[0]}"
            )
        if self._structured:
            self.contexts = self._meta(OPT_SET_META_CONTEXT, export, [*self._wanted, ALLOCATION])
        missing = [context for context in self._wanted if context not in self.contexts.values()]
        if missing:
            has = sorted(self._meta(OPT_LIST_META_CONTEXT, export, []).values())
            raise ImageError(
                f"{self.name}: export {export!r} has no {missing[0]}; "
                f"{'it has: ' + ', '.join(has) if has else 'it tells no status at all'}"
            )

    def _meta(self, option: int, export: str, queries: list[str]) -> dict[int, str]:
        """The contexts that the server names, by its numbers; none where it refuses."""
        body = string(export) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))
        replies = list(self._option(option, body))
        if option == OPT_LIST_META_CONTEXT:  # numbers mean nothing there
            return {
                number: data[4:].decode(errors="replace")
                for number, (kind, data) in enumerate(replies)
                if kind == REP_META_CONTEXT
            }
        named = [data for kind, data in replies if kind == REP_META_CONTEXT and len(data) >= 4]
        contexts = {struct.unpack_from(">I", data)[0]: data[4:].decode(errors="replace") for data in named}
        if (
            len(contexts) < len(named)
            or len(set(contexts.values())) < len(named)
            or not set(contexts.values()) <= set(queries)
        ):
            raise ImageError(
                f"{self.name}: the server names a metadata context twice, or one that it was not asked for"
            )
        return contexts

    # ---- status --------------------------------------------------------------------------------------------

    def status(self, context: str) -> tuple[Int, Int, Int]:
        """(starts, ends, flags) of the whole export in one of
        `contexts`, sorted, neighbours of equal flags joined."""
        (wanted,) = (number for number, name in self.contexts.items() if name == context)
        spans = -(-self.size // SPAN)
        if spans > MOST_SPANS:
            raise ImageError(
                f"{self.name}: has {self.size:,} bytes, so many that "
                "their status can't be asked for: no disk is that large"
            )
        nth, count = np.arange(spans, dtype=np.int64), 0
        starts, ends = nth * SPAN, np.minimum((nth + 1) * SPAN, self.size)
        parts: list[tuple[int, np.ndarray]] = []
        # a server may answer less than it was asked, so the rest is asked for in the next round
        while len(starts):
            if len(parts) + len(starts) > spans + MOST_ANSWERS:
                raise ImageError(
                    f"{self.name}: the server tells {context} in more than {MOST_ANSWERS:,} answers"
                )
            answers: dict[int, np.ndarray] = {}
            self._exchange(
                CMD_BLOCK_STATUS,
                starts,
                ends - starts,
                self._statuses(wanted, starts.tolist(), answers, MOST_EXTENTS - count),
            )
            answers = {at: _within(found, int(ends[at] - starts[at])) for at, found in answers.items()}
            parts += [(int(starts[at]), found) for at, found in answers.items()]
            count += sum(map(len, answers.values()))
            reached = starts.copy()
            for at, found in answers.items():
                reached[at] += int(found["length"].astype(np.int64).sum())
            if len(answers) < len(starts) or (reached == starts).any():
                raise ImageError(
                    f"{self.name}: the server does not tell {context} at byte "
                    f"{starts[reached == starts][0]:#x}"
                )
            starts, ends = reached[reached < ends], ends[reached < ends]
        return _joined(parts, self.size)

    def stored(self) -> tuple[Int, Int]:
        if ALLOCATION not in self.contexts.values() or self.size > MOST_SPANS * SPAN:
            return super().stored()
        starts, ends, flags = self.status(ALLOCATION)
        keep = (flags & STATE_ZERO) == 0
        return starts[keep], ends[keep]

    def _statuses(
        self, context: int, offset_of: list[int], answers: dict[int, np.ndarray], most: int
    ) -> Callable[[int], bool]:
        """Takes in a chunk of a reply to a status request; what belongs to another context is dropped."""

        ended, told = bytearray(len(offset_of)), set()

        def receive(sent: int) -> bool:
            done, kind, cookie, length = self._chunk(sent, offset_of, ended)
            data = self._receive(length)
            if kind == CHUNK_STATUS and length >= 12 and length % 8 == 4:
                about = struct.unpack_from(">I", data)[0]
                if (about not in self.contexts and not done) or (cookie, about) in told:
                    raise self._odd(kind)
                told.add((cookie, about))
                nonlocal most
                most -= length // 8
                if most < 0:
                    raise ImageError(
                        f"{self.name}: the server tells the status of its "
                        f"blocks in more than {MOST_EXTENTS:,} extents"
                    )
                if about == context:
                    answers[cookie] = np.frombuffer(
                        data, np.dtype([("length", ">u4"), ("flags", ">u4")]), offset=4
                    )
            elif kind != CHUNK_NONE or length:
                raise self._odd(kind)
            return done

        return receive

    # ---- structured replies --------------------------------------------------------------------------------

    def _reads(
        self, offset_of: list[int], wanted: list[int], place: list[int], view: memoryview
    ) -> Callable[[int], bool]:
        if not self._structured:
            return super()._reads(offset_of, wanted, place, view)
        left, ended = list(wanted), bytearray(len(wanted))
        parts: dict[int, list[tuple[int, int]]] = {}
        """Of requests that are answered in several chunks: what came."""

        def receive(sent: int) -> bool:
            done, kind, cookie, length = self._chunk(sent, offset_of, ended)
            if kind in (CHUNK_DATA, CHUNK_HOLE) and (length == 12 if kind == CHUNK_HOLE else length > 8):
                start = int.from_bytes(self._receive(8), "big") - offset_of[cookie]
                size = int.from_bytes(self._receive(4), "big") if kind == CHUNK_HOLE else length - 8
                left[cookie] -= size
                if start < 0 or size <= 0 or start + size > wanted[cookie] or left[cookie] < 0:
                    raise self._odd(kind)
                if size < wanted[cookie]:
                    came = parts.setdefault(cookie, [])
                    at = bisect(came, (start, start + size))
                    if (at and came[at - 1][1] > start) or (at < len(came) and came[at][0] < start + size):
                        # a part again: another one would stay what the memory held before
                        raise self._odd(kind)
                    came.insert(at, (start, start + size))
                target = view[place[cookie] + start : place[cookie] + start + size]
                if kind == CHUNK_DATA:
                    self._receive_into(target)
                else:
                    target[:] = bytes(size)
            elif kind != CHUNK_NONE or length:
                raise self._odd(kind)
            if done:
                parts.pop(cookie, None)
            if done and left[cookie]:
                raise ImageError(
                    f"{self.name}: the server sent less than was asked for at byte {offset_of[cookie]:#x}"
                )
            return done

        return receive

    def _chunk(self, sent: int, offset_of: list[int], ended: bytearray) -> tuple[bool, int, int, int]:
        """(does it end the request?, type, request, bytes that follow) of the next chunk; errors are raised.

        `ended` says which requests are answered.
        """
        head = self._receive(16)
        # a server may refuse a request in the old way
        if int.from_bytes(head[:4], "big") == SIMPLE_REPLY_MAGIC:
            _, error, cookie = struct.unpack(">IIQ", head)
            if cookie < sent and error:
                raise self._failed(error, offset_of[cookie])
            raise self._odd(CHUNK_NONE)
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", head + self._receive(4))
        if magic != STRUCTURED_REPLY_MAGIC or cookie >= sent or ended[cookie] or length > MAX_CHUNK + 8:
            raise ImageError(f"{self.name}: the server's reply is not a reply to any request")
        if kind == CHUNK_NONE and not flags & FLAG_DONE:
            raise self._odd(kind)
        ended[cookie] = flags & FLAG_DONE
        if kind & CHUNK_ERROR:
            if length > MAX_WORDS:
                raise self._odd(kind)
            data = self._receive(length)
            raise self._failed(
                struct.unpack_from(">I", data)[0] if length >= 4 else 0,
                offset_of[cookie],
                bool(flags & FLAG_DONE),
            )
        return bool(flags & FLAG_DONE), kind, cookie, length

    def _odd(self, kind: int) -> ImageError:
        return ImageError(
            f"{self.name}: the server sent a chunk of type {kind} that does not answer what it was asked"
        )


def _within(extents: np.ndarray, length: int) -> np.ndarray:
    """The extents that begin in the first `length` bytes: the last one may reach further, which the next
    answer says again."""
    ends = np.cumsum(extents["length"].astype(np.int64))
    found: np.ndarray = extents[(ends - extents["length"] < length) & (extents["length"] > 0)]
    return found


def _joined(parts: list[tuple[int, np.ndarray]], size: int) -> tuple[Int, Int, Int]:
    """Answers [(start, extents)] as ranges over [0, size), neighbours of equal flags joined."""
    parts.sort(key=lambda part: part[0])
    counts = ints([len(found) for _, found in parts])
    lengths = np.concatenate([found["length"].astype(np.int64) for _, found in parts])
    flags = np.concatenate([found["flags"].astype(np.int64) for _, found in parts])
    row, _ = expand(counts)
    before = np.cumsum(lengths) - lengths
    first = np.cumsum(counts) - counts
    starts = ints([start for start, _ in parts])[row] + before - before[first][row]
    new = np.append(True, flags[1:] != flags[:-1])
    starts, flags = starts[new], flags[new]
    return starts, np.append(starts[1:], size), flags
