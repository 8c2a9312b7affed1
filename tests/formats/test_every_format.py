"""What every format must show, on every small image of it (tests/recipes): all bytes owned and proven, names
and content those that were put in, type and label what blkid says, parts explained, the past told, hostile
names harmless, damage survived.

A new format is in as soon as it is listed and has a recipe; the last tests fail for one that shows less.
`BMAP_MUTATIONS=3000` damages each image so many times, not only often enough to see that it can be damaged.
"""

import hashlib
import io
import json
import os
import random
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tools.fuzz import consumers, worker
from tools.fuzz.disk import scratch
from tools.fuzz.images import Image, volumes_of
from tools.fuzz.invariants import assert_sound
from tools.fuzz.seeds import Seed

import recipes
from recipes.made import Made, Tree
from support import need
from virt_bmap.ask.check import check
from virt_bmap.ask.content import Files, spread
from virt_bmap.ask.explain import explain, fields_at
from virt_bmap.ask.history import former_owners
from virt_bmap.core.reader import Reader
from virt_bmap.diff import attribute
from virt_bmap.diff.delta import of_owners
from virt_bmap.formats import registry
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import RAW, Asks, FilesystemFormat
from virt_bmap.saved import bmap as text_map

MUTATIONS = int(os.environ.get("BMAP_MUTATIONS", "12"))


class Specimen(NamedTuple):
    """The images of a recipe, whole: what is known of them, copies to damage, their map, its readers."""

    name: str
    made: Made
    image: Image
    bmap: BlockMap
    readers: list[Reader]

    def types(self) -> set[str]:
        """What its volumes are."""
        return {type for type in self.bmap.volumes.column("type").to_pylist() if type}


SHOWN: dict[str, set[str]] = defaultdict(set)
"""By what a volume is, all that was shown of it."""
MADE: set[str] = set()
"""The recipes whose images were made and mapped."""


@pytest.fixture(scope="module", params=recipes.RECIPES)
def specimen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Specimen]:
    name, folder = request.param, tmp_path_factory.mktemp("images")
    try:
        made = recipes.make(name, folder)
    except recipes.Left as reason:
        pytest.skip(str(reason))
    assert sorted(folder.iterdir()) == sorted(made.disks), "nothing else is left there"
    seed = Seed(name, tuple(made.disks), made.disks[0].suffix != ".img")
    with tempfile.TemporaryDirectory(dir=scratch()) as copies:
        image = Image(seed, Path(copies))
        with image.opened(asks=Asks.PROOFS | Asks.SLEEP) as (bmap, readers):
            yield Specimen(name, made, image, bmap, readers)
        image.close()


# ---- as it was made ----------------------------------------------------------------------------------------


SAID = {"iso-sessions": {"hidden"}}
"""What is said of images that are more than their map shows."""


def test_every_byte_has_an_owner(specimen: Specimen) -> None:
    """And no allocator, checksum or rule of the format says anything else."""
    bmap = specimen.bmap
    found = check(bmap)
    assert {row.code for row in found.disagreements} == SAID.get(specimen.name, set())
    assert_sound(bmap, found)
    for type in specimen.types():
        SHOWN[type].add("an image")
    assert specimen.types() & ALL, specimen.types()
    states = set(bmap.filesystems.column("state").to_pylist())
    if specimen.name.startswith("btrfs"):  # copied while it is mounted, mostly before the next commit
        assert states <= {tables.RECOVERED, tables.CLEAN}
    else:
        assert states <= ({tables.RECOVERED} if specimen.name.endswith("dirty") else {tables.CLEAN})
    MADE.add(specimen.name)


def test_it_is_what_blkid_says(specimen: Specimen) -> None:
    """Type and UUID of each volume that lies in one piece, and the labels of filesystems."""
    tool = need("blkid", "util-linux")
    ours = {row["volume"]: row for row in specimen.bmap.volumes.to_pylist()}
    systems = {row["volume"]: row for row in specimen.bmap.filesystems.to_pylist()}
    for volume in volumes_of(specimen.bmap):
        words = ["-p", "-o", "udev", "-O", str(volume.base), "-S", str(volume.size)]
        done = subprocess.run([tool, *words, specimen.image.paths[volume.disk]], capture_output=True)
        said = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
        row = ours[volume.number] | systems.get(volume.number, {})
        if said and row["type"] not in LAYERS:
            if (row["type"], said.get("ID_FS_TYPE")) == ("iso9660", "udf"):
                continue  # a disc that is both
            assert row["type"] in (said.get("ID_FS_TYPE"), said.get("ID_PART_TABLE_TYPE"))
            uuids = {plain(word) for name, word in said.items() if "_UUID" in name}
            assert plain(row["uuid"] or "") in uuids or not uuids
            SHOWN[row["type"]].add("an oracle")
        if said and volume.number in systems:
            label = (
                said.get("ID_FS_LABEL_ENC", "").encode().decode("unicode-escape").encode("latin-1").decode()
            )
            assert (row["label"] or "") == label


def plain(uuid: str) -> str:
    """Without what stands between the digits."""
    return re.sub(r"\W", "", uuid.lower())


def test_it_does_not_differ_from_itself(specimen: Specimen) -> None:
    """A map beside itself: no byte has another owner, whatever owners this format has."""
    for disk in range(1, len(specimen.made.disks) + 1):
        volume = specimen.bmap.volumes.column("disk").to_pylist().index(disk)
        delta = of_owners(specimen.bmap.size_of(volume))
        answer = attribute(specimen.bmap, specimen.bmap, disk, delta)
        assert (answer.rows.num_rows, answer.size) == (0, 0), answer.rows.to_pylist()[:5]


def test_names_and_content_are_those_put_in(specimen: Specimen) -> None:
    for device, tree in specimen.made.trees.items():
        devices = specimen.bmap.volumes.column("name").to_pylist()
        volume = len(devices) - 1 - devices[::-1].index(device)  # a pool of btrfs has its first device's name
        inode, path = specimen.bmap.paths(volume)
        found = dict(zip(path.to_pylist(), inode.tolist(), strict=True))
        files = Files(specimen.bmap, volume, specimen.readers[volume])
        assert set(tree) <= set(found)
        assert {name for name in found if not OWN.fullmatch(name)} - set(tree) <= gone(files, found)
        compared = contents(files, found, tree)
        assert compared > 3 or not any(tree.values())
        for type in specimen.types():
            SHOWN[type].add("an oracle")
        SHOWN[files.type].update({"names", "content"} if compared else ())


OWN = re.compile(rb"/|/\$[A-Z].*")
"""Paths that a format has by itself: the root, and the files of NTFS."""


def gone(files: Files, found: dict[bytes, int]) -> set[bytes]:
    """Deleted files that a map still names."""
    paths = list(found)
    deleted = files.is_deleted([found[path] for path in paths])
    return {path for path, is_deleted in zip(paths, deleted, strict=True) if is_deleted}


def contents(files: Files, found: dict[bytes, int], tree: Tree) -> int:
    """How many files were compared; none differs, and only what is stored in another way is refused."""
    compared = 0
    for path, wanted in tree.items():
        if wanted is None:
            continue
        inode = found[path]
        if reason := files.refusal(inode):
            assert reason == "stored compressed or encrypted", path
            continue
        digest = hashlib.sha256()
        for piece in spread(files.pieces([inode]), files.length(inode)):
            digest.update(piece.tobytes())
        assert digest.hexdigest() == wanted, path
        compared += 1
    return compared


def test_each_part_is_explained(specimen: Specimen) -> None:
    """The first, a middle and the last byte of each kind and part of each volume; and the fields there, where
    the format declares them."""
    bmap = specimen.bmap
    for volume in range(bmap.volumes.num_rows):
        _, extents = bmap.slice_of("extents", volume)
        type = bmap.volumes.column("type")[volume].as_py()
        parts = {(row["kind"], row["part"]): row for row in reversed(extents.to_pylist()) if row["length"]}
        places = [(row, at) for row in parts.values() for at in (0, row["length"] // 2, row["length"] - 1)]
        for row, at in ((row, row["volume_offset"] + at) for row, at in places):
            SHOWN[type].add(f"a part {row['part'] or row['kind']}")
            below = bmap.descend(volume, np.array([at]), np.array([at + 1]))
            on_disk = np.flatnonzero(np.isin(below.volume, bmap.disks))
            if not len(on_disk):
                continue  # in a hole
            disk = bmap.disks.index(int(below.volume[on_disk[0]])) + 1
            answer = explain(bmap, disk, int(below.start[on_disk[0]]))
            json.dumps(answer)
            found = fields_at(bmap, answer["layer"], specimen.readers, 512)
            json.dumps(found)
            SHOWN[type].add(f"fields of {found['part']}" if found else "an explanation")


def test_the_past_is_told(specimen: Specimen) -> None:
    """By the formats that say that they know it, of all free bytes."""
    for volume in specimen.bmap.filesystems.column("volume").to_pylist():
        reader = specimen.readers[volume]
        found = former_owners(specimen.bmap, volume, reader, np.array([0]), np.array([reader.size]))
        if found is not None:
            tables.check("former", found)
            if found.num_rows:
                SHOWN[specimen.bmap.volumes.column("type")[volume].as_py()].add("a past")


# ---- hostile -----------------------------------------------------------------------------------------------

MARK = "INJ"
HOSTILE = (f"../{MARK}/../../", f"\n{MARK}\r\x1b[2J\x07", f"\0{MARK}\xff/\x80\x9b31m")
"""What takes the place of names, one after the other, repeated up to their length."""
CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")


def test_hostile_names_are_harmless(specimen: Specimen) -> None:
    """Names overwritten where they stand, checksums made right: whatever shows or writes them stays what it
    is."""
    image = specimen.image
    try:
        rename(specimen)
        image.sealer.seal()
        with image.opened() as (bmap, readers):
            assert_sound(bmap, check(bmap))
            types = bmap.volumes.column("type").to_pylist()
            for row in bmap.names.to_pylist():
                if MARK.encode() in row["name"]:
                    SHOWN[types[row["volume"]]].add("hostile names")
            lines = io.BytesIO()
            text_map.save(bmap, lines)
            use = consumers.Use(random.Random(specimen.name), image, bmap, readers)
            printed = consumers.command("lookup", *use.words(), f"1:0-{use.sizes[0]}").encode()
            for said in (lines.getvalue(), printed):
                assert not CONTROL.search(said)
                assert all(line[:1].isdigit() for line in said.splitlines())
            consumers.extracted(use)
            consumers.located(use)
    finally:
        image.restore()


def test_hostile_labels_are_harmless(specimen: Specimen) -> None:
    """The same with what volumes are called: labels, names of partitions, groups, arrays."""
    volumes = specimen.bmap.volumes
    words = {word for word in volumes.column("label").to_pylist() if word and len(word) > 2}
    words |= {
        word for name in volumes.column("name").to_pylist() for word in name.split("/")[2:-1] if word
    } - {"mapper"}
    if not words or specimen.image.host:  # of an image, the guest's disk is not what is damaged
        return
    image = specimen.image
    try:
        overwrite(image, [pair for word in words for pair in coded(word, HOSTILE[1])])
        image.sealer.seal()
        with image.opened() as (bmap, readers):
            assert_sound(bmap, check(bmap))
            called = [*bmap.volumes.column("label").to_pylist(), *bmap.volumes.column("name").to_pylist()]
            assert any(MARK in word for word in called if word)
            lines = io.BytesIO()
            text_map.save(bmap, lines)
            use = consumers.Use(random.Random(specimen.name), image, bmap, readers)
            printed = (consumers.command(name, *use.words()).encode() for name in ("info", "check"))
            for said in (lines.getvalue(), *printed):
                assert not CONTROL.search(said)
    finally:
        image.restore()


def rename(specimen: Specimen) -> None:
    """Overwrite some names, the long and the first, wherever they stand in metadata and however they are
    coded there."""
    names = set(specimen.bmap.names.column("name").to_pylist())
    plain = sorted(name.decode() for name in names if re.fullmatch(rb"[\w .-]{5,}", name))
    chosen = list(dict.fromkeys([*sorted(plain, key=len)[-15:], *plain[:15]]))
    pairs = [pair for n, name in enumerate(chosen) for pair in coded(name, HOSTILE[n % len(HOSTILE)])]
    overwrite(specimen.image, pairs)


def overwrite(image: Image, pairs: list[tuple[bytes, bytes]]) -> None:
    """Put the second of each pair where the first stands in metadata."""
    for disk, low, high in chain.from_iterable(image.classes):
        data = image.disks[disk].read(low, min(high - low, 1 << 20))
        for old, new in pairs:
            for found in re.finditer(re.escape(old), data):
                image.disks[disk].write(low + found.start(), new)


def coded(name: str, hostile: str) -> Iterator[tuple[bytes, bytes]]:
    """A name and what takes its place, as both stand in directories: FAT's short names have 8 and 3 capital
    letters."""
    new = (hostile * len(name))[: len(name)]
    for coding in ("latin-1", "utf-16-le", "utf-16-be"):
        yield name.encode(coding), new.encode(coding)
    stem, _, ending = name.upper().encode().partition(b".")
    yield stem[:8].ljust(8) + ending[:3].ljust(3), (hostile * 4)[:11].encode("latin-1")


def test_damage_is_survived(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata damaged, checksums made right, and everything done with the map that people do: a map that
    keeps its contract, or a refusal in words, in bounded time and memory."""
    noticed = number = 0
    monkeypatch.setattr("virt_bmap.cli.import_libraries", lambda *_: None)
    with worker.timed():
        while number < MUTATIONS or not noticed:
            outcome = worker.attempt(specimen.image, number)
            assert not outcome.fault, f"{number}: {outcome.done} {outcome.fault}\n{outcome.trace}"
            noticed += outcome.outcome != "mapped"
            number += 1
            assert noticed or number < 500, "nothing that is done is noticed"
    for type in specimen.types():
        SHOWN[type].add("damage")


# ---- the lists ---------------------------------------------------------------------------------------------

LAYERS = {format.name for format in registry.images() if format.read} - {RAW}
TYPES: dict[str, set[str]] = defaultdict(set)
"""What volumes are, by the module of the format that reads them."""
for listed in (*registry.VOLUMES, *registry.FILESYSTEMS):
    TYPES[f"{registry.HERE}.{listed.package}"].update(listed.types)
    if holds := getattr(listed.load(), "holds", None):
        TYPES[holds.read.__module__].update(listed.types)
FORMATS = dict(registry.every())
ALL = {*chain.from_iterable(TYPES.values()), *LAYERS}


@pytest.fixture(scope="module")
def all_made() -> None:
    """Behind all others, in the same process (pytest-xdist: --dist loadfile)."""
    if missing := set(recipes.RECIPES) - MADE:
        pytest.skip(f"not all images were made: {', '.join(sorted(missing))}")


@pytest.mark.parametrize("module", FORMATS)
def test_a_format_shows_all_that_it_declares(module: str, all_made: None) -> None:
    format, shown = FORMATS[module], set().union(*(SHOWN[type] for type in TYPES[module]))
    wanted = {"an image", "damage", "an oracle"}
    parts = {part.partition(",")[0] for part in format.structures()}
    wanted |= {f"fields of {part}" for part in parts if f"a part {part}" in shown}
    if isinstance(format, FilesystemFormat):
        wanted |= {"a past"} if format.history else set()
        wanted |= {"names", "content", "hostile names"} if format.name != "swap" else set()
    assert wanted <= shown, wanted - shown


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_an_image_format_shows_all(layer: str, all_made: None) -> None:
    assert SHOWN[layer] >= {"an image", "damage", "an oracle"}


@pytest.mark.parametrize("module", FORMATS)
def test_a_format_says_what_it_is(module: str) -> None:
    """What the pages of the docs are made of."""
    format = FORMATS[module]
    assert format.docs.features
    assert format.docs.oracles
    assert all(re.fullmatch(r"[^:]+: .+", rule) for rule in format.checks.rules)
