"""All formats that are read, in one list each: the magic that must be there, and the package that declares
the format.

A package is imported only when its magic was found, or when a map names a type that it reads: importing every
format would take longer than mapping most disks. What a format is and can do stands in its declaration,
`FORMAT` (`contract.FilesystemFormat`, `contract.VolumeFormat`, `contract.ImageFormat`), and nowhere else.
"""

import importlib
from collections.abc import Iterator
from itertools import chain
from typing import Generic, NamedTuple, TypeVar

from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import Rows
from virt_bmap.core.reader import TAIL, Reader
from virt_bmap.model.contract import RAW, FilesystemFormat, ImageFormat, VolumeFormat

HERE = "virt_bmap.formats"
Magic = tuple[int | None, bytes]
"""(offset, bytes): the offset in bytes from the start, from the end if negative; None: anywhere in the last
TAIL bytes."""
Seen = dict[tuple[int | None, int], bytes]
"""The bytes of a volume at (offset, length), as far as they were asked for: several formats look at one
place."""
F = TypeVar("F", FilesystemFormat, VolumeFormat, ImageFormat)


class Listed(NamedTuple, Generic[F]):
    """A package below `virt_bmap.formats`, the magics of which one must be there before its `probe` is asked,
    and the types that its volumes have (in blkid's words) or by which its images are asked for (QEMU's).

    `disk`: a file that begins so is most likely a disk (`--nested all`). `title`: what an image is called
    where it is only named (`foreign`). `table`: it is a partition table.
    """

    package: str
    magics: tuple[Magic, ...]
    types: tuple[str, ...]
    disk: bool = False
    title: str = ""
    table: bool = False

    def load(self) -> F:
        """The declaration."""
        found: F = importlib.import_module(f"{HERE}.{self.package}").FORMAT
        return found


SWAP_MAGICS = (
    b"SWAP-SPACE", b"SWAPSPACE2", b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001",
    b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c",
)  # fmt: skip
EXT = ("ext2", "ext3", "ext4")
EXT_BACKUPS = tuple(
    (((8 << log) * 1024 + (log == 0)) * (1024 << log) + 0x38, b"\x53\xef") for log in range(3)
)
"""Where ext has its first backup superblock, for blocks of 1, 2 and 4 KiB: its primary one may be wiped."""
F2FS_MAGIC = b"\x10\x20\xf5\xf2"
UDF_MAGICS = tuple((0x8001 + 2048 * n, word) for n in range(16) for word in (b"NSR02", b"NSR03"))
MINIX_MAGICS = (
    *((1024 + 16, word) for word in (b"\x7f\x13", b"\x8f\x13", b"\x68\x24", b"\x78\x24")),
    (1024 + 24, b"\x5a\x4d"),
)
FILESYSTEMS: tuple[Listed[FilesystemFormat], ...] = (
    Listed("filesystems.ext", ((0x438, b"\x53\xef"),), EXT, disk=True),
    Listed("filesystems.xfs", ((0, b"XFSB"),), ("xfs",), disk=True),
    Listed("filesystems.ntfs", ((3, b"NTFS    "),), ("ntfs",), disk=True),
    Listed("filesystems.udf", UDF_MAGICS, ("udf",)),  # before ISO 9660: bridges
    Listed("filesystems.iso9660", ((0x8001, b"CD001"), (0x8009, b"CDROM")), ("iso9660",)),
    Listed("filesystems.exfat", ((3, b"EXFAT   "),), ("exfat",)),
    Listed(
        "filesystems.swap",
        tuple(((4096 << shift) - 10, magic) for shift in range(5) for magic in SWAP_MAGICS),
        ("swap", "swsuspend"),
    ),
    Listed("filesystems.squashfs", ((0, b"hsqs"), (0, b"sqsh")), ("squashfs",), disk=True),
    Listed("filesystems.erofs", ((1024, b"\xe2\xe1\xf5\xe0"),), ("erofs",)),
    Listed("filesystems.f2fs", ((1024, F2FS_MAGIC),), ("f2fs",)),
    Listed("filesystems.minix", MINIX_MAGICS, ("minix",)),
    Listed("filesystems.fat", ((0, b"\xeb"), (0, b"\xe9"), (0, b"\x60"), (510, b"\x55\xaa")), ("vfat",)),
    Listed("filesystems.ext", EXT_BACKUPS, EXT),  # last: these may be leftovers
    Listed("filesystems.f2fs", ((4096 + 1024, F2FS_MAGIC),), ("f2fs",)),  # likewise
)
"""In probe order: magics that lie deeper or are longer first, so that leftovers of an older filesystem
lose."""

LVM_LABEL, MD_MAGIC = b"LABELONE", b"\xfc\x4e\x2b\xa9"
BOOT_SIGNATURE = (510, b"\x55\xaa")
VOLUMES: tuple[Listed[VolumeFormat], ...] = (
    Listed(
        "volumes.md",
        ((0, MD_MAGIC), (4096, MD_MAGIC), (None, MD_MAGIC), (None, MD_MAGIC[::-1])),
        ("linux_raid_member",),
    ),
    Listed(
        "volumes.lvm", tuple((512 * sector, LVM_LABEL) for sector in range(4)), ("LVM2_member",), disk=True
    ),
    Listed(
        "volumes.luks",
        ((0, b"LUKS\xba\xbe"), *((0x4000 << step, b"SKUL\xba\xbe") for step in range(4))),
        ("crypto_LUKS",),
        disk=True,
    ),
    Listed("volumes.bitlocker", ((3, b"-FVE-FS-"), (3, b"MSWIN4.1")), ("BitLocker",)),
    Listed("filesystems.btrfs.devices", ((0x10040, b"_BHRfS_M"),), ("btrfs",)),
    Listed("volumes.gpt", (BOOT_SIGNATURE,), ("gpt",), disk=True, table=True),
    Listed("volumes.mbr", (BOOT_SIGNATURE,), ("dos",), disk=True, table=True),
    Listed("volumes.apm", tuple((size, b"PM\0\0") for size in (512, 1024, 2048, 4096)), ("mac",), table=True),
    Listed("volumes.sun", ((508, b"\xda\xbe"),), ("sun",), table=True),
    Listed("volumes.sgi", ((0, b"\x0b\xe5\xa9\x41"),), ("sgi",), table=True),
)
"""In probe order. Members of arrays and groups come before partition tables, since their data area can hold
one; md before LVM, since a mirror whose superblock lies at its end shows LVM's label at its start; GPT
before MBR, since every GPT disk has a protective MBR; the labels of other machines last, as in the kernel.
In the same order those that span volumes are put together: arrays, then what lies on them."""

IMAGES: tuple[Listed[ImageFormat], ...] = (
    Listed("images.raw", (), (RAW,)),  # whatever is nothing else
    Listed("images.qcow2", ((0, b"QFI\xfb"),), ("qcow2",), title="qcow2 image"),
    Listed("images.qcow", ((0, b"QFI\xfb\0\0\0\1"),), ("qcow",)),
    Listed("images.qed", ((0, b"QED\0"),), ("qed",), title="QED image"),
    Listed("images.vmdk", ((0, b"KDMV"), (0, b"COWD")), ("vmdk",), title="VMDK image"),
    Listed("images.vmdk", ((0, b"# Disk DescriptorFile"),), ("vmdk",), title="VMDK descriptor"),
    Listed("images.vhd", ((0, b"conectix"), (-512, b"conectix")), ("vpc",), title="VHD image"),
    Listed("images.vhdx", ((0, b"vhdxfile"),), ("vhdx",), title="VHDX image"),
    Listed("images.vdi", ((0x40, b"\x7f\x10\xda\xbe"),), ("vdi",), title="VDI image"),
    Listed(
        "images.parallels",
        ((0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt")),
        ("parallels",),
        title="Parallels image",
    ),
    Listed("images.bochs", ((0, b"Bochs Virtual HD Image"),), ("bochs",), title="Bochs image"),
    Listed("images.dmg", ((-512, b"koly"),), ("dmg",), title="DMG image"),
    Listed("images.luks", (), ("luks",)),
    Listed("images.ewf", ((0, b"EVF\x09\x0d\x0a\xff\0"),), ("ewf",), title="EWF image"),
)
"""In probe order. Those without types can't be asked for: nothing opens them."""
IMAGE_TYPES = tuple(dict.fromkeys(type for listed in IMAGES for type in listed.types))
"""The names of all formats of images that can be opened, which are QEMU's where it has the format."""


def filesystem(type: str | None) -> FilesystemFormat | None:
    """The format whose filesystems have this type; None where none is read."""
    if found := _of_type(FILESYSTEMS, type):
        return found
    made = _of_type(VOLUMES, type)
    return made.holds if made else None


def volume(type: str | None) -> VolumeFormat | None:
    """The format whose volumes have this type; None where none is read."""
    return _of_type(VOLUMES, type)


def every() -> Iterator[tuple[str, VolumeFormat | FilesystemFormat]]:
    """(module, declaration) of all formats, those that volume formats hold after these."""
    for package, volumes in {listed.package: listed for listed in VOLUMES}.items():
        made = volumes.load()
        yield f"{HERE}.{package}", made
        if made.holds:
            yield made.holds.read.__module__, made.holds
    for package, filesystems in {listed.package: listed for listed in FILESYSTEMS}.items():
        yield f"{HERE}.{package}", filesystems.load()


def image(type: str | None) -> ImageFormat | None:
    """The image format of this name; None where there is none."""
    return _of_type(IMAGES, type)


def images() -> Iterator[ImageFormat]:
    """All image formats: for what is asked of each."""
    for package in dict.fromkeys(listed.package for listed in IMAGES):
        yield next(listed for listed in IMAGES if listed.package == package).load()


def _of_type(formats: tuple[Listed[F], ...], type: str | None) -> F | None:
    return next((format.load() for format in formats if type in format.types), None)


def filesystem_on(reader: Reader) -> FilesystemFormat | None:
    """The format of the filesystem on a volume, by magic."""
    return _first(FILESYSTEMS, reader)


def volume_on(reader: Reader, has_header: bool = False) -> VolumeFormat | None:
    """The volume format whose magic a volume carries; with a detached LUKS header there is none on it."""
    return volume("crypto_LUKS") if has_header else _first(VOLUMES, reader)


def table_on(reader: Reader) -> VolumeFormat | None:
    """The partition table that a disk carries, whatever else it carries."""
    return _first(tuple(listed for listed in VOLUMES if listed.table), reader)


def is_known(disk: Reader, start: int, length: int) -> bool:
    """Do these bytes of a disk begin as a volume of a format that is read?"""
    part = MappedReader(length, disk.name, {0: disk}, Rows.make(0, 0, start, length))
    return volume_on(part) is not None or filesystem_on(part) is not None


def image_on(reader: Reader) -> ImageFormat | None:
    """The format of the image in a file, by magic; None for a raw disk."""
    return _first(IMAGES, reader)


def _first(formats: tuple[Listed[F], ...], reader: Reader) -> F | None:
    """The first of the formats that a volume is of."""
    there: Seen = {}
    for listed in formats:
        if any(_is_there(reader, magic, there) for magic in listed.magics):
            format = listed.load()
            probe = format.probe
            if probe is None or probe(reader):
                return format
    return None


def _is_there(reader: Reader, magic: Magic, there: Seen) -> bool:
    offset, wanted = magic
    key = offset, len(wanted)
    if key not in there:
        if offset is None:
            start = max(0, reader.size - TAIL)
            there[key] = reader.read(start, reader.size - start)
        else:
            at = offset if offset >= 0 else reader.size + offset
            there[key] = reader.read_clipped(at, len(wanted)) if at >= 0 else b""
    return wanted in there[key]


def is_hybrid(reader: Reader) -> bool:
    """Is this a CD image that may have a partition table as well?"""
    there: Seen = {}
    if not any(_is_there(reader, magic, there) for one in VOLUMES if one.table for magic in one.magics):
        return False
    from virt_bmap.formats.common.partitions import is_cd

    return is_cd(reader)


def rank(type: str) -> int:
    """The place of a volume format in the list, by its type."""
    return [format.types[0] for format in VOLUMES].index(type)


def disk_magics(head: int) -> tuple[tuple[int, bytes], ...]:
    """What the first `head` bytes of a file hold, one of these, if it is most likely a disk."""
    return _in_head(
        [
            *(format.magics for format in VOLUMES if format.disk),
            *(format.magics for format in FILESYSTEMS if format.disk),
        ],
        head,
    )


def image_magics(head: int) -> tuple[tuple[int, bytes], ...]:
    """Likewise, if it is an image that can be opened."""
    return _in_head([format.magics for format in IMAGES if format.types], head)


def _in_head(magics: list[tuple[Magic, ...]], head: int) -> tuple[tuple[int, bytes], ...]:
    return tuple(
        (at, magic) for at, magic in chain(*magics) if at is not None and 0 <= at <= head - len(magic)
    )
