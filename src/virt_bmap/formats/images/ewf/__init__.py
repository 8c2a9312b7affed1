"""Expert Witness images (EWF): E01 in one or several segments, and SMART's s01, as forensic programs write
them.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)".
"""

from collections.abc import Sequence
from typing import Any

from virt_bmap.core.errors import Unsupported
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.ewf.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.images.ewf.references import following, references
from virt_bmap.model.contract import Docs, ImageFormat, ImageLayer, Structure, Structures

NAME = "ewf"
VERSION_2 = b"EVF2"


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of an image in these segments, which are in order."""
    # imported here: who only opens an image asks for its references
    from virt_bmap.formats.images.ewf import extents, header, owners, proof, segments
    from virt_bmap.formats.images.layer import Draft

    if image.read_clipped(0, len(VERSION_2)) == VERSION_2:
        raise Unsupported(
            f"{image.name}: is an Expert Witness image of version 2 (Ex01), which is not read", 0
        )
    files = [image, *others]
    draft = Draft(files, 0)
    found = segments.read_segments(files, draft.damage)
    volume = header.read_volume(image, found[0], draft.damage)
    kept = header.read_kept(files[-1], found[-1], volume, draft.damage)
    owners.own_sections(draft, found)
    chunks, listed = extents.read_chunks(draft, found)
    draft.size = segments.size_of(volume, listed, draft.damage)
    plain = owners.place_chunks(draft, chunks, volume.chunk)
    layer = draft.finish(NAME, volume.chunk, _facts(image, found, volume, kept, draft), inflate=proof.inflate)
    segments.note_lost(layer, kept.unread)
    layer.prove = proof.Stored(layer, plain, kept.hashes).prove
    return layer


def _facts(image: Reader, found: Any, volume: Any, kept: Any, draft: Any) -> dict[str, Any]:
    from virt_bmap.formats.images.ewf import header

    return {
        "version": 1,
        "segments": len(found),
        **volume.facts(),
        "case": header.read_case(image, found[0], draft.damage),
        "hashes": {name: value.hex() for name, value in kept.hashes.items()},
        "sessions": kept.sessions,
    }


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
