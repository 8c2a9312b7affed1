"""What `check` proves, what contradicts, and what it says that it did not look at; judged by the formats' own
checkers."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ext_images
from ext_images import Flavour
from support import assert_proven, mapped, need, run
from virt_bmap import cli
from virt_bmap.ask.check import check
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap


def verdicts(bmap: BlockMap, volume: int) -> dict[str, str]:
    """What became of each subject on a volume."""
    return {row.subject: row.result for row in check(bmap).verdicts if row.volume == volume}


def complains(*checker: str | Path) -> bool:
    """Does the format's own checker find a fault?"""
    return subprocess.run(checker, capture_output=True, timeout=60).returncode != 0


def flipped(image: Path, offset: int, bit: int = 0) -> Path:
    """A copy of the image with one bit changed."""
    copy = image.with_suffix(".flipped")
    shutil.copyfile(image, copy)
    with open(copy, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
    return copy


# ---- the verdict -------------------------------------------------------------------------------------------


def test_what_was_not_opened_is_not_called_proven(tmp_path, capsys):
    """A LUKS volume beside nothing known, on one disk."""
    need("cryptsetup", "cryptsetup-bin")
    need("sfdisk", "fdisk")
    disk, luks = tmp_path / "disk.img", tmp_path / "luks"
    run("truncate", "-s", "32M", disk)
    run("truncate", "-s", "20M", luks)
    options = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--batch-mode", "--key-file", "-"]
    subprocess.run(["cryptsetup", "luksFormat", *options, luks], input=b"secret", check=True)
    subprocess.run(
        ["sfdisk", "-q", "--no-reread", "--no-tell-kernel", disk],
        input=b"label: gpt\nsize=20M\nsize=8M\n",
        check=True,
    )
    with open(disk, "r+b") as file:
        file.seek(1 << 20)
        file.write(luks.read_bytes())
    bmap = mapped(disk)
    assert verdicts(bmap, 0) == {"owners": "proven", "structure": "proven", "checksums": "proven"}
    assert verdicts(bmap, 1)["content"] == "not looked at"
    assert verdicts(bmap, 2) == {"content": "not looked at"}
    assert cli.run(["check", str(disk)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "not looked at: content of /dev/sda1, /dev/sda2"
    assert cli.run(["check", "--strict", str(disk)]) == 1
    assert cli.run(["check", "-o", str(tmp_path / "v.jsonl"), str(disk)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert {
        row["detail"] for row in rows if row["device"] == "/dev/sda1" and row["result"] == "not looked at"
    } == {"encrypted: taken as one piece, not looked into"}


def test_a_format_without_allocator_or_checksums_says_so(tmp_path):
    need("genisoimage", "genisoimage")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"x" * 5000)
    run("genisoimage", "-quiet", "-R", "-o", tmp_path / "x.iso", tmp_path / "tree")
    bmap = mapped(tmp_path / "x.iso")
    assert verdicts(bmap, 0) == {
        "owners": "proven", "allocator": "not looked at", "structure": "proven", "checksums": "not looked at",
        "files": "not looked at",
    }  # fmt: skip


def test_a_saved_map_does_not_say_that_checksums_hold(tmp_path, capsys):
    need("mke2fs", "e2fsprogs")
    image = tmp_path / "x.img"
    run("truncate", "-s", "8M", image)
    run("mke2fs", "-q", "-t", "ext4", image)
    assert verdicts(mapped(image), 0)["checksums"] == "proven"
    assert cli.run(["map", "-q", "-o", str(tmp_path / "m.parquet"), str(image)]) == 0
    capsys.readouterr()
    assert cli.run(["check", str(tmp_path / "m.parquet")]) == 0
    assert "not looked at: checksums: not asked when the map was made" in capsys.readouterr().out


# ---- ext ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("mke2fs", "e2fsprogs")
    path = tmp_path_factory.mktemp("proven") / "tree"
    path.mkdir()
    ext_images.fill(path, names=300)
    return path


def changed(image: Path, path: str, change) -> None:
    """Let `change` work on the i_block of a file."""
    said = run("debugfs", "-R", f"imap {path}", image).decode()
    size = int(re.search(r"Block size:\s+(\d+)", run("dumpe2fs", "-h", image).decode())[1])
    at = (
        int(re.search(r"block (\d+)", said)[1]) * size + int(re.search(r"offset (0x\w+)", said)[1], 16) + 0x28
    )
    data = bytearray(image.read_bytes())
    block = data[at : at + 60]
    change(block)
    data[at : at + 60] = block
    image.write_bytes(data)


@pytest.mark.parametrize("what", ["order", "overlap", "most"])
def test_extents_that_a_kernel_refuses_are_a_contradiction(tree: Path, tmp_path: Path, what: str) -> None:
    """Two extents in an inode: in the wrong order, one over the other, more than eh_max."""
    image = ext_images.make(tree, Flavour("x", "-t ext4 -b 1024 -O ^metadata_csum"), tmp_path / "x.img")
    assert_proven(mapped(image))

    def change(block: bytearray) -> None:
        if what == "order":
            block[12:36] = block[24:36] + block[12:24]
        elif what == "overlap":
            block[24:28] = block[12:16]
        else:
            block[4:6] = (1).to_bytes(2, "little")

    changed(image, "/sparse", change)
    assert complains("e2fsck", "-fn", image)
    found = mapped(image)
    assert verdicts(found, 0)["structure"] == "contradicted"
    assert "tree" in set(found.problems.column("code").to_pylist())
    assert found.filesystems.column("state").to_pylist() == ["damaged"]


def test_a_revoke_block_with_an_impossible_count_refuses_the_journal(tree: Path, tmp_path: Path) -> None:
    """As e2fsck and the kernel: nothing is replayed. Before the change it is."""
    image = ext_images.make(tree, Flavour("x", "-t ext4 -b 1024 -O ^metadata_csum"), tmp_path / "x.img")
    (tmp_path / "commands").write_text(f"jo\njw -b 20000 {tree / 'size-1024'}\njw -r 20001\njc\n")
    run("debugfs", "-w", "-f", tmp_path / "commands", image)
    codes = mapped(image).problems.column("code").to_pylist()
    assert codes == ["journal-replayed"]
    data = np.fromfile(image, np.uint8)
    words = data.view(">u4")
    at = np.flatnonzero((words[:-3] == 0xC03B3998) & (words[1:-2] == 5)) * 4
    assert len(at) == 1
    data[at[0] + 12 : at[0] + 16].view(">u4")[:] = 0xFFFF
    data.tofile(image)
    found = mapped(image)
    assert verdicts(found, 0)["journal"] == "contradicted"
    assert "journal-replayed" not in found.problems.column("code").to_pylist()
    said = subprocess.run(["e2fsck", "-fy", image], capture_output=True, text=True).stderr
    assert "Invalid argument while recovering journal" in said, said


METADATA = (tables.DIRECTORY, tables.XATTR, tables.TREE, tables.METADATA, tables.SYMLINK)


def one_of_each(bmap: BlockMap, size: int) -> Iterator[tuple[str, int]]:
    """The place of one block of each kind and part of metadata, of the map's first filesystem."""
    _, extents = bmap.slice_of("extents", 0)
    kinds, flags = tables.codes(extents, "kind"), tables.integers(extents, "flags")
    start, parts = tables.integers(extents, "volume_offset"), extents.column("part").to_pylist()
    seen = set()
    for at in np.flatnonzero(np.isin(kinds, METADATA) & (flags & tables.INLINE == 0)).tolist():
        name = f"{tables.KINDS[kinds[at]]} {parts[at]}"
        if name not in seen:
            seen.add(name)
            yield name, int(start[at])


EXT_CHECKED = {
    "metadata superblock", "metadata group descriptors", "metadata block bitmap", "metadata inode bitmap",
    "metadata inode table", "metadata journal", "metadata mmp block", "metadata orphan file",
    "directory None", "xattr None", "tree None",
}  # fmt: skip


@pytest.mark.parametrize("block", [1024, 4096])
def test_one_wrong_bit_in_each_kind_of_ext_metadata_is_seen(tree: Path, tmp_path: Path, block: int) -> None:
    flavour = Flavour("x", f"-t ext4 -b {block} -O mmp,orphan_file,metadata_csum,64bit")
    image = ext_images.make(tree, flavour, tmp_path / "x.img")
    # a journal of version 3
    (tmp_path / "commands").write_text(f"jo -c\njw -b 20000 {tree / 'size-1'}\njc\n")
    run("debugfs", "-w", "-f", tmp_path / "commands", image)
    # replays it, and makes hash trees of large directories
    subprocess.run(["e2fsck", "-fyD", image], capture_output=True)
    assert not complains("e2fsck", "-fn", image)
    bmap = mapped(image)
    assert_proven(bmap)
    seen = set()
    for name, offset in one_of_each(bmap, block):
        if name not in EXT_CHECKED:
            continue
        inside = {
            "metadata journal": 0x50,
            "metadata superblock": 0x30,
            "metadata group descriptors": 0x0C,
        }.get(name, 20)
        if name == "metadata inode table":
            inside = 256 + 12  # i_ctime of the root directory
        copy = flipped(image, offset + inside, 3)
        found = check(mapped(copy)).disagreements
        assert any("checksum" in row.detail for row in found), (name, found)
        # of these e2fsck -n says nothing, or mends them silently
        if name not in ("metadata journal", "metadata mmp block"):
            assert complains("e2fsck", "-fn", copy), name
        seen.add(name)
    assert seen >= EXT_CHECKED - {"xattr None"}


def test_one_wrong_bit_in_each_part_of_a_hash_tree_is_seen(tree: Path, tmp_path: Path) -> None:
    """Without checksums: limit, count, and the order of hashes."""
    image = ext_images.make(tree, Flavour("x", "-t ext4 -b 1024 -O ^metadata_csum"), tmp_path / "x.img")
    subprocess.run(["e2fsck", "-fyD", image], capture_output=True)
    block = int(run("debugfs", "-R", "bmap /many 0", image).split()[-1])
    assert_proven(mapped(image))
    for inside, bit in ((0x20, 3), (0x22, 6), (0x28 + 3, 7), (0x2C + 2, 4), (0x1E, 3)):
        copy = flipped(image, block * 1024 + inside, bit)
        assert complains("e2fsck", "-fn", copy), inside
        assert "directory" in {row.code for row in check(mapped(copy)).disagreements}, inside


def test_names_and_targets_that_no_kernel_makes_are_seen(tree: Path, tmp_path: Path) -> None:
    """A slash in a name, a NUL in the target of a link, with no checksum to tell."""
    image = ext_images.make(tree, Flavour("x", "-t ext4 -b 1024 -O ^metadata_csum"), tmp_path / "x.img")
    data = image.read_bytes()
    for old, new, code in (
        (b"a name that takes some room 000007", b"a name/that takes some room 000007", "name"),
        (b"a" * 59, b"a" * 30 + b"\0" + b"a" * 28, "symlink"),
    ):
        assert data.count(old) >= 1
        copy = tmp_path / "copy"
        copy.write_bytes(data.replace(old, new))
        assert complains("e2fsck", "-fn", copy)
        assert code in {row.code for row in check(mapped(copy)).disagreements}
