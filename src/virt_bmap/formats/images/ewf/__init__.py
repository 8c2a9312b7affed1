"""Expert Witness images (EWF): E01 in one or several segments, and SMART's s01, as forensic programs write
them.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)".
"""

from collections.abc import Sequence

from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.ewf.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.images.ewf.references import following, references
from virt_bmap.model.contract import Docs, ImageFormat, ImageLayer, Structure, Structures

NAME = "ewf"


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of an image in these segments, which are in order."""
    # imported here: who only opens an image asks for its references
    from virt_bmap.formats.images.ewf import extents, header, owners, proof, segments
    from virt_bmap.formats.images.layer import Draft

    files = [image, *others]
    draft = Draft(files, 0)
    found = segments.read_segments(files, draft.damage)
    volume = header.read_volume(image, found[0], draft.damage)
    kept = header.read_kept(files[-1], found[-1], volume, draft.damage)
    owners.own_sections(draft, found)
    chunks, listed = extents.read_chunks(draft, found)
    draft.size = volume.size or segments.size_so_far(files, volume, chunks)
    segments.compare_counts(volume, listed, draft.damage)
    plain = owners.place_chunks(draft, chunks, volume.chunk)
    facts = header.facts(files, found, volume, kept, draft.damage)
    layer = draft.finish(NAME, volume.chunk, facts, inflate=extents.inflate)
    segments.note_lost(layer, kept.unread)
    layer.prove = proof.Stored(layer, plain, kept.hashes).prove
    return layer


def _structures() -> Structures:
    from virt_bmap.formats.images.ewf import ondisk

    return {
        "file header": Structure(ondisk.FILE_HEADER),
        "section descriptor": Structure(ondisk.SECTION),
        "volume": Structure(ondisk.VOLUME),
        "table header": Structure(ondisk.TABLE_HEADER),
        "table": Structure(ondisk.TABLE_ENTRY, many=True),
        "hash": Structure(ondisk.HASH),
        "digest": Structure(ondisk.DIGEST),
        "read errors": Structure(ondisk.ERRORS),
        "sessions": Structure(ondisk.SESSIONS),
    }


FORMAT = ImageFormat(
    NAME,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    read=read,
    structures=_structures,
    references=references,
    continued=following,
    in_qemu=False,
    suffix=".E01",
)
