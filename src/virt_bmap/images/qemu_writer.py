"""Images in QEMU's formats, written through a `qemu-nbd` that ends when we do, however we end.

qemu-nbd is given a socket to which we are connected already (systemd's socket activation), so there is no moment at which it could be left behind, waiting for
somebody and holding the image's lock. When the connection ends it finishes what is under way and leaves the image in order.

Sources: sd_listen_fds(3); QEMU util/systemd.c, qemu-nbd.c; docs/interop/qcow2.rst.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping

from virt_bmap.errors import ImageError, MissingTool, OutputError
from virt_bmap.images.nbd_writer import NbdWriter
from virt_bmap.images.qemu import block_options
from virt_bmap.images.raw import RawReader

LISTENER = 'exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
"""For sh: what was standard input becomes the first socket that systemd's protocol passes on, and the process number is the program's own."""
LAST_WORDS = 60.0
"""Seconds that qemu-nbd gets to finish after the last flush."""
LOCKED = re.compile(r"Failed to get .* lock|Is another process using the image")


@contextlib.contextmanager
def writing(path: str, format: str, references: bool, extra: Mapping[str, str] | None = None) -> Iterator[NbdWriter]:
    """The disk inside an image, for reading and writing; space is given back to the host on a trim. `extra` are further options of QEMU's block layer.

    Raises MissingTool, ImageError where the image can't be opened or somebody else uses it, OutputError where writing fails.
    """
    plain = RawReader(path)
    try:
        options = {**block_options(plain, format, references, 0), "discard": "unmap", "file.discard": "unmap", **(extra or {})}
    finally:
        plain.close()
    with serving(path, options) as writer:
        yield writer


@contextlib.contextmanager
def serving(name: str, options: Mapping[str, str]) -> Iterator[NbdWriter]:
    """A connection to a qemu-nbd that has opened what QEMU's block options describe; `name` is for messages."""
    program = shutil.which("qemu-nbd")
    if not program:
        raise MissingTool(
            f"{name}: writing it needs qemu-nbd, which is not installed (apt-get install qemu-utils, or dnf install qemu-img)"
        )
    command = [program, "--discard=unmap", "--image-opts", ",".join(f"{key}={value}" for key, value in options.items())]
    with tempfile.TemporaryFile() as messages, socket.socket(socket.AF_UNIX) as link:
        with tempfile.TemporaryDirectory(prefix="virt-bmap-") as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.join(folder, "nbd"))
            listener.listen(1)
            link.connect(os.path.join(folder, "nbd"))
            shell = ["/bin/sh", "-c", LISTENER, "sh", *command]
            process = subprocess.Popen(shell, stdin=listener.fileno(), stdout=messages, stderr=messages)
        try:
            writer = _connected(name, link, process, messages.fileno())
            yield writer
            writer.flush()
            writer.close()
            if process.wait(LAST_WORDS):
                raise OutputError(
                    f"{name}: can't be written: {_words(messages.fileno()) or f'qemu-nbd ended with {process.returncode}'}"
                )
        except subprocess.TimeoutExpired:
            raise OutputError(f"{name}: can't be written: qemu-nbd did not finish within {LAST_WORDS:.0f} seconds") from None
        finally:
            link.close()
            if process.poll() is None:
                process.terminate()
                process.wait()


def _connected(name: str, link: socket.socket, process: "subprocess.Popen[bytes]", messages: int) -> NbdWriter:
    """The client's end. Where qemu-nbd refuses the image, its own words say why."""
    try:
        return NbdWriter(name, name, link)
    except ImageError as error:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        words = _words(messages)
        if LOCKED.search(words):
            raise ImageError(
                f"{name}: is in use: QEMU holds its lock (a running guest or another tool); shut that down first"
            ) from error
        raise ImageError(f"{name}: qemu-nbd can't open it for writing: {words}" if words else str(error)) from error


def _words(messages: int) -> str:
    """The first thing that qemu-nbd said."""
    lines = os.pread(messages, 65536, 0).decode(errors="replace").strip().splitlines()
    return re.sub(r"^qemu-nbd: (Failed to blk_new_open .*?: )?", "", lines[0]) if lines else ""
