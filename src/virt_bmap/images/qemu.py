"""Images that QEMU opens (qcow2, vmdk, vhd, vhdx, vdi, ...), through `qemu-nbd` read-only on a private Unix socket.

A backing or data file that a header names (`references.py`) is passed to QEMU only when the caller allows it, and then spelled out with its driver, so that
QEMU never guesses a format or follows a name by itself.
"""

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from virt_bmap.errors import ImageError, MissingTool, UsageError
from virt_bmap.images.magic import FORMATS, recognise
from virt_bmap.images.nbd import NbdReader
from virt_bmap.images.raw import RawReader
from virt_bmap.images.references import MAX_CHAIN, allowed_references, references_of
from virt_bmap.images.status import DEPTH, DIRTY, StatusReader
from virt_bmap.reader import Reader


def open_with_qemu(image: RawReader, format: str, references: bool, status: Sequence[str] | None = None) -> Reader:
    """Serve the image with qemu-nbd and read it from there; `status` as for `images.open_image`. Raises ImageError with QEMU's own words, MissingTool without qemu-nbd."""
    if format not in FORMATS:
        raise UsageError(f"unknown image format {format!r}; there are: raw, {', '.join(FORMATS)}")
    options = block_options(image, format, references, 0)
    program = shutil.which("qemu-nbd")
    if not program:
        raise MissingTool(
            f"{image.name}: a {format} image needs qemu-nbd, which is not installed (apt-get install qemu-utils, or dnf install qemu-img)"
        )
    with tempfile.TemporaryDirectory(prefix="virt-bmap-") as folder:
        socket = os.path.join(folder, "nbd")
        # without --persistent it ends with our connection, however we end; --fork returns once the socket listens
        command = [
            program,
            "--fork",
            "--read-only",
            "--socket",
            socket,
            *_status_options(status or ()),
            "--image-opts",
            ",".join(f"{k}={v}" for k, v in options.items()),
        ]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
        words = [*done.stderr.decode(errors="replace").strip().splitlines(), f"exit status {done.returncode}"]
        why = re.sub(r"^qemu(-nbd)?: (Failed to blk_new_open .*?: )?", "", words[0])
        uri = f"nbd+unix:///?socket={socket}"
        try:
            reader = NbdReader(uri, image.name) if status is None else StatusReader(uri, image.name, status)
        except ImageError as error:
            if not done.returncode:
                raise
            raise ImageError(f"{image.name}: qemu-nbd can't open it as {format}: {why}") from error
        if done.returncode:  # a mere warning, while the server waits for its client
            reader.warning = why
        return reader


def _status_options(contexts: Sequence[str]) -> list[str]:
    """What makes qemu-nbd tell these contexts."""
    bitmaps = [f"--bitmap={context.removeprefix(DIRTY)}" for context in contexts if context.startswith(DIRTY)]
    return bitmaps + ["--allocation-depth"] * (DEPTH in contexts)


def block_options(image: RawReader, format: str, references: bool, depth: int) -> dict[str, str]:
    """The image and all that it refers to as QEMU's block options."""
    found = allowed_references(image, format, references, depth)
    options = {"driver": format, "file.driver": _file_driver(image.name), "file.filename": _escape(os.path.abspath(image.name))}
    folder = os.path.dirname(os.path.abspath(image.name))
    if found.data:
        path = os.path.join(folder, found.data)
        options |= {"data-file.driver": _file_driver(path), "data-file.filename": _escape(path)}
    if found.backing:
        assert found.backing_format  # or it would not be allowed
        backing = RawReader(os.path.join(folder, found.backing))
        try:
            below = block_options(backing, found.backing_format, references, depth + 1)
        finally:
            backing.close()
        options |= {f"backing.{key}": value for key, value in below.items()}
    return options


class Layer(NamedTuple):
    """One image of a backing chain: its file, its format, and the bytes of its clusters."""

    path: str
    format: str
    cluster: int


def backing_chain(path: str, format: str | None) -> list[Layer]:
    """An image and those below it, uppermost first, as their headers name them. Nothing is opened but to read these headers."""
    chain: list[Layer] = []
    while True:
        if len(chain) >= MAX_CHAIN:
            raise ImageError(f"{path}: its backing chain is longer than {MAX_CHAIN} files, or a loop")
        image = RawReader(path)
        try:
            format = format or recognise(image) or "raw"
            found = references_of(image, format)
            chain.append(Layer(path, format, _cluster(image, format)))
        finally:
            image.close()
        if not found.backing:
            return chain
        path, format = os.path.join(os.path.dirname(os.path.abspath(path)), found.backing), found.backing_format
        if not format:
            return chain  # whoever opens the chain says what is missing


def _cluster(image: Reader, format: str) -> int:
    """qcow2.rst, "Header": cluster_bits; 64 KiB, which is the default, for all others."""
    bits = struct.unpack_from(">I", image.read_clipped(20, 4))[0] if format == "qcow2" else 16
    return 1 << min(max(bits, 9), 21)


def _file_driver(path: str) -> str:
    return "host_device" if os.path.exists(path) and not os.path.isfile(path) else "file"


def _escape(value: str) -> str:
    return value.replace(",", ",,")
