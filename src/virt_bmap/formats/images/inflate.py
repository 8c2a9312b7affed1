"""Disks of which clusters are stored compressed, read here: each cluster that is asked for is inflated by
itself.

Sources: QEMU docs/interop/qcow2.rst (v8.2), "Compressed Clusters Descriptor" and "Compression type"; VMware
"Virtual Disk Format 5.0", "Stream-Optimized Compressed Sparse Extents".
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, gather, ints, scatter, union
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.lost import NOTHING, Lost
from virt_bmap.core.mapping import Rows
from virt_bmap.core.reader import Reader
from virt_bmap.model.contract import ImageLayer

KEPT = 16 << 20
"""Bytes of clusters that are kept: the next level of a tree often lies in the same one."""


class InflatingReader(Reader):
    """A disk whose plain clusters `plain` reads (the others as zeroes), and whose compressed ones lie by
    `rows` in `files`, each of a layer; `lost` is what these know to be missing."""

    def __init__(
        self,
        plain: Reader,
        rows: Rows,
        files: Sequence[Reader],
        layers: Mapping[int, ImageLayer],
        lost: Lost = NOTHING,
    ) -> None:
        super().__init__(plain.size, plain.name)
        self.below = [plain, *files]
        self._plain, self._rows, self._files, self._layers, self._lost = plain, rows, files, layers, lost
        self._clusters: OrderedDict[int, Bytes] = OrderedDict()
        self._kept_bytes = 0

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        data = self._plain.read_ranges(offsets, lengths)
        pieces = self._rows.down(offsets, offsets + lengths)
        if not len(pieces.row):
            return data
        data = data if data.flags.writeable else data.copy()
        place = (np.cumsum(lengths) - lengths)[pieces.query] + pieces.source - offsets[pieces.query]
        order = np.argsort(pieces.row, kind="stable")
        row, place, source, length = (
            part[order] for part in (pieces.row, place, pieces.source, pieces.length)
        )
        wanted, first = np.unique(row, return_index=True)
        cluster = self._cluster_of(row)
        skip = source % cluster
        edges = np.append(first, len(row))
        for batch in self._batches(wanted):
            low, high = np.searchsorted(wanted, [batch[0], batch[-1] + 1])
            mine = slice(edges[low], edges[high])
            inflated = self._inflated(batch)
            base = np.cumsum([0, *map(len, inflated)])[np.searchsorted(batch, row[mine])]
            found = gather(np.concatenate(inflated), base + skip[mine], length[mine])
            scatter(data, place[mine], length[mine], found)
        return data

    @property
    def whole(self) -> bool:
        return not len(self._lost.starts) and self._plain.whole and all(file.whole for file in self._files)

    def lost(self, starts: Int, ends: Int) -> Lost:
        """A compressed cluster is lost with any byte of it."""
        parts = [self._plain.lost(starts, ends), self._lost.within(starts, ends)[1]]
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

    def _cluster_of(self, row: Int) -> Int:
        """Bytes of the clusters that rows show, which is a matter of the layer."""
        files = np.array([layer.cluster for _, layer in sorted(self._layers.items())], np.int64)
        numbers = ints(sorted(self._layers))
        found: Int = files[np.searchsorted(numbers, self._rows.parent[row])]
        return found

    def _batches(self, rows: Int) -> Iterator[Int]:
        """Rows a bounded number of bytes at a time, which are what is stored of them or what comes of it."""
        size = np.cumsum(np.maximum(self._cluster_of(rows), self._rows.parent_run[rows]))
        cuts = np.flatnonzero(np.diff(size // KEPT)) + 1
        yield from np.split(rows, cuts)

    def _inflated(self, rows: Int) -> list[Bytes]:
        """The whole clusters of these rows, of which a row may show a part."""
        fresh = ints([row for row in rows.tolist() if row not in self._clusters])
        for file in np.unique(self._rows.parent[fresh]).tolist():
            mine = fresh[self._rows.parent[fresh] == file]
            stored = self._rows.parent_run[mine]
            data = self._files[file].read_ranges(self._rows.parent_offset[mine], stored)
            ends = np.cumsum(stored)
            for row, low, high in zip(*(side.tolist() for side in (mine, ends - stored, ends)), strict=True):
                self._keep(row, self._one(row, data[low:high]))
        found = []
        for row in rows.tolist():
            self._clusters.move_to_end(row)
            found.append(self._clusters[row])
        while self._kept_bytes > KEPT and len(self._clusters) > 1:
            self._kept_bytes -= len(self._clusters.popitem(last=False)[1])
        return found

    def _keep(self, row: int, cluster: Bytes) -> None:
        self._clusters[row] = cluster
        self._kept_bytes += len(cluster)

    def _one(self, row: int, data: Bytes) -> Bytes:
        """What is stored of a cluster as its bytes."""
        file, at = int(self._rows.parent[row]), int(self._rows.parent_offset[row])
        layer = self._layers[file]
        why = "it ends early" if layer.inflate else "its compression is not supported"
        try:
            found = layer.inflate(data.tobytes(), layer.cluster) if layer.inflate else b""
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
        return np.frombuffer(found, np.uint8)
