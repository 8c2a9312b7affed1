"""NBD URIs, read with a client of our own: read-only, pipelined, plain Python.

libnbd is the better library, but its Python binding exists only for the distribution's own interpreter and is
not on PyPI, while `pip install` must be enough on every supported Python. Mapping needs one command (read)
with many requests in flight; measured, this client is the faster one for that.

Sources: the NBD protocol, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle
handshake, NBD_OPT_GO, simple replies), and doc/uri.md for the URIs.
"""

import contextlib
import errno
import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, expand, gather, union
from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.core.reader import Reader

IN_FLIGHT = 256
"""Requests sent before the first reply is awaited: 7 KiB, which any socket buffer takes without blocking."""
REQUEST = 2 << 20
"""Longest single read, in bytes: servers must accept 32 MiB, but many short ones share a slow link better."""
SPARE = 0.1
"""Nearby ranges are read as one, the gap included, as long as that adds at most this share of the bytes."""
GAPS = (64 << 10, 16 << 10, 4 << 10)
TIMEOUT = 60.0
"""Seconds of silence after which a server is given up."""
PATIENCE, EACH, RATE = 300.0, 1.0, 1024
"""Seconds that a connection may be waited for in all: so many, one for each answer, and one for so many
bytes. The slowest links that carry an IP packet (GSM data: 1,200 bytes a second) and shelves that seek for
a second are quicker; a server that sends a byte a minute is left after five minutes."""
MOST_REPLIES = 1024
"""Replies to one option: QEMU names two contexts and one for each dirty bitmap."""
WORDS = 200
"""Letters of a server's own words that a message repeats."""
LARGEST_BLOCK = 1 << 16
"""The protocol's limit for the smallest block that a server takes."""
LEAST_MAXIMUM = 512
"""The protocol's limit for the longest read that a server takes, where the export is not shorter: its
preferred block is as long at least."""

NBDMAGIC, IHAVEOPT, OPTION_REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2
OPT_GO, REP_ACK, REP_INFO, REP_ERROR = 7, 1, 3, 1 << 31
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
REQUEST_MAGIC, SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
CMD_READ, CMD_DISC = 0, 2
REQUEST_HEADER = np.dtype(
    [
        ("magic", ">u4"),
        ("flags", ">u2"),
        ("type", ">u2"),
        ("cookie", ">u8"),
        ("offset", ">u8"),
        ("length", ">u4"),
    ]
)
REQUEST_SIZE = REQUEST_HEADER.itemsize
REP_ERRORS = {
    1: "unsupported",
    2: "denied by policy",
    3: "invalid",
    5: "TLS required",
    6: "unknown export",
    8: "block size required",
}
OPTION_NAMES = {OPT_GO: "NBD_OPT_GO"}
DEFAULT_PORT = 10809


def connect(uri: str) -> tuple[socket.socket, str]:
    """A connected socket and the export's name.

    UsageError for URIs that can't be served, ImageError where nobody answers.
    """
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "localhost", parts.port or DEFAULT_PORT
    except ValueError as error:
        raise UsageError(f"{uri}: is not a valid URI: {error}") from error
    if parts.scheme not in ("nbd", "nbd+unix"):
        raise UsageError(
            f"{uri}: {parts.scheme} is not supported; nbd:// and nbd+unix:// are (for TLS, put a local proxy "
            "such as nbdkit nbd in between)"
        )
    path = parse_qs(parts.query).get("socket", [""])[0]
    if parts.scheme == "nbd+unix" and not path:
        raise UsageError(f"{uri}: a nbd+unix URI needs ?socket=PATH")
    link = socket.socket(socket.AF_UNIX) if parts.scheme == "nbd+unix" else None
    try:
        if link:
            link.settimeout(TIMEOUT)
            link.connect(path)
        else:
            link = socket.create_connection((host, port), TIMEOUT)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        if link:
            link.close()
        raise ImageError(f"{uri}: can't connect: {error.strerror or error}") from error
    return link, unquote(parts.path.removeprefix("/"))


def string(text: str) -> bytes:
    """A string as options carry it."""
    data = text.encode()
    return struct.pack(">I", len(data)) + data


def refusal(kind: int, data: bytes) -> str:
    """The server's reason for refusing an option, in words."""
    words = data.decode(errors="replace").strip()[:WORDS]
    return REP_ERRORS.get(kind & ~REP_ERROR, f"error {kind:#x}") + (f": {words}" if words else "")


def split(starts: Int, ends: Int, longest: int) -> tuple[Int, Int]:
    """(offsets, lengths) of the ranges in pieces of at most `longest` bytes."""
    piece, nth = expand(-(-(ends - starts) // longest))
    offsets = starts[piece] + nth * longest
    return offsets, np.minimum(ends[piece] - offsets, longest)


def requests(kind: int, cookies: Int, offsets: Int, lengths: Int) -> bytes:
    """Requests of one kind as they go over the wire, REQUEST_SIZE bytes each."""
    made = np.zeros(len(offsets), REQUEST_HEADER)
    made["magic"], made["type"], made["cookie"], made["offset"], made["length"] = (
        REQUEST_MAGIC,
        kind,
        cookies,
        offsets,
        lengths,
    )
    return made.tobytes()


class Serving(Protocol):
    """Who serves an export to us alone. `failure`: what it said, where it did not end well."""

    failure: str

    def close(self) -> None: ...


class Refused(ImageError):
    """The server's error for one request; `ended`: it has said all that it says of that one.

    Replies to other requests still come.
    """

    def __init__(self, message: str, ended: bool) -> None:
        super().__init__(message)
        self.ended = ended


class NbdReader(Reader):
    """An NBD export, read-only."""

    def __init__(self, uri: str, name: str | None = None, link: socket.socket | None = None) -> None:
        """`link`: a socket that is connected already, to the default export."""
        self.server: Serving | None = None
        """Who serves this to us, and is to be closed with it."""
        self.name = name or uri
        self.warning = ""
        """What the server said besides when it opened the image: perhaps why it can't be read."""
        self.minimum, self.maximum = 1, REQUEST
        self.flags = 0
        """What the server offers besides reading: transmission flags."""
        self._waited, self._allowed = 0.0, PATIENCE
        self._link, export = (link, "") if link else connect(uri)
        try:
            size = self._handshake(export)
            if size == 0:
                raise ImageError(f"{self.name}: the export is empty (0 bytes), not a disk")
        except BaseException:
            self._link.close()
            raise
        super().__init__(size, self.name)

    def _handshake(self, export: str) -> int:
        """Agree on the export; its size in bytes."""
        magic, options, flags = struct.unpack(">8s8sH", self._receive(18))
        if magic != NBDMAGIC or options != IHAVEOPT or not flags & FLAG_FIXED_NEWSTYLE:
            raise ImageError(f"{self.name}: the server does not speak NBD's fixed newstyle protocol")
        self._send(struct.pack(">I", flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)))
        self._negotiate(export)
        size, largest = -1, REQUEST
        for kind, data in self._option(OPT_GO, string(export) + struct.pack(">HH", 1, INFO_BLOCK_SIZE)):
            if kind & REP_ERROR:
                raise ImageError(f"{self.name}: the server refuses export {export!r}: {refusal(kind, data)}")
            if kind == REP_INFO and len(data) >= 12 and data[:2] == struct.pack(">H", INFO_EXPORT):
                size, self.flags = struct.unpack_from(">QH", data, 2)
            elif kind == REP_INFO and len(data) >= 14 and data[:2] == struct.pack(">H", INFO_BLOCK_SIZE):
                self.minimum, _, largest = struct.unpack_from(">III", data, 2)
                self.minimum = max(1, self.minimum)
                if self.minimum > LARGEST_BLOCK or self.minimum & (self.minimum - 1):
                    raise ImageError(
                        f"{self.name}: the server takes blocks of {self.minimum:,} "
                        "bytes at least, which the protocol does not allow"
                    )
        if not 0 <= size < 1 << 63:
            raise ImageError(f"{self.name}: the server gives {size} bytes as the export's size")
        if largest < min(LEAST_MAXIMUM, size):
            raise ImageError(
                f"{self.name}: the server gives no more than {largest:,} bytes at a time, which the "
                "protocol does not allow"
            )
        self.maximum = max(self.minimum, min(REQUEST, largest) // self.minimum * self.minimum)
        return size

    def _negotiate(self, export: str) -> None:
        """What else to agree on before the export is opened: here nothing."""

    def _option(self, option: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        """(kind, data) of the server's replies to one option; an error is the last of them, the
        acknowledgement is left out."""
        self._send(IHAVEOPT + struct.pack(">II", option, len(body)) + body)
        for number in itertools.count():
            magic, about, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != OPTION_REPLY or about != option or length > 65536 or number > MOST_REPLIES:
                raise ImageError(f"{self.name}: the server's answer to {OPTION_NAMES[option]} is not valid")
            data = bytes(self._receive(length))
            if kind == REP_ACK:
                return
            yield kind, data
            if kind & REP_ERROR:
                return

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        starts, ends = self._plan(offsets, offsets + lengths)
        data = self._transfer(starts, ends)
        if len(starts) == len(offsets) and (starts == offsets).all() and (ends == offsets + lengths).all():
            return data
        base = np.cumsum(ends - starts) - (ends - starts)
        piece = np.searchsorted(starts, offsets, "right") - 1
        return gather(data, base[piece] + offsets - starts[piece], lengths)

    def _plan(self, starts: Int, ends: Int) -> tuple[Int, Int]:
        """Round the ranges out to the server's blocks, and merge neighbours where that costs few bytes."""
        starts = starts // self.minimum * self.minimum
        ends = np.minimum(-(-ends // self.minimum) * self.minimum, self.size)
        starts, ends = union(starts, ends)
        if len(starts) > 1:
            allowed = (1 + SPARE) * int((ends - starts).sum())
            for gap in GAPS:
                merged = union(starts, ends, gap)
                if int((merged[1] - merged[0]).sum()) <= allowed:
                    return merged
        return starts, ends

    def _transfer(self, starts: Int, ends: Int) -> Bytes:
        """Read the ranges in pieces that the server takes."""
        result = np.empty(int((ends - starts).sum()), np.uint8)
        offsets, lengths = split(starts, ends, self.maximum)
        place = (np.cumsum(lengths) - lengths).tolist()
        self._exchange(
            CMD_READ,
            offsets,
            lengths,
            self._reads(offsets.tolist(), lengths.tolist(), place, memoryview(result.data)),
        )
        return result

    def _exchange(self, command: int, offsets: Int, lengths: Int, receive: Callable[[int], bool]) -> None:
        """Send a request for each range, up to IN_FLIGHT under way; `receive`, told how many are sent, takes
        in a reply and says whether it ended a request.

        What the server refuses is raised when all requests are answered: whoever asks again then gets the
        replies to what was asked.
        """
        refused: list[Refused] = []
        wire, total = requests(command, np.arange(len(offsets)), offsets, lengths), len(offsets)
        self._allowed += EACH * total
        sent = received = 0
        while received < total:
            window = min(total, received + IN_FLIGHT)
            if sent < window and (sent == received or window - sent >= IN_FLIGHT // 2 or window == total):
                self._send(wire[REQUEST_SIZE * sent : REQUEST_SIZE * window])
                sent = window
            try:
                received += receive(sent)
            except Refused as error:
                refused.append(error)
                received += error.ended
        if refused:
            raise refused[0]

    def _reads(
        self, offset_of: list[int], wanted: list[int], place: list[int], view: memoryview
    ) -> Callable[[int], bool]:
        """Takes in the reply to one of these reads; replies may come in any order."""

        answered = bytearray(len(wanted))

        def receive(sent: int) -> bool:
            magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
            if magic != SIMPLE_REPLY_MAGIC or cookie >= sent or answered[cookie]:
                raise ImageError(f"{self.name}: the server's reply is not a reply to any request")
            answered[cookie] = 1
            if error:
                raise self._failed(error, offset_of[cookie])
            self._receive_into(view[place[cookie] : place[cookie] + wanted[cookie]])
            return True

        return receive

    def _failed(self, error: int, offset: int, ended: bool = True) -> Refused:
        words = os.strerror(error) if error in errno.errorcode else f"error {error}"
        before = f", and when it opened the image: {self.warning}" if self.warning else ""
        return Refused(
            f"{self.name}: can't be read at byte {offset:#x}: the server says: {words}{before}", ended
        )

    def _send(self, data: bytes) -> None:
        try:
            self._link.sendall(data)
        except OSError as error:
            raise ImageError(f"{self.name}: the NBD connection broke: {error.strerror or error}") from error

    def _receive(self, length: int) -> bytearray:
        data = bytearray(length)
        self._receive_into(memoryview(data))
        return data

    def _receive_into(self, view: memoryview) -> None:
        self._allowed += len(view) / RATE
        while len(view):
            began = time.monotonic()
            try:
                got = self._link.recv_into(view)
            except OSError as error:
                raise ImageError(
                    f"{self.name}: the NBD connection broke: {error.strerror or error}"
                ) from error
            if got == 0:
                raise ImageError(f"{self.name}: the NBD server closed the connection")
            view = view[got:]
            self._waited += time.monotonic() - began
            if self._waited > self._allowed:
                raise ImageError(
                    f"{self.name}: the server sends too slowly: we waited {self._waited:,.0f} s for it in all"
                )

    def close(self) -> None:
        # where the server is gone already there is nothing left to tell it
        with contextlib.suppress(OSError):
            self._link.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        self._link.close()
        if self.server:
            self.server.close()
