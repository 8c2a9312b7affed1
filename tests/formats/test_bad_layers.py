"""Disks that do not belong together, or that contradict themselves: one line each that names the disk and the
byte; what can be read is read."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from test_luks import FAST, SECRET
from test_lvm import Group, group, with_text  # noqa: F401  (a fixture)
from test_md import raid5_compute_sector, superblock

from support import BytesReader, run
from virt_bmap.core.keys import Keys
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes.lvm.label import _crc
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import MAX_DEPTH, survey

MIB = 1 << 20


def problems(disks: list[Reader], keys: Keys | None = None) -> list[tuple[str, str, str]]:
    """(severity, code, detail) of a map's problems."""
    bmap = survey(disks, keys=keys or Keys())
    return [(row["severity"], row["code"], row["detail"]) for row in bmap.problems.to_pylist()]


def members(uuid: bytes) -> list[Reader]:
    """A RAID5 of three disks with numbers in it."""
    data = np.arange(64 * 16384, dtype=np.uint8).reshape(64, 16384)
    images = np.zeros((3, 32, 16384), np.uint8)
    for chunk, content in enumerate(data):
        row, dd, pd, _ = raid5_compute_sector(5, 2, 3, chunk)
        images[dd, row] = content
        images[pd, row] ^= content
    result: list[Reader] = []
    for role, image in enumerate(images):
        disk = np.zeros(4 * MIB, np.uint8)
        head = bytearray(superblock(5, 2, 32, image.size // 512, role, 3, 2048, 8))
        head[0x10:0x20] = uuid
        head[0xD8:0xDC] = bytes(4)
        words = np.frombuffer(bytes(head) + bytes(-len(head) % 4), "<u4")
        total = int(words.astype(np.uint64).sum())
        head[0xD8:0xDC] = struct.pack("<I", (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
        disk[4096 : 4096 + len(head)] = np.frombuffer(bytes(head), np.uint8)
        disk[MIB : MIB + image.size] = image.reshape(-1)
        result.append(BytesReader(disk))
    return result


def test_members_of_different_arrays_mixed() -> None:
    one, two = members(b"0123456789abcdef"), members(b"fedcba9876543210")
    found = problems([one[0], two[1], two[2]])
    assert [(severity, code) for severity, code, _ in found] == [
        ("error", "missing-member"),
        ("note", "missing-member"),
    ]
    assert found[0][2] == ("members in slots 1, 2 are missing, says the superblock at byte 0x1000 of "
        "/dev/sda: its bytes are lost; "
                           "/dev/sdb, /dev/sdc belong to other arrays")  # fmt: skip


def test_a_missing_disk_of_an_array() -> None:
    one = members(b"0123456789abcdef")
    assert problems(one) == []
    ((severity, _, detail),) = problems(one[1:])
    assert severity == "note"
    assert (
        detail == "members in slots 0 are missing, says the superblock at byte 0x1000 of /dev/sda: they are "
        "computed from parity"
    )


def test_a_missing_disk_of_a_group(group: Group) -> None:
    found = problems([RawReader(str(group.disks[1]))])
    assert found
    assert all(severity == "error" and re.search(r"physical volume \S+ \(once /dev/\S+\) is missing, says "
        r"the metadata at byte 0x1000 of /dev/sda", detail)
               for severity, _, detail in found)  # fmt: skip


def test_two_groups_of_one_name(group: Group) -> None:
    """The second disk is a copy whose group and disk have other ids, as after a hasty restore of a clone."""
    disk = np.fromfile(group.disks[1], np.uint8)[: 8 * MIB]
    other = disk.copy()
    own = bytes(disk[512 + 32 : 512 + 64].tobytes())
    other[512 + 32 : 512 + 64] = ord("Z")
    other[512 + 16 : 512 + 20] = np.frombuffer(
        struct.pack("<I", _crc(other[512 + 20 : 1024].tobytes())), np.uint8
    )
    text = text_of(disk).replace(_dashed(own), _dashed(b"Z" * 32))
    text = re.sub(rb'id = "[^"]+"', b'id = "' + _dashed(b"Y" * 32) + b'"', text, count=1)
    found = [
        detail
        for _, code, detail in problems([BytesReader(disk), with_text(other, text)])
        if code == "duplicate"
    ]
    assert len(found) == 2
    assert all("2 volume groups are called my-vg" in detail for detail in found)
    assert {re.findall(r"byte 0x1000 of (\S+),", detail)[0] for detail in found} == {"/dev/sda", "/dev/sdb"}


def text_of(disk: np.ndarray) -> bytes:
    raw = disk[4096 + 40 : 4096 + 56].view("<u8")
    return bytes(disk[4096 + raw[0] : 4096 + raw[0] + raw[1]].tobytes())


def _dashed(uuid: bytes) -> bytes:
    sizes = (6, 4, 4, 4, 4, 4, 6)
    starts = np.cumsum((0, *sizes[:-1])).tolist()
    return b"-".join(uuid[start : start + size] for start, size in zip(starts, sizes, strict=True))


def test_volumes_that_contain_each_other(group: Group) -> None:
    disk = np.fromfile(group.disks[1], np.uint8)[: 8 * MIB]
    text = re.sub(
        rb'stripes = \[\s*"pv\d", \d+(,\s*"pv\d", \d+)?\s*\]', b'stripes = [ "striped", 0 ]', text_of(disk)
    )
    bmap = survey([with_text(disk, text)])
    (problem,) = [row for row in bmap.problems.to_pylist() if row["code"] == "twice"]
    assert "contain each other" in problem["detail"]
    assert problem["volume_offset"] == 4096
    assert bmap.volumes.num_rows == 1


def test_a_wrong_key(tmp_path: Path) -> None:
    device, secret = tmp_path / "device", tmp_path / "secret"
    secret.write_bytes(SECRET)
    device.write_bytes(bytes(20 * MIB))
    run("cryptsetup", "luksFormat", "-q", "--type", "luks2", *FAST["pbkdf2"], "--key-file", secret, device)
    ((severity, code, detail),) = problems([RawReader(str(device))], Keys((("all", b"wrong"),)))
    assert (severity, code) == ("warning", "no-key")
    assert detail == "none of the given keys opens it (1 key slots, the first at byte 0x8000)"


def test_partition_tables_without_end() -> None:
    """A table whose first partition holds such a table again, further down than anything real: the survey
    ends and says so."""
    disk = np.zeros((MAX_DEPTH + 8) * 1024, np.uint8)
    sectors = len(disk) // 512
    for depth in range(MAX_DEPTH + 6):
        entry = struct.pack("<B3xB3xII", 0, 0x83, 1, sectors - depth - 1)
        disk[depth * 512 + 446 : depth * 512 + 462] = np.frombuffer(entry, np.uint8)
        disk[depth * 512 + 510 : depth * 512 + 512] = (0x55, 0xAA)
    found = problems([BytesReader(disk)])
    assert [code for _, code, _ in found] == ["too-deep"]
    assert f"{MAX_DEPTH} layers" in found[0][2]


@pytest.mark.parametrize("copies", [2, 3])
def test_one_disk_given_twice(copies: int) -> None:
    one = members(b"0123456789abcdef")
    found = problems([*one, *one[:1] * (copies - 1)])
    assert sorted(code for _, code, _ in found) == ["duplicate"] * (copies - 1) + ["unused-member"] * (
        copies - 1
    )
    assert all(
        "the member in slot 0" in detail and ": /dev/sda is used, which was given first" in detail
        for _, code, detail in found
        if code == "duplicate"
    )
