"""The segments of one image: that they belong together, and what they hold of the disk together."""

from collections.abc import Sequence

from virt_bmap.core import lost
from virt_bmap.core.amounts import human, plural
from virt_bmap.core.arrays import Int, complement, total
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.lost import Lost
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.ewf.extents import Chunks, last_length
from virt_bmap.formats.images.ewf.header import Volume, identifier_of
from virt_bmap.formats.images.ewf.sections import SegmentFile, walk
from virt_bmap.model.contract import ImageLayer
from virt_bmap.model.damage import Damage


def read_segments(files: Sequence[Reader], damage: Damage) -> list[SegmentFile]:
    """The sections of all segments. Raises Corrupt where one is not what its name says."""
    found = [walk(file) for file in files]
    first = identifier_of(files[0], found[0])
    for number, (file, segment) in enumerate(zip(files, found, strict=True), 1):
        identifier = identifier_of(file, segment)
        if any(identifier) and any(first) and identifier != first:
            raise Corrupt(
                f"{file.name}: belongs to another image than {files[0].name}: their set identifiers differ"
            )
        of = f"{file.name}: " if number > 1 else ""
        for problem in segment.problems:
            damage.say(problem.code, of + problem.detail, problem.offset if number == 1 else None)
    return found


def size_so_far(files: Sequence[Reader], volume: Volume, chunks: Chunks) -> int:
    """Bytes of a disk whose size was never filled in: a program that was interrupted leaves it so."""
    if not len(chunks.number):
        return 0
    return int(chunks.number.max()) * volume.chunk + last_length(files, chunks, volume.chunk)


def compare_counts(volume: Volume, listed: int, damage: Damage) -> None:
    """What the volume section says of the disk's size, and what the tables list."""
    needed = -(-volume.size // volume.chunk)
    if not volume.size:
        damage.say("count", "its volume section says 0 sectors: the disk is taken to be what the tables list")
    elif listed > needed:
        damage.say("count", f"its tables list {plural(listed, 'chunk')}, but its disk has {needed:,}")


def note_lost(layer: ImageLayer, unread: tuple[Int, Int]) -> None:
    """What the image does not hold of its disk; and what could not be read, and is zeroes since."""
    rows, damage = layer.rows, layer.damage
    missing = complement(rows.volume_offset, rows.volume_offset + rows.run, 0, layer.size)
    if absent := total(*missing):
        damage.say(
            "truncated",
            f"{human(absent)} of the {human(layer.size)} of its disk are not in it, the first at byte "
            f"{int(missing[0][0]):#x} of the disk: it was not finished, or is damaged",
        )
    if unread_bytes := total(*unread):
        damage.say(
            "bad-blocks",
            f"{human(unread_bytes)} of the disk in {plural(len(unread[0]), 'range')} could not be read when "
            f"it was made, the first at byte {int(unread[0][0]):#x} of the disk, and are zeroes",
        )
    layer.lost = Lost.join([Lost.of(missing, lost.MISSING), Lost.of(unread, lost.UNREADABLE)])
