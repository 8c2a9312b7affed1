"""`bmaplogger`: an nbdkit server for one raw disk that prints which files are read and written, as the
original of 2014 did.

    bmaplogger [nbdkit options] file=disk.img [bmap=MAP] [logfile=LOG] [--run COMMAND]

This process starts nbdkit with `watch/plugin.py`, takes the accesses from a pipe and names their objects.
"""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NoReturn, TextIO

import numpy as np

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import BATCH, Resolver
from virt_bmap.cli import program
from virt_bmap.core.amounts import counted, plural
from virt_bmap.core.errors import MissingTool, OutputError, UsageError
from virt_bmap.core.printable import one_line, say
from virt_bmap.host import children, in_use, notices, programs, protection
from virt_bmap.host.files import growing
from virt_bmap.host.ours import is_log
from virt_bmap.model.contract import RAW
from virt_bmap.open.disks import Opening
from virt_bmap.serve import between
from virt_bmap.serve.source import saved, source
from virt_bmap.survey.maps import map_disks
from virt_bmap.watch import plugin
from virt_bmap.watch.lines import LineLog
from virt_bmap.watch.naming import Naming
from virt_bmap.watch.session import PAUSE, TICK, Guard, Outcome, Printer
from virt_bmap.watch.sinks import EachDisk, Sinks

USAGE = """\
usage: bmaplogger [OPTION...] file=DISK [bmap=MAP] [logfile=LOG] [--run COMMAND]

Serve a raw disk with nbdkit and print which files its clients read and write.

parameters:
  file=DISK       raw disk image or block device to serve
  bmap=MAP        map saved by virt-bmap (default: map the disk first)
  logfile=LOG     write the log to LOG (default: standard output)
  format=raw      serve DISK as raw although it looks like another format
  force=true      replace LOG also where it holds something else than such a log
  inline=true     log also objects that lie inside a block of inodes that is touched

options:
  -h, --help      show this help
  -V, --version   show the version
  -r              leave DISK as it is: what is written goes to a layer that is thrown away
  OPTION          any other option is nbdkit's: -U SOCKET, -p PORT, --run COMMAND, --filter=NAME, ...

With a link of the name nbdkit-bmaplogger-plugin in its plugin folder, nbdkit calls it by itself:
nbdkit -r bmaplogger file=DISK bmap=MAP --run ' qemu-kvm -m 2048 -hda $nbd '
"""
PARAMETERS = ("file", "bmap", "logfile", "force", "format", "inline")
PIPE_SIZE = 1 << 20
"""Bytes of the pipe: some 26,000 accesses; the most that /proc/sys/fs/pipe-max-size allows ordinary users by
default."""
READ_ONLY = ("-r", "--readonly", "--read-only")
"""QEMU refuses a hard disk that can't be written, so here it means a layer that is thrown away."""
KEEPS_DISK = re.compile(r"(^| )--filter[= ]cow( |$)")
"""Options of nbdkit with which no write reaches the disk."""
DRAIN_TICK = 0.01
WAITING = 1 << 24
"""Accesses that may wait to be resolved, 640 MiB. More are dropped, and counted."""

_RECORD = np.dtype(
    [
        ("time_ns", "<i8"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("dropped", "<i8"),
        ("connection", "<i4"),
        ("op", "u1"),
        ("pad", "u1", 3),
    ]
)


class Drain:
    """Empties the pipe from a thread of its own, so that it never waits for resolving or printing."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pieces: deque[bytes] = deque()
        self._waiting = 0
        self.dropped = 0
        """Accesses dropped here, beside those that nbdkit's side dropped."""
        self.ended = False
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._drain()
        finally:  # without it nbdkit's side drops and counts
            self.ended = True

    def _drain(self) -> None:
        rest = b""
        while True:
            try:
                data = os.read(self._fd, PIPE_SIZE)
            except BlockingIOError:
                time.sleep(DRAIN_TICK)  # not woken for each record: that would cost more than the record
                continue
            if not data:
                break
            rest += data
            whole = len(rest) // _RECORD.itemsize * _RECORD.itemsize
            piece, rest = rest[:whole], rest[whole:]
            if self._waiting + whole > WAITING * _RECORD.itemsize:
                self.dropped += whole // _RECORD.itemsize
            elif whole:
                self._pieces.append(piece)
                self._waiting += whole

    def take(self) -> np.ndarray:
        """The next records, none when nothing has come."""
        data = self._pieces.popleft() if self._pieces else b""
        self._waiting -= len(data)
        return np.frombuffer(data, _RECORD)


def main() -> NoReturn:
    """The program. Its exit status is nbdkit's, which with --run is the command's."""
    program("bmaplogger", lambda: partial(_main, sys.argv[1:]))


def _main(arguments: Sequence[str]) -> int:
    given, options = _split(arguments)
    if "-h" in options or "--help" in options:
        say(USAGE, end="")
        return 0
    if "-V" in options or "--version" in options:
        from importlib.metadata import version

        say(f"bmaplogger {version('virt-bmap')}")
        return 0
    if "file" not in given:
        raise UsageError("file=DISK is missing (see bmaplogger --help)")
    if given.get("format", RAW) != RAW:
        raise UsageError("only raw disks can be served here; for other formats use virt-bmap watch")
    for name in ("file", "bmap"):
        protection.reads(given.get(name, ""))
    if "logfile" in given:
        protection.writes(given["logfile"], is_log)
    protection.check(given.get("force") == "true")
    with notices.listening(lambda words: say(f"bmaplogger: {one_line(words)}", file=sys.stderr)):
        return _logged(given, options)


def _logged(given: dict[str, str], options: Sequence[str]) -> int:
    """Serve the disk and log what is done with it: the exit status."""
    disk = source(given["file"], Opening(format=given.get("format")))
    if disk.format != RAW:
        raise UsageError(
            f"{disk.image}: looks like {disk.format}; use virt-bmap "
            "watch for it, or say format=raw if it is a raw disk"
        )
    bmap = saved(given["bmap"], [disk]) if "bmap" in given else map_disks([disk.image], format=disk.format)
    resolver = Resolver(bmap)
    with contextlib.ExitStack() as stack:
        log = sys.stdout
        if "logfile" in given:
            log = stack.enter_context(_log_file(given["logfile"]))
        printer = Printer(log)
        lines = LineLog(resolver, printer.write, given.get("inline") == "true")
        guard = Guard(Naming(resolver, Sinks({"the log": EachDisk({1: lines})})))
        try:
            status, dropped = _serve(disk.image, options, guard, lines)
        finally:
            with contextlib.suppress(Exception):
                lines.flush()
            printer.close()
    outcome = Outcome()
    guard.tell(outcome)
    for words in (
        *(f"{name} ended early: {why}" for name, why in outcome.broken.items()),
        *([f"naming failed: {outcome.naming}"] if outcome.naming else []),
    ):
        say(f"bmaplogger: {words}", file=sys.stderr)
    if dropped:
        say(
            f"bmaplogger: {counted(dropped, '[access was|accesses were] dropped')}: "
            "the guest was faster than they could be named",
            file=sys.stderr,
        )
    if printer.dropped:
        say(f"bmaplogger: {plural(printer.dropped, 'line')} could not be written to the log", file=sys.stderr)
    return status


@contextlib.contextmanager
def _log_file(path: str) -> Iterator[TextIO]:
    """The log. That it can't be opened is an error; that it can't be written later must not become the
    guest's problem."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(growing(path))
        with contextlib.suppress(OutputError):  # the printer has counted what was lost
            stack.close()


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our own parameters, and all the rest, which is nbdkit's."""
    given: dict[str, str] = {}
    options: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in PARAMETERS:
            given[key] = value
        else:
            options.append(argument)
    return given, options


def _serve(image: str, options: Sequence[str], guard: Guard, lines: LineLog) -> tuple[int, int]:
    """Run nbdkit until it ends and log what it tells: (exit status, accesses dropped)."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    with contextlib.suppress(OSError):
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    layer = any(option in READ_ONLY for option in options)
    if layer:
        say("bmaplogger: -r: what is written is thrown away at the end", file=sys.stderr)
    options = [option for option in options if option not in READ_ONLY]
    command = [
        *(_nbdkit(), "--foreground", *_private(options), "python", plugin.__file__),
        *(
            f"file={os.path.abspath(image)}",
            f"accesses={write}",
            *(["layer=true"] if layer else []),
            *options,
        ),
    ]
    with contextlib.ExitStack() as stack:
        handed = [write]
        if not layer and not KEEPS_DISK.search(" ".join(options)):
            handed.append(in_use.claim(image))
            stack.callback(os.close, handed[-1])
        # whoever kills us is not to take the guest's disk away:
        # nbdkit then ends with its last client (plugin.py)
        words = [sys.executable, "-I", "-S", between.__file__, *command]
        child = stack.enter_context(children.running(words, subprocess.Popen, pass_fds=handed))
        os.close(write)
        return _follow(child, read, guard, lines)


def _follow(child: "subprocess.Popen[bytes]", read: int, guard: Guard, lines: LineLog) -> tuple[int, int]:
    """Log what comes until nbdkit ends."""
    before = {
        # the terminal sends it to nbdkit as well
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number)),
    }
    drain = Drain(read)
    dropped, quiet = 0, 0.0
    try:
        while True:
            ended = drain.ended
            records = drain.take()
            if len(records):
                dropped = max(dropped, int(records["dropped"].max()))
                _log(records[records["op"] != plugin.END], guard)
                quiet = 0.0
                continue
            if ended:
                return _status(child), dropped + drain.dropped
            quiet += TICK
            if quiet >= PAUSE:
                guard.do(lambda _: lines.flush())
            time.sleep(TICK)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _private(options: Sequence[str]) -> list[str]:
    """With a command to run and no address asked for: a private socket instead of nbdkit's TCP port, which
    anyone could connect to."""
    asked = any(
        re.match(r"(-[Upi]|--unix|--port|--ipaddr|--ip-addr|--vsock|--single|-s$)", option)
        for option in options
    )
    return ["--unix", "-"] if any(option.startswith("--run") for option in options) and not asked else []


def _log(records: np.ndarray, guard: Guard) -> None:
    """Resolve and print a batch."""
    columns = (records[name].astype(np.int64) for name in ("time_ns", "connection", "op", "offset", "length"))
    accesses = Accesses(*columns)
    for at in range(0, len(accesses), BATCH):
        guard.add(1, accesses.take(np.arange(at, min(at + BATCH, len(accesses)))))


def _nbdkit() -> str:
    """The path of an nbdkit that has the Python plugin."""
    program = programs.find("nbdkit")
    missing = (
        "nbdkit with its Python plugin is needed, and is not "
        "installed (apt-get install nbdkit nbdkit-plugin-python)"
    )
    if not program or subprocess.run([program, "--dump-plugin", "python"], capture_output=True).returncode:
        raise MissingTool(missing)
    return program


def _status(child: "subprocess.Popen[bytes]") -> int:
    status = child.wait()
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    main()
