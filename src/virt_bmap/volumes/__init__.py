"""One module for each kind of volume: partition tables, volume managers, arrays, encryption; `VOLUMES` is the only list of them.

The contract is described in `virt_bmap.contract`.
"""

from types import ModuleType

from virt_bmap.reader import Reader
from virt_bmap.registry import Format, first

HERE = "virt_bmap.volumes"
LVM_LABEL = b"LABELONE"
MD_MAGIC = b"\xfc\x4e\x2b\xa9"
BOOT_SIGNATURE = (510, b"\x55\xaa")
VOLUMES: tuple[Format, ...] = (
    Format(f"{HERE}.md", ((0, MD_MAGIC), (4096, MD_MAGIC), (None, MD_MAGIC), (None, MD_MAGIC[::-1]))),
    Format(f"{HERE}.lvm", ((0, LVM_LABEL), (512, LVM_LABEL), (1024, LVM_LABEL), (1536, LVM_LABEL))),
    Format(f"{HERE}.luks", ((0, b"LUKS\xba\xbe"), *((0x4000 << step, b"SKUL\xba\xbe") for step in range(4)))),
    Format(f"{HERE}.bitlocker", ((3, b"-FVE-FS-"), (3, b"MSWIN4.1"))),
    Format(f"{HERE}.btrfs", ((0x10040, b"_BHRfS_M"),)),
    Format(f"{HERE}.gpt", (BOOT_SIGNATURE,)),
    Format(f"{HERE}.mbr", (BOOT_SIGNATURE,)),
    Format(f"{HERE}.apm", tuple((size, b"PM\0\0") for size in (512, 1024, 2048, 4096))),
    Format(f"{HERE}.sun", ((508, b"\xda\xbe"),)),
    Format(f"{HERE}.sgi", ((0, b"\x0b\xe5\xa9\x41"),)),
)
"""In probe order. Members of arrays and groups come before partition tables, since their data area can hold one; md before LVM,
since a mirror whose superblock lies at its end shows LVM's label at its start; GPT before MBR, since every GPT disk has a protective
MBR; the labels of other machines last, as in the kernel. In the same order those that span volumes are put together: arrays, then what lies on them."""


def recognise(reader: Reader, has_header: bool = False) -> ModuleType | None:
    """The volume module whose magic the volume carries; with a detached LUKS header there is none on it."""
    if has_header:
        return next(format for format in VOLUMES if format.name == "luks").load()
    return None if reader.filesystem else first(VOLUMES, reader)


def rank(module: str) -> int:
    """The place in VOLUMES of a module by its full name."""
    return [format.module for format in VOLUMES].index(module)
