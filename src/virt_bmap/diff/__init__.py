"""What changed on a disk between two times, and whose bytes these are.

    sides       both sides, opened: images, backing chains, saved maps
    identity    are they of one disk?
    delta       what changed, as ranges: two images compared, an overlay's clusters, a dirty bitmap, a list of
                changed blocks
    compare     the reading and comparing that this takes
    tiles       each byte of these ranges with one owner, in each of the two maps
    objects     the files of both maps, matched: what happened to them by the maps alone
    segments    the delta cut into pieces with one owner on each side
    files       what happened to the bytes of files
    changes     all bytes attributed, each once
    report      the result with names; added up

`diff` answers a Question from the names of images and maps; `attribute` does so for maps and a delta that are
there already.
"""

import contextlib
from dataclasses import dataclass

import pyarrow as pa

from virt_bmap.core.errors import UsageError
from virt_bmap.core.reader import Reader
from virt_bmap.diff import delta as deltas
from virt_bmap.diff import report
from virt_bmap.diff.changes import Attribution
from virt_bmap.diff.delta import Delta
from virt_bmap.diff.objects import match
from virt_bmap.diff.sides import OpenSide, Plan, Question, Telling, open_sides
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.status import StatusReader

__all__ = ["Answer", "Question", "Telling", "attribute", "diff"]


@dataclass(frozen=True)
class Answer:
    """`rows` is a table of report.SCHEMA, whose bytes add up to `size`, the bytes of the delta's ranges
    (`count` of them); `how` it was found.

    `pieces` are, for old and new, (files with content,
    pieces in which it lies), where two maps were compared.
    """

    rows: pa.Table
    size: int
    count: int
    how: str
    pieces: tuple[tuple[int, int], tuple[int, int]] | None = None


def diff(question: Question, telling: Telling | None = None) -> Answer:
    """Open both sides, find what changed, attribute it.

    Raises UsageError, ImageError and MapError in words that name the side at fault.
    """
    telling = telling or Telling()
    with contextlib.ExitStack() as stack:
        plan, old, new = open_sides(question, stack, telling)
        found = _delta(question, plan, old, new, telling)
        both = (old.volumes, new.volumes) if old and old.volumes and new.volumes else None
        return attribute(old.bmap if old else None, new.bmap, question.disk, found, both)


def attribute(
    old: BlockMap | None,
    new: BlockMap,
    disk: int,
    delta: Delta,
    readers: tuple[list[Reader], list[Reader]] | None = None,
) -> Answer:
    """Attribute a delta of disk number `disk` (from 1).

    Without an old map all that is told is whose the bytes are now.
    """
    found = Attribution(match(old or new, new), disk, delta, readers, blind=old is None)
    rows = report.table(found)
    size = report.total(rows) if delta.only_owners else delta.size
    return Answer(
        rows, size, len(delta.starts), delta.how, report.pieces(found) if delta.only_owners else None
    )


def _delta(question: Question, plan: Plan, old: OpenSide | None, new: OpenSide, telling: Telling) -> Delta:
    """The delta, in whichever way the question asks for."""
    if question.ranges is not None:
        starts, ends = question.ranges.inside(new.size(question.disk), f"disk {question.disk} of {new.name}")
        found = deltas.of_ranges(starts, ends, f"{question.ranges.format} in {question.ranges.source}")
    elif question.bitmap is not None and isinstance(new.reader, StatusReader):
        found = deltas.of_bitmap(new.reader, question.bitmap)
    elif plan.layers and isinstance(new.reader, StatusReader):
        found = deltas.of_layers(new.reader, plan.layers, plan.cluster)
    elif old and old.reader and new.reader:
        return deltas.of_images(old.reader, new.reader, telling.comparing)
    else:
        found = deltas.of_owners(new.size(question.disk))
    return _verified(found, old, new, telling) if question.verify else found


def _verified(found: Delta, old: OpenSide | None, new: OpenSide, telling: Telling) -> Delta:
    if old is None:
        raise UsageError(f"--verify reads both sides, but nothing older than {new.name} is given")
    if old.reader is None or new.reader is None:
        raise UsageError(f"--verify reads both sides, but {(new if old.reader else old).name} is a saved map")
    return deltas.verified(found, old.reader, new.reader, telling.comparing)
