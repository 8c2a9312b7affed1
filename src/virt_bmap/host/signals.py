"""Signals: those that ask us to end become an exception, so that what a command has begun is undone by the
same code as after any error; whoever ends us while we run another command means that, too.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Those that ask a program to end."""
AGAIN = 0.02
"""Seconds after which a signal is raised again that struck where no exception can leave (the end of an
object, a callback of a library)."""


class Signalled(KeyboardInterrupt):
    """A signal that asks us to end, raised in the main thread wherever that is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)

    @property
    def status(self) -> int:
        """The exit status, as a shell gives it."""
        return 128 + self.signal


raised: Signalled | None = None
"""The signal that was raised last."""
_holding = 0
_waiting: list[int] = []


def become_exceptions() -> None:
    """From now on these signals raise Signalled. Those that somebody ignores for us (nohup) stay ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _raise)
    sys.unraisablehook = _unraisable


def ignore() -> None:
    """The end has begun, and is not to be disturbed; nor may what was cut off complain when it is taken apart
    (a writer that finds its file closed)."""
    sys.unraisablehook = lambda _: None
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals wait for the end of the block: for the short moment between having something and having noted
    that it must be undone.

    They are not blocked, since a program that is started in the block would inherit that. Other threads than
    the main one get none anyway.
    """
    global _holding
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
        if _waiting and not _holding:
            raise _signalled(_waiting.pop())


def forwarded(number: int, child: "subprocess.Popen[bytes]") -> None:
    """Pass a signal on to the command, unless the terminal has sent it there already."""
    with contextlib.suppress(OSError):
        if number in (signal.SIGINT, signal.SIGQUIT) and os.tcgetpgrp(2) == os.getpgrp():
            return
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


def _raise(number: int, _: object) -> None:
    if _holding:
        _waiting[:] = [number]
        return
    raise _signalled(number)


def _signalled(number: int) -> Signalled:
    global raised
    raised = Signalled(number)
    return raised


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """A signal must not get lost where Python can only complain of an exception."""
    if not isinstance(lost.exc_value, Signalled):
        sys.__unraisablehook__(lost)
        return
    number = int(lost.exc_value.signal)
    signal.signal(signal.SIGALRM, lambda *_: _raise(number, None))
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
