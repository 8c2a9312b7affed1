"""What takes the named accesses: the live log, the summary, the trace, the screen.

Accesses come in the order in which they happened, each once. Pieces that are HELD come again by `late`, once a newer map knows whose they are or
nobody expects that any more. Object numbers are those of the resolver that was announced last.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from virt_bmap.arrays import Int
from virt_bmap.watch.accesses import Accesses
from virt_bmap.watch.resolve import Resolver, Touched


class Sink(Protocol):
    """Takes the accesses of all disks."""

    def add(self, disk: int, accesses: Accesses, touched: Touched) -> None:
        """These happened on disk number `disk` (from 1), and touched this."""

    def late(self, disk: int, number: Int, accesses: Accesses, touched: Touched) -> None:
        """Pieces that were held: of accesses that were the `number`th (from 0) added for this disk."""

    def renew(self, resolver: Resolver) -> None:
        """From now on objects are those of a newer map."""


class DiskSink(Protocol):
    """Takes the accesses of one disk."""

    def add(self, accesses: Accesses, touched: Touched) -> None:
        """As Sink.add."""

    def late(self, accesses: Accesses, touched: Touched) -> None:
        """As Sink.late."""

    def renew(self, resolver: Resolver) -> None:
        """As Sink.renew."""


class EachDisk:
    """One sink for each disk."""

    def __init__(self, sinks: Mapping[int, DiskSink]) -> None:
        self._sinks = sinks

    def add(self, disk: int, accesses: Accesses, touched: Touched) -> None:
        self._sinks[disk].add(accesses, touched)

    def late(self, disk: int, number: Int, accesses: Accesses, touched: Touched) -> None:
        self._sinks[disk].late(accesses, touched)

    def renew(self, resolver: Resolver) -> None:
        for sink in self._sinks.values():
            sink.renew(resolver)


class Sinks:
    """Several sinks; one that fails is left out from then on, and `broken` says why: the guest runs on."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self.broken: str | None = None

    def add(self, disk: int, accesses: Accesses, touched: Touched) -> None:
        for sink in list(self._sinks):
            try:
                sink.add(disk, accesses, touched)
            except OSError as error:
                self._sinks.remove(sink)
                self.broken = error.strerror or str(error)

    def late(self, disk: int, number: Int, accesses: Accesses, touched: Touched) -> None:
        for sink in self._sinks:
            sink.late(disk, number, accesses, touched)

    def renew(self, resolver: Resolver) -> None:
        for sink in self._sinks:
            sink.renew(resolver)
