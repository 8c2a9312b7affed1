"""From disks to a block map: disk -> volumes -> filesystems, the only recursion in the project.

Every volume is looked at once. A volume format turns it (with others) into more volumes, a filesystem format
into tables; a volume that spans several members waits until no other volume is left to look at, so that all
its members are known.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from virt_bmap.core.amounts import counted, plural
from virt_bmap.core.arrays import Int, complement, ints, subtract, total, union
from virt_bmap.core.errors import (
    BmapError,
    Corrupt,
    FormatError,
    UsageError,
    is_strict,
    unexpected,
)
from virt_bmap.core.keys import NO_KEYS, Keys
from virt_bmap.core.layers import raw
from virt_bmap.core.mapping import Groups, Rows
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import stored_bytes
from virt_bmap.formats import foreign
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import FILE, BlockMap
from virt_bmap.model.contract import (
    NOT_LOOKED_AT,
    NOTHING_MORE,
    PROVEN,
    Asks,
    Assembler,
    Assembly,
    Checks,
    Child,
    Filesystem,
    FilesystemFormat,
    Member,
    Proof,
    VolumeFormat,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.damage import table as damage_table
from virt_bmap.open.disks import NOTHING, Nested
from virt_bmap.survey import rivals
from virt_bmap.survey.machines import Candidate, Machines, alike
from virt_bmap.survey.nested import MAX_LEVELS, ImageBudget
from virt_bmap.survey.owners import check_names, check_owners
from virt_bmap.survey.sleeping import asleep_in

if TYPE_CHECKING:
    from virt_bmap.open.host import Host

MAX_DEPTH = 16
"""Layers on top of each other.

Real stacks have five (disk, partition, md, LUKS, LVM); a hostile one must end.
"""
MAX_VOLUMES = 16384
"""Volumes of all disks together.

A group of ten thousand logical volumes is real; a table that shows itself again and again must end.
"""


PARTITIONED = ("disk", "image", "md")
"""Kinds of volumes in which a kernel looks for partitions."""
NAMED = ("partition", "lv", "md", "crypt", "image")
"""Kinds of volumes of which no two have one name; a btrfs pool is called as its first device."""


@dataclass
class _Volume:
    """A volume, and what became known of it so far."""

    number: int
    kind: str
    name: str
    reader: Reader
    depth: int
    disk: int | None
    size: int
    type: str | None = None
    label: str | None = None
    uuid: str | None = None
    detail: str | None = None
    unread: str = "unrecognised"
    traits: int = 0
    is_counted: bool = True
    rows: Rows | None = None
    home: "_Volume | None" = None
    """The disk in which it lies, where that is one of several machines'."""
    extents: list[pa.Table] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    holds: FilesystemFormat | None = None
    filesystem: Filesystem | None = None

    @property
    def source(self) -> str:
        """The image or file that its bytes come from."""
        return self.reader.name.rpartition(" of ")[2]

    @property
    def called(self) -> str:
        """What a disk is called by those who keep several machines' apart: as its image is."""
        return self.source if self.kind == "disk" else self.name

    def damage(self, source: str) -> Damage:
        """What this format, or part of the survey, finds on it."""
        for damage in self.damages:
            if damage.source == source:
                return damage
        self.damages.append(Damage(source))
        return self.damages[-1]

    @property
    def state(self) -> str:
        """What its filesystem says of itself, unless an error tells more: here alone it is called damaged."""
        assert self.filesystem
        is_damaged = self.damage(self.filesystem.type).is_damaged
        return tables.DAMAGED if is_damaged else self.filesystem.state


def survey(
    disks: Sequence[Reader],
    progress: Callable[[str], None] = lambda _: None,
    keys: Keys = NO_KEYS,
    nested: Nested = NOTHING,
    asks: Asks = NOTHING_MORE,
    machines: bool = False,
) -> BlockMap:
    """The block map of these disks, which become /dev/sda, /dev/sdb, ...

    `progress` is called with the name of each volume before it is read; `keys` open encrypted volumes;
    `nested` says which files are disks, too; `asks` is what is wanted beside the map; the disks are of one
    machine, or of several `machines`. Raises ImageError where
    a disk can't be read; what is wrong *on* a disk becomes rows of `problems`.
    """
    return _Survey(disks, progress, keys, nested, asks, machines).run()


def survey_host(
    host: "Host",
    progress: Callable[[str], None] = lambda _: None,
    keys: Keys = NO_KEYS,
    nested: Nested = NOTHING,
    asks: Asks = NOTHING_MORE,
    machines: bool = False,
) -> tuple[BlockMap, list[Reader]]:
    """The block map of the disks in these image files, in bytes of the files: these become disk 1, 2, ...,
    and the guest's disks volumes in them. And the reader of each volume, by its number."""
    work = _Survey([], progress, keys, nested, asks, machines)
    work.start_on(host)
    return work.run(), [volume.reader for volume in work.volumes]


def survey_open(
    disks: Sequence[Reader],
    progress: Callable[[str], None] = lambda _: None,
    keys: Keys = NO_KEYS,
    nested: Nested = NOTHING,
    asks: Asks = NOTHING_MORE,
    machines: bool = False,
) -> tuple[BlockMap, list[Reader]]:
    """Like `survey`, with the reader of each volume by its number: opened, rebuilt from parity, journals
    replayed, as the map's rows mean the bytes.

    `layers.raw` of one are the bytes as they lie on the disk. They read while the disks are open.
    """
    work = _Survey(disks, progress, keys, nested, asks, machines)
    return work.run(), [volume.reader for volume in work.volumes]


class _Survey:
    def __init__(
        self,
        disks: Sequence[Reader],
        progress: Callable[[str], None],
        keys: Keys,
        nested: Nested,
        asks: Asks = NOTHING_MORE,
        machines: bool = False,
    ) -> None:
        self.nested, self.images = nested, ImageBudget()
        self.asks = asks
        self.apart = ("image", "disk") if machines else ("image",)
        """Kinds of volumes that are disks of other machines."""
        self.volumes: list[_Volume] = []
        self.progress = progress
        self.keys = keys
        for number, reader in enumerate(disks, 1):
            disk = self._add("disk", tables.disk_name(number), reader, 0, number)
            if reader.in_use:
                words = f"was in use while it was read: {reader.in_use}; the map may mix several states"
                disk.damage("survey").say("in-use", words)
            for mark in reader.marks:
                disk.damage("survey").say(mark.code, mark.words, severity=mark.severity)
        self.todo = list(self.volumes)
        self.waiting: dict[str, tuple[VolumeFormat, list[_Volume]]] = {}
        """Members of what spans volumes, by the format's name; complete when no volume is left to look at."""
        self.machines = Machines()
        self.names: dict[str, int] = {}
        self.unclaimed: list[_Volume] = []
        self.found: list[tuple[_Volume, FilesystemFormat]] = []

    def start_on(self, host: "Host") -> None:
        """Start with files of the host instead of disks; the disks are what lies in them."""
        files = [
            self._add(FILE, path, reader, 0, number)
            for number, (path, reader) in enumerate(zip(host.paths, host.files, strict=True), 1)
        ]
        self._assemble(host, files)

    def run(self) -> BlockMap:
        done = 0
        for level in range(MAX_LEVELS + 1):
            while self.todo or self.waiting:
                while self.todo:
                    self._look_at(self.todo.pop(0))
                if self.waiting:
                    self._assemble_machines(*self.waiting.pop(min(self.waiting, key=formats.rank)))
            fresh, done = self.found[done:], len(self.found)
            for volume, format in fresh:
                self._read(volume, format)
            if level < MAX_LEVELS:
                for volume, _ in fresh:
                    self._look_beside(volume)
                    if self.nested:
                        self._open_images(volume)
        if absent := sorted(self.nested.paths - self.images.paths):
            raise UsageError(
                f"no file {os.fsdecode(absent[0])!r} on any filesystem of these disks, to open it as a disk"
            )
        if any(volume.reader.session for volume in self.volumes) and not any(
            format.session for _, format in self.found
        ):
            raise UsageError("--session: no disc (ISO 9660 or UDF) is among these disks")
        rows = Rows.concat([volume.rows for volume in self.volumes if volume.rows is not None])
        inside = Groups(rows, rows.parent)
        self._note_covered()
        for volume in self.volumes:
            self._tile(volume, inside.of(volume.number))
        return self._tables()

    def _note_covered(self) -> None:
        """The traits that volumes have by what lies beside them."""
        slack = any(volume.filesystem and volume.filesystem.size < volume.size for volume in self.volumes)
        if not slack and not any(volume.traits & tables.VOUCHING for volume in self.volumes):
            return
        from virt_bmap.survey.vouching import Surveyed, covered  # with hashlib: seldom needed

        seen = [
            Surveyed(
                volume.number,
                volume.name,
                volume.type,
                volume.traits,
                volume.reader,
                volume.filesystem.size if volume.filesystem else -1,
                volume.rows is None,
            )
            for volume in self.volumes
        ]
        for found in list(covered(seen)):
            volume = self.volumes[found.number]
            volume.traits |= found.trait
            volume.damage("vouching").say("vouched", found.detail)

    def _look_beside(self, parent: _Volume) -> None:
        """Partitions beside a filesystem that has the whole disk, as further volumes to look at."""
        if parent.filesystem and formats.is_hybrid(raw(parent.reader)):
            from virt_bmap.formats.volumes.hybrid import Hybrid

            start, end, kind, _ = _spans(parent.extents)
            mine = ~np.isin(kind, tables.IDLE)
            self._assemble(Hybrid(union(start[mine], end[mine])), [parent])

    def _open_images(self, parent: _Volume) -> None:
        """Files of a filesystem that are disks themselves, as further volumes to look at."""
        if parent.filesystem:
            # with pyarrow.compute and all image formats: seldom needed
            from virt_bmap.survey.nested.inner import Inner

            self._assemble(Inner(parent.filesystem, self.nested, self.images), [parent])

    def _add(self, kind: str, name: str, reader: Reader, depth: int, disk: int | None) -> _Volume:
        volume = _Volume(len(self.volumes), kind, name, reader, depth, disk, reader.size)
        volume.home = volume if kind in self.apart else None
        self.volumes.append(volume)
        return volume

    def _look_at(self, volume: _Volume) -> None:
        """Find out what the volume holds, and send it where that is read.

        Not even its first bytes may be readable: a compressed cluster can be damaged.
        """
        self.progress(volume.name)
        with self._refusing([volume], "survey"):
            self._send(volume)

    def _send(self, volume: _Volume) -> None:
        if volume.holds:
            volume.type = volume.holds.name
            self.found.append((volume, volume.holds))
            return
        format = formats.volume_on(volume.reader, has_header=self.keys.header_of(volume.name) is not None)
        if format and volume.kind in PARTITIONED and (verdict := rivals.judge(volume.reader, format)):
            format = verdict.believed
            volume.damage("survey").say("leftover", verdict.words, severity=verdict.severity)
        again = format.name if format and self._shows_again(volume, format) else None
        if format and not again:
            volume.type = format.name
            if volume.depth >= MAX_DEPTH:
                volume.damage("survey").say("too-deep", f"more than {MAX_DEPTH} layers", 0)
                self._whole(volume, format.name)
            elif format.spans:
                self.waiting.setdefault(format.name, (format, []))[1].append(volume)
            else:
                self._assemble(format, [volume])
        elif system := formats.filesystem_on(volume.reader):
            volume.type = system.name
            self.found.append((volume, system))
        elif (name := foreign.recognise(volume.reader)) and name != again:
            volume.type, volume.traits = name, volume.traits | foreign.TRAITS.get(name, 0)
            self.unclaimed.append(volume)  # an external journal ("jbd") is of use to its filesystem
            self._whole(volume, name)
        else:
            if volume.kind == "disk" and stored_bytes(volume.reader) == 0:
                volume.detail = "blank: nothing is stored of it"
            self.unclaimed.append(volume)
            self._whole(volume, volume.unread)

    def _shows_again(self, volume: _Volume, format: VolumeFormat) -> bool:
        """A partition that begins with the disk's first byte, as the first of Sun's does, shows the disk's
        own table once more."""
        rows = volume.rows
        if rows is None or volume.kind != "partition" or rows.parent_offset[0] != 0:
            return False
        return bool(self.volumes[int(rows.parent[0])].type == format.name)

    def _assemble_machines(self, format: VolumeFormat, members: list[_Volume]) -> None:
        """Those of each machine by themselves: other machines may have the same names and identities."""
        candidates = [
            Candidate(volume.home.number, volume.home.called, format.identify(volume.reader))
            for volume in members
            if volume.home
        ]
        machine = iter(self.machines.sort(candidates))
        groups: dict[int, list[_Volume]] = {}
        for volume in members:
            groups.setdefault(next(machine) if volume.home else -1, []).append(volume)
        for group in groups.values():
            self._assemble(format, group)

    def _assemble(self, by: Assembler, members: list[_Volume]) -> None:
        """Let a volume format make volumes of its members; where it refuses, they are one piece each, with
        the reason."""
        with self._refusing(members, by.name):
            self._add_assembly(
                by.assemble([Member(at, v.name, v.reader, self.keys) for at, v in enumerate(members)]),
                by,
                members,
            )

    def _add_assembly(self, assembly: Assembly, by: Assembler, members: list[_Volume]) -> None:
        base = len(self.volumes)
        numbers = ints([volume.number for volume in members] + [*range(base, base + len(assembly.children))])
        left = max(0, MAX_VOLUMES - base)
        for child in assembly.children[:left]:
            self._add_child(child, numbers)
        if len(assembly.children) > left:
            members[0].damage(by.name).say(
                "too-many",
                f"{counted(len(assembly.children), '[volume lies|volumes lie] in it')}; of all disks "
                f"together at most {MAX_VOLUMES:,} are looked at",
            )
        for at, (about, volume) in enumerate(
            zip(assembly.volumes, members + self.volumes[base:], strict=False)
        ):
            for name in ("type", "label", "uuid", "detail"):
                if (said := getattr(about, name)) is not None:
                    setattr(volume, name, said)
            if about.extents:
                extents = about.extents.table(volume.number)
                self._add_extents(volume, by.name, _believed(extents, by.allocator))
            volume.damage(by.name).take(about.damage)
            if checks := about.checks or (by.checks if at < len(members) else None):
                volume.proofs += said_of_all(checks)

    def _add_child(self, child: Child, numbers: Int) -> None:
        """A new volume; `numbers` are those that the volumes of its assembly have here."""
        parents = {at: self.volumes[numbers[at]] for at in child.parents}
        disks = {parent.disk for parent in parents.values()}
        images = dict.fromkeys(parent.source for parent in parents.values())
        home = next((parent.home for parent in parents.values() if parent.home), None)
        is_whole = child.kind in ("image", "pool")  # the name of a device is in it
        if home and not is_whole and not _is_called_after(child.name, parents.values()):
            child.name = f"{self.volumes[self.machines.of(home.number)].name}:{child.name}"
        if child.kind in NAMED:
            self._name(child)
        name = f"{child.name} of {', '.join(images)}"
        reader = child.over({at: parent.reader for at, parent in parents.items()}, name)
        depth = 1 + max((parent.depth for parent in parents.values()), default=0)
        volume = self._add(child.kind, child.name, reader, depth, disks.pop() if len(disks) == 1 else None)
        volume.size, volume.rows = child.size, child.rows.placed(volume.number, numbers)
        volume.unread, volume.traits = child.unread or volume.unread, child.traits
        volume.holds = child.holds
        volume.home = volume.home or home
        if child.contents:
            self.todo.append(volume)
        elif child.unread:
            self._whole(volume, child.unread)

    def _name(self, child: Child) -> None:
        wanted, child.name = child.name, self._own_name(child.name)
        if child.kind == "crypt" and child.name != wanted:
            child.damage.say(
                "duplicate",
                f"{wanted} is the name of another volume, too: the same container twice, clones or one disk "
                f"by two paths; both are shown, this one as {child.name}",
            )

    def _own_name(self, name: str) -> str:
        """The name, with a number behind it where another volume is called so."""
        number = self.names.get(name, 0) + 1
        while (own := f"{name}#{number}" if number > 1 else name) in self.names:
            number += 1
        self.names[own], self.names[name] = 1, number
        return own

    def _read(self, volume: _Volume, format: FilesystemFormat) -> None:
        """Let a filesystem's reader read its volume."""
        self.progress(volume.name)
        with self._refusing([volume], format.name):
            damage = volume.damage(format.name)
            found = format.read(volume.reader, [other.reader for other in self._beside(volume)], damage)
            damage.source = found.type
            check_names(found, damage)
            volume.proofs += said_of_all(format.checks)
            if not format.allocator:
                volume.proofs.append(
                    Proof(
                        "allocator",
                        NOT_LOOKED_AT,
                        "the format has none: what nothing refers to counts as free",
                    )
                )
            if format.prove:
                self._prove(volume, format.prove, found, damage)
            self._add_extents(
                volume, found.type, on_volume(_believed(found.extents, format.allocator), volume.number)
            )
            volume.filesystem = found
            volume.reader = found.reader
            volume.type, volume.traits = found.type, volume.traits | found.traits
            volume.is_counted = format.allocator is not None
            if Asks.SLEEP in self.asks and (file := asleep_in(found)):
                volume.traits |= tables.SLEEPING
                damage.say("asleep", f"{file} holds the memory of a machine that sleeps")

    @contextlib.contextmanager
    def _refusing(self, volumes: list[_Volume], name: str) -> Iterator[None]:
        """What a format refuses stays one piece, with the reason.

        So does what no format of ours may fail at, but did: the rest of the map is not lost with it.
        """
        count = len(self.volumes)
        try:
            yield
        except FormatError as error:
            self._undo(volumes, count, name, error)
        except BmapError:
            raise
        except Exception as error:
            if is_strict():
                raise
            self._undo(volumes, count, name, Corrupt(unexpected(error), code="unexpected"))

    def _undo(self, volumes: list[_Volume], count: int, name: str, error: FormatError) -> None:
        """Without the volumes that were made since there were `count`."""
        del self.volumes[count:]
        self.todo = [volume for volume in self.todo if volume.number < count]
        for volume in volumes:
            self._refused(volume, volume.type or name, error)

    def _add_extents(self, volume: _Volume, source: str, extents: pa.Table) -> None:
        """Rows of a format, as far as they lie in the volume:
        what damage names beyond its end is not there."""
        kept, outside = _inside(extents, volume.size)
        volume.extents.append(kept)
        if outside:
            what = "[extent lies|extents lie] outside the volume, or [reaches|reach] out of it: cut off"
            volume.damage(source).add("outside", what, count=outside)

    def _prove(
        self,
        volume: _Volume,
        prove: Callable[[Filesystem, Damage], list[Proof]],
        found: Filesystem,
        damage: Damage,
    ) -> None:
        """Ask what the map did not need, if that is wanted. What can't even be read for it is damage, too."""
        if Asks.PROOFS not in self.asks:
            volume.proofs.append(Proof("checksums", NOT_LOOKED_AT, "not asked when the map was made"))
            return
        try:
            volume.proofs += prove(found, damage)
        except FormatError as error:
            damage.refuse(error, "its metadata can't be checked")
        except BmapError:
            raise
        except Exception as error:
            if is_strict():
                raise
            damage.say("unexpected", unexpected(error))

    def _beside(self, volume: _Volume) -> list[_Volume]:
        """What nobody claims; where there are several machines, of journals of one identity the nearest one
        only: clones have each their own."""
        if not volume.home:
            return self.unclaimed
        nearest: dict[object, _Volume] = {}
        for other in sorted(self.unclaimed, key=partial(self._nearness, volume), reverse=True):
            nearest.setdefault(foreign.log_of(other.reader, other.type) or other.number, other)
        return list(nearest.values())

    def _nearness(self, one: _Volume, other: _Volume) -> tuple[bool, int]:
        if not one.home or not other.home:
            return False, 0
        is_same = self.machines.of(one.home.number) == self.machines.of(other.home.number)
        return is_same, alike(one.home.called, other.home.called)

    def _refused(self, volume: _Volume, name: str, error: FormatError) -> None:
        volume.damage(name).refuse(error)
        self._whole(volume, name)

    def _whole(self, volume: _Volume, name: str) -> None:
        """The volume is one piece that is named but not looked into."""
        rows = tables.ExtentRows()
        rows.add(tables.CONTENT, 0, volume.size, part=name)
        volume.extents = [rows.table(volume.number)]
        volume.reader.forget_ends()

    def _tile(self, volume: _Volume, inside: Rows) -> None:
        """Give an owner to what nobody named, so that the rows and the children, which lie `inside`, together
        cover the volume."""
        found = volume.filesystem
        size = min(found.size, volume.size) if found else volume.size
        damage = volume.damage(found.type if found else volume.type or "survey")
        # strided runs on one parent fill their span together: each member's runs follow each other
        known = _owned(volume, (inside.parent_offset, inside.parent_end), damage)
        left, behind = complement(*known, 0, size), complement(*known, size, volume.size)
        rows = tables.ExtentRows()
        if found and len(left[0]):
            ranges = f"[byte|bytes] in {plural(len(left[0]), 'range')}"
            code, text = "unreferenced", f"{ranges} [has|have] nothing that refers to [it|them]"
            if volume.is_counted:
                code, text = "unowned", f"{ranges} [is|are] allocated, but nothing refers to [it|them]"
            damage.say(code, counted(total(*left), text), int(left[0][0]))
        kind = tables.GAP if not found else tables.UNKNOWN if volume.is_counted else tables.UNREFERENCED
        rows.add(kind, left[0], left[1] - left[0])
        rows.add(tables.GAP, behind[0], behind[1] - behind[0], part="slack")
        volume.extents.append(rows.table(volume.number))

    def _tables(self) -> BlockMap:
        found = [volume for volume in self.volumes if volume.filesystem]
        systems = [(volume, volume.filesystem) for volume in found if volume.filesystem]
        mapped = [volume.rows for volume in self.volumes if volume.rows is not None]
        column = _columns(self.volumes)
        return BlockMap(
            volumes=tables.make(
                "volumes", volume=column("number"), disk=column("disk"), kind=column("kind"),
                name=column("name"), size=column("size"), type=column("type"), label=column("label"),
                uuid=column("uuid"), detail=column("detail"), traits=column("traits"),
            ),
            mappings=tables.mappings(mapped),
            filesystems=tables.make(
                "filesystems", volume=[volume.number for volume, _ in systems],
                **{name: [getattr(system, name) for _, system in systems]
                   for name in ("type", "uuid", "label", "block_size", "size", "features")},
                state=[volume.state for volume, _ in systems],
                root=[None if system.root < 0 else system.root for _, system in systems],
            ),
            inodes=tables.concat("inodes",
                [on_volume(system.inodes, volume.number) for volume, system in systems]),
            names=tables.concat("names",
                [on_volume(system.names, volume.number) for volume, system in systems]),
            extents=tables.concat("extents", [table for volume in self.volumes for table in volume.extents]),
            problems=damage_table(
                (volume.number, damage) for volume in self.volumes for damage in volume.damages
            ),
            proofs=[(volume.number, proof) for volume in self.volumes for proof in volume.proofs],
        )  # fmt: skip


def said_of_all(checks: Checks) -> list[Proof]:
    """What holds of every volume of a format that was read, where nothing contradicts it."""
    structure = Proof("structure", PROVEN, ", ".join(words.partition(":")[0] for words in checks.rules))
    if checks.checksums is None:
        return [structure, Proof("checksums", NOT_LOOKED_AT, "the format has none")]
    return [structure, Proof("checksums", PROVEN, checks.checksums)]


def _is_called_after(name: str, parents: Iterable[_Volume]) -> bool:
    """Is this the name of one of these with more behind it: of a partition, of what lies in a file?"""
    return any(name.startswith(one.name) and not name[len(one.name) :].startswith("/") for one in parents)


def _columns(rows: Sequence[_Volume]) -> Callable[[str], list[object]]:
    return lambda name: [getattr(row, name) for row in rows]


def _owned(volume: _Volume, children: tuple[Int, Int], damage: Damage) -> tuple[Int, Int]:
    """What of a volume has an owner, as starts and ends, each in an order of its own.

    What was found to be unreferenced gives way to all that turned up since: the volume's extents are changed.
    """
    start, end, kind, flags = _spans(volume.extents)
    claimed = kind != tables.UNREFERENCED
    low, high = check_owners(start[claimed], end[claimed], kind[claimed], flags[claimed], damage)
    known = np.append(low, children[0]), np.append(high, children[1])
    if claimed.all():
        return known
    low, high = subtract(start[~claimed], end[~claimed], *known)
    rows = tables.ExtentRows()
    rows.add(tables.UNREFERENCED, low, high - low)
    volume.extents = [
        table.filter(pa.array(tables.codes(table, "kind") != tables.UNREFERENCED)) for table in volume.extents
    ]
    volume.extents.append(rows.table(volume.number))
    return np.append(known[0], low), np.append(known[1], high)


def _spans(extents: list[pa.Table]) -> tuple[Int, Int, Int, Int]:
    """(starts, ends, kinds, flags) of the extents of a volume, but of those that lie in others, which own no
    bytes by themselves."""
    none = np.zeros(0, np.int64)
    start, length, flags = (
        np.concatenate([none, *(tables.integers(table, name) for table in extents)])
        for name in ("volume_offset", "length", "flags")
    )
    kind = np.concatenate([none, *(tables.codes(table, "kind") for table in extents)])
    own = flags & tables.INLINE == 0
    return start[own], (start + length)[own], kind[own], flags[own]


def _inside(extents: pa.Table, size: int) -> tuple[pa.Table, int]:
    """The rows that lie in a volume of this size, and how many did not: what reaches over its end is cut off
    there, the rest is left out."""
    start, length = tables.integers(extents, "volume_offset"), tables.integers(extents, "length")
    good = (start >= 0) & (length > 0) & (length <= size - start)
    if good.all():
        return extents, 0
    cut = np.where(start >= 0, np.minimum(length, size - start), 0)
    for name in ("length", "file_length"):
        at, values = extents.schema.get_field_index(name), tables.integers(extents, name)
        # of packed content all of the file's bytes are gone or none
        values = np.where(values == length, cut, values)
        extents = extents.set_column(at, extents.schema.field(at), tables.arrow(values, values < 0))
    return extents.filter(pa.array(cut > 0)), int(np.count_nonzero(~good))


def _believed(extents: pa.Table, allocator: str | None) -> pa.Table:
    """The rows of a format, in which nothing is called free where it has no allocator to say so."""
    kind = tables.codes(extents, "kind")
    if allocator or not (kind == tables.FREE).any():
        return extents
    kind = np.where(kind == tables.FREE, tables.UNREFERENCED, kind).astype(np.int8)
    at = extents.schema.get_field_index("kind")
    return extents.set_column(
        at,
        extents.schema.field(at),
        pa.DictionaryArray.from_arrays(tables.arrow(kind), pa.array(tables.KINDS)),
    )


def on_volume(table: pa.Table, number: int) -> pa.Table:
    """The table with its `volume` column set."""
    field = table.schema.field("volume")
    column = tables.arrow(np.full(table.num_rows, number, np.int32))
    return table.set_column(table.schema.get_field_index("volume"), field, column)
