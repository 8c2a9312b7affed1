"""ISO 9660 against xorriso and isoinfo, contents read back by the map, real images, and damage."""

import gzip
import itertools
import lzma
import os
import re
import subprocess
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from support import assert_proven, content, file_extents, mapped, need, run, tree
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems import iso9660
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.damage import Damage
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with what makes Rock Ridge work: depth, long names, long links, names that are not ASCII, empty
    and linked files."""
    root = tmp_path_factory.mktemp("iso-source")
    random = np.random.default_rng(1)
    for i in range(300):
        folder = root / f"many{i % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"file number {i} {'x' * (i % 180)}.dat").write_bytes(
            random.bytes(int(random.integers(0, 9000)))
        )
    deep = root.joinpath(*(f"level{i}" for i in range(12)))
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(b"at the bottom")
    (root / "empty").write_bytes(b"")
    (root / "umlaut äöü €").write_bytes(b"not ascii")
    (root / "link").symlink_to("../many1/" + "y" * 200 + "/./z")
    (root / "two pieces").symlink_to("/" + "/".join("n" * 50 for _ in range(4)))
    os.link(root / "many0" / "file number 0 .dat", root / "another name")
    (root / "boot.img").write_bytes(random.bytes(4096))
    return root


def build(where: Path, *command: str | Path) -> Path:
    """Run a program that writes the image `where`."""
    run(command[0], *command[1:])
    return where


def genisoimage(source: Path, where: Path, *options: str) -> Path:
    """An image made by genisoimage."""
    return build(
        where,
        need("genisoimage", "genisoimage"),
        "-quiet",
        "-input-charset",
        "utf-8",
        "-V",
        "MADE_HERE",
        *options,
        "-o",
        where,
        source,
    )


@pytest.fixture(scope="session")
def rock_ridge(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rock Ridge, Joliet and El Torito in one image."""
    where = tmp_path_factory.mktemp("iso") / "rr.iso"
    return genisoimage(
        source, where, "-R", "-J", "-joliet-long", "-b", "boot.img", "-no-emul-boot", "-c", "boot.cat"
    )


def layout(bmap: BlockMap) -> dict[str, tuple[int, int]]:
    """(offset, size) of every regular file that has content, but the boot catalog, which xorriso does not
    list."""
    _, inodes = bmap.slice_of("inodes", 0)
    kind, size = tables.codes(inodes, "type"), tables.integers(inodes, "size")
    of = dict(
        zip(
            tables.integers(inodes, "inode").tolist(),
            zip(kind.tolist(), size.tolist(), strict=True),
            strict=True,
        )
    )
    files = {
        path: inode
        for path, inode in tree(bmap, 0).items()
        if of[inode][0] == tables.T_FILE and of[inode][1] and "boot.cat" not in path
    }
    return {path: (file_extents(bmap, 0, inode)[0].offset, of[inode][1]) for path, inode in files.items()}


def xorriso_layout(image: Path) -> dict[str, tuple[int, int]]:
    """The same as xorriso reads it."""
    out = run(
        need("xorriso", "xorriso"), "-indev", image, "-find", "/", "-type", "f", "-exec", "report_lba", "--"
    ).decode()
    found = re.findall(r"^File data lba:\s*\d+ ,\s*(\d+) ,\s*\d+ ,\s*(\d+) , '(.*)'$", out, re.M)
    return {path: (int(lba) * 2048, int(size)) for lba, size, path in found if int(size)}


def assert_contents(bmap: BlockMap, image: Path, source: Path) -> None:
    """Every file of `source` reads through the map as it was put in."""
    reader: list[Reader] = [RawReader(os.fspath(image))]
    found = tree(bmap, 0)
    for path in source.rglob("*"):
        inode = found["/" + str(path.relative_to(source))]
        if path.is_file() and not path.is_symlink():
            assert content(bmap, reader, 0, inode) == path.read_bytes(), path
    reader[0].close()


def test_rock_ridge(rock_ridge: Path, source: Path) -> None:
    bmap = mapped(rock_ridge)
    assert_proven(bmap)
    assert layout(bmap) == xorriso_layout(rock_ridge)
    expected = {"/" + str(path.relative_to(source)) for path in source.rglob("*")} | {
        "/",
        "/rr_moved",
        "/boot.cat",
    }
    assert set(tree(bmap, 0)) == expected
    assert_contents(bmap, rock_ridge, source)
    row = bmap.filesystems.to_pylist()[0]
    assert row["type"] == "iso9660"
    assert row["label"] == "MADE_HERE"
    assert row["state"] == "clean"
    assert row["features"] == "rock-ridge joliet el-torito"


def test_inodes_are_as_stat_says(rock_ridge: Path, source: Path) -> None:
    bmap = mapped(rock_ridge)
    found = tree(bmap, 0)
    of = {row["inode"]: row for row in bmap.inodes.to_pylist()}
    for path in source.rglob("*"):
        row, stat = of[found["/" + str(path.relative_to(source))]], path.lstat()
        assert row["mode"] == stat.st_mode
        assert path.is_dir() or row["size"] == stat.st_size
        assert row["mtime_ns"] // 10**9 == int(stat.st_mtime)
        assert row["uid"] == stat.st_uid


def test_boot_images_and_metadata_are_named(rock_ridge: Path) -> None:
    bmap = mapped(rock_ridge)
    parts = set(bmap.extents.column("part").to_pylist())
    assert {"system area", "volume descriptors", "path table", "continuation area", "Joliet directory",
        "El Torito boot catalog",
            "El Torito x86 boot image, no emulation", "SL"} <= parts  # fmt: skip


def test_joliet_alone_gives_the_names(source: Path, tmp_path: Path) -> None:
    image = genisoimage(source, tmp_path / "joliet.iso", "-J", "-joliet-long", "-D")
    bmap = mapped(image)
    assert_proven(bmap)
    assert "/umlaut äöü €" in tree(bmap, 0)
    assert {"ISO 9660 directory"} <= set(bmap.extents.column("part").to_pylist())
    known = [path.relative_to(source) for path in source.rglob("*") if not path.is_symlink()]
    joliet = 103  # letters of a name, even in mkisofs's long form
    assert set(tree(bmap, 0)) == {"/"} | {"/" + str(path.with_name(path.name[:joliet])) for path in known}


def test_plain_names(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    (folder / "SUB").mkdir(parents=True)
    (folder / "SUB" / "A.TXT").write_bytes(b"a" * 5000)
    (folder / "README").write_bytes(b"r")
    image = genisoimage(folder, tmp_path / "plain.iso")
    bmap = mapped(image)
    assert_proven(bmap)
    assert set(tree(bmap, 0)) == {"/", "/SUB", "/SUB/A.TXT", "/README"}
    assert_contents(bmap, image, folder)


def test_hard_links_and_duplicates_are_shared(source: Path, rock_ridge: Path) -> None:
    bmap = mapped(rock_ridge)
    found = tree(bmap, 0)
    one, two = found["/another name"], found["/many0/file number 0 .dat"]
    rows = [row for row in bmap.extents.to_pylist() if row["inode"] in (one, two)]
    assert one != two
    assert len({row["volume_offset"] for row in rows}) == 1
    assert all(row["flags"] & tables.SHARED for row in rows)


def test_isohybrid_is_one_filesystem(source: Path, tmp_path: Path) -> None:
    xorriso = need("xorrisofs", "xorriso")
    image = build(tmp_path / "hybrid.iso", xorriso, "-quiet", "-R", "-J", "-b", "boot.img", "-no-emul-boot",
        "-boot-load-size", "4",
                  "-eltorito-alt-boot", "-e", "empty.efi", "-no-emul-boot", "-part_like_isohybrid",
                  "--protective-msdos-label", "-o", tmp_path / "hybrid.iso",
                  _with_efi(source, tmp_path))  # fmt: skip
    bmap = mapped(image)
    assert_proven(bmap)
    assert bmap.filesystems.column("type").to_pylist() == ["iso9660"]
    assert bmap.volumes.num_rows == 1
    assert layout(bmap) == xorriso_layout(image)
    parts = set(bmap.extents.column("part").to_pylist())
    assert {"isohybrid system area", "El Torito EFI boot image, no emulation"} <= parts


@pytest.fixture(scope="session")
def installer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid image as distributions make them: isolinux's boot record, whose first partition has type 0 and
    covers all, and an EFI partition."""
    template, loader = Path("/usr/lib/ISOLINUX/isohdpfx.bin"), Path("/usr/lib/ISOLINUX/isolinux.bin")
    if not (template.exists() and loader.exists()):
        pytest.skip("isolinux is not installed (apt-get install isolinux)")
    folder = tmp_path_factory.mktemp("installer")
    (folder / "tree").mkdir()
    (folder / "tree" / "isolinux.bin").write_bytes(loader.read_bytes())
    (folder / "tree" / "efi.img").write_bytes(bytes(1474560))
    return build(folder / "image.iso", need("xorrisofs", "xorriso"), "-quiet", "-R", "-b", "isolinux.bin",
        "-no-emul-boot", "-boot-load-size", "4",
                 "-boot-info-table", "-isohybrid-mbr", template, "-eltorito-alt-boot", "-e", "efi.img",
                 "-no-emul-boot", "-c", "boot.cat", "-isohybrid-gpt-basdat", "-o", folder / "image.iso",
                 folder / "tree")  # fmt: skip


def test_installer_is_read(installer: Path) -> None:
    reader = RawReader(str(installer))
    assert iso9660.probe(reader)
    found = iso9660.read(reader, (), Damage())
    reader.close()
    assert found.state == "clean"
    assert found.features == "rock-ridge el-torito isohybrid"
    assert set(found.names.column("name").to_pylist()) == {b"isolinux.bin", b"efi.img", b"boot.cat"}


def test_installer_is_one_filesystem(installer: Path) -> None:
    assert mapped(installer).filesystems.column("type").to_pylist() == ["iso9660"]


def _with_efi(source: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "efi"
    folder.mkdir()
    (folder / "boot.img").write_bytes((source / "boot.img").read_bytes())
    (folder / "empty.efi").write_bytes(bytes(range(256)) * 64)
    return folder


def test_hard_disk_emulation_has_the_size_of_its_partition(tmp_path: Path) -> None:
    folder = tmp_path / "hd"
    folder.mkdir()
    disk = bytearray(64 * 512)
    disk[446:462] = (
        bytes([0x80, 0, 2, 0, 6, 0, 63, 0]) + (1).to_bytes(4, "little") + (63).to_bytes(4, "little")
    )
    disk[510:512] = b"\x55\xaa"
    (folder / "hd.img").write_bytes(disk)
    image = genisoimage(
        folder, tmp_path / "hd.iso", "-R", "-b", "hd.img", "-hard-disk-boot", "-c", "boot.cat"
    )
    rows = [
        row
        for row in mapped(image).extents.to_pylist()
        if row["part"] == "El Torito x86 boot image, hard disk"
    ]
    assert [row["length"] for row in rows] == [64 * 512]


def test_zisofs_content(tmp_path: Path) -> None:
    folder = tmp_path / "z"
    folder.mkdir()
    text = b"".join(b"%d bottles\n" % i for i in range(20000))
    (folder / "text").write_bytes(text)
    image = tmp_path / "z.iso"
    run(
        need("xorriso", "xorriso"),
        "-outdev",
        image,
        "-map",
        folder,
        "/",
        "-set_filter_r",
        "--zisofs",
        "/text",
        "--",
    )
    bmap = mapped(image)
    assert_proven(bmap)
    (row,) = [row for row in bmap.extents.to_pylist() if row["inode"] == tree(bmap, 0)["/text"]]
    assert row["flags"] & tables.COMPRESSED
    assert row["file_length"] == len(text) > row["length"]
    data = image.read_bytes()[row["volume_offset"] :][: row["length"]]
    pointers = np.frombuffer(data[16:], "<u4", count=-(-len(text) // 32768) + 1)
    assert b"".join(zlib.decompress(data[a:b]) for a, b in itertools.pairwise(pointers)) == text


def test_high_sierra_is_refused_by_name(tmp_path: Path) -> None:
    data = np.zeros(1 << 17, np.uint8)
    data[0x8009:0x800E] = np.frombuffer(b"CDROM", np.uint8)
    from support import BytesReader

    bmap = survey([BytesReader(data)])
    assert "High Sierra" in bmap.problems.column("detail")[0].as_py()


def test_sessions_that_come_after_are_named(tmp_path: Path) -> None:
    """As genisoimage writes them; isoinfo finds the second one's tree where it was written. The same image
    merely copied there is no session."""
    need("genisoimage", "genisoimage"), need("isoinfo", "genisoimage")
    first, second, sectors = tmp_path / "first", tmp_path / "second", 240
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"file-{name}").write_bytes(name.encode())
    run("genisoimage", "-quiet", "-R", "-o", first, tmp_path / "one")
    os.truncate(first, sectors * 2048)
    words = ["-M", first, "-C", f"0,{sectors}"]
    run("genisoimage", "-quiet", "-R", *words, "-o", second, tmp_path / "two")
    disc, copied = tmp_path / "disc.iso", tmp_path / "copied.iso"
    disc.write_bytes(first.read_bytes() + second.read_bytes())
    copied.write_bytes(first.read_bytes() * 2)
    shown = run("isoinfo", "-R", "-f", "-T", str(sectors), "-i", disc).decode()
    assert "file-two" in shown
    found = [row for row in mapped(disc).problems.to_pylist() if row["code"] == "hidden"]
    assert [row["volume_offset"] for row in found] == [sectors * 2048]
    assert "1 later session begins" in found[0]["detail"]
    assert "hidden" not in mapped(copied).problems.column("code").to_pylist()


def test_few_reads(rock_ridge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = RawReader._fetch
    monkeypatch.setattr(
        RawReader,
        "_fetch",
        lambda self, offsets, lengths: calls.append(1) or original(self, offsets, lengths),
    )
    mapped(rock_ridge)
    assert len(calls) < 60


def corpus_images(corpus: Path) -> list[tuple[str, bytes]]:
    """The ISO 9660 images among the real ones, unpacked."""
    found = []
    for line in (corpus / "INVENTORY.tsv").read_text().splitlines()[1:]:
        path, kind = line.split("\t")[0], line.split("\t")[5]
        if kind.startswith("iso9660"):
            found += unpacked(corpus / path)
    return found


def unpacked(path: Path) -> list[tuple[str, bytes]]:
    """A stored image by its name; a zip holds several."""
    data = path.read_bytes()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return [
                (name, archive.read(name)) for name in archive.namelist() if name.endswith((".iso", ".img"))
            ]
    if path.suffix == ".uu":
        import binascii

        lines = data.split(b"\n")
        begin = next(i for i, line in enumerate(lines) if line.startswith(b"begin "))
        data = b"".join(binascii.a2b_uu(line) for line in lines[begin + 1 : lines.index(b"end")] if line)
        if ".Z." in path.name:
            data = subprocess.run(
                [need("gzip", "gzip"), "-dc"], input=data, stdout=subprocess.PIPE, check=True
            ).stdout
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return [(path.name, data)]


BROKEN = ("malformed2.iso",)
"""Corrupt on purpose: a directory record that does not fit its sector."""


def test_corpus(corpus: Path, tmp_path: Path) -> None:
    for name, data in corpus_images(corpus):
        image = tmp_path / "image.iso"
        image.write_bytes(data)
        bmap = mapped(image)
        if name.startswith(BROKEN):
            assert bmap.filesystems.column("state").to_pylist() == ["damaged"]
            continue
        assert_proven(bmap)
        row = bmap.filesystems.to_pylist()[0]
        # xorriso lists each extent, or refuses
        if not any(word in name for word in ("overflow", "multi_extent")):
            assert set(layout(bmap).values()) == set(xorriso_layout(image).values()), name
        mine, listed = set(tree(bmap, 0)) - {"/", "/rr_moved"}, _listed(image, row["features"] or "")
        if listed and all(ord(letter) < 256 for path in mine for letter in path):
            assert mine == listed - {"/rr_moved"}, name


def _listed(image: Path, features: str) -> set[str]:
    """All paths as another reader sees them: xorriso with Rock Ridge, isoinfo without."""
    if "rock-ridge" in features:
        out = run(
            need("xorriso", "xorriso"), "-indev", image, "-find", "/", "-exec", "echo", "--", ok=(0, 5, 32)
        ).decode(errors="surrogateescape")
        return {line[1:-1] for line in out.splitlines() if line.startswith("'/")} - {"/"}
    flags = ["-J", "-j", "iso8859-1"] if "joliet" in features else []
    out = run(need("isoinfo", "genisoimage"), *flags, "-f", "-i", image, ok=(0, 1)).decode("latin-1")
    return {re.sub(r"\.?;\d+$", "", path) for path in out.splitlines() if path.startswith("/")}


def test_label_and_uuid_as_blkid(corpus: Path, tmp_path: Path) -> None:
    blkid = need("blkid", "util-linux")
    for name, data in corpus_images(corpus):
        image = tmp_path / "image.iso"
        image.write_bytes(data)
        out = run(blkid, "-p", "-o", "export", image, ok=(0, 2, 8)).decode()
        said = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
        if said.get("TYPE") == "iso9660":
            row = mapped(image).filesystems.to_pylist()[0]
            assert row["uuid"] == said.get("UUID"), name
            if (row["label"] or "").isascii():  # blkid prints the others as cat -v does
                assert (row["label"] or "") == said.get("LABEL", "").replace("\\", ""), name
