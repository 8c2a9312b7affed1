"""What is proven of a map, what contradicts itself, and what nobody looked at.

For each volume: its extents and its children's bytes cover it to the last byte; no two owners claim the same
bytes unless they share them on purpose; nothing that is owned is called free; nothing that is allocated lacks
an owner; what the readers found wrong in nodes, checksums and journals. A volume that is one piece
(encrypted, foreign), a format without an allocator, a filesystem that was observed: that was not looked at,
and is said to be so.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import counted, plural
from virt_bmap.core.arrays import Int, covered_twice, intersect, subtract, total, union
from virt_bmap.model import tables
from virt_bmap.model.blockmap import FILE, BlockMap
from virt_bmap.model.contract import CONTRADICTED, NOT_LOOKED_AT, PROVEN, SUBJECTS, Proof
from virt_bmap.model.problems import CODES

LISTED = 100
"""Ranges named one by one for each kind of disagreement on a volume; the rest are counted."""


class Disagreement(NamedTuple):
    """Bytes [start, end) of a volume about which the map contradicts itself, the allocator, or the format."""

    volume: int
    code: str
    start: int
    end: int
    detail: str


class Totals(NamedTuple):
    """Bytes of one volume by kind; `children` are bytes that lie in further volumes.

    Together they are `size`.
    """

    volume: int
    size: int
    by_kind: dict[str, int]
    children: int


class Verdict(NamedTuple):
    """What became of one question (of contract.SUBJECTS) to one volume; for a contradiction, the
    disagreement."""

    volume: int
    subject: str
    result: str
    detail: str
    code: str | None = None
    start: int = -1
    end: int = -1


class Checked(NamedTuple):
    """What `check` found. Nothing contradicts the map where there is no disagreement; `verdicts` say what
    that is worth."""

    totals: list[Totals]
    disagreements: list[Disagreement]
    verdicts: list[Verdict]


UNASKED = "not asked when the map was made: check the disk itself"


def check(bmap: BlockMap) -> Checked:
    """Check every volume of the map."""
    report = Checked([], [], [])
    pieces = {volume: _not_looked_into(bmap, volume) for volume in range(bmap.volumes.num_rows)}
    for volume in pieces:
        _check_volume(bmap, volume, report)
    told = {(found.volume, found.code) for found in report.disagreements}
    for row in bmap.problems.filter(
        np.isin(bmap.problems.column("severity").to_pylist(), ("error", "warning"))
    ).to_pylist():
        volume, at = row["volume"], row["volume_offset"]
        # refused by its reader, which says nothing of damage
        if row["severity"] == "warning" and pieces[volume].whole:
            pieces[volume] = pieces[volume]._replace(words=row["detail"])
        elif (volume, row["code"]) not in told:  # not byte by byte already
            report.disagreements.append(
                Disagreement(volume, row["code"], -1 if at is None else at, -1, row["detail"])
            )
    for volume, piece in pieces.items():
        report.verdicts.extend(
            _verdicts(
                bmap, volume, piece, [found for found in report.disagreements if found.volume == volume]
            )
        )
    return report


class _Piece(NamedTuple):
    """What of a volume was taken as one piece, in words, empty where nothing was; `whole`: all of it."""

    words: str = ""
    whole: bool = False


def _not_looked_into(bmap: BlockMap, volume: int) -> _Piece:
    if (
        bmap.slice_of("filesystems", volume)[1].num_rows
        or bmap.volumes.column("kind")[volume].as_py() == FILE
    ):
        return _Piece()
    _, extents = bmap.slice_of("extents", volume)
    content = tables.codes(extents, "kind") == tables.CONTENT
    if not content.any():
        return _Piece()
    parts = dict.fromkeys(extents.column("part").take(np.flatnonzero(content)).to_pylist())
    words = f"{', '.join(part or 'unrecognised' for part in parts)}: taken as one piece, not looked into"
    return _Piece(words, bool(content.all()) and not len(bmap.rows_into(volume)))


def _verdicts(bmap: BlockMap, volume: int, piece: _Piece, disagreements: list[Disagreement]) -> list[Verdict]:
    """A row for each disagreement, and for each subject without one what became of it."""
    found = [
        Verdict(volume, subject_of(row.code), CONTRADICTED, row.detail, row.code, row.start, row.end)
        for row in disagreements
    ]
    subjects = {row.subject for row in found}
    said = _said(bmap, volume, piece)
    found += [Verdict(volume, *said[subject]) for subject in said if subject not in subjects]
    return sorted(found, key=lambda row: SUBJECTS.index(row.subject))


def subject_of(code: str) -> str:
    """The question that a disagreement of this code answers; other versions had other codes."""
    return CODES[code].subject if code in CODES else "structure"


def _said(bmap: BlockMap, volume: int, piece: _Piece) -> dict[str, Proof]:
    """What holds of a volume where nothing contradicts it."""
    if piece.whole:
        return {"content": Proof("content", NOT_LOOKED_AT, piece.words)}
    _, system = bmap.slice_of("filesystems", volume)
    if tables.OBSERVED in system.column("state").to_pylist():
        detail = (
            "mapped by reading its files: "
            f"{counted(_unseen(bmap, volume), '[byte was|bytes were] never observed')}"
        )
        others = ("allocator", "structure", "checksums")
        proofs = [
            Proof("owners", NOT_LOOKED_AT, detail),
            *(Proof(name, NOT_LOOKED_AT, "the metadata was not read") for name in others),
        ]
        return {proof.subject: proof for proof in proofs}
    found = [Proof("owners", PROVEN, "every byte has one owner, or several that share it on purpose")]
    if system.num_rows or bmap.volumes.column("type")[volume].as_py():
        found += [
            Proof("structure", PROVEN, "as far as its reader looks"),
            Proof("checksums", NOT_LOOKED_AT, UNASKED),
        ]
    if system.num_rows:
        has_free = tables.FREE in tables.codes(bmap.slice_of("extents", volume)[1], "kind")
        agreed = Proof("allocator", PROVEN, "what is owned is what the format's own allocator calls used")
        found.append(
            agreed if has_free or bmap.proofs is not None else Proof("allocator", NOT_LOOKED_AT, UNASKED)
        )
        found += _journal(bmap, volume, system.column("state")[0].as_py())
        found.append(Proof("files", NOT_LOOKED_AT, "the content of files is not read"))
    if piece.words:
        found.append(Proof("content", NOT_LOOKED_AT, piece.words))
    found += [proof for number, proof in bmap.proofs or () if number == volume]
    return {proof.subject: proof for proof in found}


def _journal(bmap: BlockMap, volume: int, state: str) -> list[Proof]:
    codes = {row["code"] for row in bmap.slice_of("problems", volume)[1].to_pylist()}
    if "journal-replayed" in codes:
        return [Proof("journal", PROVEN, "replayed in memory: the map shows the state after recovery")]
    if state == tables.NEEDS_RECOVERY:
        return [Proof("journal", NOT_LOOKED_AT, "it needs recovery, and was not replayed")]
    return []


def _unseen(bmap: BlockMap, volume: int) -> int:
    _, extents = bmap.slice_of("extents", volume)
    unknown = tables.codes(extents, "kind") == tables.UNKNOWN
    start = tables.integers(extents, "volume_offset")[unknown]
    length = tables.integers(extents, "length")[unknown]
    return total(start, start + length)


def _check_volume(bmap: BlockMap, volume: int, report: Checked) -> None:
    size = bmap.size_of(volume)
    _, extents = bmap.slice_of("extents", volume)
    kind, flags = tables.codes(extents, "kind"), tables.integers(extents, "flags")
    start, length = tables.integers(extents, "volume_offset"), tables.integers(extents, "length")
    end = start + length
    rows = bmap.rows_into(volume)
    image = np.array(bmap.volumes.column("kind").to_pylist()) == "image"
    if not image[volume] or bmap.slice_of("filesystems", volume)[1].num_rows:
        rows = rows.take(~image[rows.volume])  # the bytes of a nested image belong to its file
    inner = union(rows.parent_offset, rows.parent_end)
    inline = (flags & tables.INLINE) != 0
    shared = (flags & tables.SHARED) != 0
    own = ~inline

    def disagree(code: str, detail: str, ranges: tuple[Int, Int]) -> None:
        pairs = list(zip(ranges[0][:LISTED].tolist(), ranges[1][:LISTED].tolist(), strict=True))
        report.disagreements.extend(Disagreement(volume, code, low, high, detail) for low, high in pairs)
        if more := len(ranges[0]) - len(pairs):
            low, high = int(ranges[0][LISTED]), int(ranges[1][-1])
            report.disagreements.append(
                Disagreement(volume, code, low, high, f"{detail}: {plural(more, 'more range')}")
            )

    everything = union(np.append(start[own], inner[0]), np.append(end[own], inner[1]))
    whole = np.zeros(1, np.int64), np.array([size], np.int64)
    disagree("untiled", "no owner", subtract(*whole, *everything))
    disagree("outside", "owned, but outside the volume", subtract(*everything, *whole))
    owned, free = np.isin(kind, tables.OWNED) & own, kind == tables.FREE
    disagree(
        "owned-but-free",
        "owned, but the allocator calls it free",
        intersect(start[owned], end[owned], start[free], end[free]),
    )
    unknown = kind == tables.UNKNOWN
    if tables.OBSERVED not in bmap.slice_of("filesystems", volume)[1].column("state").to_pylist():
        disagree(
            "unowned",
            "allocated, but nothing refers to it",
            union(start[unknown], end[unknown]),
        )
    alone = own & ~shared & (kind != tables.FREE)
    disagree("two-owners", "two owners that do not share on purpose", covered_twice(start[alone], end[alone]))
    at_home = own & shared
    disagree("two-owners", "an owner that does not share, on bytes that others share",
             intersect(start[alone], end[alone], start[at_home], end[at_home]))  # fmt: skip
    outside = subtract(start[inline], end[inline], start[own], end[own])
    disagree("inline-outside", "said to lie inside another extent, but does not", outside)
    sums = {
        tables.KINDS[code]: total(start[own & (kind == code)], end[own & (kind == code)])
        for code in np.unique(kind[own]).tolist()
    }
    report.totals.append(Totals(volume, size, sums, int((inner[1] - inner[0]).sum())))
