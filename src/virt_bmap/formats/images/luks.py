"""QEMU's encrypted raw disk, where a user says so: never found by magic, since a LUKS disk is a disk.

Sources: QEMU block/crypto.c.
"""

from virt_bmap.model.contract import ONLY_QEMU, Docs, ImageFormat

FORMAT = ImageFormat("luks", Docs((), (ONLY_QEMU,), ()))
