"""Disks as the appliance sees them: served by nbdkit, what is written thrown away, every read noted.

A call to the appliance returns when it is done, and nbdkit writes a read to its log before it serves it. So
what the log gains during a call is what that call read. (Kernel threads of the appliance could read at that
time, too: with readahead off and nothing mounted for writing, none has been seen to.)
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from virt_bmap.accesses.accesses import LogParser
from virt_bmap.core.arrays import EMPTY, Int
from virt_bmap.core.errors import ImageError
from virt_bmap.model import tables
from virt_bmap.serve.serve import Follower, Served, Source, private_folder, serve

READ = tables.OPS.index("read")


class Reads(NamedTuple):
    """Reads in their order: [start, end) of disk number `disk`, from 1."""

    disk: Int
    start: Int
    end: Int


NO_READS = Reads(EMPTY, EMPTY, EMPTY)


@dataclass
class _ServedDisk:
    source: Source
    served: Served
    follower: Follower
    parser: LogParser = field(default_factory=LogParser)
    ours: int = 0
    """The highest connection that is not the appliance's but our own."""


class ServedDisks:
    """The served disks of one machine."""

    def __init__(self, disks: list[_ServedDisk]) -> None:
        self._disks = disks

    @property
    def uris(self) -> list[str]:
        """For reading what the appliance sees, recovered journals included."""
        return [disk.served.address.uri() for disk in self._disks]

    @property
    def sockets(self) -> list[str]:
        return [disk.served.address.socket for disk in self._disks]

    def appliance_comes(self) -> None:
        """Connections made until now are ours: what they read is not noted."""
        self.since()
        for disk in self._disks:
            disk.ours = disk.parser.open_connections

    def since(self) -> Reads:
        """What the appliance has read since the last call.

        Raises ImageError where a server has ended or its log has a gap.
        """
        parts = []
        for number, disk in enumerate(self._disks, 1):
            while data := disk.follower.read():
                found = disk.parser.feed(data)
                found = found.take((found.op == READ) & (found.connection > disk.ours))
                parts.append(
                    (
                        found.time_ns,
                        np.full(len(found), number, np.int64),
                        found.offset,
                        found.offset + found.length,
                    )
                )
            self._check(disk)
        if not parts:
            return NO_READS
        time, disks, start, end = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(time, kind="stable") if len(self._disks) > 1 else slice(None)
        return Reads(disks[order], start[order], end[order])

    def _check(self, disk: _ServedDisk) -> None:
        if disk.served.process.poll() is not None:
            raise ImageError(f"{disk.source.image}: its server ended: {disk.served.words()}")
        if disk.parser.failed:
            raise ImageError(f"{disk.source.image}: can't be read: {disk.served.words()}")
        if disk.parser.unread or disk.parser.lost or disk.follower.skipped:
            raise ImageError(f"{disk.source.image}: the log of its server has gaps")


@contextlib.contextmanager
def watched(sources: Sequence[Source]) -> Iterator[ServedDisks]:
    """Serve these disks until the block ends."""
    with contextlib.ExitStack() as stack:
        disks = []
        for source in sources:
            folder = stack.enter_context(private_folder())
            follower = Follower(f"{folder}/log")
            stack.callback(follower.close)
            disks.append(
                _ServedDisk(
                    source, stack.enter_context(serve(source, folder, write=False, in_order=True)), follower
                )
            )
        yield ServedDisks(disks)
