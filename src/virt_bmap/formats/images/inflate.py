"""Disks of which clusters are stored compressed, read here: each cluster that is asked for is inflated by
itself.

Sources: QEMU docs/interop/qcow2.rst (v8.2), "Compressed Clusters Descriptor" and "Compression type"; VMware
"Virtual Disk Format 5.0", "Stream-Optimized Compressed Sparse Extents".
"""

import zlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bytes, Int, union
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.lost import Lost
from virt_bmap.core.mapping import Rows
from virt_bmap.core.reader import Reader
from virt_bmap.model.contract import ImageLayer

KEPT = 16 << 20
"""Bytes of clusters that are kept: the next level of a tree often lies in the same one."""


def deflated(data: bytes, size: int, window: int = -12) -> bytes:
    """`contract.Inflate` for deflate; by its window the headers differ (zlib.decompressobj)."""
    try:
        return zlib.decompressobj(window).decompress(data, size)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def zstd(data: bytes, size: int) -> bytes:
    """`contract.Inflate` for Zstandard."""
    try:
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            return bytes(stream.read(size))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None


class InflatingReader(Reader):
    """A disk whose plain clusters `plain` reads (the others as zeroes), and whose compressed ones lie by
    `rows` in `files`, each of a layer."""

    def __init__(
        self, plain: Reader, rows: Rows, files: Sequence[Reader], layers: dict[int, ImageLayer]
    ) -> None:
        super().__init__(plain.size, plain.name)
        self.below = [plain, *files]
        self._plain, self._rows, self._files, self._layers = plain, rows, files, layers
        self._clusters: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        data = np.array(self._plain.read_ranges(offsets, lengths))
        pieces = self._rows.down(offsets, offsets + lengths)
        place = (np.cumsum(lengths) - lengths)[pieces.query] + pieces.source - offsets[pieces.query]
        order = np.argsort(pieces.row, kind="stable")
        for at, row, source, length in zip(
            *(column[order].tolist() for column in (place, pieces.row, pieces.source, pieces.length)),
            strict=True,
        ):
            cluster = self._cluster(row)
            skip = source % self._layers[int(self._rows.parent[row])].cluster
            data[at : at + length] = np.frombuffer(cluster, np.uint8, length, skip)
        return data

    @property
    def whole(self) -> bool:
        return self._plain.whole and all(file.whole for file in self._files)

    def lost(self, starts: Int, ends: Int) -> Lost:
        """A compressed cluster is lost with any byte of it."""
        parts = [self._plain.lost(starts, ends)]
        pieces = self._rows.down(starts, ends)
        low = pieces.target
        for file in np.unique(self._rows.parent[pieces.row]).tolist():
            mine = np.flatnonzero(self._rows.parent[pieces.row] == file)
            piece, gone = (
                self._files[file]
                .lost(*union(low[mine], (low + pieces.target_length)[mine]))
                .within(low[mine], (low + pieces.target_length)[mine])
            )
            source = pieces.source[mine][piece]
            parts.append(gone._replace(starts=source, ends=source + pieces.length[mine][piece]))
        return Lost.join(parts)

    def _cluster(self, row: int) -> bytes:
        """The whole cluster, of which the row may show a part."""
        file = int(self._rows.parent[row])
        at = int(self._rows.parent_offset[row])
        stored = int(self._rows.parent_run[row])
        key = file, at
        if key in self._clusters:
            self._clusters.move_to_end(key)
            return self._clusters[key]
        layer = self._layers[file]
        why = "it ends early" if layer.inflate else "its compression is not supported"
        try:
            found = layer.inflate(self._files[file].read(at, stored), layer.cluster) if layer.inflate else b""
        except ValueError as error:
            found, why = b"", str(error)
        start = int(self._rows.volume_offset[row]) // layer.cluster * layer.cluster
        if len(found) < min(layer.cluster, self.size - start):
            raise Corrupt(
                f"{self.name}: the compressed cluster at byte {at:#x} "
                f"of {self._files[file].name} can't be inflated: {why}",
                start,
                "mapping",
            )
        self._clusters[key] = found
        while len(self._clusters) * layer.cluster > KEPT and len(self._clusters) > 1:
            self._clusters.popitem(last=False)
        return found
