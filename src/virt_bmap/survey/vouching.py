"""Who vouches for whose bytes: hash trees, checksums and signatures that lie beside what they cover.

Such bytes must stay as they are, also where an allocator calls them free. A layer that knows its own members
says so itself (`Child.traits`). Here is what only the whole map shows: a hash device and the volume whose
first blocks it fits; hashes after a filesystem in the same volume; and what may hold hashes of it can't be
told whom, so that nothing on these disks may change.

Not seen are trees without a superblock that are neither in a partition of a type of their own nor followed by
a footer: their parameters stand in a kernel's command line or in a file. fs-verity needs nothing: it covers
content of files, which is not free.

Sources: cryptsetup lib/verity/verity.c (struct verity_sb), verity_hash.c (hash_levels); kernel
drivers/md/dm-verity-target.c, dm-integrity.c (struct superblock); Android external/avb libavb/avb_footer.h,
avb_vbmeta_image.h; the Discoverable Partitions Specification.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from virt_bmap.core.errors import FormatError
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.foreign import INTEGRITY, VERITY, VERITY_MAGIC
from virt_bmap.model.tables import CHECKSUMMED, VERIFIED, VOUCHING

AVB_FOOTER_MAGIC = b"AVBf"
SECTOR, AVB_FOOTER = 512, 64
SUPERBLOCK = struct(SECTOR, [
    (0, "signature", "V8"), (8, "version", "<u4"), (12, "hash_type", "<u4"), (32, "algorithm", "S32"),
    (64, "data_block_size", "<u4"), (68, "hash_block_size", "<u4"), (72, "data_blocks", "<u8"),
    (80, "salt_size", "<u2"), (88, "salt", "V256"),
])  # fmt: skip
INTEGRITY_SUPERBLOCK = struct(
    SECTOR, [(9, "log2_interleave_sectors", "u1"), (16, "provided_data_sectors", "<u8")]
)
BLOCK_SIZES = tuple(SECTOR << step for step in range(8))
FIRST = 32
"""Blocks of data that are compared with their hashes, as far as one block of hashes has as many."""
MAX_TREES = 64
"""Hash devices whose data is looked for among all volumes; real disks have one for each of two or three."""
BEHIND = 8 << 10
"""Bytes after a filesystem's end in which a hash tree is looked for: tools put it into the next block."""


class Surveyed(NamedTuple):
    """A volume as it was surveyed.

    `end`: where its filesystem ends, in bytes; -1: it has none. `is_disk`: it lies on nothing else.
    """

    number: int
    name: str
    type: str | None
    traits: int
    reader: Reader
    end: int
    is_disk: bool


class Covered(NamedTuple):
    """The bytes of a volume are vouched for: the trait that it has by that, and why, for a person."""

    number: int
    trait: int
    detail: str


def covered(volumes: Sequence[Surveyed]) -> Iterator[Covered]:
    """The volumes whose bytes others, or they themselves, vouch for, each once for a trait."""
    known = set[tuple[int, int]]()
    for found in _all(volumes):
        if (found.number, found.trait) not in known:
            known.add((found.number, found.trait))
            yield found


def _all(volumes: Sequence[Surveyed]) -> Iterator[Covered]:
    trees = 0
    for one in volumes:
        if one.traits & VOUCHING:
            trees += one.type == VERITY
            yield from _by(one, volumes, trees <= MAX_TREES)
        if one.end >= 0 and (detail := _in_itself(one)):
            yield Covered(one.number, VERIFIED, detail)


def _by(one: Surveyed, volumes: Sequence[Surveyed], looked_into: bool) -> Iterator[Covered]:
    """What this volume vouches for: what it fits, else all that it can."""
    others = [other for other in volumes if other.number != one.number]
    if one.type == INTEGRITY:
        yield from _by_integrity(one, others)
        return
    head = _read(one.reader, 0, SECTOR)
    if not any(head) or (head[:1] == b"{" and any(other.type == VERITY for other in others)):
        # nothing was put there yet; a signature of the root hash of a tree that is there vouches for no more
        # than that does
        return
    tree = _read_tree(one.reader) if looked_into and one.type == VERITY else None
    fitting = [other for other in others if tree and tree.fits(other.reader)]
    for other in fitting:
        yield Covered(
            other.number,
            VERIFIED,
            f"hashes in {one.name} cover all of its bytes, free ones as well (dm-verity)",
        )
    if not fitting:
        for other in volumes:
            if other.is_disk:
                yield Covered(
                    other.number,
                    VERIFIED,
                    f"{one.name} holds hashes or signatures that "
                    "may cover any of its bytes, free ones as well",
                )


def _by_integrity(one: Surveyed, others: list[Surveyed]) -> Iterator[Covered]:
    """Checksums interleaved with the data vouch for nobody else; those of another device for any that is
    large enough."""
    about = record(_read(one.reader, 0, SECTOR), INTEGRITY_SUPERBLOCK)
    if not about["log2_interleave_sectors"]:
        size = int(about["provided_data_sectors"]) * SECTOR
        for other in others:
            if other.reader.size >= size:
                yield Covered(
                    other.number,
                    CHECKSUMMED,
                    f"{one.name} holds checksums that may be those of its blocks (dm-integrity)",
                )


def _in_itself(one: Surveyed) -> str:
    """Hashes that lie after the filesystem in the same volume; empty where there are none."""
    reader = one.reader
    at = -(-one.end // SECTOR) * SECTOR
    if at < reader.size:
        behind = _read(reader, at, BEHIND)
        if any(behind[low : low + 8] == VERITY_MAGIC for low in range(0, len(behind), SECTOR)):
            return "hashes after its filesystem cover all of its bytes, free ones as well (dm-verity)"
        if _read(reader, reader.size - AVB_FOOTER, 4) == AVB_FOOTER_MAGIC:
            return (
                "hashes after its filesystem cover all of its "
                "bytes, free ones as well (Android Verified Boot)"
            )
    return ""


def _read(reader: Reader, at: int, size: int) -> bytes:
    """What is there; zeroes where nothing is, or where it can't be read."""
    try:
        return reader.read_clipped(at, size).ljust(size, b"\0")
    except FormatError:
        return bytes(size)


# ---- a hash tree -------------------------------------------------------------------------------------------


class HashTree(NamedTuple):
    """The parameters of a dm-verity tree, and the hashes that the first blocks of its data must have."""

    algorithm: str
    salt_first: bool
    salt: bytes
    block_size: int
    blocks: int
    first: tuple[bytes, ...]

    def fits(self, data: Reader) -> bool:
        """Is this what the tree was made of, as far as its first blocks tell? They hold the superblock of
        nearly all filesystems."""
        if data.size < self.blocks * self.block_size:
            return False
        return all(
            self._hash(_read(data, at * self.block_size, self.block_size)) == wanted
            for at, wanted in enumerate(self.first)
        )

    def _hash(self, block: bytes) -> bytes:
        return hashlib.new(
            self.algorithm, self.salt + block if self.salt_first else block + self.salt
        ).digest()


def _read_tree(reader: Reader) -> HashTree | None:
    """The tree whose superblock a volume begins with; None where it can't be told what it covers."""
    about = record(_read(reader, 0, SECTOR), SUPERBLOCK)
    name, blocks = bytes(about["algorithm"]).decode(errors="replace"), int(about["data_blocks"])
    block_size, hash_size, salt_size = (
        int(about[key]) for key in ("data_block_size", "hash_block_size", "salt_size")
    )
    if (
        name not in hashlib.algorithms_guaranteed
        or block_size not in BLOCK_SIZES
        or hash_size not in BLOCK_SIZES
        or blocks >= 1 << 48
    ):
        return None
    digest = hashlib.new(name).digest_size
    if not 0 < digest <= hash_size or salt_size > 256:
        return None
    bits = (hash_size // digest).bit_length() - 1  # hashes in a block, rounded down to a power of two
    levels, left = 0, blocks - 1
    while bits and left > 0:
        levels, left = levels + 1, left >> bits
    if not levels:
        return None
    # the tree begins with its root
    above = sum(-(-blocks // (1 << bits * (level + 1))) for level in range(1, levels))
    at = -(-SECTOR // hash_size) * hash_size + above * hash_size
    if at + hash_size > reader.size:
        return None
    salt_first, leaf = int(about["hash_type"]) != 0, _read(reader, at, hash_size)
    step = hash_size >> bits if salt_first else digest  # the original format puts hashes one after the other
    first = tuple(leaf[low : low + digest] for low in range(0, step * min(1 << bits, blocks, FIRST), step))
    return HashTree(name, salt_first, about["salt"].tobytes()[:salt_size], block_size, blocks, first)
