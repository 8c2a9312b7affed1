"""A damaged image: one mutation of a seed, made in place, and undone."""

import contextlib
import random
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from virt_bmap.ask.check import check
from virt_bmap.core.errors import BmapError
from virt_bmap.core.keys import parse
from virt_bmap.core.mapping import DATA
from virt_bmap.core.reader import Reader
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import NOTHING_MORE, Asks
from virt_bmap.open.disks import NOTHING, Disks, Nested
from virt_bmap.survey import maps

from . import consumers, growth
from .damage import HOW_MANY, Class, Damage
from .disk import Disk, Patch
from .invariants import assert_sound
from .sealing import Sealer, find
from .sealing.unit import Volume
from .seeds import PASSPHRASE, Seed

WANTED = (tables.METADATA, tables.DIRECTORY, tables.TREE, tables.BOOT, tables.XATTR, tables.SYMLINK)
RANGES = 4000
"""Of one class: a damaged one more or less says nothing new."""
SEALED, CUT, GROWN = 0.85, 0.02, 0.12
"""How often checksums are put right, an image loses its end, or is grown."""
KEYS = parse((), [PASSPHRASE])


class Image:
    """A seed's disks under damage."""

    def __init__(self, seed: Seed, work: Path) -> None:
        self.name, self.host = seed.name, seed.host
        self.whole = seed.paths
        self.disks = [Disk(path, work / path.name) for path in seed.paths]
        self.paths = [str(disk.path) for disk in self.disks]
        self.work = work
        with self.opened() as (bmap, _):
            self.problems = bmap.problems.num_rows
            volumes = volumes_of(bmap)
            self.classes = _classes(bmap, self.disks)
        self.sealer = Sealer(self.disks, find(self.disks, volumes))
        self.fields = growth.fields(self.disks, bmap, volumes, self.classes)

    def close(self) -> None:
        for disk in self.disks:
            disk.close()

    @contextlib.contextmanager
    def opened(
        self, nested: Nested = NOTHING, asks: Asks = NOTHING_MORE
    ) -> Iterator[tuple[BlockMap, list[Reader]]]:
        """The map of the disks as they are now, and the readers of its volumes."""
        format = None if self.host else "raw"
        disks = Disks(self.paths, format=format, keys=KEYS, nested=nested, host_offsets=self.host)
        with maps.opened(disks, asks=asks) as found:
            yield found

    def mutate(self, number: int) -> list[str]:
        """The damage with this number; what was done."""
        rng = random.Random(f"{self.name}/{number}")
        damage, done = Damage(rng, self.disks, self.classes), []
        times = rng.choice(HOW_MANY)
        if rng.random() < GROWN:
            done.append(growth.grow(rng, self.disks, self.fields))
            times = rng.choice((0, 0, 1, 2))
        done += [damage.hurt() for _ in range(times)]
        if rng.random() < SEALED:
            self.sealer.seal()
            done.append("sealed")
        if rng.random() < CUT:
            disk = rng.choice(self.disks)
            disk.resize(
                rng.choice((rng.randrange(1, disk.size + 1), rng.randrange(disk.size // 512 + 1) * 512))
            )
            done.append(f"cut to {disk.size}")
        return done

    def use(self, number: int, ran: list[str]) -> str:
        """Map and check the disks, and let a choice of consumers that belongs to the number look at the map.

        What became of it; raises what is a fault.
        """
        rng = random.Random(f"{self.name}/{number}/consumers")
        ran.append("map")
        with contextlib.ExitStack() as stack:
            try:
                bmap, readers = stack.enter_context(self.opened())
            except BmapError:
                return "refused"
            ran.append("check")
            assert_sound(bmap, check(bmap))
            consumers.consume(consumers.Use(rng, self, bmap, readers), ran)
        return "mapped" if bmap.problems.num_rows <= self.problems else "damaged"

    def restore(self) -> None:
        for disk in self.disks:
            disk.restore()

    def patches(self) -> list[tuple[int, Patch]]:
        """(size, patch) of each disk."""
        return [(disk.size, disk.patch()) for disk in self.disks]

    def apply(self, patches: Sequence[tuple[int, Patch]]) -> None:
        for disk, (size, patch) in zip(self.disks, patches, strict=True):
            disk.apply(patch, size)

    def smaller(self, patches: Sequence[tuple[int, Patch]]) -> Iterator[list[tuple[int, Patch]]]:
        """Smaller damages to try: a disk's size as it was, half of its pieces, one piece less, half of one
        piece."""
        for number, (size, patch) in enumerate(patches):
            for less in self.disks[number].smaller(size, patch):
                yield [*patches[:number], less, *patches[number + 1 :]]

    def copy(self, out: Path) -> list[Path]:
        """The disks as they are now, in files of their own."""
        result = [
            out if len(self.disks) == 1 else out.with_name(f"{out.name}.{number}")
            for number in range(1, len(self.disks) + 1)
        ]
        for disk, path in zip(self.disks, result, strict=True):
            subprocess.run(["cp", "--sparse=always", disk.path, path], check=True)
        return result


def volumes_of(bmap: BlockMap) -> list[Volume]:
    """Those that lie in one piece on one disk, as they are."""
    found, encrypted = [], set[int]()
    for number, row in enumerate(bmap.volumes.to_pylist()):
        parents = bmap.rows_of(number).parent.tolist()
        if row["kind"] == "crypt" or encrypted & set(parents):
            encrypted.add(number)
            continue
        type, size = row["type"], row["size"]
        below = bmap.descend(number, np.array([0]), np.array([size]))
        below = below.take((below.role == DATA) & np.isin(below.volume, bmap.disks))
        if type and len(below.start) == 1 and below.length[0] == size:
            found.append(
                Volume(type, bmap.disks.index(int(below.volume[0])), int(below.start[0]), size, number, bmap)
            )
    return found


def _classes(bmap: BlockMap, disks: Sequence[Disk]) -> list[Class]:
    """What the map calls metadata, by volume, kind and part; the start of each disk where it names none."""
    found: dict[tuple[int, int, str | None], list[tuple[int, int, int]]] = defaultdict(list)
    for volume in range(bmap.volumes.num_rows):
        _, extents = bmap.slice_of("extents", volume)
        kind, parts = tables.codes(extents, "kind"), extents.column("part").to_pylist()
        mine = np.flatnonzero(np.isin(kind, WANTED))
        start = tables.integers(extents, "volume_offset")[mine]
        length = tables.integers(extents, "length")[mine]
        below = bmap.descend(volume, start, start + length)
        for query, disk, low, high in zip(
            below.query.tolist(), below.volume.tolist(), below.start.tolist(), below.end.tolist(), strict=True
        ):
            if disk in bmap.disks and low < high <= disks[bmap.disks.index(disk)].size:
                row = int(mine[query])
                found[volume, int(kind[row]), parts[row]].append((bmap.disks.index(disk), low, high))
    return [ranges[:RANGES] for ranges in found.values()] or [
        [(n, 0, min(disk.size, 65536)) for n, disk in enumerate(disks)]
    ]
