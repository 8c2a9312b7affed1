"""The header of a qcow2 image, its extensions, and the tables of snapshots and bitmaps.

Sources: QEMU docs/interop/qcow2.rst (v8.2) sections "Header", "Header extensions", "Snapshots", "Bitmaps";
limits from QEMU block/qcow2.h.
"""

import struct as packing
from dataclasses import dataclass, field
from typing import NamedTuple

from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader

HEADER = struct(104, [
    (0, "magic", ">u4"), (4, "version", ">u4"), (8, "backing_file_offset", ">u8"),
    (16, "backing_file_size", ">u4"), (20, "cluster_bits", ">u4"), (24, "size", ">u8"),
    (32, "crypt_method", ">u4"), (36, "l1_size", ">u4"), (40, "l1_table_offset", ">u8"),
    (48, "refcount_table_offset", ">u8"), (56, "refcount_table_clusters", ">u4"), (60, "nb_snapshots", ">u4"),
    (64, "snapshots_offset", ">u8"), (72, "incompatible_features", ">u8"), (80, "compatible_features", ">u8"),
    (88, "autoclear_features", ">u8"), (96, "refcount_order", ">u4"), (100, "header_length", ">u4"),
])  # fmt: skip
V2_LENGTH = 72
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_L1 = 32 << 20
"""QCOW_MAX_L1_SIZE: bytes of an L1 table."""
MAX_REFCOUNT_TABLE = 8 << 20
"""QCOW_MAX_REFTABLE_SIZE, in bytes."""
MAX_SNAPSHOTS, MAX_SNAPSHOT_TABLE = 65536, 64 << 20
"""QCOW_MAX_SNAPSHOTS and QCOW_MAX_SNAPSHOTS_SIZE."""
MAX_BITMAPS, MAX_BITMAP_DIRECTORY = 65535, 64 << 20
"""QCOW2_MAX_BITMAPS and QCOW2_MAX_BITMAP_DIRECTORY_SIZE."""
MAX_SIZE = 1 << 62
"""Bytes of a disk: sums with it must stay in 64 bits."""

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
INCOMPATIBLE = {
    DIRTY: "dirty",
    CORRUPT: "corrupt",
    DATA_FILE: "data-file",
    COMPRESSION: "compression",
    EXTENDED_L2: "extended-l2",
}
COMPATIBLE = {1: "lazy-refcounts"}
BITMAPS = 1
"""Autoclear: a program that does not know of bitmaps clears it, and they are void from then on."""
AUTOCLEAR = {BITMAPS: "bitmaps", 2: "data-file-raw"}
CRYPT = {0: None, 1: "AES", 2: "LUKS"}
COMPRESSION_TYPES = {0: "zlib", 1: "zstd"}

EXT_END = 0
EXT_DATA_FILE = 0x44415441
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
CRYPTO_HEADER = packing.Struct(">QQ")
BITMAPS_HEADER = packing.Struct(">IIQQ")
SNAPSHOT = packing.Struct(">QIHHIIQII")
BITMAP = packing.Struct(">QIIBBHI")
IN_USE, AUTO = 1, 2


class Snapshot(NamedTuple):
    """One entry of the snapshot table; `size` is the disk's at that time.

    Names are bytes of the disk, made text.
    """

    id: str
    name: str
    date: int
    l1_offset: int
    l1_size: int
    vm_state: int
    size: int


class Bitmap(NamedTuple):
    """One entry of the bitmap directory; `table_size` counts entries."""

    name: str
    table_offset: int
    table_size: int
    granularity: int
    flags: int


@dataclass
class Header:
    """The header's fields that matter, checked; offsets and sizes in bytes."""

    version: int
    size: int
    cluster_bits: int
    l1_offset: int
    l1_size: int
    refcount_offset: int
    refcount_clusters: int
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
    crypto: tuple[int, int] = (0, 0)
    bitmap_directory: tuple[int, int, int] = (0, 0, 0)
    snapshots: list[Snapshot] = field(default_factory=list)
    snapshot_table: tuple[int, int] = (0, 0)
    bitmaps: list[Bitmap] = field(default_factory=list)

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


def read_header(image: Reader) -> Header:
    """The header with all that it leads to but the cluster tables. Raises Corrupt or Unsupported."""
    raw = image.read_clipped(0, HEADER.itemsize)
    fields = {name: int(record(raw, HEADER)[name]) for name in HEADER.names or ()}
    version, bits = fields["version"], fields["cluster_bits"]
    if version not in (2, 3):
        raise Unsupported(f"{image.name}: is qcow2 of version {version}; 2 and 3 are known", 4)
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise Corrupt(
            f"{image.name}: its qcow2 header at byte 0x14 says 2^{bits} bytes a cluster; there are "
            "2^9 to 2^21",
            20,
        )
    v3 = version == 3
    length = fields["header_length"] if v3 else V2_LENGTH
    order = fields["refcount_order"] if v3 else 4
    if order > 6 or not V2_LENGTH <= length <= 1 << bits or (v3 and length < 104):
        raise Corrupt(
            f"{image.name}: its qcow2 header at byte 0x60 has refcount order {order} "
            f"and a length of {length}",
            96,
        )
    incompatible = fields["incompatible_features"] if v3 else 0
    if unknown := incompatible & ~sum(INCOMPATIBLE):
        raise Unsupported(
            f"{image.name}: has incompatible qcow2 features that nobody has named yet ({unknown:#x})", 72
        )
    kind = image.read_clipped(104, 1)[0] if v3 and length > 104 else 0
    header = Header(
        version, fields["size"], bits, fields["l1_table_offset"], fields["l1_size"],
        fields["refcount_table_offset"], fields["refcount_table_clusters"], 1 << order,
        fields["nb_snapshots"], fields["snapshots_offset"],
        (fields["backing_file_offset"], fields["backing_file_size"]), fields["crypt_method"], incompatible,
        fields["compatible_features"] if v3 else 0, fields["autoclear_features"] if v3 else 0, length,
        COMPRESSION_TYPES.get(kind, f"type {kind}"),
    )  # fmt: skip
    _check(image, header)
    _read_extensions(image, header)
    header.snapshots = _read_snapshots(image, header)
    header.bitmaps = _read_bitmaps(image, header)
    return header


def _check(image: Reader, header: Header) -> None:
    """Places and sizes, before any is followed."""
    if header.size > MAX_SIZE:
        raise Corrupt(
            f"{image.name}: its qcow2 header at byte 0x18 says that the disk has {header.size:#x} bytes", 24
        )
    inside(image, "L1 table", header.l1_offset, header.l1_size * 8, MAX_L1, 40)
    inside(
        image,
        "refcount table",
        header.refcount_offset,
        header.refcount_clusters << header.cluster_bits,
        MAX_REFCOUNT_TABLE,
        48,
    )
    offset, length = header.backing
    if offset and (length > 1023 or offset + length > header.cluster):
        raise Corrupt(
            f"{image.name}: the backing file name at byte {offset:#x}, {length} bytes long, leaves "
            "the first cluster",
            8,
        )


def inside(image: Reader, what: str, offset: int, length: int, limit: int, at: int) -> None:
    """Corrupt where a table is larger than QEMU allows, or leaves the file; `at` is the field that places
    it."""
    if length > limit:
        raise Corrupt(
            f"{image.name}: its {what} has {length:,} bytes, more than the {limit:,} that QEMU "
            f"allows (field at byte {at:#x})",
            at,
        )
    if length and offset + length > image.size:
        raise Corrupt(f"{image.name}: its {what} lies at bytes {offset:#x}-{offset + length:#x}, behind "
            f"the end of the file at {image.size:#x}: "
                      "it is truncated, or its header is damaged", at)  # fmt: skip


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
                f"{image.name}: the header extension at byte {at - 8:#x}, {size} bytes long, leaves "
                "the first cluster",
                at - 8,
            )
        if kind == EXT_BACKING_FORMAT:
            header.backing_format = body.decode("ascii", "replace")
        elif kind == EXT_CRYPTO and size >= CRYPTO_HEADER.size:
            header.crypto = CRYPTO_HEADER.unpack_from(body)
            inside(image, "LUKS header", *header.crypto, image.size, at)
        elif kind == EXT_BITMAPS and size >= BITMAPS_HEADER.size and header.autoclear & BITMAPS:
            count, _, length, offset = BITMAPS_HEADER.unpack_from(body)
            inside(image, "bitmap directory", offset, length, MAX_BITMAP_DIRECTORY, at)
            if count > MAX_BITMAPS:
                raise Corrupt(f"{image.name}: says that it has {count:,} bitmaps (byte {at:#x})", at)
            header.bitmap_directory = (offset, length, count)
        at += -(-size // 8) * 8
    header.extensions_end = min(at, limit)


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _read_snapshots(image: Reader, header: Header) -> list[Snapshot]:
    """The entries follow each other, each padded to 8 bytes."""
    if header.snapshot_count == 0:
        return []
    if header.snapshot_count > MAX_SNAPSHOTS:
        raise Corrupt(f"{image.name}: says that it has {header.snapshot_count:,} snapshots (byte 0x3c)", 60)
    start = header.snapshots_offset
    area = image.read_clipped(start, min(MAX_SNAPSHOT_TABLE, max(0, image.size - start)))
    found, at = [], 0
    for number in range(1, header.snapshot_count + 1):
        if at + SNAPSHOT.size > len(area):
            raise Corrupt(
                f"{image.name}: the entry of snapshot {number} at byte {start + at:#x} leaves the file",
                start + at,
            )
        l1_offset, l1_size, id_size, name_size, date, _, _, vm_state, extra = SNAPSHOT.unpack_from(area, at)
        more = at + SNAPSHOT.size
        words = more + extra
        if words + id_size + name_size > len(area):
            raise Corrupt(
                f"{image.name}: the entry of snapshot {number} at byte {start + at:#x} leaves the file",
                start + at,
            )
        vm_state = packing.unpack_from(">Q", area, more)[0] if extra >= 8 else vm_state
        size = packing.unpack_from(">Q", area, more + 8)[0] if extra >= 16 else header.size
        inside(image, f"L1 table of snapshot {number}", l1_offset, l1_size * 8, MAX_L1, start + at)
        found.append(Snapshot(_text(area[words : words + id_size]),
                _text(area[words + id_size : words + id_size + name_size]), date,
                              l1_offset, l1_size, vm_state, size))  # fmt: skip
        at = words + id_size + name_size
        at += -at % 8
    header.snapshot_table = (start, min(at, len(area)))
    if sum(snapshot.l1_size * 8 for snapshot in found) > image.size:
        raise Corrupt(
            f"{image.name}: the L1 tables of its {len(found)} snapshots together are larger than the file",
            start,
        )
    return found


def _read_bitmaps(image: Reader, header: Header) -> list[Bitmap]:
    start, length, count = header.bitmap_directory
    area = image.read(start, length) if length else b""
    found, at = [], 0
    for number in range(1, count + 1):
        if at + BITMAP.size > len(area):
            raise Corrupt(
                f"{image.name}: the entry of bitmap {number} at byte {start + at:#x} leaves the directory",
                start + at,
            )
        offset, entries, flags, _, bits, name_size, extra = BITMAP.unpack_from(area, at)
        name = at + BITMAP.size + extra
        if name + name_size > len(area) or bits > 62:
            raise Corrupt(
                f"{image.name}: the entry of bitmap {number} at byte {start + at:#x} is damaged", start + at
            )
        inside(image, f"table of bitmap {number}", offset, entries * 8, image.size, start + at)
        found.append(Bitmap(_text(area[name : name + name_size]), offset, entries, 1 << bits, flags))
        at = name + name_size
        at += -at % 8
    if sum(bitmap.table_size * 8 for bitmap in found) > image.size:
        raise Corrupt(
            f"{image.name}: the tables of its {len(found)} bitmaps together are larger than the file", start
        )
    return found
