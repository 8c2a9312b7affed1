"""A new image that holds what is owned, and nothing else: raw files are written here, other formats through QEMU."""

import io
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from virt_bmap.arrays import Bytes, complement, union
from virt_bmap.dump import GRAIN, SparseFile, dump
from virt_bmap.errors import MissingTool, OutputError
from virt_bmap.images import magic
from virt_bmap.images.nbd_writer import NbdWriter
from virt_bmap.images.qemu import block_options
from virt_bmap.images.qemu_writer import serving
from virt_bmap.images.raw import RawReader
from virt_bmap.reader import Reader
from virt_bmap.space import NONE, Ranges
from virt_bmap.sparsify.estimate import host_of

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx")
"""What a copy can be: all that QEMU writes to at any place."""
COMPRESSED = ("qcow2",)
CLUSTER = 64 << 10
"""What QEMU's formats allocate at once or in multiples of (qcow2, vmdk); zeroes in smaller pieces would save nothing, and a compressed cluster is written only once."""


@dataclass(frozen=True)
class FreshImage:
    """An image in which nothing was written yet: zeroes need no writing."""

    writer: NbdWriter

    def write(self, offset: int, data: Bytes) -> None:
        self.writer.write(offset, data)

    def zero(self, start: int, end: int) -> None:
        """A new image reads as zeroes."""


def copy(
    reader: Reader,
    free: Ranges,
    holes: Ranges,
    path: str,
    format: str,
    compress: bool,
    tell: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the disk to `path`, an empty file, without what is `free`; `holes` are known to read as zeroes.

    `tell` is called with the number of bytes that are done. Raises OutputError and MissingTool.
    """
    skip = union(np.append(free[0], holes[0]), np.append(free[1], holes[1]))
    if format == "raw":
        with open(path, "r+b") as file:
            dump(reader, SparseFile(file, reader.size), skip, tell, GRAIN)
        return
    _create(path, format, reader.size)
    layer = "file." if compress else ""
    options = {f"{layer}driver": format, f"{layer}file.driver": "file", f"{layer}file.filename": path.replace(",", ",,")}
    with serving(path, {"driver": "compress", **options} if compress else options) as writer:
        dump(reader, FreshImage(writer), skip, tell, CLUSTER)


def holes_of(image: str, reader: Reader, format: str | None, references: bool) -> Ranges:
    """What of a disk is known to read as zeroes without reading it: holes of a raw file, what QEMU's formats have no clusters for."""
    if isinstance(reader, RawReader):
        host = host_of(image)
        return complement(*host.data, 0, reader.size) if host else NONE
    if magic.is_uri(image):
        command = ["-f", "raw", image]
    else:
        plain = RawReader(image)
        try:
            options = block_options(plain, format or magic.recognise(plain) or "raw", references, 0)
        finally:
            plain.close()
        command = ["--image-opts", ",".join(f"{key}={value}" for key, value in options.items())]
    program = shutil.which("qemu-img")
    done = (
        subprocess.run([program, "map", "--output=json", *command], capture_output=True, stdin=subprocess.DEVNULL)
        if program
        else None
    )
    return NONE if done is None or done.returncode else _zeroes(done.stdout, reader.size)


def _zeroes(told: bytes, size: int) -> Ranges:
    """The ranges that `qemu-img map --output=json` calls zero: one object a line."""
    import pyarrow.json

    table = pyarrow.json.read_json(io.BytesIO(told.strip().strip(b"[]").replace(b",\n", b"\n")))
    start = table.column("start").to_numpy()
    end = start + table.column("length").to_numpy()
    zero = table.column("zero").to_numpy()
    return union(np.clip(start[zero], 0, size), np.clip(end[zero], 0, size))


def _create(path: str, format: str, size: int) -> None:
    """An image of `size` bytes with nothing in it."""
    program = shutil.which("qemu-img")
    if not program:
        raise MissingTool(
            f"{path}: a {format} image needs qemu-img, which is not installed (apt-get install qemu-utils, or dnf install qemu-img)"
        )
    done = subprocess.run([program, "create", "-q", "-f", format, path, str(size)], capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise OutputError(f"{path}: can't be written: {words[0] if words else f'qemu-img ended with {done.returncode}'}")
