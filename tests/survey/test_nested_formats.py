"""Images in formats of their own that are files of a guest's disk: mapped like QEMU does, read through both
filesystems, and never a file of the host."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from host_images import io, qemus
from host_images import joined as joined_pieces
from support import BytesReader, assert_proven, mutations, need, run, tree
from virt_bmap.ask.check import check
from virt_bmap.ask.content import Files, spread
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.mapping import PACKED, ROLES
from virt_bmap.core.reader import Reader
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import nested as files
from virt_bmap.open.raw import RawReader
from virt_bmap.survey import nested
from virt_bmap.survey.survey import survey_open

MIB = 1 << 20
FORMATS = {
    "plain.qcow2": ("qcow2", ()),
    "small.qcow2": ("qcow2", ("-o", "cluster_size=4k,extended_l2=off")),
    "subclusters.qcow2": ("qcow2", ("-o", "extended_l2=on")),
    "zlib.qcow2": ("qcow2", ("-c",)),
    "zstd.qcow2": ("qcow2", ("-c", "-o", "compression_type=zstd")),
    "sparse.vmdk": ("vmdk", ("-o", "subformat=monolithicSparse")),
    "stream.vmdk": ("vmdk", ("-o", "subformat=streamOptimized")),
    "flat.vmdk": ("vmdk", ("-o", "subformat=monolithicFlat")),
    "split.vmdk": ("vmdk", ("-o", "subformat=twoGbMaxExtentSparse")),
    "dynamic.vhd": ("vpc", ("-o", "subformat=dynamic,force_size=on")),
    "fixed.vhd": ("vpc", ("-o", "subformat=fixed,force_size=on")),
    "a.vhdx": ("vhdx", ()),
    "a.vdi": ("vdi", ()),
}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the files of the inner filesystem are."""
    random = np.random.default_rng(7)
    return {
        "/big": random.bytes(900_000),
        "/text": b"many equal lines\n" * 40_000,
        "/folder/small": b"small",
        **{f"/folder/{number}": random.bytes(5000 + number) for number in range(20)},
    }


@pytest.fixture(scope="module")
def inner(truth: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with a partition with an ext4 of 1 KiB blocks."""
    need("mke2fs", "e2fsprogs"), need("sfdisk", "fdisk"), need("qemu-img", "qemu-utils")
    folder = tmp_path_factory.mktemp("inner")
    for path, data in truth.items():
        target = folder / "tree" / path.removeprefix("/")
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes(data)
    with (folder / "disk").open("wb") as file:
        file.truncate(8 * MIB)
    run("sfdisk", "-q", folder / "disk", stdin=b"label: dos\nstart=2048\n")
    run(
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-b",
        "1024",
        "-d",
        folder / "tree",
        "-E",
        "offset=1048576",
        folder / "disk",
        "7m",
    )
    return folder / "disk"


def outer(folder: Path, name: str = "outer", size: str = "64m") -> Path:
    """An ext4 that holds the folder's files."""
    run("mke2fs", "-q", "-t", "ext4", "-d", folder, folder.parent / name, size)
    return folder.parent / name


def opened(disk: Path | Reader, *options: str) -> tuple[BlockMap, list[Reader]]:
    return survey_open(
        [RawReader(str(disk)) if isinstance(disk, Path) else disk], nested=files(list(options))
    )


def sums(bmap: BlockMap, readers: list[Reader], device: str) -> dict[str, str]:
    """SHA-256 of every regular file of a device, read through all layers of the map."""
    volume = bmap.volume_named(device)
    files = Files(bmap, volume, readers[volume])
    found = {}
    for path, inode in tree(bmap, volume).items():
        if files.is_kind(inode, tables.T_FILE):
            content = b"".join(part.tobytes() for part in spread(files.pieces([inode]), files.length(inode)))
            found[path] = hashlib.sha256(content).hexdigest()
    return found


def partition(device: str) -> str:
    """The first one of a disk."""
    return f"{device}p1" if device[-1].isdigit() else f"{device}1"


def expected(truth: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(data).hexdigest() for path, data in truth.items()}


def notes(bmap: BlockMap) -> list[tuple[str, str]]:
    return [(row["severity"], row["detail"]) for row in bmap.problems.to_pylist()]


def pieces(bmap: BlockMap, device: str, chain: list[str]) -> list[tuple[int, int, str, int, int]]:
    """The rows of an image's disk in the words of qemu-img map; `chain` are its files, topmost first."""
    rows = bmap.rows_of(bmap.volume_named(device))
    depth = {bmap.volume_named(name): level for level, name in enumerate(chain)}
    columns = (rows.volume_offset, rows.run, rows.role, rows.parent, rows.parent_offset)
    return joined_pieces(sorted(
        (start, start + run, ROLES[role], depth[parent], -1 if role == PACKED else at)
        for start, run, role, parent, at in zip(*(column.tolist() for column in columns), strict=True)
    ))  # fmt: skip


@pytest.fixture(scope="module")
def formats(inner: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the outer disk, the folder that it was made of): the inner disk in every format."""
    folder = tmp_path_factory.mktemp("formats") / "files"
    folder.mkdir()
    for name, (format, options) in FORMATS.items():
        run("qemu-img", "convert", "-f", "raw", "-O", format, *options, inner, folder / name)
    return outer(folder, size="120m"), folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(formats: tuple[Path, Path], inner: Path, truth: dict[str, bytes], name: str) -> None:
    disk, folder = formats
    bmap, readers = opened(disk, name)
    device = f"/dev/sda:/{name}"
    kinds = {row["name"]: row["type"] for row in bmap.volumes.to_pylist()}
    assert kinds[f"{device}:file"] == FORMATS[name][0]
    assert kinds[device] == "dos"
    assert_proven(bmap)
    assert not notes(bmap)
    assert readers[bmap.volume_named(device)].read(0, 8 * MIB) == inner.read_bytes()
    assert sums(bmap, readers, partition(device)) == expected(truth)
    if name.endswith(".qcow2"):
        assert pieces(bmap, device, [f"{device}:file"]) == qemus(folder / name, FORMATS[name][0])


def test_all_are_found_and_parts_are_not_disks(formats: tuple[Path, Path]) -> None:
    bmap, _ = opened(formats[0], "all")
    found = {row["name"]: row["type"] for row in bmap.volumes.to_pylist() if row["kind"] == "image"}
    disks = {name for name in found if not name.endswith(":file")}
    assert disks == {f"/dev/sda:/{name}" for name in FORMATS}
    assert {found[name] for name in disks} == {"dos"}
    assert found["/dev/sda:/flat-flat.vmdk:file"] == "vmdk data"
    assert found["/dev/sda:/split-s001.vmdk:file"] == "vmdk data"
    assert_proven(bmap)


def test_a_part_is_a_disk_where_it_is_named(formats: tuple[Path, Path], truth: dict[str, bytes]) -> None:
    bmap, readers = opened(formats[0], "all", "flat-flat.vmdk")
    for device in ("/dev/sda:/flat.vmdk1", "/dev/sda:/flat-flat.vmdk1"):
        assert sums(bmap, readers, device) == expected(truth)
    assert_proven(bmap)


def test_lookup_climbs_and_locate_descends(formats: tuple[Path, Path], truth: dict[str, bytes]) -> None:
    """A byte of the inner file, on the way down: in the disk's cluster, the file, the outer filesystem; and
    all of them on the way up."""
    disk, _ = formats
    for name in ("small.qcow2", "zlib.qcow2", "stream.vmdk", "split.vmdk", "a.vdi"):
        bmap, _ = opened(disk, name)
        device = f"/dev/sda:/{name}"
        volume = bmap.volume_named(partition(device))
        inode = tree(bmap, volume)["/big"]
        _, extents = bmap.slice_of("extents", volume)
        row = next(row for row in extents.to_pylist() if row["inode"] == inode and row["kind"] == "data")
        at = np.array([row["volume_offset"]])
        where = bmap.descend(volume, at, at + 1)
        assert len(where.start)
        if name.endswith("k.qcow2") or name == "a.vdi":
            (start,) = where.start.tolist()
            want = truth["/big"][row["file_offset"] :][:1]
            assert RawReader(str(disk)).read(start, 1) == want
        owners = bmap.owners(1, where.start, where.end)
        found = {
            (int(number), bmap.extents.column("inode")[int(extent)].as_py())
            for number, extent in zip(owners.volume, owners.extent, strict=True)
            if extent >= 0
        }
        file = name.replace("split", "split-s001")
        assert {(0, tree(bmap, 0)[f"/{file}"]), (volume, inode)} <= found


def test_the_formats_metadata_is_named(formats: tuple[Path, Path]) -> None:
    bmap, _ = opened(formats[0], "plain.qcow2")
    volume = bmap.volume_named("/dev/sda:/plain.qcow2:file")
    _, table = bmap.slice_of("extents", volume)
    parts = {row["part"]: row["volume_offset"] for row in table.to_pylist()}
    assert {"header", "L1 table", "L2 table", "refcount table", "refcount block"} <= set(parts)
    where = bmap.descend(volume, np.array([parts["header"]]), np.array([parts["header"] + 4]))
    assert RawReader(str(formats[0])).read(int(where.start[0]), 4) == b"QFI\xfb"


# ---- what images refer to ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files" / "images").mkdir(parents=True)
    return tmp_path / "files"


def overlay(path: Path, backing: str, format: str | None = "qcow2", size: int = 8 * MIB) -> Path:
    """An overlay that names a file which the host does not have."""
    run(
        "qemu-img",
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        backing,
        *(["-F", format] if format else []),
        path,
        str(size),
    )
    return path


def chain(folder: Path, inner: Path, names: tuple[str, str], format: str | None = "qcow2") -> None:
    """base.qcow2 <- middle.qcow2 <- top.qcow2; bytes of the big file are changed in both overlays."""
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", inner, folder / "images/base.qcow2")
    for name, backing, place in (("middle", "base.qcow2", 0), ("top", "middle.qcow2", 1)):
        path = overlay(folder / f"images/{name}.qcow2", backing)
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {place + 1} {3 * MIB + place * 65536} 64k", path)
    for name, backing in zip(("middle", "top"), names, strict=True):
        run(
            "qemu-img",
            "rebase",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            backing,
            *(["-F", format] if format else []),
            folder / f"images/{name}.qcow2",
        )


@pytest.mark.parametrize("names", [
    ("base.qcow2", "middle.qcow2"),
    ("./base.qcow2", "../images/middle.qcow2"),
    ("/images/base.qcow2", "/images/middle.qcow2"),
    ("/var/lib/libvirt/images/base.qcow2", "/srv/images/middle.qcow2"),
])  # fmt: skip
def test_overlays_find_their_backing_files_on_the_same_filesystem(
    folder: Path, inner: Path, truth: dict[str, bytes], names: tuple[str, str]
) -> None:
    chain(folder, inner, ("base.qcow2", "middle.qcow2"))
    want = run_raw(folder / "images/top.qcow2")
    map_of_qemu = qemus(folder / "images/top.qcow2")
    (folder.parent / "again").mkdir()
    chain(folder, inner, names)
    bmap, readers = opened(outer(folder), "images/top.qcow2")
    device = "/dev/sda:/images/top.qcow2"
    assert readers[bmap.volume_named(device)].read(0, 8 * MIB) == want
    files = [f"/dev/sda:/images/{name}.qcow2:file" for name in ("top", "middle", "base")]
    assert pieces(bmap, device, files) == map_of_qemu
    assert_proven(bmap)
    assert not notes(bmap)
    hidden = {row["volume"] for row in bmap.extents.to_pylist() if row["part"] == "hidden by an overlay"}
    assert hidden == {bmap.volume_named(files[2])}, "what the overlays changed"


def run_raw(image: Path) -> bytes:
    target = image.with_suffix(".raw")
    run("qemu-img", "convert", "-U", "-O", "raw", image, target)
    data = target.read_bytes()
    target.unlink()
    return data


def test_each_state_of_a_chain_is_a_disk(folder: Path, inner: Path, truth: dict[str, bytes]) -> None:
    """With `all` the base is a disk, too, so that nothing of it is hidden; a raw base likewise."""
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", inner, folder / "images/base.img")
    path = overlay(folder / "images/top.qcow2", "base.img", "raw")
    io(path, "write -P 1 3M 64k")
    bmap, readers = opened(outer(folder), "all")
    assert_proven(bmap)
    assert sums(bmap, readers, "/dev/sda:/images/base.img1") == expected(truth)
    assert readers[bmap.volume_named("/dev/sda:/images/top.qcow2")].read(0, 8 * MIB) == run_raw(path)
    assert "hidden by an overlay" not in bmap.extents.column("part").to_pylist()
    kinds = {row["name"]: row["type"] for row in bmap.volumes.to_pylist()}
    assert kinds["/dev/sda:/images/base.img:file"] == "raw"


def test_a_base_without_stated_format_goes_by_its_magic(folder: Path, inner: Path) -> None:
    chain(folder, inner, ("base.qcow2", "middle.qcow2"))
    want = run_raw(folder / "images/top.qcow2")
    for name in ("middle", "top"):  # the header extension with the format becomes one that nobody knows
        path = folder / f"images/{name}.qcow2"
        path.write_bytes(path.read_bytes().replace(b"\xe2\x79\x2a\xca", b"\x01\x02\x03\x04", 1))
    bmap, readers = opened(outer(folder), "images/top.qcow2")
    assert readers[bmap.volume_named("/dev/sda:/images/top.qcow2")].read(0, 8 * MIB) == want


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "{host}",
        "nbd://localhost:10809/secret",
        'json:{"driver":"file","filename":"/etc/hostname"}',
        "images",
    ],
)
@pytest.mark.parametrize("part", ["backing", "data"])
def test_nothing_is_looked_for_on_the_host(
    folder: Path, inner: Path, name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = name.format(host=inner) if "{host}" in name else name
    path = folder / "images/top.qcow2"
    if part == "backing":
        overlay(path, name, "raw")
    else:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={folder.parent}/data", path, "1M")
        short = str(folder.parent / "data").encode()
        raw = path.read_bytes()
        at = raw.index(short) - 4
        path.write_bytes(
            raw[:at]
            + len(name).to_bytes(4, "big")
            + name.encode().ljust((len(short) + 7) // 8 * 8, b"\0")[: (len(short) + 7) // 8 * 8]
            + raw[at + 4 + (len(short) + 7) // 8 * 8 :]
        )
    disk = outer(folder)
    before = RawReader(str(disk))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a file of the host was opened")

    (
        monkeypatch.setattr("os.open", never),
        monkeypatch.setattr("builtins.open", never),
        monkeypatch.setattr("os.stat", never),
    )
    bmap, _ = opened(before, "images/top.qcow2")
    monkeypatch.undo()
    ((severity, detail),) = notes(bmap)
    assert severity == "note"
    assert "not a file of the same filesystem" in detail
    assert bmap.volumes.column("type").to_pylist() == ["ext4", "qcow2 image"]
    assert_proven(bmap)


def test_a_loop_of_backing_files_ends(folder: Path) -> None:
    overlay(folder / "images/a.qcow2", "b.qcow2"), overlay(folder / "images/b.qcow2", "a.qcow2")
    overlay(folder / "images/self.qcow2", "self.qcow2")
    bmap, _ = opened(outer(folder), "all")
    assert [severity for severity, _ in notes(bmap)] == ["note"] * 3
    assert all("or loops" in detail for _, detail in notes(bmap))
    assert_proven(bmap)


def test_external_data_file(folder: Path, inner: Path, truth: dict[str, bytes]) -> None:
    path = folder / "images/a.qcow2"
    run(
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        f"data_file={folder}/images/data.raw",
        inner,
        path,
    )
    bmap, readers = opened(outer(folder), "all")
    assert sums(bmap, readers, "/dev/sda:/images/a.qcow2p1") == expected(truth)
    kinds = {row["name"]: row["type"] for row in bmap.volumes.to_pylist()}
    assert kinds["/dev/sda:/images/data.raw:file"] == "qcow2 data"
    assert_proven(bmap)


def test_internal_snapshots_are_named(folder: Path, inner: Path) -> None:
    path = folder / "images/a.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", inner, path)
    run("qemu-img", "snapshot", "-c", "before", path)
    io(path, "write -P 5 1M 128k")
    bmap, _ = opened(outer(folder), "images/a.qcow2")
    _, table = bmap.slice_of("extents", bmap.volume_named("/dev/sda:/images/a.qcow2:file"))
    found = [row for row in table.to_pylist() if row["part"] == "data of snapshot 1"]
    assert sum(row["length"] for row in found) == 128 << 10


def test_an_encrypted_image_is_one_piece(folder: Path) -> None:
    path, secret = folder / "images/a.qcow2", ("--object", "secret,id=s,data=abc")
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        *secret,
        "-o",
        "encrypt.format=aes,encrypt.key-secret=s",
        path,
        str(8 * MIB),
    )
    io(
        path,
        "write -P 7 1M 1M",
        options=(*secret, "--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"),
    )
    bmap, _ = opened(outer(folder), "all")
    _, table = bmap.slice_of("extents", bmap.volume_named("/dev/sda:/images/a.qcow2"))
    assert [row["part"] for row in table.to_pylist()] == ["encrypted qcow2 image"]
    assert "encrypted (AES)" in bmap.volumes.column("detail").to_pylist()[1]
    assert_proven(bmap)


def test_formats_that_are_only_named(folder: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qed", folder / "images/a.qed", "8M")
    bmap, _ = opened(outer(folder), "images/a.qed")
    ((severity, detail),) = notes(bmap)
    assert severity == "note"
    assert "where the bytes of a qed image lie in its file is not known here" in detail
    assert bmap.volumes.column("type").to_pylist() == ["ext4", "QED image"]
    assert_proven(bmap)


# ---- hostile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "small.qcow2",
        "zlib.qcow2",
        "sparse.vmdk",
        "stream.vmdk",
        "split.vmdk",
        "dynamic.vhd",
        "a.vhdx",
        "a.vdi",
    ],
)
def test_damaged_inner_images_give_problems_only(formats: tuple[Path, Path], name: str) -> None:
    """The outer disk stays tiled, whatever the image says."""
    disk, _ = formats
    bmap, _ = opened(disk, name)
    file = bmap.volume_named(f"/dev/sda:/{name}:file")
    _, table = bmap.slice_of("extents", file)
    starts = np.array([row["volume_offset"] for row in table.to_pylist() if row["kind"] == "metadata"])
    where = bmap.descend(file, starts, starts + 64)
    ranges = [(int(low), int(low) + 512) for low in where.start]
    base = disk.read_bytes()
    refused = done = 0
    for data in mutations(base, 12, 5, ranges):
        if len(data) < len(base):
            continue
        bmap, _ = opened(BytesReader(data), name)
        for each in BlockMap.TABLES:
            tables.check(each, getattr(bmap, each))
        assert not [
            found for found in check(bmap).disagreements if found.volume == 0 and found.code != "two-owners"
        ]
        done += 1
        refused += any(severity == "error" for severity, _ in notes(bmap))
    assert done > 8


def test_tables_in_holes_are_not_read_for_long(folder: Path) -> None:
    """A VDI of a few bytes whose block map of 4 GiB is a hole."""
    path = folder / "images/a.vdi"
    run("qemu-img", "create", "-q", "-f", "vdi", path, "1G")
    head = bytearray(path.read_bytes()[:512])
    head[0x170:0x178] = (1 << 49).to_bytes(8, "little")
    head[0x180:0x184] = ((1 << 30) - 1).to_bytes(4, "little")
    with path.open("wb") as file:
        file.write(head)
        file.truncate(6 << 30)
    bmap, _ = opened(outer(folder), "images/a.vdi")
    ((severity, detail),) = notes(bmap)
    assert severity == "error"
    assert "they lie in holes, or overlap" in detail


def test_a_compressed_cluster_that_is_damaged(formats: tuple[Path, Path]) -> None:
    disk, _ = formats
    bmap, readers = opened(disk, "zlib.qcow2")
    device = bmap.volume_named("/dev/sda:/zlib.qcow2")
    rows = bmap.rows_of(device)
    packed = np.flatnonzero(rows.role == PACKED)
    at = int(packed[np.argmax(rows.run[packed])])
    where = bmap.descend(
        int(rows.parent[at]), rows.parent_offset[at : at + 1], rows.parent_offset[at : at + 1] + 16
    )
    data = np.frombuffer(disk.read_bytes(), np.uint8).copy()
    data[int(where.start[0]) : int(where.start[0]) + 16] = 0xFF
    bmap, readers = opened(BytesReader(data), "zlib.qcow2")
    with pytest.raises(Corrupt, match="can't be inflated"):
        readers[bmap.volume_named("/dev/sda:/zlib.qcow2")].read(int(rows.volume_offset[at]), 512)


def test_a_disk_whose_first_cluster_is_damaged(formats: tuple[Path, Path]) -> None:
    """Nobody knows what it holds; the map says so, and is complete."""
    disk, _ = formats
    bmap, _ = opened(disk, "zlib.qcow2")
    rows = bmap.rows_of(bmap.volume_named("/dev/sda:/zlib.qcow2"))
    at = int(np.argmin(rows.volume_offset))
    where = bmap.descend(
        int(rows.parent[at]), rows.parent_offset[at : at + 1], rows.parent_offset[at : at + 1] + 16
    )
    data = np.frombuffer(disk.read_bytes(), np.uint8).copy()
    data[int(where.start[0]) : int(where.start[0]) + 16] = 0xFF
    bmap, _ = opened(BytesReader(data), "zlib.qcow2")
    ((severity, detail),) = notes(bmap)
    assert severity == "error"
    assert "can't be inflated" in detail
    assert {found.code for found in check(bmap).disagreements} == {"mapping"}, "all bytes have their owners"


def test_limits_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        run("qemu-img", "create", "-q", "-f", "qcow2", folder / f"images/{number}.qcow2", "8M")
    disk = outer(folder)
    monkeypatch.setattr(
        nested.ImageBudget, "__init__", lambda self: self.__dict__.update(paths=set(), left=2)
    )
    bmap, _ = opened(disk, "all")
    assert len([detail for _, detail in notes(bmap) if "there are more than" in detail]) == 2
