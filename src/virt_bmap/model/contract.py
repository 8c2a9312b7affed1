"""What a format says of itself, and what it gives back: the shapes that the packages of formats share with
everybody else.

Each package below `formats/filesystems/`, `formats/volumes/` and `formats/images/` has one declaration,

    FORMAT = FilesystemFormat(...)   or   FORMAT = VolumeFormat(...)   or   FORMAT = ImageFormat(...)

and is listed in `formats/registry.py`. `read` and `assemble` raise Corrupt or Unsupported where nothing can
be read; what is wrong but leaves the rest readable is damage (`model/damage.py`). What consumers (explain,
diff, history, ...) want to know of a format they ask its declaration.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Int, union
from virt_bmap.core.keys import NO_KEYS, Keys
from virt_bmap.core.lost import NOTHING, Lost
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import Rows
from virt_bmap.core.packed import Codec
from virt_bmap.core.reader import Mark, Reader
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows


class Asks(enum.Flag):
    """What a survey is asked beside the map, since it takes more reading than a map does."""

    PROOFS = enum.auto()
    """Do checksums of metadata hold, are nodes in order? For `check`."""
    SLEEP = enum.auto()
    """Does a file hold the memory of a machine that sleeps?
    For whoever changes free bytes, or leaves them out."""


NOTHING_MORE = Asks(0)

PROVEN, CONTRADICTED, NOT_LOOKED_AT = "proven", "contradicted", "not looked at"
"""What can become of a question."""
SUBJECTS = ("owners", "allocator", "structure", "checksums", "journal", "content", "files")
"""What `check` asks: has every byte one owner? Does the allocator agree? Do the nodes keep the format's own
rules? Do checksums of metadata hold? Was the journal replayed? Is something in there that was not looked
into (encrypted, foreign), or is it not what a hash was kept of? Do files hold what they held?"""


class Proof(NamedTuple):
    """What a reader itself says of one of SUBJECTS: what was looked at, or why not.

    Contradictions are Problems.
    """

    subject: str
    result: str
    detail: str


@dataclass
class Filesystem:
    """All that a reader found on one volume, as tables of `model/tables.py` whose `volume` column holds 0
    until survey sets it.

    `extents` has a row for every byte of [0, size) that has an owner or that the allocator calls free. The
    reader does not fill what is left: survey adds `unknown` rows (`unreferenced` ones where the format has no
    allocator) and a problem for what no row covers, and a gap from `size` to the volume's end.

    `state` is what superblock and journal say, one of tables.STATES. What is wrong goes to the `damage` that
    the reader is given, and survey alone makes "damaged" of that.

    `reader` gives the bytes that the rows speak of: the volume's own, or those with the journal replayed.
    Whoever reads content from now on reads these.
    """

    type: str
    size: int
    block_size: int
    root: int
    state: str
    inodes: pa.Table
    names: pa.Table
    extents: pa.Table
    reader: Reader
    uuid: str | None = None
    label: str | None = None
    features: str | None = None
    traits: int = 0


class Member(NamedTuple):
    """A volume as an assembling module sees it.

    `name` is its device name, `number` its place among the members, by which mapping rows name it as a
    parent, `keys` what the user gave.
    """

    number: int
    name: str
    reader: Reader
    keys: Keys = NO_KEYS


@dataclass(kw_only=True)
class About:
    """What an assembly says of one of its volumes, a member or a child.

    `number` is its place in the assembly, by which mapping rows name it as a parent. `extents` are the rows
    of metadata that lie in it, and of what their allocator calls free; with the bytes that children's rows
    take they tile a member, and what is left over survey calls `gap`. What is None stays as it was. `checks`:
    what is proven of it, where it is of another format than the assembly.
    """

    number: int = -1
    type: str | None = None
    label: str | None = None
    uuid: str | None = None
    detail: str | None = None
    extents: ExtentRows = field(default_factory=ExtentRows)
    damage: Damage = field(default_factory=Damage)
    checks: "Checks | None" = None


@dataclass
class Child(About):
    """A new volume. `rows` place its bytes in its parents; `open`, where given, wraps the reader that follows
    the rows (decryption).

    `name` is the whole device name. `contents` False: not looked into (an extended partition, a hidden
    sub-volume). `unread` names the bytes that no reader claims: "BIOS boot". `holes` are where bytes that no
    row places read as zeroes since nothing was ever put there (thin volumes, image files); all others of that
    kind are lost. `traits`: what its bytes are tied to, as in tables.TRAITS. `holds`: the filesystem in it,
    where that is known: then nobody looks for a magic.
    """

    kind: str
    name: str
    size: int
    rows: Rows
    open: Callable[[Reader], Reader] | None = None
    contents: bool = True
    unread: str | None = None
    holes: list[tuple[int, int]] = field(default_factory=list)
    traits: int = 0
    holds: "FilesystemFormat | None" = None

    @cached_property
    def parents(self) -> list[int]:
        """The numbers of the volumes that it lies in."""
        return sorted(set(self.rows.parent.tolist()))

    def over(self, readers: Mapping[int, Reader], name: str) -> Reader:
        """Its bytes, given its parents' by their numbers."""
        parents = {number: readers[number] for number in self.parents}
        reader = MappedReader(self.size, name, parents, self.rows, self.holes)
        return self.open(reader) if self.open else reader


class Assembly:
    """What a volume module makes of its members: `volumes` are these, then the children in an order in which
    each comes after those that it lies in."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.volumes = [About(number=at) for at in range(len(members))]
        self.children: list[Child] = []

    def about(self, member: Member) -> About:
        """What is said of a member."""
        return self.volumes[member.number]

    def add(self, child: Child) -> Child:
        """One more volume, of which more may be said later; its `number` is set here."""
        child.number = len(self.volumes)
        self.volumes.append(child)
        self.children.append(child)
        return child


@dataclass
class ImageLayer:
    """One disk image: `size` bytes that the guest sees, in clusters (grains, blocks) of `cluster` bytes.

    The rows' `parent` counts `files`: 0 is the image file itself. They are sorted by volume_offset. `zeros`
    are ranges that lie nowhere and read as zeroes even where a backing file has data; what neither they nor
    rows cover is the backing file's. `extents` has one entry for each file. `facts` is for people and JSON.
    `unreadable` says why the guest's bytes can't be read though it is known where they lie; `inflate` is for
    compressed clusters, None where it is not known how they are. `lost` is what the image should hold of the
    disk and does not. `prove(disk, damage)` reads the disk, and says what checksums and hashes that the image
    keeps say of its bytes.
    """

    format: str
    files: Sequence[Reader]
    size: int
    cluster: int
    rows: Rows
    zeros: tuple[Int, Int]
    extents: list[ExtentRows]
    damage: Damage
    facts: dict[str, Any]
    unreadable: str | None = None
    inflate: Codec | None = None
    lost: Lost = NOTHING
    prove: Callable[[Reader, Damage], list[Proof]] | None = None

    @property
    def allocated(self) -> tuple[Int, Int]:
        """The guest's ranges that the backing file has no say in, sorted and merged."""
        ends = self.rows.volume_offset + self.rows.run
        return union(
            np.concatenate([self.rows.volume_offset, self.zeros[0]]), np.concatenate([ends, self.zeros[1]])
        )


class References(NamedTuple):
    """Other files that an image's header names, and the backing format that it states; `continued` is the
    file in which the image goes on behind its end."""

    backing: str | None = None
    backing_format: str | None = None
    data: str | None = None
    extents: tuple[str, ...] = ()
    continued: str | None = None

    def names(self) -> list[str]:
        return [name for name in (self.backing, self.data, *self.extents, self.continued) if name]


# ---- what a format says of itself --------------------------------------------------------------------------


class Docs(NamedTuple):
    """Short phrases, from which docs/formats.md is made: what is read, what is refused or only named, and
    what the reader was checked with."""

    features: tuple[str, ...]
    refused: tuple[str, ...]
    oracles: tuple[str, ...]


class Checks(NamedTuple):
    """Short phrases on what is proven of a volume of a format, from which docs/verification.md is made.

    `checksums` are those of metadata that are verified (None: the format has none); `rules` name a structure
    and, after a colon, what of it is a problem where it is broken; `unchecked` is never looked at.
    """

    checksums: str | None
    rules: tuple[str, ...]
    unchecked: tuple[str, ...] = ()


class Structure(NamedTuple):
    """A record type that lies at the start of a part of a volume, and whether others follow the first one to
    the part's end."""

    dtype: np.dtype[np.void]
    many: bool = False


Structures = Mapping[str, Structure]
"""By the part of the volume that an extent is; or `record`, an inode's own; or `directory`.

A word of the filesystem's features may follow: `record, crc`.
"""


def no_structures() -> Structures:
    """A format whose fields are not explained."""
    return {}


class History(NamedTuple):
    """What a format's metadata still says of the past.

    `former(reader, extents, starts, ends)` gives the table `former`: owners that are gone, of bytes that
    touch the ranges; `extents` are those of the map. `copy_of(reader, offset)` tells where a journal's byte
    belongs and in which transaction it was written, None where it is not a copy. `contents(reader)` gives the
    table `extents` of deleted files that the map still names, as if they were not deleted.
    """

    former: Callable[[Reader, pa.Table, Int, Int], pa.Table]
    copy_of: Callable[[Reader, int], tuple[int, int] | None] | None = None
    contents: Callable[[Reader], pa.Table] | None = None


class FilesystemFormat(NamedTuple):
    """A filesystem. `probe` goes by magic only and never raises on content; None where nothing but the listed
    magics need be asked, or none is listed, since a volume format says what its volumes hold.

    `read(reader, others, damage)` may use `others`, readers of volumes that nobody claimed (external
    journals); what is wrong, but leaves the rest readable, it says to `damage`.

    `allocator` names what of the format says which bytes are free, None where nothing does. Only an
    allocator's word makes bytes FREE, which may be given away; what merely nothing refers to is UNREFERENCED,
    and survey takes FREE for that where a format has no allocator.

    `structures` and `history` are called, and import what they need, only when somebody asks.
    `fixed_records`: inodes' own records all have one size, so that `record_offset`s tell it. `journals`: the
    parts of a map that are journals. `inode`: what numbers stand for, where the format has none.
    `target(data, size)`: the path in the bytes of a symbolic link whose inode has this size, None where it is
    none; formats that keep the plain path have no such function. `targets(reader)`: the inodes of all
    symbolic links, ascending, and their paths, for a format that keeps them packed.

    `in_place`: metadata is where it belongs before anything refers to it, with no journal between. `moving`:
    of a filesystem's own metadata, the parts that take free blocks and give them back; all else lies where
    it was made.
    `mount`: options with which a kernel shows all of it, None where it holds no files. `session`: of what may
    have been written in sessions, the option with which a kernel is told at which sector the one begins that
    it is to show. `scratch`: its content is worth nothing while no machine runs.

    `checks` says what is proven; `prove(found, damage)` asks what a map does not need, only for `check`.
    """

    name: str
    probe: Callable[[Reader], bool] | None
    read: Callable[[Reader, Sequence[Reader], Damage], Filesystem]
    docs: Docs
    checks: Checks
    allocator: str | None = None
    prove: Callable[[Filesystem, Damage], list[Proof]] | None = None
    structures: Callable[[], Structures] = no_structures
    history: Callable[[], History] | None = None
    journals: tuple[str, ...] = ()
    fixed_records: bool = False
    reuses_numbers: bool = True
    inode: str = ""
    target: Callable[[bytes, int], bytes | None] | None = None
    targets: Callable[[Reader], tuple[Int, pa.Array]] | None = None
    in_place: bool = False
    moving: tuple[str, ...] = ()
    mount: str | None = ""
    session: str | None = None
    scratch: bool = False


class Assembler(Protocol):
    """Whatever makes volumes of others."""

    @property
    def name(self) -> str:
        """For problems: who says so."""

    @property
    def allocator(self) -> str | None:
        """Whose word it is that bytes are free; see FilesystemFormat."""

    @property
    def checks(self) -> Checks | None:
        """What is proven of its members; None where each says so itself."""

    def assemble(self, members: Sequence[Member], /) -> Assembly:
        """The volumes that lie in these."""


class Identity(NamedTuple):
    """Who a member of something that spans volumes is: of which group, which of its members, and in which
    state the group was when it was written last. `below` are other groups that this one lies on, too."""

    group: str
    member: str
    state: int
    below: frozenset[str] = frozenset()


def nobody(reader: Reader) -> Identity | None:
    """A format whose volumes span nothing."""
    return None


class Slice(NamedTuple):
    """A partition in bytes of its disk, and whether something known begins there."""

    start: int
    end: int
    known: bool


class Beside(NamedTuple):
    """A partition table on a disk that carries another format's superblock as well."""

    partitions: Sequence[Slice]
    reaches_beyond: bool
    """Does it count further than the disk goes?"""


def outlived(reader: Reader, table: Beside) -> bool | None:
    """A superblock that is left over where a partition holds something."""
    return any(part.known for part in table.partitions)


class VolumeFormat(NamedTuple):
    """A partition table, volume manager, array or encryption.

    `name` is the type of its members in blkid's words.

    `assemble` gets one member; where the format `spans` volumes, all that were found so far. `allocator` as
    in FilesystemFormat. `holds`: what the volumes hold that it makes, where that is one filesystem of its own
    (btrfs). `is_leftover(reader, table)`: is its superblock one that was forgotten on a disk which has this
    partition table, too? None: the table is part of what the volume holds. `identify(reader)`: which member
    it is, where members span disks.
    """

    name: str
    probe: Callable[[Reader], bool]
    assemble: Callable[[Sequence[Member]], Assembly]
    docs: Docs
    checks: Checks
    spans: bool = False
    allocator: str | None = None
    structures: Callable[[], Structures] = no_structures
    holds: FilesystemFormat | None = None
    is_leftover: Callable[[Reader, Beside], bool | None] = outlived
    identify: Callable[[Reader], Identity | None] = nobody


RAW = "raw"
"""The format of a file that is the disk itself."""


class Writing(enum.Flag):
    """What can be had of images of a format by writing to them, through QEMU or (raw) by ourselves."""

    ANYWHERE = enum.auto()
    """A disk can be filled at any place, in any order."""
    COMPRESSED = enum.auto()
    """What is written can be stored compressed."""
    FREEING = enum.auto()
    """What is freed inside goes back to the host."""


class ShownFile(NamedTuple):
    """A file that QEMU is shown: `file` is its name, beside the image; None: so many `zeroes`.

    `check` raises ImageError where the file is not what it is said to be.
    """

    file: str | None
    zeroes: int = 0
    check: Callable[[Reader], None] | None = None


class Rewritten(NamedTuple):
    """What QEMU is shown in the place of an image file: `content`, made of the places of its `parts`."""

    parts: tuple[ShownFile, ...]
    content: Callable[[Sequence[str]], bytes]


def by_magic(image: Reader) -> bool:
    """A format that its magic alone tells."""
    return True


def no_references(image: Reader) -> References:
    """A format whose images are one file."""
    return References()


def ends_here(first: Reader, part: Reader, number: int) -> str | None:
    """A format whose images go on in no other file."""
    return None


def as_it_is(image: Reader) -> Reader:
    """A format without a log."""
    return image


def unmarked(image: Reader) -> Mark | None:
    """A format whose images say nothing of their state."""
    return None


def no_options(image: Reader) -> Mapping[str, str]:
    """A format whose driver needs no word more."""
    return {}


def one_size(image: Reader) -> int:
    """Bytes of a cluster that nothing else is said of: the default of qcow2 and of QEMU's dirty bitmaps."""
    return 64 << 10


ONLY_QEMU = "where the bytes lie in the file: only QEMU knows"
"""What is said of formats that have no reader."""


class ImageFormat(NamedTuple):
    """The format of a file with a disk in it. `name` is that of QEMU's driver, where it has one.

    `read(image, others)` gives the layer of an image; `others` are readers of the data file, the extents and
    the further parts that its header names, in its order. None: where the bytes lie only QEMU can say.
    `checks` says what is proven then; `allocator` as in FilesystemFormat.

    `references(image)` tells from the header alone what other files it names, and raises ImageError or
    Corrupt where it can't be followed; `cluster(image)` in what units it shows bytes of its own.
    `continued(first, part, number)`: the file in which it goes on behind this one, which is number `number`
    from 1 of those that `first` begins; None behind the last one.

    `in_qemu`: QEMU has a driver for it; where it has none, an image is read by its layer alone. QEMU is given
    the file, or what `rewritten(image, write)` says where its parser would take more for a name than is one;
    None: this image as it is. `options(image)` are those of its driver. `follows`: QEMU reads the backing
    files of such an image. `recovered(image)` is the file with its log replayed, and the
    same reader where there is none: `read` is given this, and QEMU replays none of what it only reads.
    `marked(image)`: that it is damaged, or was not closed, as its header alone tells. `refusal`: nothing
    opens these, and what to do instead. `suffix`: of files that are made in this format.
    """

    name: str
    docs: Docs
    checks: Checks | None = None
    probe: Callable[[Reader], bool] = by_magic
    read: Callable[[Reader, Sequence[Reader]], ImageLayer] | None = None
    allocator: str | None = None
    structures: Callable[[], Structures] = no_structures
    references: Callable[[Reader], References] = no_references
    continued: Callable[[Reader, Reader, int], str | None] = ends_here
    in_qemu: bool = True
    cluster: Callable[[Reader], int] = one_size
    rewritten: Callable[[Reader, bool], Rewritten | None] | None = None
    options: Callable[[Reader], Mapping[str, str]] = no_options
    recovered: Callable[[Reader], Reader] = as_it_is
    marked: Callable[[Reader], Mark | None] = unmarked
    follows: bool = True
    writing: Writing = Writing(0)
    suffix: str = ""
    refusal: str = ""
