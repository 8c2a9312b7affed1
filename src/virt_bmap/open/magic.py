"""What an image is, by its name and its magic: light enough to be asked for every image.

Sources: QEMU docs/interop/qcow2.rst, block/qcow.c, block/qed.h, block/vmdk.c, block/vpc.c, block/vdi.c,
block/vhdx.h, block/parallels.c, block/bochs.c, block/dmg.c.
"""

from virt_bmap.core.errors import ImageError
from virt_bmap.core.reader import Reader

FORMATS = ("qcow2", "qcow", "qed", "vmdk", "vpc", "vhdx", "vdi", "parallels", "bochs", "dmg", "luks")
"""QEMU's own names; vpc is VHD.

`luks` is QEMU's encrypted raw format and is never found by magic: a LUKS disk is a disk.
"""

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")

MAGICS: tuple[tuple[str, int, bytes], ...] = (
    ("qcow2", 0, b"QFI\xfb\0\0\0\x02"),
    ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vpc", 0, b"conectix"),
    ("vpc", -512, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("dmg", -512, b"koly"),
)
"""(format, offset from the start or, negative, from the end, magic)."""
UNREADABLE = (
    (b"EVF\t\r\n\xff\0", "an Expert Witness (E01) image", "ewfmount or ewfexport"),
    (b"EVF2\r\n\x81\0", "an Ex01 image", "ewfexport"),
)


def recognise(reader: Reader) -> str | None:
    """The QEMU format whose magic the file carries; None for a raw disk.

    ImageError for image formats that nothing here opens.
    """
    for name, offset, magic in MAGICS:
        at = offset if offset >= 0 else reader.size + offset
        if at >= 0 and reader.read_clipped(at, len(magic)) == magic:
            return name
    for magic, what, tool in UNREADABLE:
        if reader.read_clipped(0, len(magic)) == magic:
            raise ImageError(
                f"{reader.name}: is {what}, which can't be read directly; use {tool} to get a raw disk first"
            )
    return None


def is_uri(image: str) -> bool:
    """Does this name an NBD server rather than a file? A file of such a name is given as ./nbd:..."""
    return image.split(":", 1)[0] in SCHEMES and ":" in image
