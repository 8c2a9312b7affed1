"""One module (or folder) for each filesystem; `FILESYSTEMS` is the only list of them.

The contract is described in `virt_bmap.contract`; docs/adding-a-format.md walks through `example.py`.
"""

from types import ModuleType

from virt_bmap.filesystems import ext, fat, xfs
from virt_bmap.reader import Reader

FILESYSTEMS: tuple[ModuleType, ...] = (ext, xfs, fat)
"""In probe order: magics that lie deeper or are longer first, so that leftovers of an older filesystem lose."""


def recognise(reader: Reader) -> ModuleType | None:
    """The filesystem module whose magic the volume carries."""
    for module in FILESYSTEMS:
        if module.probe(reader):
            return module
    return None
