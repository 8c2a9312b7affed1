"""Images in QEMU's formats, written through a qemu-nbd that leaves the image in order when it ends
(`qemu.py`)."""

import contextlib
from collections.abc import Iterator

from virt_bmap.core.errors import OutputError
from virt_bmap.open.disks import SAFELY, Opening
from virt_bmap.open.graph import Graph
from virt_bmap.open.nbd_writer import NbdWriter
from virt_bmap.open.qemu import connected
from virt_bmap.open.raw import RawReader


@contextlib.contextmanager
def writing(path: str, format: str, opening: Opening = SAFELY, compress: bool = False) -> Iterator[NbdWriter]:
    """The disk inside an image, for reading and writing; space is given back to the host on a trim.

    `compress`: what is written is stored compressed.

    Raises MissingTool, ImageError where the image can't be opened or somebody else uses it, OutputError where
    writing fails.
    """
    with (
        contextlib.closing(RawReader(path)) as plain,
        contextlib.closing(Graph(plain, format, opening, write=True)) as graph,
    ):
        graph.give_back()
        if compress:
            graph.node = {"driver": "compress", "file": graph.node}
        writer = connected(NbdWriter, f"{path}: writing it", graph, ["--discard=unmap"])
    try:
        yield writer
        writer.flush()
        writer.close()
        if writer.server and writer.server.failure:
            raise OutputError(f"{path}: can't be written: {writer.server.failure}")
    finally:
        writer.close()
