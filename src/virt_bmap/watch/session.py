"""One watched run of a command: servers up, the command with their names, accesses followed until it ends."""

import contextlib
import os
import queue
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from virt_bmap.errors import UsageError
from virt_bmap.watch.accesses import Accesses, LogParser
from virt_bmap.watch.resolve import Resolver, Touched
from virt_bmap.watch.serve import Follower, Served, Source, forwarded, private_folder, serve

TICK = 0.1
"""Seconds between two looks at the log."""
PAUSE = 0.5
"""Seconds without any access after which the line that is still open is written."""
BATCH = 1 << 15
"""Requests that are resolved at a time: bounds the memory that a batch takes, as one may touch many objects."""
QUEUE = 1 << 10
"""Blocks of lines that may wait for a slow terminal."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

Sink = Callable[[int, Accesses, Touched], None]


@dataclass
class Outcome:
    """How it ended: the command's exit status as a shell gives it, and what of the log is missing."""

    status: int = 0
    failed: int = 0
    lost: int = 0
    unread: int = 0
    broken: str | None = None
    """Why a sink that failed was left out from then on; the guest runs on."""
    server: str | None = None
    """What a server said that ended before the command did."""


@dataclass
class _Disk:
    number: int
    served: Served
    follower: Follower
    parser: LogParser = field(default_factory=LogParser)

    def is_used(self) -> bool:
        """Has a client, as far as the log tells: where parts of it were dropped it can't."""
        return self.parser.open_connections > 0 and not self.follower.skipped and self.served.process.poll() is None


def watch(
    resolver: Resolver, sources: Sequence[Source], command: Sequence[str], sinks: list[Sink],
    *, write: bool = False, idle: Callable[[], None] = lambda: None,
) -> Outcome:  # fmt: skip
    """Serve the disks, run the command, and give each batch of accesses to every sink as (disk, accesses, what they touched).

    `idle` is called when nothing has happened for a while. Blocks until the command has ended and all was resolved.
    """
    if not shutil.which(command[0]):
        raise UsageError(f"{command[0]}: no such command")
    with contextlib.ExitStack() as stack:
        disks = []
        for number, source in enumerate(sources, 1):
            folder = stack.enter_context(private_folder())
            follower = Follower(f"{folder}/log")
            stack.callback(follower.close)
            disks.append(_Disk(number, stack.enter_context(serve(source, folder, write)), follower))
        outcome = Outcome()
        with _child(command, [disk.served for disk in disks]) as (child, ended):
            _follow(resolver, disks, sinks, idle, ended, outcome)
            outcome.status = child.wait()
        if outcome.status < 0:
            outcome.status = 128 - outcome.status
        _linger(resolver, disks, sinks, idle, outcome)
        for disk in disks:
            if disk.served.process.poll() is not None:
                outcome.server = disk.served.words()
            disk.served.process.terminate()
            disk.served.process.wait()
            while _step(resolver, disk, sinks, outcome):
                pass
            outcome.failed += disk.parser.failed
            outcome.lost += disk.parser.lost
            outcome.unread += disk.parser.unread
    return outcome


def _follow(
    resolver: Resolver, disks: list[_Disk], sinks: list[Sink], idle: Callable[[], None], ended: int, outcome: Outcome
) -> None:
    """Resolve what the log gains until the file descriptor `ended` says that the command has."""
    quiet = 0.0
    while True:
        busy = sum(_step(resolver, disk, sinks, outcome) for disk in disks) > 0
        quiet = 0.0 if busy else quiet + TICK
        if quiet >= PAUSE:
            idle()
        if select.select([ended], [], [], TICK)[0]:
            return


def _linger(resolver: Resolver, disks: list[_Disk], sinks: list[Sink], idle: Callable[[], None], outcome: Outcome) -> None:
    """A command may put the guest into the background and end: follow it until its last connection closes, or SIGINT comes."""
    with contextlib.suppress(KeyboardInterrupt):
        while any(disk.is_used() for disk in disks):
            if not sum(_step(resolver, disk, sinks, outcome) for disk in disks):
                idle()
                time.sleep(TICK)


def _step(resolver: Resolver, disk: _Disk, sinks: list[Sink], outcome: Outcome) -> bool:
    """Resolve the next piece of a disk's log; False when there is none."""
    data = disk.follower.read()
    accesses = disk.parser.feed(data)
    for at in range(0, len(accesses), BATCH):
        batch = accesses.take(slice(at, at + BATCH))  # type: ignore[arg-type]
        touched = resolver.touched(disk.number, batch.offset, batch.length)
        for sink in list(sinks):
            try:
                sink(disk.number, batch, touched)
            except OSError as error:
                sinks.remove(sink)
                outcome.broken = error.strerror or str(error)
    return bool(data)


@contextlib.contextmanager
def _child(command: Sequence[str], served: Sequence[Served]) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
    """The running command, with a file descriptor that can be read once it has ended. Signals that we get are passed on to it."""
    words = _words(served)
    arguments = [substituted(part, words) for part in command]
    try:
        child = subprocess.Popen(arguments, env={**os.environ, **words})
    except OSError as error:
        raise UsageError(f"{command[0]}: can't be run: {error.strerror}") from error
    before = {number: signal.signal(number, lambda number, _: forwarded(number, child)) for number in SIGNALS}
    ended = os.pidfd_open(child.pid)
    try:
        yield child, ended
    finally:
        os.close(ended)
        if child.poll() is None:
            child.terminate()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _words(served: Sequence[Served]) -> dict[str, str]:
    """What the command is told, as variables and in its arguments: uri, nbd and unixsocket of the first disk, uri2, ... of the others."""
    words: dict[str, str] = {}
    for number, disk in enumerate(served, 1):
        end = "" if number == 1 else str(number)
        words |= {f"uri{end}": disk.uri, f"nbd{end}": disk.nbd, f"unixsocket{end}": disk.socket}
    return words


def substituted(argument: str, words: Mapping[str, str]) -> str:
    """The argument with $NAME and ${NAME} replaced for these names only; any other dollar sign is the command's own business."""
    name = r"\$(?:(\w+)|\{(\w+)\})"
    return re.sub(name, lambda match: words.get(match[1] or match[2], match[0]), argument)


class Printer:
    """Prints blocks of lines from a thread of its own: a terminal that does not keep up, or is stopped, must not stop the watching.

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
            except (OSError, ValueError):  # the reader has gone; the guest runs on
                self.dropped += len(lines)

    def close(self) -> None:
        """Wait until all is printed."""
        self._queue.put(None)
        self._thread.join()
