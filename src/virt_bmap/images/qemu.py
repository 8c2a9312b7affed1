"""Images that QEMU opens (qcow2, vmdk, vhd, vhdx, vdi, ...), through `qemu-nbd` read-only on a private Unix socket.

Headers are read here before QEMU sees the file, for one reason: what else would QEMU open? A backing or data file that the header names is passed
to QEMU only when the caller allows references, and then spelled out with its driver, so that QEMU never guesses a format or follows a name by itself.

Sources: QEMU docs/interop/qcow2.rst, block/qcow.c, block/qed.h, block/vmdk.c, block/vpc.c, block/vdi.c, block/vhdx.h, block/parallels.c, block/bochs.c, block/dmg.c.
"""

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

from virt_bmap.errors import ImageError, MissingTool, UsageError
from virt_bmap.images.magic import FORMATS, recognise
from virt_bmap.images.nbd import NbdReader
from virt_bmap.images.raw import RawReader
from virt_bmap.images.status import DEPTH, DIRTY, StatusReader
from virt_bmap.reader import Reader

MAX_CHAIN = 64
"""Backing files below each other. QEMU itself sets no limit; chains beyond a few dozen are unusable, and a loop must end."""
QCOW2_DATA_FILE = 1 << 2
QCOW2_EXT_BACKING_FORMAT, QCOW2_EXT_DATA_FILE = 0xE2792ACA, 0x44415441
QED_BACKING_FILE, QED_BACKING_RAW = 1, 4


@dataclass
class References:
    """Other files that an image's header names, and the backing format that it states."""

    backing: str | None = None
    backing_format: str | None = None
    data: str | None = None
    extents: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        return [name for name in (self.backing, self.data, *self.extents) if name]


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
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            why = (
                re.sub(r"^qemu-nbd: (Failed to blk_new_open .*?: )?", "", words[0]) if words else f"exit status {done.returncode}"
            )
            raise ImageError(f"{image.name}: qemu-nbd can't open it as {format}: {why}")
        uri = f"nbd+unix:///?socket={socket}"
        return NbdReader(uri, image.name) if status is None else StatusReader(uri, image.name, status)


def _status_options(contexts: Sequence[str]) -> list[str]:
    """What makes qemu-nbd tell these contexts."""
    bitmaps = [f"--bitmap={context.removeprefix(DIRTY)}" for context in contexts if context.startswith(DIRTY)]
    return bitmaps + ["--allocation-depth"] * (DEPTH in contexts)


def block_options(image: RawReader, format: str, references: bool, depth: int) -> dict[str, str]:
    """The image and all that it refers to as QEMU's block options."""
    found = _references(image, format)
    if found.names() and not references:
        raise ImageError(
            f"{image.name}: its {format} header refers to {', '.join(map(repr, found.names()))}, which is not opened unasked, since whoever wrote the image "
            "chose that name; if you trust it, say --references (or --format raw for a raw disk that only looks like this)"
        )
    if depth >= MAX_CHAIN:
        raise ImageError(f"{image.name}: its backing chain is longer than {MAX_CHAIN} files, or a loop")
    options = {"driver": format, "file.driver": _file_driver(image.name), "file.filename": _escape(os.path.abspath(image.name))}
    folder = os.path.dirname(os.path.abspath(image.name))
    if found.data:
        path = os.path.join(folder, found.data)
        options |= {"data-file.driver": _file_driver(path), "data-file.filename": _escape(path)}
    if found.backing:
        if not found.backing_format:
            raise ImageError(
                f"{image.name}: its header names the backing file {found.backing!r} without a format, and guessing it is unsafe; "
                f"state it with: qemu-img rebase -u -b {found.backing} -F FORMAT {image.name}"
            )
        backing = RawReader(os.path.join(folder, found.backing))
        try:
            below = block_options(backing, found.backing_format, references, depth + 1)
        finally:
            backing.close()
        options |= {f"backing.{key}": value for key, value in below.items()}
    return options


@dataclass(frozen=True)
class Layer:
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
            found = _references(image, format)
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


def _references(image: Reader, format: str) -> References:
    """What else an image of this format would make QEMU open."""
    if format in ("qcow2", "qcow"):
        return _qcow_references(image, format)
    if format == "qed":
        header = image.read_clipped(0, 72)
        features, at, length = struct.unpack_from("<Q", header, 16)[0], *struct.unpack_from("<II", header, 56)
        name = _name(image, at, length) if features & QED_BACKING_FILE else None
        return References(backing=name, backing_format="raw" if features & QED_BACKING_RAW else None)
    if format == "vmdk":
        return _vmdk_references(image)
    return References()


def _name(image: Reader, offset: int, length: int) -> str | None:
    if length == 0:
        return None
    if length > 1023 or offset + length > image.size:
        raise ImageError(
            f"{image.name}: the backing file name at byte {offset:#x}, {length} bytes long, does not fit into the image"
        )
    return os.fsdecode(image.read(offset, length))


def _qcow_references(image: Reader, format: str) -> References:
    """qcow2.rst, "Header" and "Header extensions"."""
    header = image.read_clipped(0, 104)
    version, at, length = struct.unpack_from(">IQI", header, 4)
    found = References(backing=_name(image, at, length) if at else None)
    extensions = 72 if version < 3 else struct.unpack_from(">I", header, 100)[0]
    if format == "qcow2" and extensions <= 65536:
        area = image.read_clipped(extensions, 65536)
        place = 0
        while place + 8 <= len(area):
            kind, size = struct.unpack_from(">II", area, place)
            body = area[place + 8 : place + 8 + size]
            if kind == 0 or len(body) < size:
                break
            if kind == QCOW2_EXT_BACKING_FORMAT:
                found.backing_format = body.decode("ascii", "replace")
            elif kind == QCOW2_EXT_DATA_FILE:
                found.data = os.fsdecode(body)
            place += 8 + (size + 7) // 8 * 8
        incompatible = struct.unpack_from(">Q", header, 72)[0] if version >= 3 else 0
        if not incompatible & QCOW2_DATA_FILE:
            found.data = None
        elif found.data is None:
            raise ImageError(f"{image.name}: its qcow2 header says that an external data file holds the data, but names none")
    if found.backing_format and found.backing_format not in ("raw", *FORMATS):
        raise ImageError(
            f"{image.name}: its header states the backing format {found.backing_format!r}; there are: raw, {', '.join(FORMATS)}"
        )
    return found


def _vmdk_references(image: Reader) -> References:
    """The text descriptor, in a file of its own or embedded: extent lines and the parent's name."""
    head = image.read_clipped(0, 1 << 20)
    separate = head.startswith(b"# Disk DescriptorFile")
    if not separate:
        if head[:4] != b"KDMV":
            return References()
        capacity, at, sectors = struct.unpack_from("<Q8xQQ", head, 12)
        separate = capacity == 0  # QEMU then takes the embedded descriptor for a whole image's
        if at == 0 or at * 512 >= image.size:
            return References()
        head = image.read_clipped(at * 512, min(sectors * 512, 1 << 20))
    text = head.split(b"\0", 1)[0].decode("latin-1")
    extents = re.findall(r'^(?:RW|RDONLY|NOACCESS)\s+\d+\s+\w+\s+"([^"\n]*)"', text, re.MULTILINE)
    parent = re.search(r'^parentFileNameHint\s*=\s*"([^"\n]*)"', text, re.MULTILINE)
    parent_cid = re.search(r"^parentCID\s*=\s*([0-9a-fA-F]+)", text, re.MULTILINE)
    has_parent = parent and parent_cid and parent_cid[1].lower() != "ffffffff"
    # the extent that a monolithic file's embedded descriptor names is the file itself, which QEMU does not open again
    return References(backing=parent[1] if parent and has_parent else None, extents=extents if separate else [])
