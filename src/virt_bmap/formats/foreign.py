"""What is known by its magic alone: named in `info` and in the map as one piece, never as unknown.

Asked last, after every volume and filesystem module has said no. All bytes that any row needs are read in one
batch.

Sources: util-linux libblkid/src/superblocks and libblkid/src/partitions (names, offsets and magics); Linux
drivers/md (dm-thin-metadata.c, dm-cache-metadata.c, dm-era-target.c), fs/qnx4, fs/qnx6, fs/omfs, fs/efs,
fs/affs, fs/jffs2, fs/sysv, fs/xfs/libxfs/ xfs_log_format.h, block/partitions/ldm.h and amiga.c; FreeBSD
sys/geom/vinum; btrfs-progs image/metadump.c; QEMU block/*.c and the libewf, AFFLIB and libmodi format
documents for image containers; magic(5) of file(1) for compressed files.
"""

from collections.abc import Mapping
from functools import cache

from virt_bmap.core.arrays import ints
from virt_bmap.core.reader import HEAD, TAIL, Reader
from virt_bmap.formats.registry import IMAGES
from virt_bmap.model.tables import SLEEPING, VOUCHING

Check = tuple[int, bytes] | tuple[int, bytes, bytes]
"""(offset, magic[, mask]): the bytes there, masked, are the magic. A negative offset counts from the end."""
Row = tuple[str, Check, *tuple[Check, ...]]
"""(type in blkid's words, checks that must all hold; the first one has no mask)."""

SECTOR = 512
VERITY, INTEGRITY = "DM_verity_hash", "DM_integrity"
VERITY_MAGIC = b"verity\0\0"


def _le(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def _be(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "big")


def _each(name: str, offsets: tuple[int, ...], magics: tuple[bytes, ...]) -> tuple[Row, ...]:
    """One row for each of the magics at each of the offsets."""
    return tuple((name, (offset, magic)) for magic in magics for offset in offsets)


BCACHE = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
BCACHEFS = bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")
DM_MAGIC = 32
"""csum, flags, blocknr and uuid stand before the magic in the superblocks of dm-thin, dm-cache and dm-era."""
UFS_MAGICS = (0x00011954, 0x19540119, 0x00195612, 0x00095014, 0x00612195, 0x05231994)
PROMISE_SECTORS = (63, 255, 256, 16, 399, 591, 675, 735, 911, 974, 991, 951, 3087)
DASD_BLOCKS = (512, 1024, 2048, 4096)

ENCRYPTED: tuple[Row, ...] = (
    ("crypto_LUKS", (0, b"LUKS\xba\xbe")),
    ("crypto_LUKS", (0x4000, b"SKUL\xba\xbe")),
    ("BitLocker", (3, b"-FVE-FS-")),
    ("BitLocker", (0, b"\xebX\x90MSWIN4.1"), (424, bytes.fromhex("3bd6674929 2ed84a83 99f6a339e3d001"))),
    ("cs_fvault2", (88, b"CS"), (8, _le(1, 2)), (10, _le(0x10, 2))),
    ("CoreStorage", (88, b"CS"), (8, _le(1, 2)), (90, _le(1))),
    ("TrueCrypt", (6, b"TrueCrypt Boot Loader")),
    ("TrueCrypt", (6, b" TrueCrypt Boot Loader")),
    ("VeraCrypt", (6, b"VeraCrypt Boot Loader")),
    ("VeraCrypt", (6, b" VeraCrypt Boot Loader")),
)

MEMBERS: tuple[Row, ...] = (
    ("ddf_raid_member", (-SECTOR, _be(0xDE11DE11))),
    ("ddf_raid_member", (-SECTOR, _le(0xDE11DE11))),
    ("ddf_raid_member", (-257 * SECTOR, _be(0xDE11DE11))),
    ("isw_raid_member", (-2 * SECTOR, b"Intel Raid ISM Cfg Sig. ")),
    ("isw_raid_member", (-8192, b"Intel Raid ISM Cfg Sig. ")),
    ("nvidia_raid_member", (-2 * SECTOR, b"NVIDIA  ")),
    ("lsi_mega_raid_member", (-SECTOR, b"$XIDE$")),
    ("adaptec_raid_member", (-SECTOR, _be(0x37FC4D1E)), (-SECTOR + 256, b"DPTM")),
    ("hpt37x_raid_member", (4608 + 32, _le(0x5A7816F0))),
    ("hpt37x_raid_member", (4608 + 32, _le(0x5A7816FD))),
    ("hpt45x_raid_member", (-11 * SECTOR, _le(0x5A7816F3))),
    ("hpt45x_raid_member", (-11 * SECTOR, _le(0x5A7816FD))),
    *_each(
        "promise_fasttrack_raid_member",
        tuple(-SECTOR * n for n in PROMISE_SECTORS),
        (b"Promise Technology, Inc.",),
    ),
    (
        "silicon_medley_raid_member",
        (-SECTOR + 0x60, _le(0x2F000000)),
        (-SECTOR + 0x140, bytes(0x1FE - 0x140)),
    ),
    ("jmicron_raid_member", (-SECTOR, b"JM"), (-SECTOR + 3, b"\0", b"\xf8")),
    ("bcache", (4096 + 24, BCACHE)),
    ("drbd", (-4096 + 60, b"\x83\x74\x02\x6b"), (-4096 + 80, _be(4096))),
    ("drbd", (-4096 + 60, b"\x83\x74\x02\x6c"), (-4096 + 80, _be(4096))),
    ("drbd", (-4096 + 60, b"\x83\x74\x02\x6d"), (-4096 + 80, _be(4096))),
    ("drbdmanage_control_volume", (0, b"$DRBDmgr=q")),
    ("drbdproxy_datalog", (0, b"DRBDdlh*")),
    ("DM_snapshot_cow", (0, b"SnAp"), (4, _le(1))),
    (VERITY, (0, VERITY_MAGIC)),
    (INTEGRITY, (0, b"integrt\0")),
    ("Android vbmeta", (0, b"AVB0")),
    ("DM_thin_metadata", (DM_MAGIC, _le(27022010, 8))),
    ("DM_cache_metadata", (DM_MAGIC, _le(6142003, 8))),
    ("DM_era_metadata", (DM_MAGIC, _le(2126579579, 8))),
    ("vdo", (0, b"dmvdo001")),
    ("stratis", (SECTOR + 4, b"!Stra0tis\x86\xff\x02^\x41rh")),
    ("stratis", (9 * SECTOR + 4, b"!Stra0tis\x86\xff\x02^\x41rh")),
    ("ceph_bluestore", (0, b"bluestore block device")),
    ("oracleasm", (32, b"ORCLDISK")),
    ("mpool", (0, b"mpoolDev")),
    ("VMFS_volume_member", (1024 << 10, _be(0x0DD001C0))),
    ("vinum", (4096, b"IN VINO\0")),
    ("vinum", (4096, b"VINUM-1\0")),
    ("zfs_member", (16384 + 24, b"version\0")),
    ("zfs_member", ((256 << 10) + 16384 + 24, b"version\0")),
    ("zfs_member", (128 << 10, _le(0x00BAB10C, 8))),
    ("zfs_member", (128 << 10, _be(0x00BAB10C, 8))),
    ("LVM1_member", (0, b"HM"), (2, _le(1, 2))),
    ("LVM1_member", (0, b"HM"), (2, _le(2, 2))),
)

FILESYSTEMS: tuple[Row, ...] = (
    ("jbd", (0x438, b"\x53\xef"), (0x460, b"\x08", b"\x08")),
    ("xfs_external_log", (0, _be(0xFEEDBABE)), (8, _be(1))),
    ("xfs_external_log", (0, _be(0xFEEDBABE)), (8, _be(2))),
    ("apfs", (32, b"NXSB")),
    ("bcachefs", (4096 + 24, BCACHEFS)),
    ("bcachefs", ((2 << 20) + 24, BCACHEFS)),
    ("ReFS", (0, b"\0\0\0ReFS\0")),
    ("ReFS", (3, b"ReFS\0\0\0\0")),
    *_each("ufs", tuple(kib * 1024 + 1372 for kib in (0, 8, 64, 256)),
        tuple(f(m) for m in UFS_MAGICS for f in (_le, _be))),
    ("VMFS", (2048 << 10, _be(0x5EF1AB2F))),
    ("gfs2", (64 << 10, _be(0x01161970)), ((64 << 10) + 24, _be(1801))),
    ("gfs", (64 << 10, _be(0x01161970))),
    *_each("ocfs2", (1024, 2048, 4096, 8192), (b"OCFSV2",)),
    ("ocfs", (8192, b"OracleCFS")),
    *_each("befs", (32, 544), (b"BFS1", b"1SFB")),
    ("bfs", (0, _le(0x1BADFACE))),
    ("hpfs", (0x2000, b"\x49\xe8\x95\xf9")),
    *_each("udf", tuple(0x8001 + 2048 * n for n in range(16)), (b"NSR02", b"NSR03")),
    ("vxfs", (1024, _le(0xA501FCF5))),
    ("vxfs", (8192, _be(0xA501FCF5))),
    ("jfs", (32 << 10, b"JFS1")),
    ("reiser4", (64 << 10, b"ReIsEr4")),
    *_each("reiserfs", (8192 + 20, 8192 + 0x34, 65536 + 0x34), (b"ReIsErFs",)),
    *_each("reiserfs", (65536 + 0x34,), (b"ReIsEr2Fs", b"ReIsEr3Fs")),
    ("nilfs2", (1024, _le(2) + _le(0, 2) + _le(0x3434, 2))),
    ("romfs", (0, b"-rom1fs-")),
    *_each("cramfs", (0, 512), (_le(0x28CD3D45), _be(0x28CD3D45))),
    ("ubi", (0, b"UBI#")),
    ("ubifs", (0, _le(0x06101831))),
    *_each("jffs2", (0,),
        tuple(order(0x1985, 2) + order(node, 2) for order in (_le, _be) for node in (0xE001, 0xE002, 0x2003,
                0x2004))),
    ("qnx4", (SECTOR, b"/" + bytes(15))),
    ("qnx6", (0x2000, _le(0x68191122))),
    ("qnx6", (0x2000, _be(0x68191122))),
    ("omfs", (256 + 16, _be(0xC2993D87))),
    ("efs", (SECTOR + 28, _be(0x072959))),
    ("efs", (SECTOR + 28, _be(0x07295A))),
    *_each("sysv", tuple(kib * 1024 + 512 + 504 for kib in (0, 9, 15, 18)),
        (_le(0xFD187E20), _be(0xFD187E20))),
    *_each("xenix", (1024 + 0x3F8,), (_le(0x2B5544), _be(0x2B5544))),
    ("exfs", (0, b"EXFS")),
    ("nss", (4096, b"SPB5")),
    ("scoutfs", ((64 << 10) + 4, b"\x8b\x42\x3c\x10")),
    ("zonefs", (0, b"SFOZ")),
    ("swsuspend", (0, b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c")),
    *_each("swsuspend", tuple(page - 10 for page in (4096, 8192, 16384, 32768, 65536)),
           (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001")),
    ("squashfs3", (0, b"shsq")),
    ("squashfs3", (0, b"qshs")),
    *_each("affs", (0,), tuple(b"DOS" + bytes([kind]) for kind in range(8))),
    ("hfsplus", (1024, b"BD"), (1024 + 124, b"H+")),
    ("hfsplus", (1024, b"H+"), (1026, _be(4, 2))),
    ("hfsplus", (1024, b"HX"), (1026, _be(5, 2))),
    ("hfs", (1024, b"BD")),
    *_each("minix", (1024 + 16,), tuple(_be(magic, 2) for magic in (0x137F, 0x138F, 0x2468, 0x2478))),
    *_each("minix", (1024 + 24,), (_be(0x4D5A, 2),)),
)  # fmt: skip

HOLDERS = {name for name, *_ in (*ENCRYPTED, *MEMBERS)}
"""Types of what holds volumes, and no files."""
MOUNTED = {
    "affs", "befs", "bfs", "efs", "exfs", "hfs", "hfsplus", "hpfs", "jfs", "nilfs2", "omfs", "qnx4",
    "qnx6", "reiserfs", "romfs", "sysv", "ufs", "zonefs",
}  # fmt: skip
"""Filesystems that the kernels of most distributions mount."""

PARTITION_TABLES: tuple[Row, ...] = (
    ("ldm", (6 * SECTOR, b"PRIVHEAD")),
    ("ldm", (-SECTOR, b"PRIVHEAD")),
    ("aix", (0, _be(0xC9C2D4C1))),
    ("sgi", (0, _be(0x0BE5A941))),
    ("sun", (508, b"\xda\xbe")),
    ("mac", (0, b"ER"), (SECTOR, b"PM")),
    ("mac", (0, b"ER"), (2048, b"PM")),
    ("mac", (SECTOR, b"PM\0\0")),
    *_each("bsd", (512, 64, 128), (_le(0x82564557), _be(0x82564557))),
    ("ultrix", (16384 - 72, _le(0x032957))),
    ("solaris", (SECTOR + 12, _le(0x600DDEEE))),
    ("unixware", (29 * SECTOR + 4, _le(0xCA5E600D))),
    *_each("amiga", tuple(SECTOR * n for n in range(16)), (b"RDSK",)),
    *_each("dasd", tuple(2 * size + 4 for size in DASD_BLOCKS), (b"\xe5\xd6\xd3\xf1",)),
    *_each(
        "dasd",
        tuple(at * size for at in (1, 2) for size in DASD_BLOCKS),
        (b"\xd3\xd5\xe7\xf1", b"\xc3\xd4\xe2\xf1"),
    ),
)

CONTAINERS: tuple[Row, ...] = (
    *(
        (listed.title, (offset, magic))
        for listed in IMAGES
        for offset, magic in listed.magics
        if listed.title and offset is not None
    ),
    ("seSparse VMDK extent", (0, _le(0xCAFEBABE, 8))),
    ("ASIF image", (0, b"shdw")),
    ("cloop image", (0, b"#!/bin/sh\n#V2.0 Format")),
    ("EWF2 image", (0, b"EVF2\x0d\x0a\x81\0")),
    ("EWF logical image", (0, b"LVF\x09\x0d\x0a\xff\0")),
    ("EWF logical image", (0, b"LEF2\x0d\x0a\x81\0")),
    ("AD encrypted image", (0, b"ADCRYPT\0")),
    ("AFF image", (0, b"AFF10\r\n\0")),
    ("encrypted DMG image", (0, b"encrcdsa")),
    ("sparseimage", (0, b"sprs")),
    ("Nero CD image", (-12, b"NER5")),
    ("Nero CD image", (-8, b"NERO")),
    ("raw CD sectors", (0, b"\0" + b"\xff" * 10 + b"\0")),
    ("Android sparse image", (0, _le(0xED26FF3A))),
    ("Android boot image", (0, b"ANDROID!")),
    ("btrfs-image dump", (0, _le(0xBD5C25E27295668B, 8))),
    ("btrfs-image dump", (0, b"_DUmP_v1")),
    ("xfs_metadump", (0, b"XFSM")),
    ("xfs_metadump", (0, b"XMD2")),
    ("partclone image", (0, b"partclone-image")),
    ("ntfsclone image", (0, b"\0ntfsclone-image")),
    ("FSArchiver file", (0, b"FsA0")),
    ("gzip file", (0, b"\x1f\x8b\x08")),
    ("compress file", (0, b"\x1f\x9d\x90")),
    ("xz file", (0, b"\xfd7zXZ\0")),
    ("bzip2 file", (0, b"BZh"), (4, b"1AY&SY")),
    ("zstd file", (0, b"\x28\xb5\x2f\xfd")),
    ("lz4 file", (0, _le(0x184D2204))),
    ("zip file", (0, b"PK\3\4")),
    ("7z file", (0, b"7z\xbc\xaf\x27\x1c")),
    ("tar file", (257, b"ustar")),
)
"""Not a disk but a file that holds one: opening it with the right format shows what is inside."""

TRAITS = {
    VERITY: VOUCHING,
    INTEGRITY: VOUCHING,
    "Android vbmeta": VOUCHING,
    "swsuspend": SLEEPING,
}
"""What volumes of a type mean for others, as in tables.TRAITS."""
MAGICS: tuple[Row, ...] = (*ENCRYPTED, *MEMBERS, *FILESYSTEMS, *PARTITION_TABLES, *CONTAINERS)
"""First match wins. Encryption and members of arrays come first, since what they hold can look like
anything."""


LOGS = {"jbd": 0x468, "xfs_external_log": 0x130}
"""Journals on devices of their own: where the UUID lies by which their filesystem finds them."""


def log_of(reader: Reader, type: str | None) -> bytes | None:
    """Whose journal this is; None where it is none."""
    return reader.read_clipped(LOGS[type], 16) if type in LOGS else None


def recognise(reader: Reader) -> str | None:
    """The type in blkid's words where it has one, or None."""
    have = _wanted_bytes(reader)
    begins = [
        MAGICS[at]
        for at in sorted(at for key, data in have.items() for at in _beginning().get((*key, data), ()))
    ]
    for name, *checks in begins:
        if all(_holds(have, check) for check in checks):
            return name
    return next(
        (name for name, holds in (("via_raid_member", _is_via), ("atari", _is_atari)) if holds(reader)), None
    )


@cache
def _beginning() -> Mapping[tuple[int, int, bytes], list[int]]:
    """The rows of MAGICS whose first check is (offset, length, magic): of hundreds a volume has to be asked
    for few."""
    found: dict[tuple[int, int, bytes], list[int]] = {}
    for at, row in enumerate(MAGICS):
        offset, magic = row[1][:2]
        found.setdefault((offset, len(magic), magic), []).append(at)
    return found


@cache
def _wanted() -> list[tuple[int, int]]:
    """Every (offset, length) of MAGICS."""
    return sorted({(check[0], len(check[1])) for _, *checks in MAGICS for check in checks})


def _wanted_bytes(reader: Reader) -> Mapping[tuple[int, int], bytes]:
    """The bytes at every (offset, length) of MAGICS that lies inside the volume: what lies between its ends,
    which are read already, in one batch."""
    places = [(key, key[0] if key[0] >= 0 else reader.size + key[0]) for key in _wanted()]
    inside = [(key, at) for key, at in places if 0 <= at <= reader.size - key[1]]
    found = {
        key: reader.read(at, key[1]) for key, at in inside if at + key[1] <= HEAD or at >= reader.size - TAIL
    }
    deep = [(key, at) for key, at in inside if key not in found]
    data = reader.read_ranges(ints([at for _, at in deep]), ints([key[1] for key, _ in deep])).tobytes()
    for key, _ in deep:
        found[key], data = data[: key[1]], data[key[1] :]
    return found


def _holds(have: Mapping[tuple[int, int], bytes], check: Check) -> bool:
    offset, magic = check[0], check[1]
    data = have.get((offset, len(magic)))
    if data is None:
        return False
    return (
        data == magic
        if len(check) == 2
        else bytes(a & b for a, b in zip(data, check[2], strict=True)) == magic
    )


def _is_via(reader: Reader) -> bool:
    """libblkid via_raid.c: a two-byte signature, so the checksum over the first 50 bytes decides."""
    if reader.size < 0x10000:
        return False
    sector = reader.read(reader.size // SECTOR * SECTOR - SECTOR, SECTOR)
    return sector[:2] == b"\x55\xaa" and sector[2] <= 2 and sector[50] == sum(sector[:50]) & 0xFF


def _is_atari(reader: Reader) -> bool:
    """libblkid partitions/atari.c: no magic; the size of the disk and at least one plausible partition
    decide."""
    sector = reader.read_clipped(0, SECTOR)
    size = int.from_bytes(sector[0x1C2:0x1C6], "big")
    bad_start = int.from_bytes(sector[0x1F6:0x1FA], "big")
    bad_count = int.from_bytes(sector[0x1FA:0x1FE], "big")
    if size < 2 or size > reader.size // SECTOR or (bad_count and not 0 < bad_start <= size - bad_count):
        return False
    parts = [sector[0x1C6 + 12 * i : 0x1D2 + 12 * i] for i in range(4)]
    ranges = [(int.from_bytes(part[4:8], "big"), int.from_bytes(part[8:12], "big")) for part in parts]
    return any(
        part[0] & 1 and part[1:4].isalnum() and start >= 1 and count >= 1 and start + count <= size
        for part, (start, count) in zip(parts, ranges, strict=True)
    )
