"""Discs that were written in sessions: any of them is shown, as isoinfo, xorriso and a kernel show it."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest

import udf_images
from appliance import Step, made
from support import BytesReader, assert_proven, content, mapped, need, run, tree
from virt_bmap import cli
from virt_bmap.ask.check import check
from virt_bmap.core.errors import UsageError
from virt_bmap.core.reader import DiscSession
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import Disks
from virt_bmap.survey.maps import opened
from virt_bmap.survey.survey import survey

SECTOR = 2048
STARTS = (0, 480, 960)
"""In sectors, of the disc that genisoimage writes."""
ROOM = 32
"""Sectors that libburn's programs leave at the start of what can be overwritten."""


def sources(folder: Path) -> list[Path]:
    """What each session adds."""
    found = []
    for name in ("one", "two", "three"):
        (folder / name).mkdir(parents=True)
        (folder / name / name).write_bytes(name.encode() * 1000)
        found.append(folder / name)
    (found[0] / "old").write_bytes(np.random.default_rng(1).bytes(300_000))
    return found


@pytest.fixture(scope="module")
def appended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DiscSession behind session, as on a CD: each shows the files of those before it, too."""
    need("genisoimage", "genisoimage")
    folder = tmp_path_factory.mktemp("appended")
    disc, last = folder / "disc", 0
    for at, source in zip(STARTS, sources(folder), strict=True):
        more = ["-M", disc, "-C", f"{last},{at}"] if at else []
        run("genisoimage", "-quiet", "-R", *more, "-o", folder / "new", source)
        with open(disc, "ab") as file:
            file.truncate(at * SECTOR)
            file.seek(at * SECTOR)
            file.write((folder / "new").read_bytes())
        last = at
    return disc


@pytest.fixture(scope="module")
def overwritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A medium that can be overwritten, as libburn's programs grow it: the newest descriptors are copied to
    the start, where room was left. The second session has lost a file."""
    need("xorriso", "xorriso")
    folder = tmp_path_factory.mktemp("overwritten")
    disc, (one, two, three) = folder / "disc", sources(folder)
    for words in (["-map", one, "/"], ["-rm", "/old", "--", "-map", two, "/"], ["-map", three, "/"]):
        run("xorriso", "-dev", f"stdio:{disc}", *words, "-commit", "-end")
    return disc


@pytest.fixture
def lost(appended: Path, tmp_path: Path) -> Path:
    """The same where no room was left, as growisofs does it: the first session's descriptors are gone."""
    data, last = bytearray(appended.read_bytes()), STARTS[-1]
    descriptors = bytearray(data[(last + 16) * SECTOR : (last + 18) * SECTOR])
    size = len(data) // SECTOR
    descriptors[80:88] = size.to_bytes(4, "little") + size.to_bytes(4, "big")
    data[16 * SECTOR : 18 * SECTOR] = descriptors
    (tmp_path / "lost").write_bytes(data)
    return tmp_path / "lost"


def shown(disc: Path, session: DiscSession | None) -> tuple[BlockMap, dict[str, str]]:
    """The map, and the hashes of all regular files by their paths, read where it says."""
    with opened(Disks([os.fspath(disc)], session=session)) as (bmap, readers):
        found = {
            path: hashlib.sha256(content(bmap, [readers[0]], 0, inode)).hexdigest()
            for path, inode in tree(bmap, 0).items()
            if path != "/"
        }
    assert {row.code for row in check(bmap).disagreements} <= {"hidden"}
    return bmap, found


def by_isoinfo(disc: Path, start: int) -> dict[str, str]:
    words = ["isoinfo", "-R", "-i", disc, "-T", str(start)]
    paths = [line for line in run(*words, "-f").decode().splitlines() if line.startswith("/")]
    return {path: hashlib.sha256(run(*words, "-x", path)).hexdigest() for path in paths}


def by_xorriso(disc: Path, session: int, where: Path) -> dict[str, str]:
    where.mkdir()
    load = ["-osirrox", "on", "-load", "session", str(session), "-indev", f"stdio:{disc}"]
    run("xorriso", *load, "-extract", "/", where)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in where.iterdir()}
    return {f"/{name}": digest for name, digest in found.items()}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_sessions_that_were_appended(appended: Path, number: int) -> None:
    need("isoinfo", "genisoimage")
    start = STARTS[number - 1]
    truth = by_isoinfo(appended, start)
    assert len(truth) == number + 1
    bmap, found = shown(appended, DiscSession(number))
    assert found == truth
    assert shown(appended, DiscSession(sector=start))[1] == truth
    features = bmap.filesystems.column("features").to_pylist()[0].split()
    assert [word for word in features if "@" in word] == ([f"session@{start}"] if start else [])
    later = [row for row in bmap.problems.to_pylist() if row["code"] == "hidden"]
    assert [row["volume_offset"] for row in later] == [at * SECTOR for at in STARTS[number : number + 1]]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_sessions_on_what_can_be_overwritten(overwritten: Path, number: int, tmp_path: Path) -> None:
    truth = by_xorriso(overwritten, number, tmp_path / "out")
    assert ("/old" in truth) == (number == 1)
    assert shown(overwritten, DiscSession(number))[1] == truth


def test_the_last_session(appended: Path, overwritten: Path) -> None:
    assert shown(appended, DiscSession())[1] == by_isoinfo(appended, STARTS[-1])
    bmap, newest = shown(overwritten, None)
    assert newest == shown(overwritten, DiscSession())[1]
    assert [(row["code"], row["severity"], row["volume_offset"]) for row in bmap.problems.to_pylist()] == [
        ("hidden", "note", ROOM * SECTOR)
    ]
    assert_proven(bmap)


def test_sessions_without_descriptors_are_said(lost: Path) -> None:
    assert shown(lost, None)[1] == by_isoinfo(lost, 0) == shown(lost, DiscSession(3))[1]
    assert shown(lost, DiscSession(2))[1] == by_isoinfo(lost, STARTS[1])
    with pytest.raises(UsageError, match="the descriptors of session 1 were overwritten"):
        shown(lost, DiscSession(1))


def test_an_image_that_is_a_file_of_a_session_is_none(appended: Path, tmp_path: Path) -> None:
    """Nor is one that was merely copied behind it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "image").write_bytes(appended.read_bytes()[: STARTS[1] * SECTOR])
    run("genisoimage", "-quiet", "-R", "-o", tmp_path / "disc", folder)
    with open(tmp_path / "disc", "ab") as file:
        file.write((folder / "image").read_bytes())
    assert shown(tmp_path / "disc", DiscSession())[1] == shown(tmp_path / "disc", DiscSession(1))[1]
    with pytest.raises(UsageError, match=r"it has 1 session \(1 at sector 0\)"):
        shown(tmp_path / "disc", DiscSession(2))


# ---- UDF ---------------------------------------------------------------------------------------------------

SECOND = 4096


def two_volumes(folder: Path, media: str) -> Path:
    """Of which the second was made for its place behind the first."""
    need("mkudffs", "udftools")
    disc = folder / "disc"
    for name, start in (("first", 0), ("second", SECOND)):
        with open(folder / name, "wb") as file:
            file.truncate((start + SECOND) * SECTOR)
        words = [f"--media-type={media}", f"--label={name}", f"--startblock={start}"]
        run("mkudffs", f"--blocksize={SECTOR}", *words, folder / name)
        with open(disc, "ab") as file:
            file.write((folder / name).read_bytes()[start * SECTOR :])
    return disc


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_volumes(tmp_path_factory.mktemp("volumes"), "hd")


@pytest.mark.parametrize("media", ["hd", "dvdr", "bdr", "dvdrw"])
@pytest.mark.parametrize("number", [1, 2])
def test_udf_volumes_behind_each_other(tmp_path: Path, media: str, number: int) -> None:
    """With a virtual allocation table at the end of each, or sparing tables, or neither."""
    volumes = two_volumes(tmp_path, media)
    start = (number - 1) * SECOND
    words = [f"--startblock={start}", f"--lastblock={start + SECOND - 1}"]
    said = run("udfinfo", f"--blocksize={SECTOR}", *words, volumes).decode()
    for session in (
        DiscSession(number),
        DiscSession(sector=start),
        *([DiscSession()] if number == 2 else []),
    ):
        bmap, _ = shown(volumes, session)
        (found,) = bmap.filesystems.to_pylist()
        assert re.findall("^label=(.*)$", said, re.MULTILINE) == [found["label"]]
        assert re.findall("^uuid=(.*)$", said, re.MULTILINE) == [found["uuid"]]
        hidden = [row["volume_offset"] for row in bmap.problems.to_pylist() if row["code"] == "hidden"]
        assert hidden == ([SECOND * SECTOR] if number == 1 else [])
        owned = [row for row in bmap.extents.to_pylist() if row["kind"] in ("metadata", "directory")]
        inside = range(start * SECTOR, (start + SECOND) * SECTOR)
        assert all(row["volume_offset"] in inside for row in owned)


@pytest.mark.parametrize("name", ["virtual", "virtualold"])
def test_states_that_virtual_allocation_tables_keep(tmp_path: Path, name: str) -> None:
    """What an older table shows is what the disc showed before it was written on."""
    need("mkudffs", "udftools")
    udf_images.make(name, tmp_path / "disc")
    before = mapped(_first_state(tmp_path / "disc", tmp_path / "before"))
    bmap, _ = shown(tmp_path / "disc", DiscSession(1))
    assert bmap.inodes.to_pylist() == before.inodes.to_pylist()
    assert bmap.names.to_pylist() == before.names.to_pylist()
    newest = mapped(tmp_path / "disc")
    assert newest.inodes.to_pylist() != before.inodes.to_pylist()
    for session in (DiscSession(), DiscSession(2)):
        assert shown(tmp_path / "disc", session)[0].inodes.to_pylist() == newest.inodes.to_pylist()
    with pytest.raises(UsageError, match="there is no session 3: it has 2 sessions"):
        shown(tmp_path / "disc", DiscSession(3))


def _first_state(disc: Path, copy: Path) -> Path:
    """The disc without the two blocks that were written last."""
    copy.write_bytes(disc.read_bytes()[: -2 * SECTOR])
    return copy


@pytest.mark.parametrize("step", [-1, 0, 1, 1 << 31])
def test_tables_that_lead_nowhere(tmp_path: Path, step: int) -> None:
    """A table that names itself, or one that comes after it, as the one before it is the first."""
    need("mkudffs", "udftools")
    udf_images.make("virtual", tmp_path / "disc")
    volume = udf_images.Volume((tmp_path / "disc").read_bytes())
    at = len(volume.data) // SECTOR - 1
    table = volume.get(at)
    before = 216 + int.from_bytes(table[208:212], "little") + 132
    table[before : before + 4] = (at - volume.start + step).to_bytes(4, "little")
    volume.put(at, udf_images.sealed(table))
    (tmp_path / "disc").write_bytes(volume.data)
    assert shown(tmp_path / "disc", DiscSession(1))[0].inodes.num_rows
    with pytest.raises(UsageError, match="it has 1 session "):
        shown(tmp_path / "disc", DiscSession(2))


# ---- the option --------------------------------------------------------------------------------------------


def test_commands_show_the_session(appended: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["cat", "--session", "2", str(appended), "/dev/sda", "/two"]
    assert cli.run(words) == 0
    assert capfd.readouterr().out == "two" * 1000
    with pytest.raises(UsageError, match="/three"):
        cli.run([*words[:-1], "/three"])


@pytest.mark.parametrize("text", ["0", "-1", "first", "sector:", "sector:x", "1.5", ""])
def test_what_is_no_session(text: str) -> None:
    with pytest.raises(UsageError, match="--session"):
        cli.run(["info", f"--session={text}", "none.iso"])


def test_a_sector_beyond_the_end(appended: Path) -> None:
    with pytest.raises(UsageError, match="no session begins at sector 1000000"):
        shown(appended, DiscSession(sector=1_000_000))


def test_a_disk_that_is_no_disc() -> None:
    reader = BytesReader(np.zeros(1 << 20, np.uint8))
    reader.session = DiscSession(2)
    with pytest.raises(UsageError, match="no disc"):
        survey([reader])


@pytest.mark.slow
def test_a_kernel_sees_the_same(appended: Path, overwritten: Path, volumes: Path) -> None:
    """Told at which sector a session begins, by its drivers of ISO 9660 and UDF."""
    discs = {"appended": appended, "overwritten": overwritten, "udf": volumes}
    host = "".join(f"cp {disc} {name}\n" for name, disc in discs.items())
    begins = [("appended", at) for at in STARTS] + [("overwritten", at) for at in (0, ROOM, 224)]
    look = "modprobe -a isofs udf; mkdir -p /sysroot\n"
    for name, at in begins:
        look += f"mount -t iso9660 -o ro,sbsector={at} /dev/disk/guestfs/{name} /sysroot; cd /sysroot\n"
        look += f"find . -type f | xargs sha256sum | sed 's/^/sha {name} {at} /'; cd /; umount /sysroot\n"
    for at in (0, SECOND):
        look += f"mount -t udf -o ro,session={at} /dev/disk/guestfs/udf /sysroot; umount /sysroot\n"
        look += (
            f"dmesg | grep -o \"UDF-fs: INFO Mounting volume '[a-z]*'\" | tail -1 | sed 's/^/udf {at} /'\n"
        )
    host += "".join(f"# {hashlib.sha256(disc.read_bytes()).hexdigest()}\n" for disc in discs.values())
    steps: list[Step] = [("host", host), ("sh", look)]
    log = (made("sessions", dict.fromkeys(discs, 0), steps) / "log").read_text()
    for name, at in begins:
        truth = dict(re.findall(rf"^sha {name} {at} (\w+)  \./(.*)$", log, re.MULTILINE))
        found = shown(discs[name], DiscSession(sector=at))[1]
        assert {digest: path[1:] for path, digest in found.items()} == truth, (name, at)
    labels = re.findall(r"^udf (\d+) .*'(.*)'$", log, re.MULTILINE)
    assert labels == [
        (str(at), shown(volumes, DiscSession(sector=at))[0].filesystems.column("label")[0].as_py())
        for at in (0, SECOND)
    ]
