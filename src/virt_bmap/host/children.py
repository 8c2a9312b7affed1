"""Programs that we run: noted as something to be undone, so that none outlives us by accident, and ended by
the kernel where we are killed.

Sources: prctl(2), PR_SET_PDEATHSIG; setpriv(1).
"""

import contextlib
import functools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from virt_bmap.host import programs, signals
from virt_bmap.host.leftovers import undoing

PATIENCE = 10.0
"""Seconds that a program gets to end by itself after SIGTERM."""
AGAIN = 0.5
"""Seconds after which it is asked again."""


@contextlib.contextmanager
def running(
    command: Sequence[str | os.PathLike[str]],
    start: "Callable[..., subprocess.Popen[bytes]] | None" = None,
    **options: Any,
) -> "Iterator[subprocess.Popen[bytes]]":
    """A program that runs until it ends, or the block does.

    `options` are those of Popen, or of another function that is to `start` it.
    """
    words = [os.fspath(word) for word in command]
    with contextlib.ExitStack() as stack:
        with signals.held():
            process = start(words, **options) if start else subprocess.Popen([*_mortal(), *words], **options)
            stack.enter_context(undoing(lambda: stop(process)))
        yield process


def run(
    command: Sequence[str | os.PathLike[str]],
    stdin: bytes | None = None,
    timeout: float | None = None,
    **options: Any,
) -> "subprocess.CompletedProcess[bytes]":
    """Run a program to its end, and take what it says.

    Raises OSError, and TimeoutExpired after `timeout` seconds.
    """
    source = subprocess.DEVNULL if stdin is None else subprocess.PIPE
    with running(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        out, err = process.communicate(stdin, timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def stop(process: "subprocess.Popen[bytes]", patience: float = PATIENCE) -> None:
    """End a program that still runs, and close our ends of its pipes."""
    ended(process, patience)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # what nobody has taken
                stream.close()


def ended(process: "subprocess.Popen[bytes]", patience: float) -> int:
    """The exit status of a program that is asked to end, and killed where it does not in `patience` seconds.

    It is asked again and again: qemu-nbd (7.2) forgets a SIGTERM that comes before its main loop begins.
    """
    until = time.monotonic() + patience
    while process.poll() is None and (left := until - time.monotonic()) > 0:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(AGAIN, left))
    if process.poll() is None:
        process.kill()
    return process.wait()


def _mortal() -> list[str]:
    """What makes the kernel end a program with us.

    It watches the thread that starts the program, so only the main thread's are mortal so.
    """
    return [] if threading.current_thread() is not threading.main_thread() else mortal()


def mortal(number: str = "TERM") -> list[str]:
    """For programs that are started by a thread which lives as long as they do: what the kernel is told, with
    the signal that ends them, and then a look whether we live still."""
    program = _setpriv()
    return (
        [program, "--pdeathsig", number, "--", "/bin/sh", "-c", ORPHANS_END, str(os.getpid())]
        if program
        else []
    )


ORPHANS_END = '[ "$PPID" = "$0" ] && exec "$@"'
"""For sh: a parent that ended before the kernel was told is not noticed by it."""


@functools.cache
def _setpriv() -> str | None:
    """util-linux's; those of busybox and toybox know no such option."""
    program = programs.find("setpriv")
    return program if program and os.path.basename(os.path.realpath(program)) == "setpriv" else None
