"""Both sides of a comparison, opened: images, NBD exports, backing chains, saved maps."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from virt_bmap.accesses.ranges import RangeList
from virt_bmap.core.errors import ImageError, MapError, UsageError
from virt_bmap.core.reader import Reader
from virt_bmap.diff import identity
from virt_bmap.diff.delta import CLUSTER
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open import open_disks, open_image
from virt_bmap.open.disks import Disks
from virt_bmap.open.magic import is_uri
from virt_bmap.open.status import DEPTH, DIRTY
from virt_bmap.survey import maps
from virt_bmap.survey.maps import Watcher
from virt_bmap.survey.survey import survey_open


class Question(NamedTuple):
    """What is asked: what became of the first of the disks `new`, since it was `old`. Both are images, block
    devices, NBD URIs or saved maps; `old` None: the backing chain of `new`, or nothing older is there.

    `bitmap` names a dirty bitmap of `new`; `ranges` are changed ranges of disk number `disk`. `verify` reads
    what other means call changed. `force` compares what does not look like one disk.
    """

    old: str | None
    new: Disks
    """The further ones are what it takes to map what spans several; the delta is of the first one. Their
    formats are found by magic."""
    bitmap: str | None = None
    ranges: RangeList | None = None
    disk: int = 1
    verify: bool = False
    force: bool = False
    old_format: str | None = None
    old_further: tuple[str, ...] = ()
    """The further disks as they were; none: as they are now."""

    def then(self, image: str, format: str | None) -> Disks:
        """The disks as they were, the first one as this image."""
        return replace(self.new, images=(image, *(self.old_further or self.new.images[1:])), format=format)


class Telling(NamedTuple):
    """How progress is told: `mapping` is given the open disks of a side and returns what hears each volume's
    name; `comparing` hears how many bytes are done, and of how many."""

    mapping: Watcher = lambda _: lambda _: None
    comparing: Callable[[int, int], None] = lambda _done, _all: None


class OpenSide(NamedTuple):
    """One side, open: its map, and for a disk that can be read its reader and those of its volumes."""

    name: str
    bmap: BlockMap
    reader: Reader | None = None
    volumes: list[Reader] | None = None

    def size(self, disk: int) -> int:
        """Bytes of disk number `disk`, from 1."""
        size: int = self.bmap.size_of(self.bmap.disk(disk))
        return size


class Plan(NamedTuple):
    """What is compared with what: the older side (None: there is none), and of how many images of a backing
    chain, with clusters of `cluster` bytes at most, the delta is; `layers` 0: it is found in another way."""

    old: Disks | None
    layers: int = 0
    cluster: int = CLUSTER


def plan(question: Question) -> Plan:
    """Find out what is asked: a backing chain is compared with what lies below it.

    Raises UsageError where there is nothing to compare.
    """
    new, old = question.new.images[0], question.old
    asked = Plan(None if old is None else question.then(old, question.old_format))
    if question.bitmap is not None or question.ranges is not None:
        return asked
    if is_uri(new):
        return Plan(None, 1) if old is None else asked
    if maps.is_saved(new) or (old is not None and (is_uri(old) or maps.is_saved(old))):
        if old is None:
            raise UsageError(f"{new}: is only one map; name two, or a map and a disk")
        return asked
    from virt_bmap.open.references import backing_chain

    chain = backing_chain(new, question.new)
    if old is None:
        if len(chain) == 1:
            raise UsageError(
                f"{new}: has no backing file; name what to "
                "compare it with, an older image or map, or a --bitmap"
            )
        return Plan(question.then(chain[1].path, chain[1].format), 1, chain[0].cluster)
    for number, layer in enumerate(chain[1:], 1):
        if os.path.exists(layer.path) and os.path.exists(old) and os.path.samefile(layer.path, old):
            cluster = max(each.cluster for each in chain[:number])
            return Plan(question.then(old, layer.format), number, cluster)
    return asked


def open_sides(
    question: Question, stack: contextlib.ExitStack, telling: Telling
) -> tuple[Plan, OpenSide | None, OpenSide]:
    """What is compared, and both sides, mapped; they stay open as long as `stack`.

    Raises what `plan` does, and ImageError or MapError in words that name the side.
    """
    found = plan(question)
    status = [DEPTH] if found.layers else [DIRTY + question.bitmap] if question.bitmap is not None else []
    new = _open(question.new, status, question, stack, telling)
    old = _open(found.old, [], question, stack, telling) if found.old is not None else None
    if old is not None and not question.force:
        _require_one_disk(old, new, question.disk, resized=found.layers > 0)
    return found, old, new


def _open(
    disks: Disks, status: list[str], question: Question, stack: contextlib.ExitStack, telling: Telling
) -> OpenSide:
    name, *further = disks.images
    if maps.is_saved(name):
        if status:
            raise UsageError(
                f"{name}: is a saved map, which has no "
                f"{status[0].removeprefix('qemu:')}: name the disk itself"
            )
        bmap = maps.load(name)
        if bmap.given_paths:
            raise MapError(
                f"{name}: is a text map, which holds no inodes to "
                "compare: make a Parquet map (virt-bmap -o map.parquet)"
            )
        side = OpenSide(name, bmap)
    else:
        reader = stack.enter_context(contextlib.closing(open_image(name, disks, status)))
        if question.disk != 1:
            raise UsageError(
                f"{name}: --disk counts the disks of saved maps; of images the first one named is compared"
            )
        readers = [reader, *stack.enter_context(open_disks(further, replace(disks, format=None)))]
        bmap, volumes = survey_open(readers, telling.mapping(readers), disks.keys, machines=disks.machines)
        side = OpenSide(name, bmap, reader, volumes)
    if bmap.on_files:
        raise MapError(f"{name}: is a map of an image file's own bytes, not of the disk that a guest sees")
    bmap.disk(question.disk, name)
    return side


def _require_one_disk(old: OpenSide, new: OpenSide, disk: int, resized: bool) -> None:
    """ImageError where sizes differ (an overlay may be
    `resized`), MapError where the disks are different ones."""
    if old.size(disk) != new.size(disk) and not resized:
        raise ImageError(
            f"{old.name} has {old.size(disk):,} bytes, {new.name} {new.size(disk):,}: they are of different "
            "disks, or one was resized; --force compares them anyway"
        )
    identity.require_same(old.bmap, old.name, new.bmap, new.name, disk)
