"""Who owns which bytes of the segment files, and where the disk lies in them."""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.mapping import PACKED
from virt_bmap.formats.images.ewf.extents import TABLES, Chunks
from virt_bmap.formats.images.ewf.ondisk import CHECKSUM, FILE_HEADER, SECTION
from virt_bmap.formats.images.ewf.sections import SegmentFile
from virt_bmap.formats.images.layer import IN_DATA, Draft

PARTS = {
    "header": "header", "header2": "header", "xheader": "header", "volume": "volume", "disk": "volume",
    "data": "backup volume", "hash": "hash", "digest": "digest", "xhash": "extended hash",
    "error2": "read errors", "session": "sessions", "ltree": "tree of files", "ltypes": "tree of files",
    "incomplete": "incomplete",
}  # fmt: skip
"""What lies in sections, beside tables and chunks."""


def own_sections(draft: Draft, segments: Sequence[SegmentFile]) -> None:
    """File headers, and sections that are one piece."""
    for file, segment in enumerate(segments):
        draft.own("file header", 0, FILE_HEADER.itemsize, file=file)
        places: dict[str, list[tuple[int, int]]] = {}
        for section in segment.sections:
            places.setdefault("section descriptor", []).append((section.descriptor, SECTION.itemsize))
            if section.kind not in (*TABLES, "sectors"):
                part = PARTS.get(section.kind, "section of an unknown kind")
                places.setdefault(part, []).append((section.start, section.end - section.start))
        for part, found in places.items():
            start, length = np.array(found, np.int64).T
            draft.own(part, start, length, file=file)


def place_chunks(draft: Draft, chunks: Chunks, chunk: int) -> Chunks:
    """Where the disk lies. A chunk that is stored as it is has its checksum behind it; these are given back,
    `stored` being their bytes before it."""
    guest = chunks.number * chunk
    needed = np.clip(draft.size - guest, 0, chunk)
    here = needed > 0
    packed = chunks.packed & here
    stored = np.minimum(chunks.stored, 2 * chunk)
    draft.place(
        guest[packed], chunks.host[packed], needed[packed], PACKED, chunks.file[packed], stored[packed]
    )
    plain, needed = chunks.take(~chunks.packed & here), needed[~chunks.packed & here]
    good = draft.damage.check(
        plain.stored >= needed + CHECKSUM,
        "extents",
        "[chunk ends before its bytes do|chunks end before their bytes do]",
        plain.host,
    )
    length = np.minimum(plain.stored - CHECKSUM, chunk)
    plain = plain.take(good)._replace(stored=length[good])
    draft.place(plain.number * chunk, plain.host, plain.stored, IN_DATA, plain.file)
    for file in range(len(draft.files)):
        mine = plain.file == file
        draft.own("chunk checksum", (plain.host + plain.stored)[mine], CHECKSUM, file=file)
    return plain
