"""Apple's disk images (UDIF): opened by QEMU.

Sources: QEMU block/dmg.c.
"""

from virt_bmap.model.contract import ONLY_QEMU, Docs, ImageFormat

FORMAT = ImageFormat("dmg", Docs((), (ONLY_QEMU,), ()))
