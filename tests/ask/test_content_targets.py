"""Where symbolic links lead: as the tools of each format say, or not at all; never bytes that are another
file's."""

import binascii
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import mapped, mounted, need, run
from virt_bmap import cli
from virt_bmap.ask.content import Files
from virt_bmap.formats import registry as formats
from virt_bmap.formats.filesystems import udf
from virt_bmap.formats.filesystems.udf import links
from virt_bmap.model import tables
from virt_bmap.open.disks import Disks
from virt_bmap.survey.maps import opened

TARGETS = {
    "plain": "data", "dots": "./../d/./../../data", "root": "/", "absolute": "/etc/passwd", "up": "..",
    "here": ".", "long": "/".join(f"component-{i:03d}" for i in range(30)),
    "wide": "w" * 200 + "/" + "v" * 200, "spaces": "a b/c  d", "odd": "ünï/cödé",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("links") / "tree"
    folder.mkdir()
    (folder / "data").write_bytes(b"x" * 3000)
    for name, target in TARGETS.items():
        os.symlink(target, folder / name)
    return folder


def extracted(image: Path, out: Path, status: int = 0) -> dict[str, str]:
    """The links that extract makes, and where they lead."""
    out.mkdir()
    assert cli.run(["extract", "-q", "-C", str(out), str(image), "/dev/sda", "/"]) == status
    return {path.name: os.readlink(path) for path in out.iterdir() if path.is_symlink()}


def test_rock_ridge(source: Path, tmp_path: Path) -> None:
    need("xorrisofs", "xorriso")
    run("xorrisofs", "-quiet", "-R", "-o", tmp_path / "a.iso", source)
    assert extracted(tmp_path / "a.iso", tmp_path / "out") == TARGETS


def test_rock_ridge_link_with_an_extent_of_its_own(source: Path, tmp_path: Path) -> None:
    """makefs of the BSDs gives links an extent and a length: they mean nothing, the bytes stay the other
    file's alone."""
    need("xorrisofs", "xorriso")
    image, changed = tmp_path / "a.iso", 0
    run("xorrisofs", "-quiet", "-R", "-o", image, source)
    data = bytearray(image.read_bytes())
    at = struct.unpack_from("<I", data, 0x8000 + 158)[0] * 2048
    records = {}
    while data[at]:
        records[bytes(data[at + 33 : at + 33 + data[at + 32]])] = at
        at += data[at]
    (file,) = (place for name, place in records.items() if name.startswith(b"DATA"))
    for place in records.values():
        end = place + data[place]
        if b"SL" in data[place:end] or b"CE" in data[place + 60 : end]:
            data[place + 2 : place + 10] = data[file + 2 : file + 10]
            data[place + 10 : place + 18] = struct.pack("<I", 4) + struct.pack(">I", 4)
            changed += 1
    assert changed >= len(TARGETS)
    image.write_bytes(data)
    assert extracted(image, tmp_path / "out") == TARGETS
    bmap = mapped(image)
    owners = [row["inode"] for row in bmap.extents.to_pylist() if row["kind"] == "data"]
    assert len(set(owners)) == 1


def test_a_rock_ridge_link_without_a_target_is_left_out(source: Path, tmp_path: Path) -> None:
    need("xorrisofs", "xorriso")
    image = tmp_path / "a.iso"
    run("xorrisofs", "-quiet", "-R", "-o", image, source)
    image.write_bytes(
        image.read_bytes().replace(b"SL\x0b\x01\x00\x00\x04data", b"XX\x0b\x01\x00\x00\x04data")
    )
    assert extracted(image, tmp_path / "out", 1) == {
        name: target for name, target in TARGETS.items() if name != "plain"
    }


@pytest.mark.parametrize("options", [[], ["-comp", "zstd"], ["-noI"]])
def test_squashfs(source: Path, tmp_path: Path, options: list[str]) -> None:
    """The paths lie in the inode table, which is compressed."""
    image = tmp_path / "disk.img"
    run(need("mksquashfs", "squashfs-tools"), source, image, "-quiet", "-noD", "-noF", *options)
    assert extracted(image, tmp_path / "out") == TARGETS


@pytest.mark.parametrize("kind", ["erofs", "f2fs", "ext2", "btrfs"])
def test_formats_that_keep_the_path_itself(kind: str, source: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    if kind == "erofs":
        run(need("mkfs.erofs", "erofs-utils"), "--quiet", image, source)
    else:
        run("truncate", "-s", "128M", image)
        if kind == "f2fs":
            run(need("mkfs.f2fs", "f2fs-tools"), "-q", image)
            run(need("sload.f2fs", "f2fs-tools"), "-f", source, image, ok=(0, 1))
        elif kind == "ext2":
            run("mke2fs", "-q", "-F", "-d", source, image)
        else:
            run(need("mkfs.btrfs", "btrfs-progs"), "-q", "--rootdir", source, image)
    assert extracted(image, tmp_path / "out") == TARGETS


def windows_link(tag: int, substitute: str, shown: str, flags: bytes) -> bytes:
    """The data of a reparse point, by [MS-FSCC] 2.1.2.4 and 2.1.2.5."""
    both = [name.encode("utf-16-le") for name in (substitute, shown)]
    names = struct.pack("<4H", 0, len(both[0]), len(both[0]) + 2, len(both[1]))
    body = names + flags + both[0] + bytes(2) + both[1] + bytes(2)
    return struct.pack("<IHH", tag, len(body), 0) + body


def test_links_of_windows(tmp_path: Path) -> None:
    """Relative ones as ntfs-3g shows them; it puts its own mount point before the rest of absolute ones."""
    import ntfs_images

    image, made = tmp_path / "n.img", {
        "relative": (0xA000000C, "..\\dir\\file", "..\\dir\\file", struct.pack("<I", 1), "../dir/file"),
        "absolute": (0xA000000C, "\\??\\C:\\dir", "C:\\dir", bytes(4), "C:/dir"),
        "junction": (0xA0000003, "\\??\\C:\\dir", "C:\\dir", b"", "C:/dir"),
        "unnamed": (0xA0000003, "\\??\\C:\\dir", "", b"", "C:/dir"),
    }  # fmt: skip
    run("truncate", "-s", "16M", image)
    run(need("mkntfs", "ntfs-3g"), "-q", "-F", image)
    with ntfs_images.fuse(image, "rw") as where:
        (where / "dir").mkdir(), (where / "in").mkdir()
        (where / "dir/file").write_bytes(b"x")
        for name, (tag, substitute, shown, flags, _) in made.items():
            link = where / "in" / name
            link.write_bytes(b"") if name == "relative" else link.mkdir()
            os.setxattr(link, "system.ntfs_reparse_data", windows_link(tag, substitute, shown, flags))
    with ntfs_images.fuse(image, "ro") as where:
        shown = {name: os.readlink(where / "in" / name) for name in made}
    assert shown["relative"] == made["relative"][-1]
    assert all(shown[name].endswith("/dir") for name in ("absolute", "junction", "unnamed")), shown
    (tmp_path / "out").mkdir()
    assert cli.run(["extract", "-q", "-C", str(tmp_path / "out"), str(image), "/dev/sda", "/in"]) == 0
    assert {name: os.readlink(tmp_path / "out/in" / name) for name in made} == {
        name: row[-1] for name, row in made.items()
    }


def test_ntfs(source: Path, tmp_path: Path) -> None:
    import ntfs_images

    image = tmp_path / "n.img"
    run("truncate", "-s", "16M", image)
    run(need("mkntfs", "ntfs-3g"), "-q", "-F", image)
    links = TARGETS | {"longest": "x/" * 1500}  # not resident
    with ntfs_images.fuse(image, "rw") as where:
        for name, target in links.items():
            os.symlink(target, where / name)
    assert extracted(image, tmp_path / "out") == links


# ---- UDF ---------------------------------------------------------------------------------------------------


def components(path: str) -> bytes:
    """ECMA-167 4/14.16, as a kernel writes it (fs/udf/namei.c udf_symlink)."""
    result = b"\x02\0\0\0" if path.startswith("/") else b""
    for name in filter(None, path.split("/")):
        if name in (".", ".."):
            result += bytes([4 if name == "." else 3, 0, 0, 0])
            continue
        wide = any(ord(letter) > 255 for letter in name)
        text = (b"\x10" + name.encode("utf-16-be")) if wide else (b"\x08" + name.encode("latin-1"))
        result += bytes([5, len(text), 0, 0]) + text
    return result


@pytest.mark.parametrize("target", ["data", "../up/./x", "/etc/passwd", "ünï/文字", "/"])
def test_udf(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a UDF tree whose entry is changed to that of a link (ICB file type 12), its content to path
    components."""
    need("genisoimage", "genisoimage")
    folder, image = tmp_path / "tree", tmp_path / "u.iso"
    folder.mkdir()
    (folder / "link").write_bytes(
        b"MARK" + components(target)[4:].ljust(max(4, len(components(target))) - 4, b"?")
    )
    run("genisoimage", "-quiet", "-udf", "-hide", "*", "-o", image, folder)
    data = bytearray(image.read_bytes())
    at = data.index((folder / "link").read_bytes())
    data[at : at + 4] = components(target)[:4]
    entries = [
        place
        for place in range(0, len(data), 2048)
        if struct.unpack_from("<H", data,
            place)[0] == 261 and data[place + 27] == 5 and struct.unpack_from("<Q", data,
            place + 56)[0] < 2048
    ]  # fmt: skip
    (place,) = entries
    data[place + 27] = 12
    size = struct.unpack_from("<H", data, place + 10)[0]
    struct.pack_into("<H", data, place + 8, binascii.crc_hqx(bytes(data[place + 16 : place + 16 + size]), 0))
    data[place + 4] = (sum(data[place : place + 4]) + sum(data[place + 5 : place + 16])) & 0xFF
    image.write_bytes(data)
    # the ISO 9660 beside it owns as much
    alone = udf.FORMAT._replace(read=lambda reader, others, damage: udf.read_alone(reader, damage))
    monkeypatch.setattr(udf, "FORMAT", alone)
    assert extracted(image, tmp_path / "out") == {"link": target}


path_names = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=20
)


@given(st.lists(path_names, max_size=6), st.booleans())
def test_any_udf_path(names: list[str], absolute: bool) -> None:
    path = ("/" if absolute else "") + "/".join(names)
    data = components(path)
    assert links.target(data, len(data)) == (path.encode() or None)


@given(st.binary(max_size=200), st.sampled_from(["iso9660", "udf", "ntfs"]))
def test_nonsense_is_a_path_or_nothing(data: bytes, kind: str) -> None:
    format = formats.filesystem(kind)
    assert format
    assert format.target
    found = format.target(data, len(data))
    assert found is None or len(found) > 0


def test_a_link_whose_blocks_are_behind_the_end_has_no_target(tmp_path: Path) -> None:
    """A truncated image: what can't be read is no target."""
    image = tmp_path / "disk.img"
    run("truncate", "-s", "8M", image)
    run("mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024", image)
    with mounted(image) as where:
        (where / "fill").write_bytes(bytes(range(1, 256)) * 20_000)
        os.symlink("long/" * 100, where / "link")
    with opened(Disks([str(image)])) as (bmap, readers):
        files = Files(bmap, 0, readers[0])
        assert files.target(files.find(b"/link", follow=False)) == b"long/" * 100
        rows = [row for row in bmap.extents.to_pylist() if row["kind"] == "symlink"]
        kinds = tables.codes(bmap.extents, "kind")
        assert (kinds == tables.SYMLINK).sum() == 1
        readers[0].size = rows[0]["volume_offset"] + 10
        assert files.target(files.find(b"/link", follow=False)) is None
