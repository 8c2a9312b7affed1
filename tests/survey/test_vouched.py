"""Bytes that something vouches for stay as they are, also where an allocator calls them free: dm-verity,
dm-integrity, Android Verified Boot, journals of arrays.

The judge of a hash tree is `veritysetup verify`; that of what has no tool here is that no byte of the
protected ranges changes.
"""

import itertools
import json
import re
import struct
import subprocess
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_lvm import loops, with_text
from test_md import superblock

from support import BytesReader, mapped, mounted, need, run
from virt_bmap.ask.space import free_space, traits_of
from virt_bmap.cli import run as bmap
from virt_bmap.formats.volumes.md.superblock import _checksum_1
from virt_bmap.model import tables
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.maps import load
from virt_bmap.survey.survey import survey
from virt_bmap.survey.vouching import Surveyed, _read_tree, covered

MIB = 1 << 20
ROOT, ROOT_VERITY, DATA = (
    "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", "2C7357ED-EBD2-46D9-AEC1-23D437EC2BF5",
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
)  # fmt: skip
SIGNATURE = "41092B05-9FC8-4523-994F-2DEF0408B176"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 of 24 MiB in which a large file was deleted: what its free blocks hold is not zero."""
    image = tmp_path_factory.mktemp("root") / "root.img"
    return with_deleted(image, 1)


def with_deleted(image: Path, seed: int, size: int = 24 * MIB) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run("mke2fs", "-q", "-t", "ext4", image)
    with mounted(image) as where:
        (where / "kept").write_bytes(np.random.default_rng(seed).bytes(MIB))
        (where / "gone").write_bytes(np.random.default_rng(seed + 1).bytes(8 * MIB))
        run("sync", "-f", where)
        (where / "gone").unlink()
    return image


def format_tree(data: Path, hashes: Path, *options: str) -> str:
    """Make a hash tree; the hash at its root."""
    need("veritysetup", "cryptsetup-bin")
    return re.search(r"Root hash:\s*(\w+)", run("veritysetup", "format", *options, data, hashes).decode())[1]  # type: ignore[index]


def verified(data: Path, hashes: Path, root_hash: str, *options: str) -> bool:
    done = subprocess.run(
        ["veritysetup", "verify", *options, data, hashes, root_hash], capture_output=True, check=False
    )
    return done.returncode == 0


Part = tuple[str, Path | int]
"""The type of a partition, and what is in it, or how large it is."""


def disk_of(image: Path, *parts: Part, names: tuple[str, ...] = ()) -> list[tuple[int, int]]:
    """A disk with a GPT; where its partitions lie, in bytes."""
    places, at = [], MIB
    for _, content in parts:
        size = content if isinstance(content, int) else content.stat().st_size
        places.append((at, -(-size // MIB) * MIB))
        at += places[-1][1]
    with image.open("wb") as file:
        file.truncate(at + MIB)
    lines = [f"start={start // 512}, size={size // 512}, type={kind}" + (f', name="{name}"' if name else "")
             for (kind, _), (start, size), name in itertools.zip_longest(parts, places, names)]  # fmt: skip
    run("sfdisk", "-q", image, stdin=("label: gpt\n" + "\n".join(lines)).encode())
    with image.open("r+b") as file:
        for (_, content), (start, _) in zip(parts, places, strict=True):
            if isinstance(content, Path):
                file.seek(start)
                file.write(content.read_bytes())
    return places


def cut(image: Path, place: tuple[int, int], out: Path, size: int | None = None) -> Path:
    with image.open("rb") as file:
        file.seek(place[0])
        out.write_bytes(file.read(size or place[1]))
    return out


def everywhere(image: Path, folder: Path, *beside: Path) -> list[Path]:
    """The image after each command that gives bytes back or leaves them out: a copy, in place, a dump."""
    others = [word for path in beside for word in ("-a", str(path))]
    copy, dump = folder / "copied", folder / "dumped"
    device = "/dev/sd" + "abc"[len(beside)]
    assert bmap(["sparsify", "-q", *others, str(image), str(copy)]) == 0
    assert bmap(["dump", "-q", "--skip-free", *others, "-a", str(image), device, str(dump)]) == 0
    assert bmap(["sparsify", "-q", "--in-place", *map(str, beside), str(image)]) == 0
    return [copy, dump, image]


# ---- dm-verity ---------------------------------------------------------------------------------------------


def test_a_tree_in_a_partition_of_its_own(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its data stays as it is; a filesystem beside it gives back what is free."""
    hashes, other, disk = tmp_path / "hashes", with_deleted(tmp_path / "other", 5), tmp_path / "disk.img"
    root_hash = format_tree(root, hashes)
    places = disk_of(disk, (ROOT, root), (ROOT_VERITY, hashes), (DATA, other))
    before = np.fromfile(disk, np.uint8)
    assert bmap(["sparsify", "--estimate", str(disk)]) == 0
    said = capsys.readouterr()
    assert "free of /dev/sda3\n" in said.out
    assert "free of /dev/sda1" not in said.out
    assert (
        "/dev/sda1: left as it is: hashes in /dev/sda2 cover all of its bytes, free ones as well "
        "(dm-verity): discard it before" in said.err
    )
    for image in everywhere(disk, tmp_path):
        data = cut(image, places[0], tmp_path / "d", root.stat().st_size)
        tree = cut(image, places[1], tmp_path / "h")
        assert verified(data, tree, root_hash)
        now = np.fromfile(image, np.uint8)
        assert (now[: places[1][0] + places[1][1]] == before[: places[1][0] + places[1][1]]).all()
        assert np.count_nonzero(now[places[2][0] :] != before[places[2][0] :]) > 7 * MIB
        run("e2fsck", "-fn", f"{image}?offset={places[2][0]}")


def test_a_tree_behind_the_filesystem(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "part"
    data.write_bytes(root.read_bytes())
    size = data.stat().st_size
    options = (f"--hash-offset={size}", f"--data-blocks={size // 4096}")
    root_hash = format_tree(data, data, *options)
    disk = tmp_path / "disk.img"
    (place,) = disk_of(disk, (ROOT, data))
    assert traits_of(mapped(disk)).tolist() == [0, tables.VERIFIED]
    for image in everywhere(disk, tmp_path):
        part = cut(image, place, tmp_path / "now")
        assert verified(part, part, root_hash, *options)


def test_a_tree_on_another_disk(root: Path, tmp_path: Path) -> None:
    hashes, data = tmp_path / "hashes", tmp_path / "data"
    data.write_bytes(root.read_bytes())
    root_hash = format_tree(data, hashes)
    for image in everywhere(data, tmp_path, hashes):
        assert verified(image, hashes, root_hash)
    assert bmap(["sparsify", "-q", "--in-place", str(data)]) == 0
    assert not verified(data, hashes, root_hash), "that the tree is asked for at all"


@pytest.mark.parametrize("options", [
    (), ("--hash=sha512",), ("--hash=sha1", "--format=0"), ("--format=0", "--salt=-"),
    ("--data-block-size=1024", "--hash-block-size=512"), ("--salt=" + "5a" * 256,),
])  # fmt: skip
def test_a_tree_knows_its_data(root: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    hashes, other = tmp_path / "hashes", tmp_path / "other"
    format_tree(root, hashes, *options)
    other.write_bytes(bytes(root.stat().st_size))
    with (
        closing(RawReader(str(hashes))) as tree,
        closing(RawReader(str(root))) as data,
        closing(RawReader(str(other))) as zeroes,
    ):
        found = _read_tree(tree)
        assert found
        assert found.fits(data)
        assert not found.fits(zeroes)


@pytest.mark.parametrize("what", ["tree of another", "no superblock", "signature", "vbmeta", "AVB0"])
def test_where_it_can_not_be_told_nothing_changes(root: Path, tmp_path: Path, what: str) -> None:
    hashes, disk = tmp_path / "hashes", tmp_path / "disk.img"
    kind, name = ROOT_VERITY, ""
    if what == "tree of another":
        format_tree(with_deleted(tmp_path / "other", 9), hashes)
        kind = DATA
    elif what == "no superblock":
        hashes.touch()
        format_tree(root, hashes, "--no-superblock")
    elif what == "signature":
        hashes.write_text(json.dumps({"rootHash": "00" * 32, "signature": ""}))
        kind = SIGNATURE
    elif what == "AVB0":
        hashes.write_bytes(b"AVB0".ljust(4096, b"\0"))
        kind = DATA
    else:
        hashes.write_bytes(b"of a form that is not known".ljust(4096, b"\0"))
        kind, name = DATA, "vbmeta_system_a"
    disk_of(disk, (DATA, root), (kind, hashes), names=("", name))
    before = disk.read_bytes()
    for image in everywhere(disk, tmp_path):
        assert image.read_bytes() == before
    hashes.write_bytes(bytes(4096))  # made, but not used yet
    disk_of(disk, (DATA, root), (ROOT_VERITY, hashes))
    assert len(free_space(mapped(disk), 0).all()[0])


def test_an_image_beside_its_tree_in_a_filesystem(root: Path, tmp_path: Path) -> None:
    hashes, outer = tmp_path / "hashes", tmp_path / "outer.img"
    root_hash = format_tree(root, hashes)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "root.img").write_bytes(root.read_bytes())
    (folder / "root.verity").write_bytes(hashes.read_bytes())
    run("truncate", "-s", "64M", outer)
    run("mke2fs", "-q", "-t", "ext4", "-d", folder, outer)
    assert (
        bmap(
            [
                "dump",
                "-q",
                "--skip-free",
                "--nested",
                "all",
                str(outer),
                "/dev/sda:/root.img",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert verified(tmp_path / "out", hashes, root_hash)


def test_hostile_trees() -> None:
    """Numbers of a superblock that make no sense; more trees than anybody has."""
    random = np.random.default_rng(3)
    good = bytearray(8192)
    good[:8], good[8:16], good[32:38] = b"verity\0\0", struct.pack("<II", 1, 1), b"sha256"
    struct.pack_into("<IIQH", good, 64, 4096, 4096, 6144, 32)
    for _ in range(3000):
        data = bytearray(good)
        for at in random.integers(8, 90, 3).tolist():
            data[at] = random.integers(256)
        _read_tree(BytesReader(np.frombuffer(bytes(data), np.uint8)))
    many = [
        Surveyed(
            n,
            f"v{n}",
            "DM_verity_hash",
            tables.VOUCHING,
            BytesReader(np.frombuffer(bytes(good), np.uint8)),
            -1,
            n == 0,
        )
        for n in range(1000)
    ]
    assert [found.number for found in covered(many)] == [0]


# ---- others ------------------------------------------------------------------------------------------------


def test_a_footer_of_android_verified_boot(root: Path, tmp_path: Path) -> None:
    """The hash tree and the signed descriptor lie after the filesystem, and a footer in the last 64 bytes
    (avb_footer.h)."""
    size, part, disk = root.stat().st_size, tmp_path / "part", tmp_path / "disk.img"
    footer = struct.pack(">4sIIQQQ", b"AVBf", 1, 0, size, size, 4096).ljust(64, b"\0")
    part.write_bytes(root.read_bytes() + b"AVB0".ljust(MIB - 64, b"\0") + footer)
    disk_of(disk, (DATA, part))
    before = disk.read_bytes()
    for image in everywhere(disk, tmp_path):
        assert image.read_bytes() == before


def test_a_root_of_chromeos(root: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk_of(disk, ("3CB8E202-3B7E-47DD-8A3C-7FF2A13CFCEC", root), (DATA, with_deleted(tmp_path / "state", 3)))
    found = mapped(disk)
    assert traits_of(found).tolist() == [0, tables.VERIFIED, 0]
    assert list(free_space(found, 0).left) == [1]


def test_checksums_on_another_device(root: Path, tmp_path: Path) -> None:
    """dm-integrity with a metadata device (dm-integrity.c, struct superblock): nothing on the data tells of
    it."""
    meta, disk, image = tmp_path / "meta", tmp_path / "disk.img", tmp_path / "data"
    for interleaved, left in ((0, True), (15, False)):
        head = struct.pack(
            "<8sBBHIQIBB", b"integrt\0", 1, interleaved, 4, 16, root.stat().st_size // 512, 0, 0, 0
        )
        meta.write_bytes(head.ljust(MIB, b"\0"))
        image.write_bytes(root.read_bytes())
        with closing(RawReader(str(image))) as data, closing(RawReader(str(meta))) as beside:
            space = free_space(survey([data, beside]), 0)
        assert bool(space.left) == left
        if left:
            assert "dm-integrity" in space.left[0]
            assert "fstrim" in space.left[0]
    assert not disk.exists()


def lvm_with_integrity(disk: np.ndarray, extents: int) -> BytesReader:
    """The physical volume with a mirror whose halves keep checksums, as `lvcreate --type raid1
    --raidintegrity y` describes it."""
    number = itertools.count()

    def volume(name: str, body: str, visible: bool = False) -> str:
        status = '["READ", "WRITE", "VISIBLE"]' if visible else '["READ", "WRITE"]'
        identity = f"{next(number):06d}-0000-0000-0000-0000-0000-000000"
        return (f'{name} {{\nid = "{identity}"\nstatus = {status}\nflags = []\nsegment_count = 1\n'
            f'segment1 {{\nstart_extent = 0\n'
                f"{body}\n}}\n}}\n")  # fmt: skip

    def linear(name: str, count: int, at: int) -> str:
        return volume(
            name, f'extent_count = {count}\ntype = "striped"\nstripe_count = 1\nstripes = ["pv0", {at}]'
        )

    text, at = "logical_volumes {\n", 0
    for half in (0, 1):
        name = f"r_rimage_{half}"
        text += (
            linear(f"{name}_iorig", extents, at)
            + linear(f"{name}_imeta", 1, at + extents)
            + linear(f"r_rmeta_{half}", 1, at + extents + 1)
        )
        text += volume(
            name,
            f'extent_count = {extents}\ntype = "integrity"\norigin = "{name}_iorig"\n'
            f'meta_dev = "{name}_imeta"\n'
            f'data_sectors = {extents * 2048}\nmode = "J"\ntag_size = 4\nblock_size = 512\n'
            'internal_hash = "crc32c"',
        )
        at += extents + 2
    parts = ", ".join(f'"r_rmeta_{half}", "r_rimage_{half}"' for half in (0, 1))
    text += (
        volume(
            "r",
            f'extent_count = {extents}\ntype = "raid1"\ndevice_count = 2\nregion_size = 4096\nraids '
            f"= [{parts}]",
            True,
        )
        + "}\n"
    )
    raw = disk[4096 + 40 : 4096 + 56].view("<u8")
    old = disk[4096 + raw[0] : 4096 + raw[0] + raw[1]].tobytes()
    return with_text(disk, old.replace(b"}\n# Generated", text.encode() + b"}\n# Generated", 1))


def test_lvm_raid_with_integrity(root: Path, tmp_path: Path) -> None:
    """The layer that vouches is an inner volume, whose words for people say more than that; what decides is
    its trait."""
    need("vgcreate", "lvm2")
    image = tmp_path / "pv.img"
    run("truncate", "-s", "64M", image)
    with loops(image) as (devices, options):
        run("pvcreate", *options[:2], devices[0])
        run("vgcreate", *options, "-s", "1M", "vg", devices[0])
    data = lvm_with_integrity(np.fromfile(image, np.uint8), 24).data
    for half in (0, 1):
        start = MIB + half * 26 * MIB
        data[start : start + 24 * MIB] = np.fromfile(root, np.uint8)
    data.tofile(image)
    found = mapped(image)
    names = found.volumes.column("name").to_pylist()
    assert found.volumes.column("type").to_pylist()[names.index("/dev/vg/r")] == "ext4"
    assert traits_of(found)[names.index("/dev/vg/r_rimage_0")] == tables.CHECKSUMMED
    assert "another volume" in found.volumes.column("detail")[names.index("/dev/vg/r_rimage_0")].as_py()
    assert "dm-integrity" in free_space(found, 0).left[names.index("/dev/vg/r")]
    before = image.read_bytes()
    for changed in everywhere(image, tmp_path):
        assert changed.read_bytes()[MIB : MIB + 52 * MIB] == before[MIB : MIB + 52 * MIB]


def test_an_array_with_a_journal(root: Path) -> None:
    """A member list that names a journal (MD_DISK_ROLE_JOURNAL): newer bytes, and parity made with them, may
    lie there."""
    data = np.fromfile(root, np.uint8)
    for journal in (False, True):
        disks = []
        for role in (0, 1):
            head = bytearray(superblock(1, 0, 0, len(data) // 512, role, 3 if journal else 2, MIB // 512, 8))
            if journal:
                struct.pack_into("<I", head, 0x5C, 2)
                struct.pack_into("<H", head, 256 + 4, 0xFFFD)
                head[0xD8:0xDC] = struct.pack("<I", _checksum_1(bytes(head)))
            disk = np.zeros(MIB + len(data), np.uint8)
            disk[4096 : 4096 + len(head)] = np.frombuffer(bytes(head), np.uint8)
            disk[MIB:] = data
            disks.append(BytesReader(disk))
        found = survey(disks)
        array = found.volumes.column("kind").to_pylist().index("md")
        assert bool(traits_of(found)[array] & tables.JOURNALED) == journal
        assert (array in free_space(found, 0).left) == journal


# ---- saved maps --------------------------------------------------------------------------------------------


def test_a_map_saved_without_traits_is_read(root: Path, tmp_path: Path) -> None:
    saved, old = tmp_path / "map.parquet", tmp_path / "old.parquet"
    assert bmap(["-q", "-o", str(saved), str(root)]) == 0
    table = pq.read_table(saved)
    volumes = table.column("volumes").combine_chunks()
    fields = [field for field in volumes.type.value_type if field.name != "traits"]
    without = pa.StructArray.from_arrays(
        [volumes.values.field(field.name) for field in fields], fields=fields
    )
    lists = pa.ListArray.from_arrays(volumes.offsets, without)
    at = table.schema.get_field_index("volumes")
    pq.write_table(table.set_column(at, "volumes", lists).replace_schema_metadata(table.schema.metadata), old)
    assert load(str(old)).volumes.column("traits").to_pylist() == [None]
    assert traits_of(load(str(old))).tolist() == [0]
    assert len(free_space(load(str(old)), 0).all()[0])
