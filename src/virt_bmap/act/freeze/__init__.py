"""Filesystems that stand still while something is copied: a guest's through its agent, or this host's; thawed
again whatever happens.

    with Frozen(Guest("/run/qga.sock"), limit=60):
        copy_the_disk()

A process of its own, the keeper, freezes, waits and thaws. It thaws when the block ends, when the time limit
is over, and when the process that asked for it dies, by whatever signal; and where the keeper dies, the
asking process thaws. FreezeError says that the filesystems did not stand still all the time.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from virt_bmap.core import errors
from virt_bmap.core.errors import FreezeError, UsageError
from virt_bmap.host import programs
from virt_bmap.host.signals import SIGNALS, forwarded

LIMIT = 60.0
"""Seconds: a guest that stands still for longer notices it (timeouts of services, the kernel's warning of
hung tasks after 120 s)."""
STOP_TIMEOUT = 5.0
"""Seconds that a command gets to end by itself after SIGTERM."""


class Guest(NamedTuple):
    """The filesystems of a guest: the Unix socket of its agent's virtio-serial port, and mount points inside
    the guest (without any: all)."""

    socket: str
    mountpoints: tuple[str, ...] = ()


class HostMounts(NamedTuple):
    """Filesystems that are mounted on this host, by their mount points."""

    folders: tuple[str, ...]


Target = Guest | HostMounts


class Thawed(NamedTuple):
    """How it ended. `why` they were thawed: asked, timeout, orphaned (the asking process died), stolen
    (someone else had done it); after how many seconds."""

    why: str
    seconds: float


class Frozen:
    """A freeze of at most `limit` seconds, as a context manager.

    `select` finds it readable once the filesystems are thawed.

    Entering raises FreezeError, UsageError or MissingTool where they can't be frozen, and nothing is frozen
    then. Leaving thaws, and raises FreezeError where they were thawed before.
    """

    def __init__(self, target: Target, limit: float = LIMIT) -> None:
        self.target, self.limit = target, limit
        self.filesystems = ""
        """What is frozen, in words."""
        self.report: Thawed | None = None

    def __enter__(self) -> "Frozen":
        words = json.dumps(
            {"kind": type(self.target).__name__, "limit": self.limit, "target": self.target._asdict()}
        )
        # a session of its own: what kills our process group or terminal leaves it alone
        self._keeper = subprocess.Popen(
            programs.python("virt_bmap.act.freeze.keeper", words, options=("-B",)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self.filesystems = self._hear()["filesystems"]
        except BaseException:
            self.thaw()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.thaw()
        report = self.wait()
        if kind is None and report.why == "timeout":
            raise FreezeError(
                f"the limit of {self.limit:g} seconds was over and the "
                "filesystems were thawed: what was copied is not consistent"
            )
        if kind is None and report.why == "stolen":
            raise FreezeError(
                "someone else has thawed the filesystems meanwhile: what was copied is not consistent"
            )

    def fileno(self) -> int:
        """Readable when the keeper has something to say."""
        assert self._keeper.stdout
        return self._keeper.stdout.fileno()

    def thaw(self) -> None:
        """Ask for it, without waiting; may be called from a signal handler, and more than once."""
        assert self._keeper.stdin
        with contextlib.suppress(OSError, ValueError):  # it has ended; the pipe is closed
            os.write(self._keeper.stdin.fileno(), b"thaw\n")

    def wait(self) -> Thawed:
        """How it ended; waits until all is thawed."""
        if self.report is None:
            said = self._hear()
            self._close()
            self.report = Thawed(said["why"], said["seconds"])
        return self.report

    def _close(self) -> None:
        """The keeper has said its last word."""
        assert self._keeper.stdin
        assert self._keeper.stdout
        self._keeper.wait()
        self._keeper.stdout.close()
        self._keeper.stdin.close()

    def _hear(self) -> dict[str, Any]:
        """What the keeper says next.

        Raises the error that it met; where it was killed, thaws in its place.
        """
        assert self._keeper.stdout
        line = self._keeper.stdout.readline()
        if line.endswith(b"\n"):
            said: dict[str, Any] = json.loads(line)
            if "error" in said:
                self._close()
                raise getattr(errors, said["error"])(said["words"])
            return said
        from virt_bmap.act.freeze.keeper import freezer_of

        self._close()
        self.report = Thawed("killed", 0.0)
        with contextlib.closing(freezer_of(self.target)) as freezer:
            freezer.thaw()
        raise FreezeError(
            "the process that kept the filesystems frozen was killed; "
            "they are thawed, and what was copied is not consistent"
        )


def run(target: Target, command: Sequence[str], limit: float = LIMIT) -> tuple[int, Frozen]:
    """Run a command while filesystems stand still: its exit status as a shell gives it, and the freeze.

    A signal thaws at once and is passed on to the command; when the time is over the command is ended. Raises
    FreezeError where it ended after the thaw.
    """
    dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with Frozen(target, limit) as held:
            status, signalled = _follow(held, command)
    finally:
        sys.dont_write_bytecode = dont_write
    if signalled and status == 0:
        raise FreezeError(
            f"{signalled.name} came and the filesystems were thawed before "
            "the command had ended: what it copied is not consistent"
        )
    return status, held


def _follow(held: Frozen, command: Sequence[str]) -> tuple[int, signal.Signals | None]:
    """The command's exit status, and the signal that we got while it ran."""
    with _passing_on(held) as passing:
        try:
            child = subprocess.Popen(command)
        except OSError as error:
            raise UsageError(f"{command[0]}: can't be run: {error.strerror}") from error
        ended = os.pidfd_open(child.pid)
        try:
            passing.to(child)
            select.select([ended, held.fileno()], [], [])
            if child.poll() is None and held.wait().why != "asked":
                _stop(child)
            status = child.wait()
        finally:
            os.close(ended)
            _stop(child)
    return 128 - status if status < 0 else status, passing.got


class _Passing:
    """Signals that we get thaw, and go to the command; those that come before it runs are kept for it."""

    def __init__(self, held: Frozen) -> None:
        self._held = held
        self._child: subprocess.Popen[bytes] | None = None
        self.got: signal.Signals | None = None

    def __call__(self, number: int, _: object) -> None:
        self.got = signal.Signals(number)
        self._held.thaw()
        if self._child:
            forwarded(number, self._child)

    def to(self, child: "subprocess.Popen[bytes]") -> None:
        """The command runs."""
        self._child = child
        if self.got:
            forwarded(self.got, child)


@contextlib.contextmanager
def _passing_on(held: Frozen) -> Iterator[_Passing]:
    passing = _Passing(held)
    before = {number: signal.signal(number, passing) for number in SIGNALS}
    try:
        yield passing
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """End a command that still runs."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
