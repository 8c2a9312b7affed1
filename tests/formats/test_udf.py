"""UDF: volumes of mkudffs and mkisofs, and ones that a kernel filled and aged in the appliance; what was put
in comes back through the map."""

import hashlib
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import udf_images
from appliance import Step, made
from support import BytesReader, assert_proven, content, mapped, need, run, survives, tree
from virt_bmap.formats.filesystems import iso9660, udf
from virt_bmap.formats.filesystems.udf import bridge, inodes, names
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.damage import Damage
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey

MIB = 1 << 20
MADE = {
    "hd-512": ("hd", "2.01", 512), "hd-1024": ("hd", "1.50", 1024), "hd-2048": ("hd", "1.02", 2048),
    "hd-4096": ("hd", "2.01", 4096), "dvdram": ("dvdram", "2.01", 2048), "dvdrw": ("dvdrw", "2.01", 2048),
    "long": ("hd", "2.01", 2048),
}  # fmt: skip
"""mkudffs' media types: dvdrw has sparing tables."""


def mkudffs(image: Path, media: str, revision: str, size: int, *more: str) -> None:
    need("mkudffs", "udftools")
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    run(
        "mkudffs",
        "--utf8",
        f"--media-type={media}",
        f"--udfrev={revision}",
        f"--blocksize={size}",
        "--label=A Löngish label",
        *more,
        image,
    )


@pytest.mark.parametrize("name", MADE)
def test_empty_volumes(tmp_path: Path, name: str) -> None:
    """As udfinfo and blkid describe them; and the bitmap's free blocks are as many as udfinfo counts."""
    media, revision, size = MADE[name]
    image = tmp_path / "x.img"
    mkudffs(image, media, revision, size, *(["--ad=long"] if name == "long" else []))
    bmap = mapped(image)
    assert_proven(bmap)
    (found,) = bmap.filesystems.to_pylist()
    assert (found["type"], found["block_size"], found["state"], found["features"]) == (
        "udf",
        size,
        "clean",
        f"UDF{revision}",
    )
    said = dict(
        line.split("=", 1)
        for line in run("blkid", "-p", "-o", "export", image).decode().splitlines()
        if "=" in line
    )
    assert (bmap.filesystems.column("label")[0].as_py(), bmap.filesystems.column("uuid")[0].as_py()) == (
        "A Löngish label",
        said["UUID"],
    )
    free = sum(
        row["length"] for row in bmap.extents.to_pylist() if row["kind"] == "free" and row["part"] is None
    )
    assert free == size * int(re.search(rb"^freeblocks=(\d+)", run("udfinfo", image), re.MULTILINE)[1])  # type: ignore[index]
    assert tree(bmap, 0) == {"/": found["root"]} if "root" in found else len(bmap.names) == 0


# ---- mkisofs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder, and what is in it."""
    chooser, folder = random.Random(5), tmp_path_factory.mktemp("udf") / "tree"
    found = {
        f"/many/file {number:04d}, whose name is rather long.text": chooser.randbytes(
            chooser.choice([0, 1, 2047, 2048, 2049, 40_000])
        )
        for number in range(400)
    }
    found |= {"/big": chooser.randbytes(2_000_000), "/ünïcödé/文字.txt": b"text", "/a/b/c/d/e/f": b"deep"}
    for path, data in found.items():
        (folder / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (folder / path[1:]).write_bytes(data)
    return folder, found


@pytest.fixture(scope="module")
def discs(files: tuple[Path, dict[str, bytes]]) -> dict[str, Path]:
    """Bridge discs: one whose two trees are the same, one whose ISO 9660 tree shows nothing of it."""
    need("genisoimage", "genisoimage")
    folder, _ = files
    result = {}
    for name, options in {"both": [], "udf": ["-hide", "*"]}.items():
        result[name] = folder.parent / f"{name}.iso"
        subprocess.run(
            [
                "genisoimage",
                "-quiet",
                "-udf",
                "-iso-level",
                "3",
                "-V",
                "DISC",
                *options,
                "-o",
                result[name],
                folder,
            ],
            check=True,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            capture_output=True,
        )
    return result


def alone(image: Path) -> BlockMap:
    """The map with the UDF side of a bridge disc, whoever owns more."""
    reader = RawReader(str(image))
    found = bridge.beside(udf.read_alone(reader, Damage()), iso9660.read(reader, (), Damage()))
    reader.close()

    def taken(*_: object) -> object:
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(udf, "FORMAT", udf.FORMAT._replace(read=taken))
        return mapped(image)


@pytest.mark.parametrize("name", ["both", "udf"])
def test_content_of_discs(files: tuple[Path, dict[str, bytes]], discs: dict[str, Path], name: str) -> None:
    bmap = alone(discs[name])
    assert_proven(bmap)
    paths, disk = tree(bmap, 0), [RawReader(str(discs[name]))]
    plain = {path for path, inode in paths.items() if inode in set(regular(bmap))}
    assert plain == set(files[1])
    for path, data in files[1].items():
        assert content(bmap, disk, 0, paths[path]) == data, path
    sizes = dict(
        zip(
            tables.integers(bmap.inodes, "inode").tolist(),
            tables.integers(bmap.inodes, "size").tolist(),
            strict=True,
        )
    )
    times = dict(
        zip(
            tables.integers(bmap.inodes, "inode").tolist(),
            bmap.inodes.column("mtime_ns").to_pylist(),
            strict=True,
        )
    )
    for path, data in files[1].items():
        assert sizes[paths[path]] == len(data)
        assert abs(times[paths[path]] - (files[0] / path[1:]).stat().st_mtime_ns) < 1_000_000_000


def regular(bmap: BlockMap) -> list[int]:
    return tables.integers(bmap.inodes, "inode")[tables.codes(bmap.inodes, "type") == tables.T_FILE].tolist()  # type: ignore[no-any-return]


def test_the_tree_with_more_content_is_mapped(discs: dict[str, Path]) -> None:
    assert mapped(discs["both"]).filesystems.column("type").to_pylist() == ["iso9660"]
    found = mapped(discs["udf"])
    assert found.filesystems.column("type").to_pylist() == ["udf"]
    for bmap, other in ((mapped(discs["both"]), "UDF"), (found, "ISO 9660")):
        assert f"structures of the {other} volume beside it" in bmap.extents.column("part").to_pylist()
        assert_proven(bmap)


def test_a_bridge_whose_udf_is_lost_is_iso9660(discs: dict[str, Path], tmp_path: Path) -> None:
    image = tmp_path / "x.iso"
    data = bytearray(discs["both"].read_bytes())
    for at in (20, 28):  # both volume descriptor sequences
        start = int.from_bytes(data[256 * 2048 + at : 256 * 2048 + at + 4], "little") * 2048
        data[start : start + 4096] = bytes(4096)
    image.write_bytes(data)
    bmap = mapped(image)
    assert bmap.filesystems.column("type").to_pylist() == ["iso9660"]
    ((code, detail),) = [(row["code"], row["detail"]) for row in bmap.problems.to_pylist()]
    assert code == "beside"
    assert "no volume descriptor sequence holds a logical volume" in detail


# ---- parts -------------------------------------------------------------------------------------------------


def test_names_of_any_length_are_found_like_one_by_one() -> None:
    """Random directories, some of which break off, against a walk from entry to entry."""
    chooser = random.Random(9)
    for _ in range(60):
        data, base, size, expected = bytearray(), [], [], []
        for number in range(chooser.randrange(1, 5)):
            base.append(len(data))
            for _ in range(chooser.randrange(0, 40)):
                length, use = chooser.randrange(1, 60), chooser.choice([0, 0, 4, 17])
                name = bytes([8]) + bytes(chooser.randrange(97, 123) for _ in range(length))
                entry = bytearray(-(-(38 + use + len(name)) // 4) * 4)
                entry[0:2], entry[19], entry[36:38] = (
                    (257).to_bytes(2, "little"),
                    len(name),
                    use.to_bytes(2, "little"),
                )
                entry[18] = chooser.choice([0, 0, 0, 2, 4, 8])
                entry[38 + use : 38 + use + len(name)] = name
                entry[4] = sum(entry[:16]) & 0xFF
                data += entry
                expected.append((number, name[1:] if entry[18] in (0, 2) else None))
            size.append(len(data) - base[-1])
        parsed = names.parse(
            np.frombuffer(bytes(data) + bytes(64), np.uint8),
            np.arange(len(base)),
            np.array(base),
            np.array(size),
            Damage(),
        )
        assert list(zip(parsed.parent.tolist(), parsed.name.strings(), strict=True)) == [
            one for one in expected if one[1] is not None
        ]


def test_times() -> None:
    """Local time with its distance from UTC in minutes, or none."""
    stamp = bytes([0x3C, 0x10]) + (2024).to_bytes(2, "little") + bytes([2, 29, 13, 30, 15, 12, 34, 56])
    nothing = bytes([0x01, 0x18]) + (1970).to_bytes(2, "little") + bytes([1, 1, 0, 0, 0, 0, 0, 0])
    never = bytes(12)
    found = inodes.times(np.frombuffer(stamp + nothing + never, np.uint8).reshape(3, 12)).tolist()
    assert found == [1709209815_123456000, 0, inodes.NO_TIME]


# ---- a kernel's --------------------------------------------------------------------------------------------

FILLED = {
    "fa": ("hd", "2.01", 512),
    "fb": ("dvdrw", "1.50", 2048),
    "fc": ("hd", "2.01", 4096),
    "fd": ("hd", "2.01", 2048),
}
FILL = r"""
modprobe udf
for name in fa fb fc fd; do
    mkdir -p /sysroot; mount -t udf -o rw,nostrict /dev/disk/guestfs/$name /sysroot
    mkdir -p /sysroot/dir/deeper
    for i in $(seq 60)
    do dd if=/dev/disk/guestfs/random of="/sysroot/dir/file $i" bs=100 skip=$((i * 53)) count=$((i * i / \
7)) 2>/dev/null; done
    rm /sysroot/dir/file\ ?[13579]
    for i in $(seq 300); do
        dd if=/dev/disk/guestfs/random bs=4k skip=$((i * 3)) count=1 2>/dev/null >> /sysroot/left
        dd if=/dev/disk/guestfs/random bs=4k skip=$((i * 5)) count=1 2>/dev/null >> /sysroot/right
    done
    dd if=/dev/disk/guestfs/random of=/sysroot/sparse bs=4k seek=100 count=3 2>/dev/null
    ln /sysroot/left /sysroot/dir/again; ln -s ../left /sysroot/dir/link
    ln -s "$(seq -s/ 40)" /sysroot/longlink; mkfifo /sysroot/fifo
    for i in $(seq 300); do : > /sysroot/dir/deeper/"$i, a name that is long enough for many blocks"; done
    rm /sysroot/right
    cd /sysroot; find . -type f -print0 | xargs -0 sha256sum | sed "s/^/sha $name /"
    find . -type l | sed "s/^/link $name /"; cd /
    umount /sysroot; blockdev --flushbufs /dev/disk/guestfs/$name
done
"""


@pytest.fixture(scope="module")
def filled() -> Path:
    """Volumes that Linux' own driver filled, and on which it deleted."""
    need("mkudffs", "udftools")
    host = (
        'python3 -c \'import numpy; open("random", "wb").write(numpy.random.default_rng(4).bytes(8 << '
        "20))'\n"
    )
    for name, (media, revision, size) in FILLED.items():
        host += (
            f"truncate -s 24M {name}; PATH=$PATH:/sbin mkudffs --media-type={media} "
            f"--udfrev={revision} --blocksize={size} {'--ad=long' if name == 'fd' else ''} {name} > "
            "/dev/null\n"
        )
    steps: list[Step] = [("host", host), ("sh", FILL)]
    return made("udf", {"random": 0, **dict.fromkeys(FILLED, 0)}, steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILLED)
def test_a_kernels_files(filled: Path, name: str) -> None:
    """Hashes read through the mount equal those through the map; all blocks have one owner, or the bitmap
    calls them free."""
    log = (filled / "log").read_text()
    hashes = {
        path: digest
        for digest, path in re.findall(rf"^sha {name} ([0-9a-f]{{64}})  \.(/.*)$", log, re.MULTILINE)
    }
    bmap = mapped(filled / name)
    assert_proven(bmap)
    paths, disk = tree(bmap, 0), [RawReader(str(filled / name))]
    plain = set(regular(bmap))
    assert {path for path, inode in paths.items() if inode in plain} - {"/Non-Allocatable Space"} == set(
        hashes
    )  # which a kernel does not list
    for path, digest in hashes.items():
        assert hashlib.sha256(content(bmap, disk, 0, paths[path])).hexdigest() == digest, path
    assert paths["/left"] == paths["/dir/again"]
    kinds = dict(
        zip(
            tables.integers(bmap.inodes, "inode").tolist(),
            tables.codes(bmap.inodes, "type").tolist(),
            strict=True,
        )
    )
    assert [kinds[paths[path]] for path in ("/dir/link", "/longlink", "/fifo", "/dir")] == [
        tables.T_SYMLINK,
        tables.T_SYMLINK,
        tables.T_FIFO,
        tables.T_DIRECTORY,
    ]
    assert "allocation extent" in bmap.extents.column("part").to_pylist(), (
        "left and right took blocks in turn"
    )
    free = sum(
        row["length"] for row in bmap.extents.to_pylist() if row["kind"] == "free" and row["part"] is None
    )
    assert free == FILLED[name][2] * int(
        re.search(rb"^freeblocks=(\d+)", run("udfinfo", filled / name), re.MULTILINE)[1]
    )  # type: ignore[index]


def test_corpus(corpus: Path, tmp_path: Path) -> None:
    """Images of other projects: those that are whole are proven; label and UUID are blkid's."""
    seen = 0
    for line in (corpus / "INVENTORY.tsv").read_text().splitlines()[1:]:
        words = line.split("\t")
        if "udf" in words and words[0].endswith(".xz"):
            data = lzma.decompress((corpus / words[0]).read_bytes())
            bmap = survives(np.frombuffer(data, np.uint8))
            assert bmap is not None
            if words[-1] == "valid":
                assert_proven(bmap)
            (tmp_path / "x").write_bytes(data)
            said = dict(
                line.split("=", 1)
                for line in run("blkid", "-p", "-o", "udev", tmp_path / "x", ok=(0, 2)).decode().splitlines()
                if "=" in line
            )
            for found in (found for found in bmap.filesystems.to_pylist() if found["type"] == "udf" and said):
                label = said.get("ID_FS_LABEL_ENC", "")
                assert (found["uuid"], found["label"] or "") == (
                    said.get("ID_FS_UUID"),
                    re.sub(r"\\x(..)", lambda each: chr(int(each[1], 16)), label),
                ), words[0]
                seen += 1
    assert seen > 5


# ---- what took another's place -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", udf_images.KINDS)
def test_the_newest_state_counts(tmp_path: Path, name: str) -> None:
    """ICBs that lead to newer ones, blocks that a later session wrote anew, packets that were moved."""
    need("mkudffs", "udftools")
    udf_images.make(name, tmp_path / "image")
    bmap = mapped(tmp_path / "image")
    assert_proven(bmap)
    root = next(row for row in bmap.inodes.to_pylist() if row["type"] == "directory")
    assert root["inode"] == bmap.filesystems.column("root").to_pylist()[0]
    assert root["uid"] == udf_images.NEWEST
    parts = bmap.extents.column("part").to_pylist()
    assert parts.count("ICB") == (6 if name == "replaced" else 0)
    assert ("virtual allocation table" in " ".join(filter(None, parts))) == ("virtual" in name)
    assert ("packet that sparing has moved" in parts) == (name == "spared")


@pytest.mark.slow
def test_a_kernel_sees_the_same_state() -> None:
    """But that of UDF 1.50 with a virtual allocation table inside its entry: Linux takes what stands before
    the table for a part of it."""
    need("mkudffs", "udftools")
    script = Path(udf_images.__file__)
    host = f"# {hashlib.sha256(script.read_bytes()).hexdigest()}\nexport PATH=$PATH:/sbin\n"
    look = "modprobe udf; mkdir -p /sysroot\n"
    kinds = [name for name in udf_images.KINDS if name != "virtualold"]
    for name in kinds:
        host += f"{sys.executable} {script} {name} {name}\n"
        look += f"mount -t udf -o ro /dev/disk/guestfs/{name} /sysroot; stat -c '{name} %u' /sysroot\n"
        look += "umount /sysroot\n"
    folder = made("udfnew", dict.fromkeys(kinds, 0), [("host", host), ("sh", look)])
    log = (folder / "log").read_text()
    assert re.findall(r"^(\w+) (\d+)$", log, re.MULTILINE) == [
        (name, str(udf_images.NEWEST)) for name in kinds
    ]


@pytest.mark.parametrize("to", [4, 100, 1 << 20])
def test_icbs_that_lead_back_or_nowhere(tmp_path: Path, to: int) -> None:
    need("mkudffs", "udftools")
    udf_images.make("replaced", tmp_path / "image")
    volume = udf_images.Volume((tmp_path / "image").read_bytes())
    for block in (volume.start + 101, volume.start + 201):
        indirect = volume.get(block) if block == volume.start + 101 else volume.get(volume.start + 101)
        indirect[12:16] = (block - volume.start).to_bytes(4, "little")
        indirect[40:44] = to.to_bytes(4, "little")
        volume.put(block, udf_images.sealed(indirect))
    bmap = survey([BytesReader(np.frombuffer(bytes(volume.data), np.uint8))])
    assert ("error", "inode") in zip(
        bmap.problems.column("severity").to_pylist(), bmap.problems.column("code").to_pylist(), strict=True
    )


# ---- metadata partitions -----------------------------------------------------------------------------------


def metadata_file(model: bytearray, block: int, kind: int, extents: list[tuple[int, int]]) -> bytearray:
    """The file entry of a metadata file or its mirror, in this block; (bytes, first block) of its extents."""
    entry = model[:176]
    entry[0:2], entry[12:16], entry[27] = (261).to_bytes(2, "little"), block.to_bytes(4, "little"), kind
    entry[10:12], entry[34:36] = (176).to_bytes(2, "little"), bytes(2)
    entry[56:64], entry[112:176] = sum(length for length, _ in extents).to_bytes(8, "little"), bytes(64)
    entry[172:176] = (8 * len(extents)).to_bytes(4, "little")
    for length, at in extents:
        entry += length.to_bytes(4, "little") + at.to_bytes(4, "little")
    return udf_images.sealed(entry)


def with_metadata_partition(image: Path) -> tuple[bytes, dict[str, int]]:
    """A volume of mkudffs with its file set and root moved into a metadata partition, whose file lies in two
    pieces in reverse order. No tool here makes one.

    Metadata blocks 0 to 7 are the partition's 1000 to 1007, blocks 8 to 39 its 500 to 531.
    """
    size, data = 2048, bytearray(image.read_bytes())

    def get(at: int) -> bytearray:
        return bytearray(data[at * size : (at + 1) * size])

    def put(at: int, block: bytearray) -> None:
        data[at * size : (at + 1) * size] = block.ljust(size, b"\0")

    main = int.from_bytes(get(256)[20:24], "little")
    descriptors = {int.from_bytes(get(at)[:2], "little"): at for at in range(main + 7, main - 1, -1)}
    start = int.from_bytes(get(descriptors[5])[188:192], "little")
    logical = get(descriptors[6])
    file_set = get(start + int.from_bytes(logical[252:256], "little"))
    root = get(start + int.from_bytes(file_set[404:408], "little"))

    def place(block: int) -> int:
        return 1000 + block if block < 8 else 500 + block - 8

    def moved(block: bytearray, to: int, partition_at: tuple[int, ...]) -> None:
        block[12:16] = to.to_bytes(4, "little")
        for at, number in zip(partition_at, (9, 1), strict=False):
            block[at : at + 4], block[at + 4 : at + 6] = (
                number.to_bytes(4, "little"),
                (1).to_bytes(2, "little"),
            )
        put(start + place(to), udf_images.sealed(block))

    moved(file_set, 2, (404,))
    parent = (
        176 + int.from_bytes(root[168:172], "little")
        if root[:2] == b"\x05\x01"
        else 216 + int.from_bytes(root[208:212], "little")
    )
    fid = root[parent : parent + 40]
    fid[12:16], fid[24:28], fid[28:30] = (
        (9).to_bytes(4, "little"),
        (9).to_bytes(4, "little"),
        (1).to_bytes(2, "little"),
    )
    root[parent : parent + 40] = udf_images.sealed(fid)
    moved(root, 9, ())
    for at, kind in ((600, 250), (601, 251)):
        put(start + at, metadata_file(root, at, kind, [(8 * size, 1000), (32 * size, 500)]))
    maps = (
        bytes([1, 6, 1, 0, 0, 0])
        + bytes([2, 64, 0, 0, 0])
        + b"*UDF Metadata Partition".ljust(31, b"\0")
        + bytes([1, 0, 0, 0])
    )
    maps += (
        (600).to_bytes(4, "little")
        + (601).to_bytes(4, "little")
        + b"\xff" * 4
        + (32).to_bytes(4, "little")
        + bytes([1, 0, 1])
        + bytes(5)
    )
    logical[252:256], logical[256:258] = (2).to_bytes(4, "little"), (1).to_bytes(2, "little")
    logical[264:268], logical[268:272], logical[440 : 440 + len(maps)] = (
        len(maps).to_bytes(4, "little"),
        (2).to_bytes(4, "little"),
        maps,
    )
    logical[10:12] = (440 + len(maps) - 16).to_bytes(2, "little")
    put(descriptors[6], udf_images.sealed(logical))
    bitmap = start + int.from_bytes(get(descriptors[5])[68:72], "little")
    bits = np.unpackbits(
        np.frombuffer(bytes(data[bitmap * size + 24 : bitmap * size + 24 + 2048]), np.uint8),
        bitorder="little",
    ).copy()
    for low, high in ((1000, 1008), (500, 532), (600, 602)):
        assert bits[low:high].all(), "free until now"
        bits[low:high] = 0
    data[bitmap * size + 24 : bitmap * size + 24 + 2048] = np.packbits(bits, bitorder="little").tobytes()
    return bytes(data), {"file set": (start + place(2)) * size, "root": (start + place(9)) * size}


def test_metadata_partition(tmp_path: Path) -> None:
    image = tmp_path / "x.img"
    mkudffs(image, "hd", "1.50", 2048)
    data, places = with_metadata_partition(image)
    bmap = survey([BytesReader(np.frombuffer(data, np.uint8))])
    rows = [row for row in bmap.extents.to_pylist() if not row["flags"] & tables.INLINE]
    parts = {row["part"]: row["volume_offset"] for row in rows}
    assert bmap.filesystems.column("state").to_pylist() == ["clean"], bmap.problems.to_pylist()
    assert parts["file set descriptor"] == places["file set"]
    assert parts["file entry"] == places["root"]
    held = sum(row["length"] for row in rows if row["part"] == "metadata file")
    assert held == (40 - 2) * 2048, "all of it but the two blocks that lie in it"
    assert {"file entry of the metadata file", "file entry of the metadata mirror file"} <= set(parts)
    lost = sum(row["length"] for row in rows if row["kind"] == "unknown")
    assert lost == 2 * 2048, "where file set and root were before, the bitmap still calls it used"
