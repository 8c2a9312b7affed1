"""The caretaker of a disk that is served: it does nothing as long as the watch lives.

A guest must keep its disk when the watch is killed. Then nobody empties the server's log
any more, which lies in memory, nor removes the folder in the end: this process does,
until the server has ended with its last client. The end of its standard input tells it
that the watch is gone. It is the standard library's only, so that it takes little memory;
and it holds the folder's lock, by which other runs know that the folder is in use, as the server does.

    caretaker.py FOLDER LOCK        (LOCK: the number of the descriptor)
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys

MOUNT, VHOST = "mount", "vhost"
"""Where in the folder the doors are (`doors.py`): a file below a mount, and a socket."""
CONNECTED = "03"
"""SS_CONNECTED, as /proc/net/unix has it."""
TICK = 0.5
"""Seconds between two looks at the log: some ten megabytes of lines at most."""


def main() -> None:
    """Wait, empty, remove."""
    folder, lock = sys.argv[1], int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # they are the terminal's, and meant for the guest
    sys.stdin.buffer.read()
    server = _server(folder, lock)
    if server >= 0:
        with contextlib.suppress(OSError):
            print(
                "virt-bmap: the watch is gone; its disk is served until the last client leaves",
                file=sys.stderr,
                flush=True,
            )
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody is to wait for more words
        while not select.select([server], [], [], TICK)[0]:
            _empty(f"{folder}/log")
            close_doors(folder)
    if _is_there(folder, lock):
        shutil.rmtree(folder, ignore_errors=True)


def close_doors(folder: str) -> None:
    """End the doors that nobody uses: they are clients of the server, which would never end."""
    for name in ("file", "vhost"):
        try:
            with open(f"{folder}/{name}.pid") as file:
                number = int(file.read())
        except (OSError, ValueError):
            continue
        if not in_use(folder, name):
            with contextlib.suppress(OSError):
                os.unlink(f"{folder}/{name}.pid")
                os.kill(number, signal.SIGTERM)


def in_use(folder: str, door: str) -> bool:
    """Has somebody the file open, or is connected to the socket? The file's mount is gone where not."""
    if door == "file":
        words = ["fusermount3", "-u", f"{folder}/{MOUNT}"]
        said = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return b"busy" in said.stderr
    with open("/proc/net/unix") as file:
        rows = [line.split() for line in file]
    return any(row[5:6] == [CONNECTED] and row[7:] == [f"{folder}/{VHOST}"] for row in rows)


def _is_there(folder: str, lock: int) -> bool:
    """Is the folder still the one that is locked?"""
    try:
        return os.path.samestat(os.lstat(folder), os.fstat(lock))
    except OSError:
        return False


def _server(folder: str, lock: int) -> int:
    """A descriptor of the server's process, which can be read once it has ended; -1: it has."""
    if not _is_there(folder, lock):
        return -1
    with contextlib.suppress(OSError, ValueError):
        with open(f"{folder}/pid") as file:
            number = int(file.read())
        server = os.pidfd_open(number)
        with open(f"/proc/{number}/cmdline", "rb") as file:
            if os.fsencode(folder) in file.read():
                return server
    return -1


def _empty(log: str) -> None:
    """Give back what the log has taken. The server appends to it, and may go on while it is cut."""
    with contextlib.suppress(OSError):
        os.truncate(log, 0)


if __name__ == "__main__":
    main()
