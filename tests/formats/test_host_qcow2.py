"""qcow2 as a layer: clusters against qemu-img map, owners against qemu-img check, content against QEMU's own
reading."""

import json
from pathlib import Path

import numpy as np
import pytest

from host_images import (
    content,
    io,
    numbered,
    ours,
    parts,
    proven,
    qemus,
    random_writes,
    raw_content,
)
from support import need, run
from virt_bmap.ask.check import check
from virt_bmap.ask.records import owner_records
from virt_bmap.core.arrays import ints
from virt_bmap.formats.images.qcow2 import allocator
from virt_bmap.open.disks import Opening
from virt_bmap.open.host import open_host
from virt_bmap.survey.maps import map_disks

SIZE = 6 << 20
VARIANTS = {
    "plain": (),
    "v2": ("compat=0.10",),
    "512": ("cluster_size=512",),
    "4k": ("cluster_size=4k", "refcount_bits=1"),
    "2M": ("cluster_size=2M", "refcount_bits=64"),
    "refcounts of 2": ("refcount_bits=2", "cluster_size=1k"),
    "refcounts of 4": ("refcount_bits=4",),
    "refcounts of 8": ("refcount_bits=8",),
    "refcounts of 32": ("refcount_bits=32",),
    "lazy": ("lazy_refcounts=on",),
    "subclusters": ("extended_l2=on", "cluster_size=64k"),
    "small subclusters": ("extended_l2=on", "cluster_size=16k"),
    "metadata": ("preallocation=metadata",),
    "metadata and subclusters": ("preallocation=metadata", "extended_l2=on"),
    "falloc": ("preallocation=falloc",),
    "zstd": ("compression_type=zstd",),
}


def create(path: Path, *options: str, size: int = SIZE) -> Path:
    need("qemu-img", "qemu-utils")
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        *(["-o", ",".join(options)] if options else []),
        path,
        str(size),
    )
    return path


def leaks_and_errors(image: Path) -> tuple[int, int]:
    found = json.loads(run("qemu-img", "check", "-U", "--output=json", image, ok=(0, 2, 3)))
    return found.get("leaks", 0), found.get("corruptions", 0)


def same_as_qemu(
    image: Path, tmp_path: Path, inflate: bool = True, sparse: bool = False, data: Path | None = None
) -> None:
    with open_host([str(image)], Opening(references=True)) as host:
        assert ours(host, sparse=sparse) == qemus(image, data=data)
        if inflate:
            assert content(host) == raw_content(image, "qcow2", tmp_path / "raw")


@pytest.mark.parametrize("variant", VARIANTS)
def test_after_random_writes_the_map_is_qemus(tmp_path, variant):
    size = SIZE if len(variant) % 2 else SIZE - 512 * 7  # the last cluster of a disk may be cut
    options = VARIANTS[variant]
    cluster = {
        "cluster_size=512": 512,
        "cluster_size=1k": 1024,
        "cluster_size=4k": 4096,
        "cluster_size=2M": 2 << 20,
    }.get(options[0] if options else "", 65536)
    image = create(tmp_path / "a.qcow2", *options, size=size)
    random_writes(image, size, cluster, seed=len(variant), packed="2M" not in variant)
    same_as_qemu(image, tmp_path, inflate=variant != "zstd", sparse="metadata" in variant)
    assert leaks_and_errors(image) == (0, 0)
    proven(image)


def chain(tmp_path: Path, *options: str) -> tuple[Path, Path, Path]:
    """base.raw <- middle.qcow2 <- top.qcow2, each with data of its own.

    The overlays are larger than what lies below them, but not those with subclusters: of a kept subcluster
    QEMU says then that it holds the zeroes behind the backing file's end."""
    base, middle, top = tmp_path / "base, a.raw", tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    more = 0 if "extended_l2=on" in options else 1 << 20
    numbered(base, SIZE - more // 2)
    for path, below, format, size, cluster in (
        (middle, base, "raw", SIZE, 16384),
        (top, "middle.qcow2", "qcow2", SIZE + more, 65536),
    ):
        words = ",".join([f"cluster_size={cluster}", *options])
        run(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", format, "-o", words, path, str(size)
        )
        random_writes(path, size, cluster, seed=cluster % 7, count=25)
    return top, middle, base


@pytest.mark.parametrize("options", [(), ("extended_l2=on",), ("compat=0.10",)])
def test_a_chain_is_one_map_over_all_its_files(tmp_path, options):
    top, middle, base = chain(tmp_path, *options)
    same_as_qemu(top, tmp_path)
    bmap = proven(top)
    assert bmap.volumes.column("name").to_pylist() == [str(top), str(middle), str(base), "/dev/sda"]
    with open_host([str(top)], Opening(references=True)) as host:
        rows = host.disks[0].rows
        for number in (1, 2):
            shown = sum(int(n) for n in rows.parent_run[rows.parent == number])
            assert parts(bmap, number)["hidden by an overlay"] > 0
            assert shown > 0
    assert parts(bmap, 2)["hidden by an overlay"] == base.stat().st_size - shown


def test_two_overlays_share_their_base(tmp_path):
    top, _, base = chain(tmp_path)
    other = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", other)
    bmap = proven(top, other)
    names = bmap.volumes.column("name").to_pylist()
    assert names[:2] == [str(top), str(other)], "what was given comes first"
    assert names.count(str(base)) == 1
    assert "hidden by an overlay" not in parts(bmap, names.index(str(base))), (
        "the empty overlay shows all of it"
    )
    owners = {
        row["device"]
        for row in owner_records(bmap, names.index(str(base)) + 1, ints(0), ints(base.stat().st_size))
    }
    assert owners >= {"/dev/sda", "/dev/sdb"}


@pytest.mark.parametrize("raw", [False, True])
def test_external_data_file(tmp_path, raw):
    data = tmp_path / "data.raw"
    image = create(tmp_path / "a.qcow2", f"data_file={data}", *(["data_file_raw=on"] if raw else []))
    random_writes(image, SIZE, 65536, seed=3, packed=False)
    same_as_qemu(image, tmp_path, data=data)
    assert leaks_and_errors(image) == (0, 0)
    bmap = proven(image)
    assert bmap.volumes.column("name").to_pylist() == [str(image), str(data), "/dev/sda"]
    assert bmap.volumes.column("type").to_pylist()[:2] == ["qcow2", "qcow2 data"]


def test_data_that_only_snapshots_hold_has_their_number(tmp_path):
    image = create(tmp_path / "a.qcow2")
    io(image, "write -P 1 0 1M")
    run("qemu-img", "snapshot", "-c", "first", image)
    io(image, "write -P 2 0 256k")  # 4 clusters of which only the first snapshot has the old
    run("qemu-img", "snapshot", "-c", "second", image)
    io(image, "write -P 3 256k 256k", "write -P 4 2M 128k")  # 4 clusters that both snapshots have
    run("qemu-img", "snapshot", "-c", "third", image)
    io(image, "write -P 5 2M 64k")
    same_as_qemu(image, tmp_path)
    assert leaks_and_errors(image) == (0, 0)
    found = parts(proven(image))
    assert found["data of snapshot 1"] == 256 << 10
    assert found["data of several snapshots"] == 256 << 10
    assert found["data of snapshot 3"] == 64 << 10
    assert "data of snapshot 2" not in found
    for number, (name, fill) in enumerate([("first", 1), ("second", 2), ("third", 3)], 1):
        with open_host([str(image)]) as host:
            snapshot = host.disks[0].chain[0].layer.facts["snapshots"][number - 1]
            assert (snapshot["number"], snapshot["name"], snapshot["size"]) == (number, name, SIZE)
        raw = tmp_path / "snapshot"
        run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", image, raw)
        assert raw.read_bytes()[(number - 1) * (128 << 10)] in (1, 2, fill)
        bmap = proven(image)
    _, table = bmap.slice_of("extents", 0)
    for row in table.to_pylist():  # what is said to be the old data really is
        if row["part"] in ("data of snapshot 1", "data of several snapshots", "data of snapshot 3"):
            fill = {"data of snapshot 3": 4}.get(row["part"], 1)
            assert set(image.read_bytes()[row["volume_offset"] :][: row["length"]]) == {fill}


def test_bitmaps_are_named(tmp_path):
    image = create(tmp_path / "a.qcow2")
    run("qemu-img", "bitmap", "--add", "-g", "4096", image, "b0")
    run("qemu-img", "bitmap", "--add", "--disable", image, "b1")
    io(image, "write -P 7 1M 3M")
    same_as_qemu(image, tmp_path)
    assert leaks_and_errors(image) == (0, 0)
    found = parts(proven(image))
    assert found["bitmap directory"] > 0
    assert found["bitmap data"] == 65536
    with open_host([str(image)]) as host:
        facts = host.disks[0].chain[0].layer.facts["bitmaps"]
    info = json.loads(run("qemu-img", "info", "--output=json", image))["format-specific"]["data"]["bitmaps"]
    assert [(b["name"], b["granularity"], b["enabled"]) for b in facts] == [
        (b["name"], b["granularity"], "auto" in b["flags"]) for b in info
    ]


def test_an_encrypted_image_is_mapped_but_not_looked_into(tmp_path):
    image, secret = tmp_path / "a.qcow2", ("--object", "secret,id=s,data=abc")
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        *secret,
        "-o",
        "encrypt.format=aes,encrypt.key-secret=s",
        image,
        str(SIZE),
    )
    io(
        image,
        "write -P 7 1M 1M",
        options=(*secret, "--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={image}"),
    )
    bmap = proven(image)
    assert parts(bmap, 1) == {"encrypted qcow2 image": SIZE}
    with open_host([str(image)]) as host:
        assert [piece[:3] for piece in ours(host)] == [(1 << 20, 2 << 20, "data")]


@pytest.mark.slow
def test_the_luks_header_is_named(tmp_path):
    """Slow: QEMU measures how fast this machine derives keys."""
    image, secret = tmp_path / "a.qcow2", ("--object", "secret,id=s,data=abc")
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        *secret,
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        image,
        str(SIZE),
    )
    bmap = proven(image)
    _, table = bmap.slice_of("extents", 0)
    (place,) = (row["volume_offset"] for row in table.to_pylist() if row["part"] == "LUKS header")
    assert image.read_bytes()[place : place + 6] == b"LUKS\xba\xbe"


def test_leaks_are_where_qemu_sees_them(tmp_path):
    """The refcounts of all clusters of a file are raised where they were 0, or lowered: qemu-img check counts
    the same clusters."""
    image = create(tmp_path / "a.qcow2")
    io(image, "write -P 1 0 1M", "write -P 1 3M 512k")
    clean = image.read_bytes()
    table = int.from_bytes(clean[48:56], "big")
    block = int.from_bytes(clean[table : table + 8], "big")
    for change, at in (("leak", 40), ("leak", 33), ("low", 6), ("high", 7)):
        data = bytearray(clean.ljust(48 * 65536, b"\0"))
        data[block + 2 * at : block + 2 * at + 2] = {"leak": 1, "low": 0, "high": 3}[change].to_bytes(
            2, "big"
        )
        image.write_bytes(data)
        leaks, errors = leaks_and_errors(image)
        bmap = map_disks([str(image)], host_offsets=True)
        codes = {problem["code"]: problem["volume_offset"] for problem in bmap.problems.to_pylist()}
        assert codes == {"unowned" if change == "leak" else "count": at * 65536}
        assert (leaks, errors) == (1, 0) if change == "leak" else errors > 0
        assert {found.code for found in check(bmap).disagreements} >= set(codes)


def test_a_terabyte_with_little_data_is_quick(tmp_path):
    image = create(tmp_path / "a.qcow2", "cluster_size=64k", size=1 << 40)
    io(image, *(f"write -P 7 {at << 30} 64k" for at in range(0, 1024, 16)))
    with open_host([str(image)]) as host:
        assert len(host.disks[0].rows) == 64
        assert sum(file.requested for file in host.files) < 64 * 65536 + (1 << 20)


def test_every_refcount_width_is_decoded_as_qemu_writes_it():
    """Against a bit-by-bit reading of the specification."""
    raw = np.random.default_rng(1).integers(0, 256, (3, 64), dtype=np.uint8)
    for bits in (1, 2, 4, 8, 16, 32):
        flat = raw.reshape(-1).tolist()
        if bits < 8:
            expected = [(byte >> shift) & ((1 << bits) - 1) for byte in flat for shift in range(0, 8, bits)]
        else:
            expected = [
                int.from_bytes(bytes(flat[at : at + bits // 8]), "big")
                for at in range(0, len(flat), bits // 8)
            ]
        assert allocator.decode(raw, bits).tolist() == expected
