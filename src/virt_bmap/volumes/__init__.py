"""One module for each kind of volume: partition tables, volume managers, arrays, encryption; `VOLUMES` is the only list of them.

The contract is described in `virt_bmap.contract`.
"""

from types import ModuleType

from virt_bmap.reader import Reader
from virt_bmap.volumes import gpt, lvm, mbr

VOLUMES: tuple[ModuleType, ...] = (lvm, gpt, mbr)
"""In probe order. Members of arrays and groups come before partition tables, since their data area can hold one; GPT before MBR,
since every GPT disk has a protective MBR."""


def recognise(reader: Reader) -> ModuleType | None:
    """The volume module whose magic the volume carries."""
    for module in VOLUMES:
        if module.probe(reader):
            return module
    return None
