"""CD images that carry another machine's partition table: both are shown, each byte by its owner."""

import struct
from pathlib import Path

import numpy as np
import pytest
from test_iso9660 import layout, xorriso_layout
from test_sectors_and_chains import by_partx, by_us

from support import assert_proven, content, mapped, need, run, tree
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader

MIB = 1 << 20
MINE = b"persistent"
APPENDED = ["-append_partition", "2", "0x83"]
WAYS = {
    "sgi": ("xorriso -as mkisofs", ["-mips-boot", "boot"]),
    "sun": ("genisoimage", ["-sparc-boot", "BOOT"]),
    "mac": ("xorriso -as mkisofs", ["-hfsplus"]),
    "mac in blocks of 2048": ("xorriso -as mkisofs", ["-hfsplus", "-apm-block-size", "2048"]),
    "mac and hfs": ("genisoimage", ["-hfs", "-part"]),
    "mac, dos and an appended partition": (
        "xorriso -as mkisofs",
        ["-hfsplus", *APPENDED, "APPENDED", "-appended_part_as_apm", "-part_like_isohybrid"],
    ),
}  # fmt: skip
"""Programs and options; words in capitals are files beside the tree."""


def made(folder: Path, name: str) -> Path:
    program, options = WAYS[name]
    source, image, random = folder / "tree", folder / "image", np.random.default_rng(5)
    (source / "folder").mkdir(parents=True)
    (source / "boot").write_bytes(random.bytes(20_480))
    (source / "folder" / "file").write_bytes(random.bytes(200_000))
    (folder / "BOOT").write_bytes(random.bytes(8192))
    (folder / "mine").mkdir()
    (folder / "mine" / "mine").write_bytes(MINE)
    run("mke2fs", "-q", "-d", folder / "mine", folder / "APPENDED", "4m")
    need(program.split()[0], program.split()[0])
    words = [folder / word if word.isupper() else word for word in options]
    run(*program.split(), "-quiet", "-R", *words, "-o", image, source)
    return image


def owned(bmap: BlockMap) -> list[tuple[int, int]]:
    """What the CD image's own tree and metadata take."""
    _, table = bmap.slice_of("extents", 0)
    kinds = ("data", "directory", "metadata", "boot", "symlink")
    return [
        (row["volume_offset"], row["volume_offset"] + row["length"])
        for row in table.to_pylist()
        if row["kind"] in kinds
    ]


@pytest.mark.parametrize("name", WAYS)
def test_both_are_shown(tmp_path: Path, name: str) -> None:
    """The disk is the CD image, with all its files; of the partitions those that it has nothing in."""
    image = made(tmp_path, name)
    bmap = mapped(image)
    assert_proven(bmap)
    assert bmap.filesystems.column("type")[0].as_py() == "iso9660"
    assert layout(bmap) == xorriso_layout(image)
    if "dos" not in name and "hfs" not in name:
        truth = by_partx(image)
        assert truth
        assert set(by_us(bmap).items()) <= set(truth.items())
        left_out = {nr: place for nr, place in truth.items() if nr not in by_us(bmap)}
        assert all(
            any(low < (first + count) * 512 and high > first * 512 for low, high in owned(bmap))
            or (name.startswith("mac") and nr == 4)  # padding of the CD image, which is said to be one
            for nr, (first, count) in left_out.items()
        )
    if "appended" in name:
        volume = bmap.volumes.column("type").to_pylist().index("ext2")
        reader = RawReader(str(image))
        assert content(bmap, [reader], volume, tree(bmap, volume)["/mine"]) == MINE
        reader.close()


@pytest.mark.parametrize("name", [name for name in WAYS if "mac" in name and "and hfs" not in name])
def test_what_hfs_alone_owns_is_named(tmp_path: Path, name: str) -> None:
    """The places of its catalog and of its other files of its own, by its volume header."""
    image = made(tmp_path, name)
    data = image.read_bytes()
    headers = (at for at in range(1024, len(data), 512) if data[at : at + 4] == b"H+\0\4")
    at = next(headers)  # others are copies of it
    start, size = at - 1024, struct.unpack_from(">I", data, at + 40)[0]
    found = mapped(image)
    named = [
        (row["volume_offset"], row["volume_offset"] + row["length"])
        for row in found.slice_of("extents", 0)[1].to_pylist()
        if row["part"] == "hfsplus volume beside it"
    ]
    forks = [struct.unpack_from(">II", data, at + fork + 16) for fork in (112, 192, 272)]
    assert all(
        any(low <= start + first * size and start + (first + count) * size <= high for low, high in named)
        for first, count in forks
        if count
    )
    assert any(low <= at < high for low, high in named)


def test_a_partition_that_was_added_to_apples_map(tmp_path: Path) -> None:
    """As others add one to a DOS table, for what is to persist on a stick."""
    image, start = made(tmp_path, "mac"), 16 * MIB
    with image.open("r+b") as file:
        file.truncate(32 * MIB)
        head = bytearray(file.read(64 * 512))
        count = struct.unpack_from(">I", head, 512 + 4)[0]
        words = b"more", b"Apple_UNIX_SVR2", 0, 8192, 0x33
        entry = struct.pack(">2s2xIII32s32sIII", b"PM", 0, start // 512, 8192, *words)
        at = 512 * (count + 1)
        assert not any(head[at : at + 512])
        head[at : at + len(entry)] = entry
        for number in range(1, count + 2):
            struct.pack_into(">I", head, 512 * number + 4, count + 1)
        file.seek(0)
        file.write(head)
        file.seek(start)
        file.write((tmp_path / "APPENDED").read_bytes())
    bmap = mapped(image)
    assert_proven(bmap)
    device, place = count + 1, (start // 512, 8192)
    assert by_partx(image)[device] == by_us(bmap)[device] == place
    volume = bmap.volume_named(f"/dev/sda{device}")
    assert "/mine" in tree(bmap, volume)
    assert layout(bmap) == xorriso_layout(image)


@pytest.mark.parametrize("label", ["mac", "dvh"])
def test_an_image_that_was_forgotten_on_a_disk_is_none(tmp_path: Path, label: str) -> None:
    """Its descriptors lie in no partition of a table that was made since, or nothing of that is lost."""
    need("parted", "parted")
    image = made(tmp_path, "mac")
    with image.open("r+b") as file:
        file.truncate(64 * MIB)
        file.write(bytes(32768))
    run("parted", "-s", image, "mklabel", label)
    name = ["name", "ext2"] if label == "mac" else ["primary"]
    run("parted", "-s", image, "mkpart", *name, "16MiB", "20MiB")
    with image.open("r+b") as file:
        file.seek(16 * MIB)
        file.write((tmp_path / "APPENDED").read_bytes())
    bmap = mapped(image)
    types = bmap.volumes.column("type").to_pylist()
    assert types[0] == ("mac" if label == "mac" else "iso9660")
    assert "ext2" in types
    volume = types.index("ext2")
    assert "/mine" in tree(bmap, volume)
    assert tables.codes(bmap.extents, "kind").size
