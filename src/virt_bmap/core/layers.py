"""The way down through layers of readers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virt_bmap.core.reader import Reader


def bottom(reader: "Reader") -> set["Reader"]:
    """The readers at the bottom of all layers, each once however often the layers lead to it."""
    return {one for one in layers(reader) if not one.below}


def layers(reader: "Reader") -> set["Reader"]:
    """A reader and all those below it, each once."""
    seen, todo = {reader}, [reader]
    for one in todo:
        fresh = set(one.below) - seen
        seen |= fresh
        todo += fresh
    return seen


def raw(reader: "Reader") -> "Reader":
    """The same bytes as they lie on the volume, nothing of them put right."""
    while reader.corrects:
        (reader,) = reader.below
    return reader
