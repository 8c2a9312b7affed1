"""What takes the named accesses: the live log, the summary, the trace, the screen.

Accesses come in the order in which they happened, each once. Pieces that are open (HELD or GUESSED, see
`accesses/resolve.py`) come again by `late`, once another map knows whose they are or nobody expects that any
more; parts of them may come apart, but no byte comes twice. Object numbers are those of the resolver that was
announced last, which may be an older one again for a moment.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import Resolver, Touched
from virt_bmap.core.arrays import Int
from virt_bmap.core.printable import one_line


class Sink(Protocol):
    """Takes the accesses of all disks."""

    def add(self, disk: int, accesses: Accesses, touched: Touched) -> None:
        """These happened on disk number `disk` (from 1), and touched this."""

    def late(self, disk: int, number: Int, accesses: Accesses, touched: Touched) -> None:
        """Pieces that were open: of accesses that were the `number`th (from 0) added for this disk."""

    def renew(self, resolver: Resolver) -> None:
        """From now on objects are those of another map."""


@runtime_checkable
class Beating(Protocol):
    """A sink that has something to do now and then."""

    def beat(self) -> None:
        """To be called often."""


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
    """Several sinks, each with the words that name it; one that fails is left out from then on, and `broken`
    says why: the guest and the others go on."""

    def __init__(self, sinks: "Sequence[Sink] | Mapping[str, Sink]") -> None:
        self._sinks: list[tuple[str, Sink]] = (
            list(sinks.items()) if isinstance(sinks, Mapping) else [("a sink", sink) for sink in sinks]
        )
        self.broken: dict[str, str] = {}
        self.added: dict[int, int] = {}
        """Accesses of each disk so far."""

    def add(self, disk: int, accesses: Accesses, touched: Touched) -> None:
        self.added[disk] = self.added.get(disk, 0) + len(accesses)
        self._each(lambda sink: sink.add(disk, accesses, touched))

    def late(self, disk: int, number: Int, accesses: Accesses, touched: Touched) -> None:
        self._each(lambda sink: sink.late(disk, number, accesses, touched))

    def renew(self, resolver: Resolver) -> None:
        self._each(lambda sink: sink.renew(resolver))

    def beat(self) -> None:
        """Some time has passed."""
        self._each(lambda sink: sink.beat() if isinstance(sink, Beating) else None)

    def _each(self, do: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks):
            try:
                do(sink)
            except Exception as error:  # whatever it is, it must not reach the guest
                self._sinks.remove((name, sink))
                self.broken[name] = (
                    getattr(error, "strerror", None) or one_line(error) or type(error).__name__
                )
