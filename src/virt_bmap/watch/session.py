"""One watched run of a command: servers up, the command with their names, accesses followed until it ends.

Naming may fail: a fault of ours, no memory, a map that can't be had. The guest must not notice. So every
failure ends here (`Guard`), naming starts anew or is given up with a word, and the log of the servers is
followed on in any case.
"""

import contextlib
import os
import queue
import re
import secrets
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np

from virt_bmap.accesses.accesses import Accesses, LogParser
from virt_bmap.accesses.resolve import BATCH, Resolver
from virt_bmap.core.errors import UsageError
from virt_bmap.core.printable import one_line
from virt_bmap.host.signals import SIGNALS, forwarded
from virt_bmap.serve.address import Address
from virt_bmap.serve.caretaker import close_doors
from virt_bmap.serve.doors import DOORS, opened
from virt_bmap.serve.serve import Follower, Served, Source, lasting, lasting_folder
from virt_bmap.watch import oom
from virt_bmap.watch.naming import Naming
from virt_bmap.watch.refresh import Refresher
from virt_bmap.watch.sinks import Sink, Sinks
from virt_bmap.watch.under_way import UnderWay

TICK = 0.05
"""Seconds between two looks at the log, at least."""
LONGEST_TICK = 0.3
SHARE = 0.03
"""Of a processor, that naming may take before its looks become fewer, up to LONGEST_TICK: large batches cost
half of what small ones do."""
PAUSE = 0.5
"""Seconds without any access after which the line that is still open is written."""
QUEUE = 1 << 10
"""Blocks of lines that may wait for a slow terminal."""
NICENESS = 5
"""Of the threads that name accesses and draw the screen: where the guest and its disk want every core, they
go first, and names and picture come a little later."""
MOST_FAILURES = 3
"""Failures of naming after which it is not started again."""
LAST_MAP = 60.0
"""Seconds that the last map may take, which names what the command wrote just before it ended."""

Runner = Callable[
    [Sequence[str], Mapping[str, str]], contextlib.AbstractContextManager["subprocess.Popen[bytes]"]
]
"""Starts a command, given as its words and environment, and looks after it until the block ends."""


@dataclass
class Outcome:
    """How it ended: the command's exit status as a shell gives it, and what of the log is missing."""

    status: int = 0
    failed: int = 0
    lost: int = 0
    unread: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    """Why sinks that failed, by name, were left out from then on; the guest ran on."""
    naming: str | None = None
    """Why naming failed, and whether it was given up."""
    unnamed: int = 0
    """Accesses that were lost by that."""
    server: str | None = None
    """What a server said that ended before the command did."""
    stale: str | None = None
    """Why the last map that was asked for could not be had."""
    maps: int = 1
    """How many maps named the accesses, one after the other."""


@dataclass
class _WatchedDisk:
    number: int
    folder: str
    served: Served
    doors: dict[str, str]
    follower: Follower
    parser: LogParser
    under_way: UnderWay = field(default_factory=UnderWay)
    blind: bool = False
    """Parts of the log could not be read."""

    def is_used(self) -> bool:
        """Has a client, as far as the log tells: where parts of it were lost it can't."""
        is_known = not self.blind and not self.follower.skipped
        return is_known and self.parser.open_connections > 0 and self.served.process.poll() is None


def watch(
    resolver: Resolver, sources: Sequence[Source], command: Sequence[str],
    sinks: "Sequence[Sink] | Mapping[str, Sink]", *, write: bool = False,
    idle: Callable[[], None] = lambda: None, refresher: Refresher | None = None, run: "Runner | None" = None,
    address: Address | None = None,
) -> Outcome:  # fmt: skip
    """Serve the disks, run the command, and give its accesses with what they touched to every sink.

    They are served at `address`, or at sockets in folders of their own. `idle` is called when nothing has
    happened for a while. `refresher` reads the map again where the command writes metadata; None: nobody
    does. `run` starts the command, on our own terminal unless told. Blocks until the command has ended and
    all was named.
    """
    if not shutil.which(command[0]):
        raise UsageError(f"{command[0]}: no such command")
    with contextlib.ExitStack() as stack:
        own = f"virt-bmap-{secrets.token_hex(8)}"
        disks = [
            stack.enter_context(_disk(number, source, write, own, address, _doors(command, number)))
            for number, source in enumerate(sources, 1)
        ]
        if refresher:
            refresher.serve(disks[0].folder, [disk.served.address.uri(own) for disk in disks])
        guard = Guard(Naming(resolver, Sinks(sinks), refresher))
        outcome = Outcome()
        with _child(command, disks, run or foreground) as (child, ended):
            oom.first()
            step_aside()
            _follow(disks, guard, idle, ended)
            outcome.status = child.wait()
        if outcome.status < 0:
            outcome.status = 128 - outcome.status
        with contextlib.suppress(KeyboardInterrupt):
            _linger(disks, guard, idle)
            _settle(disks, guard)
        for disk in disks:
            _note(disk, guard, outcome)
        guard.do(Naming.finish)
        guard.tell(outcome)
        if refresher:  # it is a client of the servers, too
            refresher.close()
    return outcome


class Guard:
    """Naming, and what becomes of it when it fails."""

    def __init__(self, naming: Naming) -> None:
        self._naming = naming
        self._failures = 0
        self._words = ""
        self.accesses = 0
        """That were to be named."""

    @property
    def given_up(self) -> bool:
        """Is nothing named any more?"""
        return self._failures >= MOST_FAILURES

    def do(self, what: Callable[[Naming], None]) -> None:
        """Do this, if naming was not given up; start it anew where it fails."""
        if self.given_up:
            return
        try:
            what(self._naming)
        except Exception as error:  # whatever it is, the guest goes on
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """This went wrong: begin anew."""
        if self.given_up:
            return
        self._failures += 1
        self._words = (
            "not enough memory"
            if isinstance(error, MemoryError)
            else one_line(f"{type(error).__name__}: {error}")
        )
        self._naming = self._naming.again()

    def add(self, disk: int, accesses: Accesses) -> None:
        """Name these."""
        self.accesses += len(accesses)
        self.do(lambda naming: naming.add(disk, accesses))

    @property
    def is_settled(self) -> bool:
        """Is there nothing to wait for?"""
        return self.given_up or self._naming.is_settled

    def wake(self) -> list[int]:
        """As Naming.wake."""
        return [] if self.given_up else self._naming.wake()

    def tick(self) -> None:
        """As Naming.tick, and the sinks' own."""
        self.do(Naming.tick)
        self.do(lambda naming: naming.sinks.beat())

    def tell(self, outcome: Outcome) -> None:
        """How it went."""
        naming = self._naming
        outcome.broken, outcome.maps = naming.sinks.broken, naming.resolver.number + 1
        outcome.stale = naming.failure if naming.failures else None
        outcome.unnamed = self.accesses - sum(naming.sinks.added.values())
        outcome.naming = self.words

    @property
    def words(self) -> str | None:
        """What went wrong, if anything did."""
        return (
            f"{self._words} ({'given up' if self.given_up else 'started again'})" if self._failures else None
        )


@contextlib.contextmanager
def _disk(
    number: int, source: Source, write: bool, own: str, address: Address | None, doors: Sequence[str]
) -> Iterator[_WatchedDisk]:
    """A disk that is served until the block ends, or, if that is later, its last client leaves."""
    with (
        lasting_folder() as folder,
        contextlib.closing(Follower(f"{folder.name}/log")) as follower,
        lasting(source, folder, write, own, address and address.numbered(number)) as served,
        opened(doors, served, folder) as paths,
    ):
        yield _WatchedDisk(number, folder.name, served, paths, follower, LogParser(own))


def _doors(command: Sequence[str], number: int) -> list[str]:
    """Which doors to this disk the command asks for."""
    end = "" if number == 1 else str(number)
    named = {match[1] or match[2] for part in command for match in re.finditer(NAME, part)}
    return [name for name in DOORS if f"{name}{end}" in named]


def step_aside() -> None:
    """From here on this thread, and no other, takes what processor time is left over, and interrupts nobody
    when it wakes."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def _follow(disks: list[_WatchedDisk], guard: Guard, idle: Callable[[], None], ended: int) -> None:
    """Name what the log gains until the file descriptor `ended` says that the command has."""
    quiet = 0.0
    while True:
        spent = time.thread_time()
        busy = sum(_step(disk, guard) for disk in disks) > 0
        guard.tick()
        tick = min(max(TICK, (time.thread_time() - spent) / SHARE), LONGEST_TICK)
        quiet = 0.0 if busy else quiet + tick
        if quiet >= PAUSE:
            guard.do(lambda _: idle())
        if ended in select.select([ended, *guard.wake()], [], [], tick)[0]:
            return


def _linger(disks: list[_WatchedDisk], guard: Guard, idle: Callable[[], None]) -> None:
    """A command may put the guest into the background and end: follow it until its last connection closes, or
    SIGINT comes."""
    closing = 0.0
    while any(disk.is_used() for disk in disks):
        if time.monotonic() > closing:  # what nobody uses is a client all the same
            closing = time.monotonic() + PAUSE
            for disk in disks:
                close_doors(disk.folder)
        busy = sum(_step(disk, guard) for disk in disks)
        guard.tick()
        if not busy:
            guard.do(lambda _: idle())
            select.select(guard.wake(), [], [], TICK)


def _settle(disks: list[_WatchedDisk], guard: Guard) -> None:
    """Read the map a last time if the guest has changed it, while there is a server to read it from."""
    until = time.monotonic() + LAST_MAP
    while sum(_step(disk, guard) for disk in disks) or (not guard.is_settled and time.monotonic() < until):
        guard.tick()
        select.select(guard.wake(), [], [], 0 if guard.is_settled else TICK)


def _note(disk: _WatchedDisk, guard: Guard, outcome: Outcome) -> None:
    """Name the rest of a disk's log, and note what is missing."""
    if disk.served.process.poll() is not None:
        outcome.server = disk.served.words()
    while _step(disk, guard):
        pass
    outcome.failed += disk.parser.failed
    outcome.lost += disk.parser.lost
    outcome.unread += disk.parser.unread


def _step(disk: _WatchedDisk, guard: Guard) -> bool:
    """Name the next piece of a disk's log; False when there is none."""
    before = time.time_ns()
    try:
        data = disk.follower.read()
        accesses = disk.parser.feed(data)
        late = disk.under_way.feed(accesses, disk.parser.numbers, disk.parser.ended)
    except Exception as error:
        disk.blind = True
        guard.fail(error)
        return False
    for at in range(0, len(accesses), BATCH):
        guard.add(disk.number, accesses.take(np.arange(at, min(at + BATCH, len(accesses)))))
    if len(late):
        guard.do(lambda naming: naming.ended(disk.number, late))
    seen = before if not data else int(accesses.time_ns[-1]) if len(accesses) else 0
    seen = min(seen, disk.under_way.oldest_ns)
    if seen:
        guard.do(lambda naming: naming.seen(disk.number, seen))
    return bool(data)


@contextlib.contextmanager
def _child(
    command: Sequence[str], disks: Sequence[_WatchedDisk], run: Runner
) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
    """The running command, with a file descriptor that can be read once it has ended."""
    words = _words(disks)
    with run([substituted(part, words) for part in command], {**os.environ, **words}) as child:
        ended = os.pidfd_open(child.pid)
        try:
            yield child, ended
        finally:
            os.close(ended)
            if child.poll() is None:
                child.terminate()
                child.wait()


@contextlib.contextmanager
def foreground(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> "Iterator[subprocess.Popen[bytes]]":
    """The command on our own terminal. Signals that we get are passed on to it."""
    child = started(arguments, environment)
    before = {number: signal.signal(number, lambda number, _: forwarded(number, child)) for number in SIGNALS}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def started(
    arguments: Sequence[str], environment: Mapping[str, str], **streams: Any
) -> "subprocess.Popen[bytes]":
    """The running command; UsageError where it can't be run."""
    try:
        return subprocess.Popen(arguments, env=environment, **streams)
    except OSError as error:
        raise UsageError(f"{arguments[0]}: can't be run: {error.strerror}") from error


def _words(disks: Sequence[_WatchedDisk]) -> dict[str, str]:
    """What the command is told, as variables and in its arguments: uri, nbd and unixsocket of the first disk,
    with file and vhost where it asks for them; uri2, ... of the others."""
    words: dict[str, str] = {}
    for disk in disks:
        end, address = "" if disk.number == 1 else str(disk.number), disk.served.address
        words |= {f"uri{end}": address.uri(), f"nbd{end}": address.nbd}
        words |= {f"unixsocket{end}": address.socket} if address.socket else {}
        words |= {f"{name}{end}": path for name, path in disk.doors.items()}
    return words


NAME = r"\$(?:(\w+)|\{(\w+)\})"
"""A variable in an argument."""


def substituted(argument: str, words: Mapping[str, str]) -> str:
    """The argument with $NAME and ${NAME} replaced for these names only; any other dollar sign is the
    command's own business."""
    return re.sub(NAME, lambda match: words.get(match[1] or match[2], match[0]), argument)


class Printer:
    """Prints blocks of lines from a thread of its own: a terminal that does not keep up, or is stopped, must
    not stop the watching.

    `dropped` counts lines that were not printed because too many waited.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._queue: queue.Queue[list[str] | None] = queue.Queue(QUEUE)
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="printer", daemon=True)
        self._thread.start()

    def write(self, lines: list[str]) -> None:
        """Print these lines as soon as may be."""
        try:
            self._queue.put_nowait(lines)
        except queue.Full:
            self.dropped += len(lines)

    def _run(self) -> None:
        while (lines := self._queue.get()) is not None:
            try:
                self._file.write("".join(lines))
                self._file.flush()
            except Exception:  # the reader has gone, the disk is full, no memory: the guest runs on
                self.dropped += len(lines)

    def close(self) -> None:
        """Wait until all is printed."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=1)
                self._thread.join()
