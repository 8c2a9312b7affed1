"""The disks of a machine as a person names them, and how they are to be opened: one value, parsed once."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

from virt_bmap.core.keys import NO_KEYS, Keys
from virt_bmap.core.reader import DiscSession, Reader


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How images are opened, and who is trusted."""

    format: str | None = None
    """One of `magic.FORMATS`; None to go by magic. What an NBD server shows is raw."""
    references: bool = False
    """An image may consist of further files: backing files, external data files, VMDK extents."""
    blocksize: int | None = None
    """Bytes of a sector of the disks; None to go by what lies there, or by what a device tells."""
    session: DiscSession | None = None
    """The session that is shown of discs that were written in several; None for what lies at their start."""
    force_share: bool = False
    """Images in QEMU's formats are read even while QEMU has them open for writing: what is read may then mix
    several states."""

    def tell(self, disk: Reader) -> None:
        """What a person says of the disk itself goes with its reader, to whom it concerns."""
        if self.blocksize:
            disk.sector, disk.is_sector_sure = self.blocksize, True
        disk.session = self.session


SAFELY = Opening()
"""By magic, and nobody is trusted."""


class Nested(NamedTuple):
    """Which files to open: these paths (bytes, from the root of whichever filesystem has them), and with
    `all` every file that begins as a disk does."""

    paths: frozenset[bytes] = frozenset()
    all: bool = False

    def __bool__(self) -> bool:
        return self.all or bool(self.paths)


NOTHING = Nested()


def nested(options: Sequence[str]) -> Nested:
    """The files of `--nested` options: paths, or `all`."""
    return Nested(
        frozenset(
            b"/" + option.encode(errors="surrogateescape").strip(b"/")
            for option in options
            if option != "all"
        ),
        "all" in options,
    )


@dataclass(frozen=True)
class Disks(Opening):
    """Images, block devices or NBD URIs as the disks /dev/sda, /dev/sdb, ... of one machine, or several."""

    images: Sequence[str]
    _: KW_ONLY
    keys: Keys = NO_KEYS
    """They open encrypted volumes."""
    nested: Nested = NOTHING
    """Files on these disks that are disks, too."""
    machines: bool = False
    """They are disks of several machines: identity and names have the machine as their scope, and which disks
    belong together their members tell."""
    host_offsets: bool = False
    """Count in bytes of the image files: these are disks 1, 2, ..., and the guest's disks volumes in them."""
