"""Bochs' growing images: opened by QEMU.

Sources: QEMU block/bochs.c.
"""

from virt_bmap.model.contract import ONLY_QEMU, Docs, ImageFormat

FORMAT = ImageFormat("bochs", Docs((), (ONLY_QEMU,), ()))
