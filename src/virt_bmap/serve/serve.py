"""A disk served at C speed with its accesses logged: nbdkit with the log filter, on a Unix socket in a
private folder.

    client -> nbdkit: log filter -> cow filter (unless writing)
                  -> file plugin                 raw files and block devices
                  -> nbd plugin -> qemu-nbd      qcow2, vmdk, ...
                  -> nbd plugin -> the server    NBD URIs

The log goes to a file in memory, not through a pipe: nbdkit writes each line before it serves the request, so
a full pipe would stall the guest. The file is followed, and what has been read is punched out of it, so that
it stays as small as the backlog.

Who serves a guest must not take its disk away, whatever happens here: a lasting server is nobody's child to
be ended. It ends by itself when its last client leaves (nbdkit-exitlast-filter). The watch is a client as
long as it lives, so that others may come and go; and a caretaker looks after what is left when it is killed.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from virt_bmap.core.errors import ImageError
from virt_bmap.host import children, in_use, leftovers, programs
from virt_bmap.host.punch import punch
from virt_bmap.model.contract import RAW
from virt_bmap.open import magic
from virt_bmap.open.disks import SAFELY, Opening
from virt_bmap.open.graph import Graph
from virt_bmap.open.nbd import NbdReader
from virt_bmap.open.qemu import served_by
from virt_bmap.open.raw import RawReader
from virt_bmap.serve import between, caretaker
from virt_bmap.serve.address import Address

START_TIMEOUT = 30.0
"""Seconds that a server gets to open its disk and listen."""
BACKLOG = 256 << 20
"""Bytes of log that may wait: some 3 million requests.

What lies further back is dropped, and counted through the gap in the ids.
"""
PIECE = 4 << 20
LAST_CLIENT = 5.0
"""Seconds that a server gets to see that its last client has left."""
COW_BLOCK = 4096
"""Block size of the throw-away layer. With nbdkit's default of 64 KiB every 4 KiB read would fetch 64 KiB."""
COW_BLOCK_LARGE = 65536
COW_LARGE = 1 << 41
"""The layer's bitmap takes 2 bits a block (128 MiB here): larger disks get larger blocks."""


class Source(NamedTuple):
    """A disk to serve: a path, or an NBD URI, and the format that was found (of a URI raw), which it is
    mapped with, too."""

    image: str
    format: str
    size: int
    opening: Opening = SAFELY


class Served(NamedTuple):
    """A running server."""

    address: Address
    log: str
    process: "subprocess.Popen[bytes]"
    messages: str
    processes: "Sequence[subprocess.Popen[bytes]]"
    """It, and what it depends on."""

    def words(self) -> str:
        """The last thing that the server said on its standard error."""
        with open(self.messages, errors="replace") as file:
            lines = file.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {self.process.poll()}"


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A new folder that only this user can enter, in memory where there is /dev/shm."""
    memory = "/dev/shm"
    with leftovers.private_folder(memory if os.access(memory, os.W_OK) else None) as folder:
        yield folder


@contextlib.contextmanager
def lasting_folder() -> Iterator[leftovers.Shared]:
    """A private folder for a lasting server, with a caretaker.

    It is removed when the block ends, or, where that was left, when the server has ended.
    """
    memory = "/dev/shm"
    with leftovers.shared_folder(memory if os.access(memory, os.W_OK) else None) as folder:
        words = [sys.executable, "-I", "-S", caretaker.__file__, folder.name, str(folder.lock)]
        with children.running(words, subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            pass_fds=[folder.lock],
                              process_group=0) as process:  # fmt: skip
            left = False

            def leave() -> None:
                nonlocal left
                left = True
                folder.leave()

            try:
                yield folder._replace(leave=leave)
            finally:
                assert process.stdin
                process.stdin.close()
                if left:
                    let_go(process)
                else:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(LAST_CLIENT)


def let_go(process: "subprocess.Popen[bytes]") -> None:
    """Let a program live on as nobody's child: nothing ends it when the block does."""
    process.returncode = 0  # as far as anyone here is concerned


@contextlib.contextmanager
def lasting(
    source: Source, folder: leftovers.Shared, write: bool, export: str, address: Address | None = None
) -> Iterator[Served]:
    """Serve a disk until its last client has left; the block is one client, of the export `export`.

    Raises as `serve` does.
    """
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(serve(source, folder.name, write, lock=folder.lock, address=address))
        link = stack.enter_context(contextlib.closing(NbdReader(served.address.uri(export))))
        try:
            yield served
        finally:
            link.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                served.process.wait(LAST_CLIENT)
            if served.process.poll() is None:  # somebody has it open
                folder.leave()
                for process in served.processes:
                    let_go(process)


@contextlib.contextmanager
def serve(
    source: Source,
    folder: str,
    write: bool,
    in_order: bool = False,
    lock: int | None = None,
    address: Address | None = None,
) -> Iterator[Served]:
    """Serve a disk until the block ends, at `address`, or at a socket in the folder.

    `in_order`: each connection's requests are served, and logged, one after the other as they come. `lock`:
    the server ends with its last client, and not with us; until then it keeps the folder's lock.

    Raises MissingTool, and ImageError with the server's words.
    """
    program = programs.required(
        "nbdkit", f"{source.image}: serving it", "apt-get install nbdkit, or dnf install nbdkit"
    )
    lasts = lock is not None
    below: list[subprocess.Popen[bytes]] = []
    handed = [] if lock is None else [lock]
    with contextlib.ExitStack() as stack:
        if write and not magic.is_uri(source.image):  # qemu-nbd locks what it opens by itself
            in_use.refuse(source.image)
            if source.format == RAW:
                # the server has it, too, and for as long as it lasts
                handed.append(in_use.claim(source.image))
                stack.callback(os.close, handed[-1])
        if magic.is_uri(source.image):
            plugin = ["nbd", f"uri={source.image}", "shared=true"]
        elif source.format == RAW:
            plugin = ["file", f"file={os.path.abspath(source.image)}"]
        else:
            lower, process = stack.enter_context(_qemu_nbd(source, folder, write, lasts))
            below.append(process)
            plugin = ["nbd", f"socket={lower}", "shared=true"]
        log, messages = f"{folder}/log", f"{folder}/nbdkit.err"
        if address:
            address.make_free()
        address = address or Address(f"{folder}/nbd")
        threads = ["--threads", "1"] if in_order else []
        filters = [
            *(["--filter=exitlast"] if lasts else []),
            "--filter=log",
            *([] if write else ["--filter=cow"]),
        ]
        block = COW_BLOCK if source.size <= COW_LARGE else COW_BLOCK_LARGE
        command = [
            *(
                program,
                "--foreground",
                *([] if lasts else ["--exit-with-parent"]),
                *threads,
                *address.listening,
            ),
            *("--pidfile", f"{folder}/pid", *filters, *plugin, f"logfile={log}"),
            *([] if write else [f"cow-block-size={block}"]),
        ]
        # the log's times have no zone
        process = stack.enter_context(
            _running(command, messages, programs.environment({"TZ": "UTC0", "LC_ALL": "C"}), lasts, handed)
        )
        served = Served(address, log, process, messages, [process, *below])
        _wait_for(f"{folder}/pid", served, source)
        try:
            yield served
        finally:
            if process.poll() is not None and address.socket:
                with contextlib.suppress(OSError):
                    os.unlink(address.socket)


@contextlib.contextmanager
def _qemu_nbd(
    source: Source, folder: str, write: bool, lasts: bool
) -> "Iterator[tuple[str, subprocess.Popen[bytes]]]":
    """(socket, process) of a qemu-nbd that serves an image in one of QEMU's formats.

    It ends with its last connection: ours, and nbdkit's one.
    """
    with (
        contextlib.closing(RawReader(source.image)) as image,
        contextlib.closing(Graph(image, source.format, source.opening, write)) as graph,
    ):
        options = ["--shared=0", *([] if write else ["--read-only"])]
        reader, server = served_by(
            NbdReader, f"{source.image}: serving it", graph, options, f"{folder}/qemu", lasts
        )
    with contextlib.closing(reader):
        yield f"{folder}/qemu", server.process


@contextlib.contextmanager
def _running(
    command: list[str], messages: str, env: dict[str, str] | None, lasts: bool, handed: Sequence[int] = ()
) -> "Iterator[subprocess.Popen[bytes]]":
    """A server that is ended with the block.

    Signals of the terminal pass it by: the guest gets them, and needs its disk until it ends.
    """
    nothing = subprocess.DEVNULL
    words = [sys.executable, "-I", "-S", between.__file__, *command] if lasts else command
    with (
        open(messages, "wb") as errors,
        children.running(
            words,
            subprocess.Popen if lasts else None,
            stdin=nothing,
            stdout=nothing,
            stderr=errors,
            env=env,
            process_group=0,
            pass_fds=handed,
        ) as process,
    ):
        yield process


def _wait_for(pidfile: str, served: Served, source: Source) -> None:
    """Until the server listens, which it says by writing its process number."""
    end = time.monotonic() + START_TIMEOUT
    while not (os.path.exists(pidfile) and os.path.getsize(pidfile)):
        if served.process.poll() is not None:
            raise ImageError(f"{source.image}: can't be served: {served.words()}")
        if time.monotonic() > end:
            raise ImageError(f"{source.image}: can't be served: no answer in {START_TIMEOUT:.0f} seconds")
        time.sleep(0.01)


class Follower:
    """Reads a file that grows, and gives back the space of what it has read."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._at = 0
        self._punched = 0
        self.skipped = 0
        """Bytes of the log that were dropped because the backlog grew beyond BACKLOG."""

    def read(self) -> bytes:
        """What was added since the last call, up to PIECE bytes."""
        behind = os.fstat(self._fd).st_size - self._at
        if behind > BACKLOG:
            self._at += behind - BACKLOG // 2
            self.skipped += behind - BACKLOG // 2
        data = os.pread(self._fd, PIECE, self._at)
        self._at += len(data)
        if self._at - self._punched >= PIECE:
            with contextlib.suppress(OSError):  # where the filesystem can't, the log just stays
                punch(self._fd, self._punched, self._at - self._punched)
            self._punched = self._at
        return data

    def close(self) -> None:
        os.close(self._fd)
