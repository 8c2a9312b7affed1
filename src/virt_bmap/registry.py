"""How `filesystems/` and `volumes/` list their modules: a magic that must be there, and a module that is imported only then.

Importing every format would take longer than mapping most disks.
"""

import importlib
from types import ModuleType
from typing import NamedTuple

from virt_bmap.reader import TAIL, Reader

Magic = tuple[int | None, bytes]
"""(offset, bytes): the offset in bytes from the start, from the end if negative; None: anywhere in the last TAIL bytes."""


class Format(NamedTuple):
    """A module by its full name. One of `magics` must be there before the module's own `probe` is asked."""

    module: str
    magics: tuple[Magic, ...]

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]

    def load(self) -> ModuleType:
        """The module."""
        return importlib.import_module(self.module)

    def recognise(self, reader: Reader) -> ModuleType | None:
        """The module, if the volume is of this format."""
        if not any(_is_there(reader, magic) for magic in self.magics):
            return None
        module = self.load()
        return module if module.probe(reader) else None


def _is_there(reader: Reader, magic: Magic) -> bool:
    offset, wanted = magic
    if offset is None:
        start = max(0, reader.size - TAIL)
        return wanted in reader.read(start, reader.size - start)
    return reader.read_clipped(offset if offset >= 0 else reader.size + offset, len(wanted)) == wanted


def first(formats: tuple[Format, ...], reader: Reader) -> ModuleType | None:
    """The first of the formats that the volume is of."""
    for format in formats:
        if module := format.recognise(reader):
            return module
    return None
