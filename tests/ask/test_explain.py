"""virt-bmap explain against debugfs, parity worked out, the records' own magic numbers, and the bytes that
were put in."""

import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import BytesReader, mapped, mounted, mutations, need, need_root, run, wait_for_socket
from virt_bmap.ask.explain import MAX_LAYERS, _Walk, explain
from virt_bmap.core.errors import BmapError
from virt_bmap.core.mapping import COPY, Row, Rows
from virt_bmap.formats import registry as formats
from virt_bmap.formats.filesystems.ext import history
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap, Owners
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey

PROGRAM = [sys.executable, "-m", "virt_bmap", "explain"]
START = 1 << 20
"""Where the partition of the test disk begins."""


def words(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, **more)


def fails(*arguments: object) -> str:
    done = words(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    return done.stderr


def answer(*arguments: object) -> dict[str, Any]:
    done = words("--json", *arguments)
    assert done.returncode == 0, done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def innermost(found: dict[str, Any]) -> dict[str, Any]:
    """The last layer of a stack in which every layer has one other inside."""
    layer: dict[str, Any] = found["layer"]
    while layer["layers"]:
        (layer,) = layer["layers"]
    return layer


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT with an ext4 of a file with two names, a directory of forty small files, and a symbolic link."""
    need("mke2fs", "e2fsprogs"), need("sfdisk", "fdisk")
    folder = tmp_path_factory.mktemp("explain")
    (folder / "tree/etc").mkdir(parents=True)
    (folder / "tree/many").mkdir()
    (folder / "tree/etc/passwd").write_bytes(np.random.default_rng(1).bytes(11_000))
    os.link(folder / "tree/etc/passwd", folder / "tree/hard")
    os.symlink("/etc/passwd", folder / "tree/link")
    for number in range(40):
        (folder / f"tree/many/f{number}").write_text("x" * 10)
    path = folder / "disk.img"
    with open(path, "wb") as file:
        file.truncate(40 << 20)
    run("sfdisk", "-q", path, stdin=b"label: gpt\nsize=30M,name=system\n")
    run(
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-L",
        "root",
        "-d",
        folder / "tree",
        "-E",
        f"offset={START}",
        path,
        "30M",
    )
    return path


def debugfs(disk: Path, command: str) -> str:
    return run("debugfs", "-R", command, f"{disk}?offset={START}").decode()


def test_a_byte_of_a_file(disk: Path) -> None:
    block = int(debugfs(disk, "bmap /etc/passwd 3"))
    at = START + block * 1024 + 17
    found = answer(disk, at)
    layer = innermost(found)
    assert (layer["device"], layer["offset"], layer["kind"]) == ("/dev/sda1", at - START, "partition")
    system = layer["filesystem"]
    assert (system["type"], system["label"], system["block"], system["block_offset"]) == (
        "ext4",
        "root",
        block,
        17,
    )
    (owner,) = layer["owners"]
    assert (owner["kind"], owner["file_offset"]) == ("data", 3 * 1024 + 17)
    inode, said = owner["inode"], debugfs(disk, "stat /etc/passwd")
    assert inode["inode"] == int(re.search(r"Inode: (\d+)", said)[1])
    assert inode["size"] == int(re.search(r"Size: (\d+)", said)[1]) == 11_000
    assert inode["nlink"] == int(re.search(r"Links: (\d+)", said)[1]) == 2
    assert inode["mode"][-4:] == re.search(r"Mode: +(\d{4})", said)[1]
    seconds, extra = re.search(r"mtime: 0x([0-9a-f]+):([0-9a-f]+)", said).groups()
    assert (np.datetime64(inode["mtime"].rstrip("Z"), "ns") - np.datetime64(0, "ns")).astype(int) == int(
        seconds, 16
    ) * 10**9 + (int(extra, 16) >> 2)
    assert sorted(inode["paths"]) == ["/etc/passwd", "/hard"]
    content = (disk.parent / "tree/etc/passwd").read_bytes()
    assert bytes.fromhex(found["bytes"]) == content[3 * 1024 + 17 :][:64]
    shown = words(disk, at).stdout
    for word in (
        "/dev/sda1",
        "2 names: ",
        "/etc/passwd",
        "/hard",
        f"block {block:,} of 1,024 bytes, byte 0x11 in it",
        found["bytes"][:2],
    ):
        assert word in shown


def test_slack_behind_the_end_of_a_file(disk: Path) -> None:
    block = int(debugfs(disk, "bmap /etc/passwd 10"))
    shown = words(disk, START + block * 1024 + 11_000 - 10 * 1024).stdout
    assert "byte 0x2af8 (beyond its end: slack)" in shown
    assert "slack" not in words(disk, START + block * 1024 + 10_999 - 10 * 1024).stdout


def test_inode_records_are_where_debugfs_says(disk: Path) -> None:
    for path in ("/many/f7", "/hard", "/link"):
        block, inside = re.search(
            r"located at block (\d+), offset 0x([0-9a-f]+)", debugfs(disk, f"imap {path}")
        ).groups()
        at = START + int(block) * 1024 + int(inside, 16)
        for byte in (0, 255):
            layer = innermost(answer(disk, at + byte))
            record = layer["filesystem"]["record"]
            names = {"/hard", "/etc/passwd"} if path == "/hard" else {path}
            assert record["path"] in names
            assert (record["size"], record["inside"], record["offset"]) == (256, byte, at - START)
            assert any(owner["part"] == "inode table" for owner in layer["owners"])
            beside = layer["filesystem"]["records_in_block"]
            number = (record["inode"] - 1) // 4 * 4 + 1
            used = [n for n in range(number, number + 4) if "marked in use" in debugfs(disk, f"testi <{n}>")]
            assert [row["inode"] for row in beside["records"]] == used, (
                "four inodes of 256 bytes in a block of 1 KiB"
            )
            assert beside["count"] == len(used)
        assert f"record of inode {record['inode']}, " in words(disk, at).stdout


def test_names_in_a_directory(disk: Path) -> None:
    block = int(debugfs(disk, "bmap /many 0"))
    (owner,) = innermost(answer(disk, START + block * 1024))["owners"]
    assert sorted(owner["names"]["names"]) == sorted(os.listdir(disk.parent / "tree/many"))
    assert owner["names"]["count"] == 40
    assert "40 names in this directory" in words(disk, START + block * 1024).stdout
    assert "and 30 more" in words(disk, START + block * 1024).stdout


def test_why_there_is_no_owner(disk: Path) -> None:
    free = int(debugfs(disk, "ffb 1 20000").split()[-1])
    assert [owner["kind"] for owner in innermost(answer(disk, START + free * 1024))["owners"]] == ["free"]
    assert (
        "the filesystem's or volume manager's own allocator calls it free"
        in words(disk, START + free * 1024).stdout
    )
    assert "between /dev/sda1 and the end" in words(disk, 35 << 20).stdout
    assert "between the start and /dev/sda1" in words(disk, 500_000).stdout
    assert "metadata [GPT header]" in words(disk, 0x210).stdout
    assert bytes.fromhex(answer(disk, 0x200)["bytes"])[:8] == b"EFI PART"


def test_the_last_byte(disk: Path) -> None:
    found = answer(disk, (40 << 20) - 1)
    assert found["bytes"] == "00"
    assert [owner["kind"] for owner in innermost(found)["owners"]] == ["metadata"]


def test_saved_maps_and_several_disks(disk: Path, tmp_path: Path) -> None:
    at = START + int(debugfs(disk, "bmap /etc/passwd 0")) * 1024
    for name in ("m.parquet", "m.bmap"):
        subprocess.run([*PROGRAM[:-1], "-q", "-o", tmp_path / name, disk], check=True)
        done = words(tmp_path / name, at)
        assert "data of /hard" in done.stdout
        assert "not shown: the map was saved without" in done.stdout
    assert answer(tmp_path / "m.parquet", at)["layer"] == answer(disk, at)["layer"]
    second = answer("-a", disk, "-a", disk, f"2:{at}")
    assert (second["disk"], innermost(second)["device"]) == (2, "/dev/sdb1")


def test_bad_words(disk: Path) -> None:
    assert "explain needs a map or disk, and one OFFSET" in fails(disk)
    assert "explain needs one OFFSET" in fails("-a", disk, "1", "2")
    assert "explain takes one byte" in fails(disk, "0-100")
    assert "is not a number of bytes" in fails(disk, "zzz")
    assert "beyond the end of disk 1" in fails(disk, 40 << 20)
    assert "there is no disk 2" in fails(disk, "2:0")
    assert "No such file" in fails("nonexistent", "0")


def test_a_bad_sector_is_explained_all_the_same(disk: Path, tmp_path: Path) -> None:
    """A server that fails every read of one block of a file."""
    need("nbdkit", "nbdkit")
    at = START + int(debugfs(disk, "bmap /etc/passwd 0")) * 1024
    script = f"""case "$1" in
        get_size) echo {40 << 20} ;;
        pread) if [ $4 -le {at} ] && [ {at} -lt $(($4 + $3)) ]; then echo EIO bad sector >&2; exit 1; fi
               dd if={disk} iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=64k status=none ;;
        *) exit 2 ;;
    esac"""
    path = tmp_path / "socket"
    server = subprocess.Popen(["nbdkit", "-f", "-r", "-U", path, "sh", "-"], stdin=subprocess.PIPE, text=True)
    try:
        server.stdin.write(script)
        server.stdin.close()
        wait_for_socket(path)
        done = words(f"nbd+unix:///?socket={path}", at)
        assert done.returncode == 0, done
        assert "data of /hard" in done.stdout
        assert re.search(r"the bytes there are not shown: .*", done.stdout)
    finally:
        server.kill()
        server.wait()


# ---- other filesystems: the record says itself whose it is -------------------------------------------------


def records(image: Path) -> list[tuple[int, dict[str, Any]]]:
    """(inode, explained record) of every inode, with the byte 5 behind its start asked about."""
    bmap = mapped(image)
    place, number = tables.integers(bmap.inodes, "record_offset"), tables.integers(bmap.inodes, "inode")
    result = []
    for inode, at in zip(number[place >= 0].tolist(), place[place >= 0].tolist(), strict=True):
        result.append((inode, innermost(explain(bmap, 1, at + 5))["filesystem"]["record"]))
    return result


def test_ntfs_records_name_themselves(tmp_path: Path) -> None:
    need("mkntfs", "ntfs-3g")
    image = tmp_path / "ntfs"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    run("mkntfs", "-F", "-Q", "-q", image)
    data = image.read_bytes()
    found = records(image)
    assert len(found) >= 11
    for inode, record in found:
        at = record["offset"]
        assert (record["inode"], record["size"], record["inside"], data[at : at + 4]) == (
            inode,
            1024,
            5,
            b"FILE",
        )
        assert int.from_bytes(data[at + 0x2C : at + 0x30], "little") == inode


def test_xfs_records_name_themselves(tmp_path: Path) -> None:
    need("mkfs.xfs", "xfsprogs")
    image = tmp_path / "xfs"
    with open(image, "wb") as file:
        file.truncate(300 << 20)
    run("mkfs.xfs", "-q", image)
    found = records(image)
    assert len(found) >= 3
    with open(image, "rb") as file:
        for inode, record in found:
            file.seek(record["offset"])
            data = file.read(512)
            assert (record["inode"], record["size"], data[:2]) == (inode, 512, b"IN")
            assert int.from_bytes(data[0x98:0xA0], "big") == inode


def test_fat_records_hold_the_name(tmp_path: Path) -> None:
    need("mkfs.vfat", "dosfstools"), need("mcopy", "mtools")
    image, source = tmp_path / "fat", tmp_path / "FILE.TXT"
    source.write_bytes(b"hello" * 1000)
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    run("mkfs.vfat", image)
    for name in ("A.TXT", "B.TXT"):
        run("mcopy", "-i", image, source, f"::{name}")
    bmap, data = mapped(image), image.read_bytes()
    for name, raw in ((b"A       TXT", "/A.TXT"), (b"B       TXT", "/B.TXT")):
        record = innermost(explain(bmap, 1, data.index(name) + 7))["filesystem"]["record"]
        assert (record["path"], record["size"], record["offset"]) == (raw, 32, data.index(name))


# ---- layers ------------------------------------------------------------------------------------------------


def test_parity_is_the_xor_of_what_it_is_said_to_protect(corpus: Path) -> None:
    folder = corpus / "images/fox-it+dissect.volume/tests/_data/md"
    disks = [
        BytesReader(np.frombuffer(gzip.decompress((folder / f"md-raid5-{n}.bin.gz").read_bytes()), np.uint8))
        for n in (1, 2, 3)
    ]
    bmap = survey(disks)
    seen = set()
    for number, disk in enumerate(disks, 1):
        for at in np.random.default_rng(number).integers(0, disk.size, 60).tolist():
            layers = explain(bmap, number, at)["layer"]["layers"]
            roles = {layer["from"]["role"] for layer in layers}
            seen |= roles
            if not layers:
                continue
            assert len(roles) == 1
            assert len(layers) == (2 if roles == {"parity"} else 1)
            protected = 0
            for layer in layers:
                assert layer["from"]["start"] + layer["from"]["inside"] == at
                home = bmap.descend(
                    layer["device"] and bmap.volume_named(layer["device"]),
                    np.array([layer["offset"]]),
                    np.array([layer["offset"] + 1]),
                )
                home = home.take(home.role == 0)
                protected ^= int(disks[int(home.volume[0])].data[home.start[0]])
            assert protected == int(disk.data[at])
    assert seen == {"data", "parity"}


def test_below_the_encryption(disk: Path, tmp_path: Path) -> None:
    """The filesystem encrypted in place by cryptsetup, which needs no kernel for that."""
    need("cryptsetup", "cryptsetup-bin")
    pytest.importorskip("cryptography")
    image, key = tmp_path / "luks", tmp_path / "key"
    image.write_bytes(disk.read_bytes()[START : START + (30 << 20)] + bytes(32 << 20))
    key.write_text("secret")
    fast = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    run(
        "cryptsetup",
        "reencrypt",
        "-q",
        "--encrypt",
        "--type",
        "luks2",
        *fast,
        "--reduce-device-size",
        "32M",
        "--key-file",
        key,
        image,
    )
    block = int(debugfs(disk, "bmap /etc/passwd 0"))
    dump = run("cryptsetup", "luksDump", image).decode()
    at = int(re.search(r"Data segments:\s+0: crypt\s+offset: (\d+)", dump)[1]) + block * 1024
    found = answer("--key", f"all:file:{key}", image, at)
    layer = innermost(found)
    assert (layer["kind"], layer["filesystem"]["block"], layer["owners"][0]["inode"]["path"]) == (
        "crypt",
        block,
        "/hard",
    )
    assert bytes.fromhex(found["bytes"]) == image.read_bytes()[at : at + 64]
    assert bytes.fromhex(found["bytes"]) != (disk.parent / "tree/etc/passwd").read_bytes()[:64]
    assert "below the encryption" in words("--key", f"all:file:{key}", image, at).stdout
    shut = words(image, at).stdout
    assert "one piece that is named but not looked into" in shut


def test_segments_of_a_logical_volume(tmp_path: Path) -> None:
    """LVM in a partition, made without device-mapper; lvs and pvs say where the segment lies."""
    need("lvcreate", "lvm2"), need_root()
    image = tmp_path / "lvm"
    with open(image, "wb") as file:
        file.truncate(48 << 20)
    run("sfdisk", "-q", image, stdin=b"label: dos\nstart=2048,type=8e\n")
    loop = run("losetup", "-f", "--show", "-o", str(START), image).decode().strip()
    try:
        more = ["--config", f'devices{{filter=["a|{loop}$|","r|.*|"]}}', "--driverloaded", "n"]
        run("pvcreate", "-q", *more, loop)
        run("vgcreate", "-q", "-s", "1M", *more, "group", loop)
        for name in ("one", "two"):
            run("lvcreate", "-q", "-L", "8M", "-an", "-Zn", "-Wn", "-n", name, *more, "group")
        shown = run("pvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "pe_start", *more)
        extent = (
            run("lvs", "--noheadings", "-o", "seg_pe_ranges", *more, "group/two")
            .decode()
            .split(":")[1]
            .split("-")[0]
        )
        place = int(shown) + (int(extent) << 20)
    finally:
        run("losetup", "-d", loop)
    found = answer(image, START + place + 4097)
    partition = found["layer"]["layers"][0]
    (volume,) = partition["layers"]
    assert (partition["device"], partition["type"], partition["offset"]) == (
        "/dev/sda1",
        "LVM2_member",
        place + 4097,
    )
    assert (volume["device"], volume["kind"], volume["offset"]) == ("/dev/group/two", "lv", 4097)
    assert volume["from"] == {
        "role": "data",
        "start": place,
        "end": place + (8 << 20),
        "inside": 4097,
        "number": 0,
        "count": 1,
    }
    assert (
        f"data: 8.0 MiB from byte {place:#x}, byte 0x1001 in it" in words(image, START + place + 4097).stdout
    )


def test_a_stack_that_multiplies_is_cut() -> None:
    """Every volume lies twice in the one before: 2**39 ways down."""
    depth = 40
    rows = [Rows.of([Row(0, n - 1, 0, 100), Row(0, n - 1, 0, 100, role=COPY)], n) for n in range(1, depth)]
    bmap = BlockMap(
        volumes=tables.make("volumes", volume=list(range(depth)), disk=[1] * depth,
            kind=["disk"] + ["lv"] * (depth - 1),
                            name=[f"/dev/v{n}" for n in range(depth)], size=[100] * depth),
        mappings=tables.mappings(rows),
        **{name: tables.empty(name) for name in ("filesystems", "inodes", "names", "extents", "problems")},
    )  # fmt: skip
    none = np.zeros(0, np.int64)
    # without owners, which climb all ways, as lookups must: survey lets no stack grow deeper than 16
    walk = _Walk(bmap, Owners(none, none, none, none, none, none, none, none, none))
    count = json.dumps(walk.layer(0, 5)).count('"device"')
    assert count == MAX_LAYERS
    assert walk.left < 0


# ---- fields ------------------------------------------------------------------------------------------------


def fields_of(disk: Path, offset: int) -> dict[str, Any]:
    found = answer(disk, offset)["fields"]
    return {
        row["name"]: row["value"]
        for row in found["fields"]
        if row["record"] in (None, found["fields"][0]["record"])
    }


def test_fields_of_the_superblock_are_those_of_dumpe2fs(disk: Path) -> None:
    said = dict(
        line.split(":", 1)
        for line in run("dumpe2fs", "-h", f"{disk}?offset={START}").decode().splitlines()
        if ":" in line
    )
    found = fields_of(disk, START + 1024)
    assert (found["s_inodes_count"], found["s_blocks_per_group"]) == (
        int(said["Inode count"]),
        int(said["Blocks per group"]),
    )
    assert bytes.fromhex(fields_of(disk, START + 1024 + 0x68)["s_uuid"]).hex() == said[
        "Filesystem UUID"
    ].strip().replace("-", "")
    backup = next(at for at in range(8193, 30 << 10, 8192) if answer(disk, START + at * 1024)["fields"])
    assert fields_of(disk, START + backup * 1024)["s_inodes_count"] == int(said["Inode count"])


def test_fields_of_an_inode_are_those_of_debugfs(disk: Path) -> None:
    group, at = re.search(r"block (\d+), offset (0x[0-9a-f]+)", debugfs(disk, "imap /etc/passwd")).groups()  # type: ignore[union-attr]
    found = fields_of(disk, START + int(group) * 1024 + int(at, 16))
    assert (found["i_size_lo"], found["i_links_count"], found["i_mode"]) == (11_000, 2, 0o100644)


def test_fields_of_gpt_are_those_of_sfdisk(disk: Path) -> None:
    table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    assert fields_of(disk, 512)["signature"] == "EFI PART"
    assert fields_of(disk, 512 + 32)["first_usable_lba"] == int(table["firstlba"])
    found = fields_of(disk, 1024)
    entry = answer(disk, 1024 + 32)["fields"]["fields"]
    assert {row["name"]: row["value"] for row in entry}["starting_lba"] == table["partitions"][0]["start"]
    assert (
        bytes.fromhex(found["unique_partition_guid"])[:4][::-1].hex()
        == table["partitions"][0]["uuid"].split("-")[0].lower()
    )


def test_data_has_no_fields_and_every_structure_is_declared(disk: Path) -> None:
    assert answer(disk, START + int(debugfs(disk, "bmap /etc/passwd 3")) * 1024)["fields"] is None
    for _, format in formats.every():
        for known in format.structures().values():
            assert known.dtype.names


# ---- what a journal remembers ------------------------------------------------------------------------------


def test_whose_a_free_block_was_and_what_a_journal_block_is_a_copy_of(tmp_path: Path) -> None:
    """A file is written, synced and deleted by this kernel; debugfs said where it lay, and reads the journal
    for us."""
    need("mke2fs", "e2fsprogs"), need_root()
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", image)
    with mounted(image, "rw") as folder:
        (folder / "d").mkdir()
        for number in range(4):
            with open(folder / f"d/file{number}", "wb") as file:
                file.write(bytes([number]) * 50_000)
                os.fsync(file.fileno())
        inode = (folder / "d/file2").stat().st_ino
        run("sync", "-f", folder)
        block = int(run("debugfs", "-R", "bmap /d/file2 3", image))
        kept = int(run("debugfs", "-R", "bmap /d/file3 3", image))
        (folder / "d/file2").unlink()
    found = answer(image, block * 1024 + 17)
    assert innermost(found)["owners"][0]["kind"] == "free"
    (former,) = found["history"]["former"]
    assert (former["inode"], former["names"], former["now"]) == (inode, ["file2"], None)
    assert (former["file_offset"], former["size"]) == (3 * 1024 + 17, 50_000)
    assert "was once byte 0xc11 of inode" in words(image, block * 1024 + 17).stdout
    assert answer(image, kept * 1024)["history"] is None
    untouched = answer(image, (60 << 20) + 512)
    assert untouched["history"]["former"] == []
    first = int(run("debugfs", "-R", "bmap <8> 0", image))
    reader, data = RawReader(str(image)), image.read_bytes()
    latest: dict[int, tuple[int, int]] = {}
    for block in range(first + 1, first + 60):
        if copy := history.copy_of(reader, block * 1024):
            latest[copy[0]] = max(latest.get(copy[0], (0, 0)), (copy[1], block))
    reader.close()
    # every block that was logged was also written home since, and the last copy of it is what lies there
    same = {
        target
        for target, (_, block) in latest.items()
        if data[target : target + 1024] == data[block * 1024 : block * 1024 + 1024]
    }
    assert len(same) > 5
    assert set(latest) - same <= {1024}  # the superblock is written again when it is unmounted
    _, block = latest[max(same)]
    found = answer(image, block * 1024 + 5)
    assert found["history"]["copy_of"] == max(same) + 5
    assert f"belongs at byte {max(same) + 5:#x} of /dev/sda" in words(image, block * 1024 + 5).stdout
    # a hostile journal costs an answer at most, never more than that
    start = first * 1024
    for mutant in mutations(data, 60, seed=7, ranges=[(start, start + 64 * 1024)]):
        hostile = BytesReader(mutant)
        with contextlib.suppress(BmapError):
            history.copy_of(hostile, block * 1024)
            history.former(hostile, tables.empty("extents"), np.array([max(same)]), np.array([max(same) + 1]))
