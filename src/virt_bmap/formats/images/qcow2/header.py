"""The header of a qcow2 image and its extensions: checked, before any place in it is followed.

Sources: QEMU docs/interop/qcow2.rst (v8.2) sections "Header", "Header extensions".
"""

import struct as packing
from dataclasses import dataclass
from typing import Any

from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.qcow2.ondisk import (
    AUTOCLEAR,
    BITMAPS,
    BITMAPS_HEADER,
    COMPATIBLE,
    COMPRESSION_TYPES,
    CORRUPT,
    CRYPT,
    CRYPTO_HEADER,
    DATA_FILE,
    DIRTY,
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_CRYPTO,
    EXT_END,
    EXTENDED_L2,
    HEADER,
    INCOMPATIBLE,
    MAX_BITMAP_DIRECTORY,
    MAX_BITMAPS,
    MAX_CLUSTER_BITS,
    MAX_L1,
    MAX_REFCOUNT_TABLE,
    MAX_SIZE,
    MIN_CLUSTER_BITS,
    V2_LENGTH,
)

Table = tuple[int, int]
"""(offset, bytes) in the file, which holds all of it; an empty one lies at 0."""


@dataclass
class Header:
    """The header's fields that matter, checked; offsets and sizes in bytes.

    `l1` and `refcount_table` are tables, and so are, of the extensions, `crypto` (the LUKS header) and
    `bitmap_directory`, which has `bitmap_count` entries.
    """

    version: int
    size: int
    cluster_bits: int
    l1: Table
    refcount_table: Table
    refcount_bits: int
    snapshot_count: int
    snapshots_offset: int
    backing: tuple[int, int]
    crypt: int
    incompatible: int
    compatible: int
    autoclear: int
    length: int
    compression: str
    extensions_end: int = 0
    backing_format: str | None = None
    crypto: Table = (0, 0)
    bitmap_directory: Table = (0, 0)
    bitmap_count: int = 0

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended(self) -> bool:
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def external(self) -> bool:
        return bool(self.incompatible & DATA_FILE)

    @property
    def l2_entries(self) -> int:
        """Clusters that one L2 table, itself a cluster, describes."""
        return self.cluster // (16 if self.extended else 8)

    @property
    def features(self) -> list[str]:
        """The words of qemu-img."""
        return [
            word
            for bits, words in (
                (self.incompatible, INCOMPATIBLE),
                (self.compatible, COMPATIBLE),
                (self.autoclear, AUTOCLEAR),
            )
            for bit, word in words.items()
            if bits & bit
        ]

    @property
    def encryption(self) -> str | None:
        return CRYPT.get(self.crypt, f"method {self.crypt}")

    def unreadable(self) -> str | None:
        """Why the guest's bytes can't be read; None where they can."""
        return f"it is encrypted ({self.encryption})" if self.crypt else None

    def facts(self) -> dict[str, Any]:
        """What the header says, for people and JSON."""
        return {
            "version": self.version,
            "cluster_size": self.cluster,
            "features": self.features,
            "refcount_bits": self.refcount_bits,
            "compression": self.compression,
            "encryption": self.encryption,
            "dirty": bool(self.incompatible & DIRTY),
            "corrupt": bool(self.incompatible & CORRUPT),
        }


def read_header(image: Reader) -> Header:
    """The header and its extensions. Raises Corrupt or Unsupported."""
    raw = image.read_clipped(0, HEADER.itemsize)
    fields = {name: int(record(raw, HEADER)[name]) for name in HEADER.names or ()}
    version, bits = fields["version"], fields["cluster_bits"]
    if version not in (2, 3):
        raise Unsupported(f"{image.name}: is qcow2 of version {version}; 2 and 3 are supported", 4)
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise Corrupt(
            f"{image.name}: its qcow2 header at byte 0x14 says 2^{bits} bytes a cluster, not 2^9 to 2^21",
            20,
        )
    v3 = version == 3
    length = fields["header_length"] if v3 else V2_LENGTH
    order = fields["refcount_order"] if v3 else 4
    if order > 6 or not V2_LENGTH <= length <= 1 << bits or (v3 and length < 104):
        raise Corrupt(
            f"{image.name}: its qcow2 header at byte 0x60 has "
            f"refcount order {order} and a length of {length}",
            96,
        )
    incompatible = fields["incompatible_features"] if v3 else 0
    if unknown := incompatible & ~sum(INCOMPATIBLE):
        raise Unsupported(
            f"{image.name}: has incompatible qcow2 features that are not known ({unknown:#x})", 72
        )
    size, (name_at, name_size) = fields["size"], (fields["backing_file_offset"], fields["backing_file_size"])
    if size > MAX_SIZE:
        raise Corrupt(
            f"{image.name}: its qcow2 header at byte 0x18 says that the disk has {size:#x} bytes", 24
        )
    if name_at and (name_size > 1023 or name_at + name_size > 1 << bits):
        raise Corrupt(
            f"{image.name}: the backing file name at byte {name_at:#x}, "
            f"{name_size} bytes long, leaves the first cluster",
            8,
        )
    kind = image.read_clipped(104, 1)[0] if v3 and length > 104 else 0
    refcounts = fields["refcount_table_clusters"] << bits
    header = Header(
        version, size, bits,
        placed(image, "L1 table", fields["l1_table_offset"], fields["l1_size"] * 8, MAX_L1, 40),
        placed(image, "refcount table", fields["refcount_table_offset"], refcounts, MAX_REFCOUNT_TABLE, 48),
        1 << order, fields["nb_snapshots"], fields["snapshots_offset"], (name_at, name_size),
        fields["crypt_method"], incompatible, fields["compatible_features"] if v3 else 0,
        fields["autoclear_features"] if v3 else 0, length, COMPRESSION_TYPES.get(kind, f"type {kind}"),
    )  # fmt: skip
    _read_extensions(image, header)
    return header


def placed(image: Reader, what: str, offset: int, length: int, limit: int, at: int) -> Table:
    """The table of `length` bytes at `offset`; Corrupt where it is larger than QEMU allows, or leaves the
    file. `at` is the field that places it."""
    if length > limit:
        raise Corrupt(
            f"{image.name}: its {what} has {length:,} bytes, more than "
            f"the {limit:,} that QEMU allows (field at byte {at:#x})",
            at,
        )
    if length and offset + length > image.size:
        raise Corrupt(
            f"{image.name}: its {what} lies at bytes {offset:#x}-{offset + length:#x}, beyond the end of the "
            f"file at {image.size:#x}: it is truncated, or its header is damaged",
            at,
        )
    return (offset, length) if length else (0, 0)


def _read_extensions(image: Reader, header: Header) -> None:
    """Type, length and data, padded to 8 bytes, up to the end mark."""
    area = image.read_clipped(0, header.cluster)
    at = header.length
    limit = header.backing[0] or header.cluster
    while at + 8 <= limit:
        kind, size = packing.unpack_from(">II", area, at)
        body = area[at + 8 : at + 8 + size]
        at += 8
        if kind == EXT_END:
            break
        if len(body) < size or at + size > limit:
            raise Corrupt(
                f"{image.name}: the header extension at byte {at - 8:#x}, "
                f"{size} bytes long, leaves the first cluster",
                at - 8,
            )
        if kind == EXT_BACKING_FORMAT:
            header.backing_format = body.decode("ascii", "replace")
        elif kind == EXT_CRYPTO and size >= CRYPTO_HEADER.size:
            offset, length = CRYPTO_HEADER.unpack_from(body)
            header.crypto = placed(image, "LUKS header", offset, length, image.size, at)
        elif kind == EXT_BITMAPS and size >= BITMAPS_HEADER.size and header.autoclear & BITMAPS:
            count, _, length, offset = BITMAPS_HEADER.unpack_from(body)
            header.bitmap_directory = placed(
                image, "bitmap directory", offset, length, MAX_BITMAP_DIRECTORY, at
            )
            if count > MAX_BITMAPS:
                raise Corrupt(f"{image.name}: says that it has {count:,} bitmaps (byte {at:#x})", at)
            header.bitmap_count = count
        at += -(-size // 8) * 8
    header.extensions_end = min(at, limit)
