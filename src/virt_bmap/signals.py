"""Signals for a command that we run: whoever ends us, means it."""

import contextlib
import os
import signal
import subprocess

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Those that ask a program to end."""


def forwarded(number: int, child: "subprocess.Popen[bytes]") -> None:
    """Pass a signal on to the command, unless the terminal has sent it there already."""
    with contextlib.suppress(OSError):
        if number in (signal.SIGINT, signal.SIGQUIT) and os.tcgetpgrp(2) == os.getpgrp():
            return
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)
