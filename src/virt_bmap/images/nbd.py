"""NBD URIs, read with a client of our own: read-only, pipelined, plain Python.

libnbd is the better library, but its Python binding exists only for the distribution's own interpreter and is not on PyPI, while `pip install` must be
enough on every supported Python. Mapping needs one command (read) with many requests in flight; measured, this client is the faster one for that.

Sources: the NBD protocol, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle handshake, NBD_OPT_GO, simple replies),
and doc/uri.md for the URIs.
"""

import contextlib
import errno
import os
import socket
import struct
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from virt_bmap.arrays import Bytes, Int, gather, union
from virt_bmap.errors import ImageError, UsageError
from virt_bmap.reader import Reader

IN_FLIGHT = 256
"""Requests sent before the first reply is awaited: 7 KiB, which any socket buffer takes without blocking."""
REQUEST = 2 << 20
"""Longest single read, in bytes: servers must accept 32 MiB, but many short ones share a slow link better."""
SPARE = 0.1
"""Nearby ranges are read as one, the gap included, as long as that adds at most this share of the bytes."""
GAPS = (64 << 10, 16 << 10, 4 << 10)
TIMEOUT = 60.0

NBDMAGIC, IHAVEOPT, OPTION_REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2
OPT_GO, REP_ACK, REP_INFO, REP_ERROR = 7, 1, 3, 1 << 31
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
REQUEST_MAGIC, SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
CMD_READ, CMD_DISC = 0, 2
REP_ERRORS = {
    1: "unsupported",
    2: "denied by policy",
    3: "invalid",
    5: "TLS required",
    6: "unknown export",
    8: "block size required",
}
DEFAULT_PORT = 10809


def connect(uri: str) -> tuple[socket.socket, str]:
    """A connected socket and the export's name. UsageError for URIs that can't be served, ImageError where nobody answers."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "localhost", parts.port or DEFAULT_PORT
    except ValueError as error:
        raise UsageError(f"{uri}: is not a valid URI: {error}") from error
    if parts.scheme not in ("nbd", "nbd+unix"):
        raise UsageError(
            f"{uri}: {parts.scheme} is not supported; nbd:// and nbd+unix:// are (for TLS, put a local proxy such as nbdkit nbd in between)"
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


class NbdReader(Reader):
    """An NBD export, read-only."""

    def __init__(self, uri: str, name: str | None = None) -> None:
        self.name = name or uri
        self.minimum, self.maximum = 1, REQUEST
        self._link, export = connect(uri)
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
        name = export.encode()
        body = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, INFO_BLOCK_SIZE)
        self._send(IHAVEOPT + struct.pack(">II", OPT_GO, len(body)) + body)
        size = -1
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != OPTION_REPLY or length > 65536:
                raise ImageError(f"{self.name}: the server's answer to NBD_OPT_GO is not valid")
            data = bytes(self._receive(length))
            if kind & REP_ERROR:
                why = REP_ERRORS.get(kind & ~REP_ERROR, f"error {kind:#x}")
                words = data.decode(errors="replace").strip()
                raise ImageError(f"{self.name}: the server refuses export {export!r}: {why}{': ' + words if words else ''}")
            if kind == REP_ACK:
                break
            if kind == REP_INFO and length >= 10 and data[:2] == struct.pack(">H", INFO_EXPORT):
                size = struct.unpack_from(">Q", data, 2)[0]
            elif kind == REP_INFO and length >= 14 and data[:2] == struct.pack(">H", INFO_BLOCK_SIZE):
                self.minimum, _, largest = struct.unpack_from(">III", data, 2)
                self.minimum = max(1, self.minimum)
                self.maximum = max(self.minimum, min(REQUEST, largest) // self.minimum * self.minimum)
        if not 0 <= size < 1 << 63:
            raise ImageError(f"{self.name}: the server gives {size} bytes as the export's size")
        return size

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
        """Read the ranges with up to IN_FLIGHT requests under way; replies may come in any order."""
        result = np.empty(int((ends - starts).sum()), np.uint8)
        counts = -(-(ends - starts) // self.maximum)
        piece = np.repeat(np.arange(len(starts)), counts)
        nth = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
        offsets = starts[piece] + nth * self.maximum
        lengths = np.minimum(ends[piece] - offsets, self.maximum)
        requests = np.zeros(len(offsets), np.dtype([("magic", ">u4"), ("flags", ">u2"), ("type", ">u2"), ("cookie", ">u8"),
                                                    ("offset", ">u8"), ("length", ">u4")]))  # fmt: skip
        requests["magic"], requests["type"] = REQUEST_MAGIC, CMD_READ
        requests["cookie"], requests["offset"], requests["length"] = np.arange(len(offsets)), offsets, lengths
        wire, view = requests.tobytes(), memoryview(result.data)
        place = (np.cumsum(lengths) - lengths).tolist()
        wanted, offset_of = lengths.tolist(), offsets.tolist()
        sent = received = 0
        while received < len(wanted):
            window = min(len(wanted), received + IN_FLIGHT)
            if sent < window and (sent == received or window - sent >= IN_FLIGHT // 2 or window == len(wanted)):
                self._send(wire[28 * sent : 28 * window])
                sent = window
            magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
            if magic != SIMPLE_REPLY_MAGIC or cookie >= sent:
                raise ImageError(f"{self.name}: the server's reply is not a reply to any request")
            if error:
                words = os.strerror(error) if error in errno.errorcode else f"error {error}"
                raise ImageError(f"{self.name}: can't be read at byte {offset_of[cookie]:#x}: the server says: {words}")
            self._receive_into(view[place[cookie] : place[cookie] + wanted[cookie]])
            received += 1
        return result

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
        while len(view):
            try:
                got = self._link.recv_into(view)
            except OSError as error:
                raise ImageError(f"{self.name}: the NBD connection broke: {error.strerror or error}") from error
            if got == 0:
                raise ImageError(f"{self.name}: the NBD server closed the connection")
            view = view[got:]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # where the server is gone already there is nothing left to tell it
            self._link.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        self._link.close()
