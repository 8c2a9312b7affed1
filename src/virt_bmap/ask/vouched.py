"""What an image itself vouches for: the checksums and hashes that it keeps of its disk, compared with all of
the disk's bytes."""

import contextlib

from virt_bmap.ask.check import Checked, Disagreement, Verdict
from virt_bmap.core.errors import Unsupported
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import CONTRADICTED, NOT_LOOKED_AT, SUBJECTS, Proof
from virt_bmap.model.damage import Damage
from virt_bmap.open import magic
from virt_bmap.open.disks import Disks, Opening

NOTHING_KEPT = Proof("content", NOT_LOOKED_AT, "the image keeps no hash of what its disk holds")


def add_content(report: Checked, bmap: BlockMap, disks: Disks) -> None:
    """Read all of these disks, which the map is of, and add to the report what became of each.

    Raises as `open_host` does.
    """
    kinds = bmap.volumes.column("kind").to_pylist()
    volumes = [number for number, kind in enumerate(kinds) if kind == "disk"]
    for image, volume in zip(disks.images, volumes, strict=True):
        proofs, damage = _compare(image, disks)
        problems = damage.problems()
        report.disagreements.extend(
            Disagreement(volume, found.code, found.offset, -1, found.detail) for found in problems
        )
        report.verdicts.extend(
            Verdict(volume, "content", CONTRADICTED, found.detail, found.code, found.offset)
            for found in problems
        )
        if not problems:
            report.verdicts.extend(Verdict(volume, *proof) for proof in proofs)
    report.verdicts.sort(key=lambda row: (row.volume, SUBJECTS.index(row.subject)))


def _compare(image: str, opening: Opening) -> tuple[list[Proof], Damage]:
    damage = Damage()
    if magic.is_uri(image):
        return [NOTHING_KEPT], damage
    from virt_bmap.open.host import LayeredReader

    try:
        with contextlib.closing(LayeredReader(image, opening)) as reader:
            prove = reader.disk.chain[0].layer.prove
            return (prove(reader, damage) if prove else [NOTHING_KEPT]), damage
    except Unsupported as error:
        return [Proof("content", NOT_LOOKED_AT, str(error))], damage
