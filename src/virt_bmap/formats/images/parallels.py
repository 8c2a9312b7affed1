"""Parallels: opened by QEMU.

Sources: QEMU docs/interop/parallels.rst, block/parallels.c.
"""

from virt_bmap.model.contract import ONLY_QEMU, Docs, ImageFormat

FORMAT = ImageFormat("parallels", Docs((), (ONLY_QEMU,), ("qemu-img convert",)))
