"""What an image's own checksums and hashes say of what it holds.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)", "Data chunk", "Digest section".
"""

import hashlib
import zlib
from functools import partial
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Bytes, Int, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.core.threads import ahead
from virt_bmap.formats.images.ewf.extents import Chunks
from virt_bmap.formats.images.ewf.ondisk import CHECKSUM
from virt_bmap.model.contract import NOT_LOOKED_AT, PROVEN, ImageLayer, Proof
from virt_bmap.model.damage import Damage

WORDS = {"md5": "MD5", "sha1": "SHA-1"}
BATCH = 8 << 20
"""Bytes that are hashed at a time."""


class Stored(NamedTuple):
    """What vouches for the disk of a layer: checksums behind its `plain` chunks, whose `stored` are the bytes
    before these, those in compressed ones, and hashes of the whole disk by their names."""

    layer: ImageLayer
    plain: Chunks
    hashes: dict[str, bytes]

    def prove(self, disk: Reader, damage: Damage) -> list[Proof]:
        """Read all that the image holds of the disk, whose reader this is, and compare."""
        layer, rows = self.layer, self.layer.rows
        whole = int(rows.run.sum()) == layer.size
        digests = {name: hashlib.new(name, usedforsecurity=False) for name in self.hashes} if whole else {}
        starts = np.unique(rows.volume_offset // layer.cluster)  # of chunks; a row may join several
        starts = np.arange(-(-layer.size // layer.cluster), dtype=np.int64) if whole else starts
        step = max(1, BATCH // layer.cluster)
        bad: list[int] = []
        parts = (starts[at : at + step] * layer.cluster for at in range(0, len(starts), step))
        for data in ahead(partial(self._read, disk, bad), parts):
            for digest in digests.values():
                digest.update(data.data)
        damage.add(
            "content", "[chunk is|chunks are] not what [its checksum says|their checksums say]", ints(bad)
        )
        for name, digest in digests.items():
            if digest.digest() != self.hashes[name]:
                damage.say(
                    "content",
                    f"the {WORDS[name]} of the disk is {digest.hexdigest()}, but the image keeps "
                    f"{self.hashes[name].hex()}",
                )
        return [self._verdict(whole, len(starts))]

    def _verdict(self, whole: bool, chunks: int) -> Proof:
        """What was looked at."""
        words = f"the checksums of {plural(chunks, 'chunk')} hold"
        if whole and self.hashes:
            names = " and ".join(WORDS[name] for name in self.hashes)
            are = "are" if len(self.hashes) > 1 else "is"
            return Proof("content", PROVEN, f"{words}; the disk's {names} {are} what the image keeps")
        if self.hashes:
            return Proof(
                "content", NOT_LOOKED_AT, f"{words}; its hashes are of the whole disk, which is not here"
            )
        return Proof("content", PROVEN, f"{words}; the image keeps no hash of the disk")

    def _read(self, disk: Reader, bad: list[int], starts: Int) -> Bytes:
        """Chunks at these bytes of the disk; `bad` gets those that are not what they were."""
        lengths = np.minimum(self.layer.cluster, disk.size - starts)
        try:
            data = disk.read_ranges(starts, lengths)
        except Corrupt:  # one of them can't be inflated: which?
            data = np.concatenate(
                [self._one(disk, bad, *one) for one in zip(starts.tolist(), lengths.tolist(), strict=True)]
            )
        self._compare(data, starts, bad)
        return data

    def _one(self, disk: Reader, bad: list[int], start: int, length: int) -> Bytes:
        try:
            return disk.read_ranges(ints(start), ints(length))
        except Corrupt:
            bad.append(start)
            return np.zeros(length, np.uint8)

    def _compare(self, data: Bytes, starts: Int, bad: list[int]) -> None:
        """The checksums of those among these chunks that are not compressed."""
        cluster, plain = self.layer.cluster, self.plain
        low, high = np.searchsorted(plain.number, [starts[0] // cluster, starts[-1] // cluster + 1])
        mine = plain.take(np.arange(low, high))
        place = np.searchsorted(starts, mine.number * cluster) * cluster
        for file, at, host, length in zip(
            *(side.tolist() for side in (mine.file, place, mine.host, mine.stored)), strict=True
        ):
            image = self.layer.files[file]
            chunk = data[at : at + length]
            if len(chunk) < length:  # the last one may be longer than what is left of the disk
                chunk = image.read_ranges(ints(host), ints(length))
            if zlib.adler32(chunk.data) != int.from_bytes(image.read(host + length, CHECKSUM), "little"):
                bad.append(int(starts[at // cluster]))
