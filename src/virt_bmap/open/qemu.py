"""Images that QEMU opens (qcow2, vmdk, vhd, vhdx, vdi, ...), through a `qemu-nbd` that ends when we do,
however we end.

It is told what to open by a `graph.Graph`, follows no name by itself, and works behind a wall
(`host/confine.py`): should an image get the better of all that, no other file and no network can be had.

qemu-nbd is given a socket to which we are connected already (systemd's socket activation). So there is no
moment at which it could be left behind, waiting for somebody and holding the image's lock.

Sources: sd_listen_fds(3); QEMU util/systemd.c, qemu-nbd.c (v7.2).
"""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import TypeVar

from virt_bmap.core.errors import BmapError, ImageError, MissingTool
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import CLAIM_STORED
from virt_bmap.host import children, confine, leftovers, programs, signals
from virt_bmap.open.disks import Opening
from virt_bmap.open.graph import Graph
from virt_bmap.open.nbd import TIMEOUT, NbdReader
from virt_bmap.open.raw import RawReader
from virt_bmap.open.status import DEPTH, DIRTY, StatusReader

LISTENER = 'ulimit -d "$0" 2>/dev/null; exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
"""For sh: a limit of memory in KiB, where there can be one; what was standard input becomes the first socket
that systemd's protocol passes on, and the process number is the program's own."""
MEMORY = 1 << 30
"""Bytes that qemu-nbd may take for an image that is only read, beside CLAIM_STORED for each that is stored.

Most formats have a table that QEMU holds whole, of up to 2 GiB: in a hole it costs no more than its length in
a header. Threads and caches take some hundred MiB.
"""
LAST_WORDS, WRITTEN = 5.0, 60.0
"""Seconds that qemu-nbd gets to end: after reading, and after writing, when it may have much to finish."""
PACKAGES = "apt-get install qemu-utils, or dnf install qemu-img"
LOCKED = re.compile(r"Failed to get .* lock|Is another process using the image")
MODULE = re.compile(r"module \S+ not found")
"""A part of QEMU that is not installed, and often not needed: of dmg's two ways to pack, say."""
WARNING = re.compile(r"(qemu(-nbd)?: )?(warning|info): ")
CANT_RUN = (126, 127)
"""Exit statuses of sh: what it was to run is not there, or no program of this machine."""
IN_USE = {
    True: "shut that down first",
    False: "-U (--force-share) reads it anyway, and what is read may then mix several states",
}
"""What to do about a lock, by whether the image is to be written."""
Client = TypeVar("Client", bound=NbdReader)


def open_with_qemu(
    image: RawReader, format: str, opening: Opening, status: Sequence[str] | None = None
) -> Reader:
    """Serve the image, whose format was found, with qemu-nbd and read it from there; see `open_image`.

    Raises ImageError, and MissingTool without qemu-nbd.
    """
    with contextlib.closing(Graph(image, format, opening)) as graph:
        options = ["--read-only", *_status_options(status or ())]
        client = NbdReader if status is None else functools.partial(StatusReader, wanted=status)
        reader: Reader = connected(client, f"{image.name}: a {format} image", graph, options)
        reader.marks = graph.marks
        return reader


def _status_options(contexts: Sequence[str]) -> list[str]:
    """What makes qemu-nbd tell these contexts."""
    bitmaps = [f"--bitmap={context.removeprefix(DIRTY)}" for context in contexts if context.startswith(DIRTY)]
    return bitmaps + ["--allocation-depth"] * (DEPTH in contexts)


def connected(
    client: Callable[[str, str, socket.socket], Client], why: str, graph: Graph, options: Sequence[str]
) -> Client:
    """A client of a qemu-nbd that has opened these nodes, which ends when the client is closed; `why` it is
    needed is for people.

    Raises MissingTool, and ImageError with QEMU's own words.
    """
    return served_by(client, why, graph, options)[0]


def served_by(
    client: Callable[[str, str, socket.socket], Client], why: str, graph: Graph, options: Sequence[str],
    path: str | None = None, lasts: bool = False,
) -> "tuple[Client, Server]":  # fmt: skip
    """Likewise, with the server.

    Others may connect to it at `path`, too; where it `lasts`,
    it does not end with us while they are connected.
    """
    program = programs.required("qemu-nbd", why, PACKAGES)
    # who starts it behind the wall waits for it, so that the kernel can end it with us
    # by SIGKILL: it forgets a SIGTERM that comes early, and there is nobody left for whom it could finish
    mortal = [] if lasts else children.mortal("KILL")
    try:
        return _connected(client, Server(program, mortal, options, graph, path, confine.popen, lasts), graph)
    except (ImageError, MissingTool, OSError):
        if confine.bears(program):  # or it is not the image's fault
            raise
    return _connected(client, Server(program, [], options, graph, path, confine.popen_outside, lasts), graph)


def _connected(
    client: Callable[[str, str, socket.socket], Client], server: "Server", graph: Graph
) -> "tuple[Client, Server]":
    try:
        made = client(graph.name, graph.name, server.link)
    except BaseException as error:
        refusal = server.refusal() if isinstance(error, ImageError) else None
        server.close()
        if refusal:
            raise refusal from error
        raise
    if graph.write:  # which may take as long as it takes
        server.link.settimeout(None)
    made.server, made.warning = server, server.words()
    return made, server


def reason(text: str, nodes: str) -> str:
    """The line that says why `nodes` can't be opened, among what QEMU and its drivers print before it, and
    the advice behind it; else the first that complains, or the first."""
    lines = [line for line in text.strip().splitlines() if not MODULE.search(line)]
    failed = f"Failed to blk_new_open '{nodes}': "
    said = [line.split(failed, 1)[1] for line in lines if failed in line]
    said += [line for line in lines if not WARNING.match(line)] + lines
    return re.sub(r"^qemu(-nbd)?: ", "", said[0]) if said else ""


class Server:
    """A qemu-nbd. It ends with `link`, our connection."""

    def __init__(
        self,
        program: str,
        mortal: list[str],
        options: Sequence[str],
        graph: Graph,
        path: str | None,
        popen: confine.Popen,
        lasts: bool,
    ) -> None:
        self._graph, self._program = graph, program
        self._patience = WRITTEN if graph.write else LAST_WORDS
        self._nodes = f"json:{json.dumps(graph.node)}"
        self.failure = ""
        self._messages = tempfile.TemporaryFile(dir=leftovers.temporary())  # noqa: SIM115 - closed by close
        self.link = socket.socket(socket.AF_UNIX)
        self._noted = contextlib.ExitStack()
        try:
            with signals.held():
                self.process = self._started(program, mortal, options, path, popen)
                if not lasts:
                    self._noted.enter_context(
                        leftovers.undoing(lambda: children.stop(self.process, self._patience))
                    )
        except BaseException:
            self._noted.close()
            self.link.close()
            self._messages.close()
            raise

    def _started(
        self, program: str, mortal: list[str], options: Sequence[str], path: str | None, popen: confine.Popen
    ) -> "subprocess.Popen[bytes]":
        limit = "unlimited" if self._graph.write else str(MEMORY + CLAIM_STORED * self._graph.stored() >> 10)
        words = [*mortal, "/bin/sh", "-c", LISTENER, limit, program, *options, self._nodes]
        with leftovers.private_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
            place = path or os.path.join(folder, "nbd")
            with contextlib.suppress(FileNotFoundError):  # of a first try
                os.unlink(place)
            listener.bind(place)
            listener.listen()
            self.link.settimeout(TIMEOUT)
            self.link.connect(place)
            # signals of the terminal are for us
            return popen(program, words, self._graph.read, self._graph.write, stdin=listener,
                stdout=self._messages,
                         stderr=self._messages, process_group=0, env=programs.environment())  # fmt: skip

    def words(self) -> str:
        """What it said, if it said anything: why it failed, or the first thing."""
        text = os.pread(self._messages.fileno(), 65536, 0).decode(errors="replace")
        return self._graph.in_words(reason(text, self._nodes))

    def refusal(self) -> BmapError | None:
        """Why it does not serve the image; None where that is not its fault."""
        status, words = self._ended(), self.words()
        if status <= 0 or not words:
            return None
        if status in CANT_RUN:
            return MissingTool(f"{self._program}: can't be run: {words} ({PACKAGES})")
        if LOCKED.search(words):
            return ImageError(
                f"{self._graph.name}: is in use: QEMU holds its lock (a running guest or another tool); "
                f"{IN_USE[bool(self._graph.write)]}"
            )
        return ImageError(
            f"{self._graph.name}: qemu-nbd can't open it as "
            f"{self._graph.format}{' for writing' if self._graph.write else ''}: {words}"
        )

    def _ended(self) -> int:
        """Its exit status. It ends with our connection, but not if that had not been agreed on yet; where it
        failed to open the image, it had ended before that broke."""
        self.link.close()
        return children.ended(self.process, self._patience)

    def close(self) -> None:
        """End it; what it has begun it finishes."""
        if self._messages.closed:
            return
        status = self._ended()
        if status == -signal.SIGKILL:
            self.failure = f"qemu-nbd did not finish within {self._patience:.0f} seconds"
        elif status:
            self.failure = self.words() or f"qemu-nbd ended with {status}"
        self._noted.close()
        self._messages.close()
