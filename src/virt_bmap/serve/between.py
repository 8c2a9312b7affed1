"""Stands between a server and whoever started it: the server's parent, which nobody kills.

nbdkit (1.32) asks the kernel for a SIGTERM when its parent dies, even without --exit-with-parent: with the
watch as its parent, a guest's disk would go with the watch. This process is the standard library's only. It
passes on what ends a program, and its exit status is the server's.

    between.py COMMAND [ARGUMENT...]
"""

import os
import signal
import subprocess
import sys


def main() -> None:
    """Run the command."""
    child = subprocess.Popen(sys.argv[1:], close_fds=False)
    signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)  # a terminal sends them to the server, too
    # what the server was given is its own: the end of a pipe is to be seen when it ends
    os.closerange(3, 256)
    status = child.wait()
    os._exit(128 - status if status < 0 else status)


if __name__ == "__main__":
    main()
