"""One module (or folder) for each filesystem; `FILESYSTEMS` is the only list of them.

The contract is described in `virt_bmap.contract`; docs/adding-a-format.md walks through `example.py`.
"""

from types import ModuleType

from virt_bmap.reader import Reader
from virt_bmap.registry import Format, first

HERE = "virt_bmap.filesystems"
SWAP_MAGICS = (
    b"SWAP-SPACE",
    b"SWAPSPACE2",
    b"S1SUSPEND",
    b"S2SUSPEND",
    b"ULSUSPEND",
    b"LINHIB0001",
    b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c",
)
EXT_BACKUPS = tuple((((8 << log) * 1024 + (log == 0)) * (1024 << log) + 0x38, b"\x53\xef") for log in range(3))
"""Where ext has its first backup superblock, for blocks of 1, 2 and 4 KiB: its primary one may be wiped."""
F2FS_MAGIC = b"\x10\x20\xf5\xf2"
FILESYSTEMS: tuple[Format, ...] = (
    Format(f"{HERE}.btrfs", ()),  # never by magic: `volumes.btrfs` makes the pool and says what it is
    Format(f"{HERE}.ext", ((0x438, b"\x53\xef"),)),
    Format(f"{HERE}.xfs", ((0, b"XFSB"),)),
    Format(f"{HERE}.ntfs", ((3, b"NTFS    "),)),
    Format(
        f"{HERE}.udf", tuple((0x8001 + 2048 * n, word) for n in range(16) for word in (b"NSR02", b"NSR03"))
    ),  # before ISO 9660: bridges
    Format(f"{HERE}.iso9660", ((0x8001, b"CD001"), (0x8009, b"CDROM"))),
    Format(f"{HERE}.exfat", ((3, b"EXFAT   "),)),
    Format(f"{HERE}.swap", tuple(((4096 << shift) - 10, magic) for shift in range(5) for magic in SWAP_MAGICS)),
    Format(f"{HERE}.squashfs", ((0, b"hsqs"), (0, b"sqsh"))),
    Format(f"{HERE}.erofs", ((1024, b"\xe2\xe1\xf5\xe0"),)),
    Format(f"{HERE}.f2fs", ((1024, F2FS_MAGIC),)),
    Format(f"{HERE}.fat", ((0, b"\xeb"), (0, b"\xe9"), (0, b"\x60"), (510, b"\x55\xaa"))),
    Format(f"{HERE}.ext", EXT_BACKUPS),  # last: these may be leftovers
    Format(f"{HERE}.f2fs", ((4096 + 1024, F2FS_MAGIC),)),  # likewise
)
"""In probe order: magics that lie deeper or are longer first, so that leftovers of an older filesystem lose."""


def recognise(reader: Reader) -> ModuleType | None:
    """The filesystem module that reads this volume."""
    if reader.filesystem:
        return next(format for format in FILESYSTEMS if format.name == reader.filesystem).load()
    return first(FILESYSTEMS, reader)
