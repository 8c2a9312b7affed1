"""The parent of a differencing VHD, by its locators.

Sources: Microsoft "Virtual Hard Disk Image Format Specification" 1.0, "Parent Locator Entry".
"""

from virt_bmap.core.errors import Unsupported
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.backing import of_parent
from virt_bmap.formats.images.vhd.header import Footer, read_footer
from virt_bmap.formats.images.vhd.ondisk import HEADER, LOCATOR, SECTOR
from virt_bmap.model.contract import References

MAX_LOCATOR = 4096
"""Bytes of a parent's name: Windows' longest paths have some hundred characters."""


def references(image: Reader) -> References:
    """A differencing image's parent, which is a VHD, too."""
    return of_parent(image, "vpc", parent)


def parent(image: Reader) -> str | None:
    """The name of a differencing image's parent: the relative one if there is one.

    Raises Corrupt or Unsupported.
    """
    foot = read_footer(image)
    if foot.kind != "differencing":
        return None
    names = {
        platform: image.read(offset, min(length, MAX_LOCATOR)).decode("utf-16-le", "replace").rstrip("\0")
        for platform, offset, length, _ in read_locators(image, foot)
        if platform in (b"W2ru", b"W2ku")
    }
    name = names.get(b"W2ru") or names.get(b"W2ku")
    if not name:
        raise Unsupported(
            f"{image.name}: is a differencing VHD that names its "
            "parent by neither a relative nor an absolute path",
            foot.header,
        )
    return name.replace("\\", "/")


def read_locators(image: Reader, foot: Footer) -> list[tuple[bytes, int, int, int]]:
    """(platform, offset, bytes used, bytes kept) of each parent locator that lies in the file; only
    differencing images have any."""
    if foot.kind != "differencing":
        return []
    raw = record(image.read(foot.header, HEADER.itemsize), HEADER)["parent_locator_entries"].tobytes()
    found = []
    for at in range(8):
        entry = record(raw, LOCATOR, at * LOCATOR.itemsize)
        platform, offset, length, space = (
            bytes(entry["platform_code"]),
            int(entry["data_offset"]),
            int(entry["data_length"]),
            int(entry["data_space"]),
        )
        # some write sectors, as the text says, some bytes, as the table does
        space = space * SECTOR if 0 < space < SECTOR else space
        if platform and length and offset + length <= image.size:
            found.append((platform, offset, length, max(space, length)))
    return found
