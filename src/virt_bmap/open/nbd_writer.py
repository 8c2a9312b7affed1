"""An NBD export that is written: data, zeroes, and trims that give space back, with many requests in flight.

Sources: the NBD protocol (doc/proto.md): transmission flags, NBD_CMD_WRITE, NBD_CMD_TRIM,
NBD_CMD_WRITE_ZEROES, NBD_CMD_FLUSH.
"""

import errno
import os
import socket
from collections import Counter

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, ints
from virt_bmap.core.errors import OutputError
from virt_bmap.open.nbd import EACH, IN_FLIGHT, REQUEST_SIZE, SIMPLE_REPLY_MAGIC, NbdReader, requests, split

FLAG_READ_ONLY, FLAG_SEND_FLUSH, FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES = 1 << 1, 1 << 2, 1 << 5, 1 << 6
CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES = 1, 3, 4, 6
UNACKNOWLEDGED = 8
"""Writes under way: enough that the server writes while the next data are read, and few enough that it need
not keep much."""
LONGEST = 1 << 30
"""Bytes of one trim or of one request for zeroes.

They carry no data, and some servers take no more than 2 GiB.
"""
REPLY = np.dtype([("magic", ">u4"), ("error", ">u4"), ("cookie", ">u8")])


class NbdWriter(NbdReader):
    """An NBD export for reading and writing.

    Raises OutputError where the server allows only reading, and for what it refuses later.
    """

    def __init__(self, uri: str, name: str | None = None, link: socket.socket | None = None) -> None:
        super().__init__(uri, name, link)
        self._open: Counter[int] = Counter()
        """Requests without a reply yet, by their cookies. The cookie of each is its offset, for messages."""
        if self.flags & FLAG_READ_ONLY:
            self.close()
            raise OutputError(f"{self.name}: can't be written: the server exports it read-only")

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        self._await(0)
        return super()._fetch(offsets, lengths)

    def write(self, offset: int, data: Bytes) -> None:
        """Write `data` at `offset`; errors may come with a later call, the last with `flush`."""
        offsets, lengths = split(ints(offset), ints(offset + len(data)), self.maximum)
        view = memoryview(np.ascontiguousarray(data).data).cast("B")
        for at, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            self._await(UNACKNOWLEDGED - 1)
            self._send(requests(CMD_WRITE, ints(at), ints(at), ints(length)))
            self._send(view[at - offset : at - offset + length])
            self._open[at] += 1

    def zero(self, start: int, end: int) -> None:
        """Make bytes [start, end) zeroes, without sending them where the server can do that by itself."""
        if self.flags & FLAG_SEND_WRITE_ZEROES:
            self._command(CMD_WRITE_ZEROES, ints(start), ints(end))
            return
        nothing = np.zeros(min(end - start, self.maximum), np.uint8)
        for low in range(start, end, self.maximum):
            self.write(low, nothing[: end - low])

    def trim(self, starts: Int, ends: Int) -> None:
        """Give the space of these ranges back; their content means nothing any more.

        Raises OutputError where the server can't.
        """
        if not self.flags & FLAG_SEND_TRIM:
            raise OutputError(
                f"{self.name}: space can't be given back: the server does not offer NBD_CMD_TRIM"
            )
        self._command(CMD_TRIM, starts, ends)

    def flush(self) -> None:
        """Wait for all that is under way, and until the server has put it on its disk."""
        if self.flags & FLAG_SEND_FLUSH:
            self._command(CMD_FLUSH, ints(0), ints(1), whole=True)
        self._await(0)

    def _command(self, kind: int, starts: Int, ends: Int, whole: bool = False) -> None:
        """Requests without data, IN_FLIGHT of them at a time. `whole`: of the whole export, with no range."""
        offsets, lengths = split(starts, ends, LONGEST // self.minimum * self.minimum)
        wire = requests(kind, offsets, offsets, np.zeros(1, np.int64) if whole else lengths)
        self._await(0)
        for low in range(0, len(offsets), IN_FLIGHT):
            part = wire[REQUEST_SIZE * low : REQUEST_SIZE * (low + IN_FLIGHT)]
            self._send(part)
            self._open.update(offsets[low : low + IN_FLIGHT].tolist())
            self._await(0)

    def _await(self, left: int) -> None:
        """Receive replies until `left` are missing."""
        count = self._open.total() - left
        if count <= 0:
            return
        self._allowed += EACH * count
        replies = np.frombuffer(self._receive(count * REPLY.itemsize), REPLY)
        answered = Counter(replies["cookie"].tolist())
        if (replies["magic"] != SIMPLE_REPLY_MAGIC).any() or not answered <= self._open:
            raise OutputError(
                f"{self.name}: can't be written: the server's reply is not a reply to any request"
            )
        self._open -= answered
        if (failed := np.flatnonzero(replies["error"])).size:
            first = replies[failed[0]]
            error = int(first["error"])
            words = os.strerror(error) if error in errno.errorcode else f"error {error}"
            raise OutputError(
                f"{self.name}: can't be written at byte {int(first['cookie']):#x}: the server says: {words}"
            )

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._link.sendall(data)
        except OSError as error:
            raise OutputError(
                f"{self.name}: can't be written: the NBD connection broke: {error.strerror or error}"
            ) from error
