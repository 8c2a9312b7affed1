"""make: every SPEC gives the disk that it names, filled with the tree, in a format that its name says; what
goes wrong leaves nothing behind."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support import assert_proven, mapped, mounted, need, need_root, run, unmount
from virt_bmap.act.make import disk, make, tools
from virt_bmap.act.make.spec import KINDS, bytes_of, parse, usage
from virt_bmap.cli import run as bmap
from virt_bmap.core.errors import BmapError, ImageError, MissingTool, OutputError, UsageError
from virt_bmap.host import programs

MIB = 1 << 20


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small system: /boot, names with blanks, a hole, hard and symbolic links, owners and modes."""
    top = tmp_path_factory.mktemp("tree")
    for folder in ("boot/grub", "etc/empty", "usr/share/a folder"):
        (top / folder).mkdir(parents=True)
    (top / "boot/vmlinuz").write_bytes(os.urandom(70_000))
    (top / "boot/grub/grub.cfg").write_text("set root=1\n")
    (top / "usr/share/a folder/größe.txt").write_text("large\n")
    (top / "etc/passwd").write_text("root:x:0:0\n")
    (top / "etc/passwd").chmod(0o640)
    with open(top / "usr/sparse", "wb") as file:
        file.seek(3 * MIB)
        file.write(b"end")
    os.symlink("../etc/passwd", top / "usr/link")
    os.link(top / "etc/passwd", top / "etc/again")
    os.utime(top / "etc/passwd", (1_000_000_000, 1_000_000_000))
    if os.geteuid() == 0:
        os.chown(top / "etc/passwd", 1234, 5678)
    return top


@pytest.fixture(scope="module")
def plain(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree without links, for filesystems that have none."""
    top = tmp_path_factory.mktemp("plain") / "tree"
    shutil.copytree(tree, top)
    (top / "usr/link").unlink()
    return top


def seen(root: Path, owners: bool = True) -> dict[str, tuple[object, ...]]:
    """What one can see of a tree: by path, the content or target, and of files mode, owner and time."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        name, about = str(path.relative_to(root)), path.lstat()
        if name == "lost+found":
            continue
        facts = (
            (about.st_mode, about.st_uid, about.st_gid, int(about.st_mtime))
            if owners and not path.is_symlink() and path.is_file()
            else ()
        )
        content = (
            os.readlink(path)
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "directory"
        )
        found[name] = (content, *facts)
    return found


def devices(image: Path) -> dict[str, str | None]:
    """Every device of a disk and its type, as the map has them, which is proven."""
    found = mapped(image)
    assert_proven(found)
    return dict(
        zip(found.volumes.column("name").to_pylist(), found.volumes.column("type").to_pylist(), strict=True)
    )


# ---- the words ---------------------------------------------------------------------------------------------


def test_the_words_are_those_of_guestfish() -> None:
    need("guestfish", "libguestfs-tools")
    text = subprocess.run(["guestfish", "-N", "help"], capture_output=True, text=True).stdout
    theirs = re.findall(r"^guestfish -N (\w+) ", text, re.MULTILINE)
    assert len(theirs) == 7
    for kind in theirs:
        section = text.split(f"guestfish -N {kind} ")[1].split("\nguestfish -N ")[0]
        parameters = dict(re.findall(r"^      <(\w+)> .*?\(default: ([^)]*)\)", section, re.MULTILINE))
        assert KINDS[kind].parameters == parameters


def test_parameters_in_order_with_defaults_for_empty_ones() -> None:
    spec = parse("lvfs:/dev/a/b::512M:gpt")
    assert (spec.kind, spec.volume, spec.filesystem(), spec.size, spec.table) == (
        "lvfs",
        ("a", "b"),
        "ext2",
        512 * MIB,
        "gpt",
    )
    assert usage("fs") == "fs[:filesystem[:size[:partition]]]"


def test_sizes() -> None:
    for text, size in (
        ("1000", 1000),
        ("7s", 3584),
        ("2k", 2048),
        ("3M", 3 * MIB),
        ("3MiB", 3 * MIB),
        ("3mb", 3 * MIB),
        ("1G", 1 << 30),
        ("2T", 2 << 40),
    ):
        assert bytes_of(text) == size
    for text in ("", "M", "1X", "-1", "1.5G", "0", "99999999999999P", "1Gi1", "1 G", "٣M", "0x10"):
        with pytest.raises(UsageError):
            bytes_of(text)


# ---- disks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "types"), [
    ("disk:8M", {"/dev/sda": None}),
    ("part:8M", {"/dev/sda": "dos", "/dev/sda1": None}),
    ("part:8M:gpt", {"/dev/sda": "gpt", "/dev/sda1": None}),
    ("fs::32M", {"/dev/sda": "dos", "/dev/sda1": "ext2"}),
    ("fs:ext3:32M:efi", {"/dev/sda": "gpt", "/dev/sda1": "ext3"}),
    ("fs:ext4:32M:mbr", {"/dev/sda": "dos", "/dev/sda1": "ext4"}),
    ("fs:xfs:320M", {"/dev/sda": "dos", "/dev/sda1": "xfs"}),
    ("fs:vfat:32M", {"/dev/sda": "dos", "/dev/sda1": "vfat"}),
    ("fs:ntfs:32M:gpt", {"/dev/sda": "gpt", "/dev/sda1": "ntfs"}),
    ("fs:exfat:32M", {"/dev/sda": "dos", "/dev/sda1": "exfat"}),
    ("fs:swap:32M", {"/dev/sda": "dos", "/dev/sda1": "swap"}),
    ("bootroot:vfat:ext4:96M:32M:gpt", {"/dev/sda": "gpt", "/dev/sda1": "vfat", "/dev/sda2": "ext4"}),
    ("lv:/dev/one/two:32M", {"/dev/sda": "dos", "/dev/sda1": "LVM2_member", "/dev/one/two": None}),
    ("lvfs::ext4:64M", {"/dev/sda": "dos", "/dev/sda1": "LVM2_member", "/dev/VG/LV": "ext4"}),
    ("bootrootlv:/dev/a-b/c.d:ext2:ext4:96M:32M",
        {"/dev/sda": "dos", "/dev/sda1": "ext2", "/dev/sda2": "LVM2_member", "/dev/a-b/c.d": "ext4"}),
])  # fmt: skip
def test_every_spec_gives_what_it_says(spec: str, types: dict[str, str | None], tmp_path: Path) -> None:
    if "lv" in spec:
        need_root()
    out = tmp_path / "out.img"
    try:
        make(spec, str(out))
    except MissingTool as error:
        pytest.skip(str(error))
    found = parse(spec)
    assert out.stat().st_size == found.size
    assert os.listdir(tmp_path) == ["out.img"]
    bmap_ = mapped(out)
    if types["/dev/sda"]:
        assert_proven(bmap_)
        partitions = json.loads(run("sfdisk", "-J", out))["partitiontable"]["partitions"]
        assert all(entry["start"] * 512 % MIB == 0 for entry in partitions)
    names, kinds = (bmap_.volumes.column(column).to_pylist() for column in ("name", "type"))
    assert dict(zip(names, kinds, strict=True)) == types


def test_a_boot_partition_has_the_size_asked_for_and_is_marked(tmp_path: Path) -> None:
    make("bootroot:ext2:ext2:96M:20M", str(tmp_path / "out"))
    first, second = json.loads(run("sfdisk", "-J", tmp_path / "out"))["partitiontable"]["partitions"]
    assert (first["size"] * 512, first.get("bootable")) == (20 * MIB, True)
    assert second["start"] == first["start"] + first["size"]
    assert (second["start"] + second["size"]) * 512 == 96 * MIB


# ---- trees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext2", "ext4", "xfs", "btrfs"])
def test_a_tree_is_put_in_as_it_is(kind: str, tree: Path, tmp_path: Path) -> None:
    """Seen through the running kernel: content, links, modes, owners, times."""
    need_root()
    out = tmp_path / "out.img"
    make(f"fs:{kind}:400M", str(out), str(tree))
    with mounted(out, "ro", MIB) as root:
        assert seen(root) == seen(tree)
        # mkfs.btrfs writes the zeroes
        assert kind == "btrfs" or (root / "usr/sparse").stat().st_blocks * 512 < MIB
    assert set(devices(out).values()) >= {kind}


@pytest.mark.parametrize("kind", ["vfat", "ntfs"])
def test_a_tree_in_filesystems_without_links(kind: str, plain: Path, tmp_path: Path) -> None:
    """Seen through the map: extract copies it out again."""
    need_root()
    out = tmp_path / "out.img"
    make(f"fs:{kind}:64M", str(out), str(plain))
    copy = tmp_path / "copy"
    copy.mkdir()
    bmap(
        [
            "extract",
            "-q",
            str(out),
            "/dev/sda1",
            *(f"/{path.name}" for path in plain.iterdir()),
            "-C",
            str(copy),
        ]
    )
    assert seen(copy, False) == seen(plain, False)


def test_a_tree_with_boot_is_split(tree: Path, tmp_path: Path) -> None:
    need_root()
    out = tmp_path / "out.img"
    make("bootroot:ext2:ext4:128M:32M", str(out), str(tree))
    with mounted(out, "ro", MIB) as boot, mounted(out, "ro", 33 * MIB) as root:
        assert seen(boot) == seen(tree / "boot")
        assert list((root / "boot").iterdir()) == []
        whole = seen(tree)
        assert seen(root) == {name: facts for name, facts in whole.items() if not name.startswith("boot/")}
    assert (tree / "boot/vmlinuz").exists(), "the tree itself stays as it is"


def test_a_tree_in_a_logical_volume(tree: Path, tmp_path: Path) -> None:
    need_root(), need("lvm", "lvm2")
    out = tmp_path / "out.img"
    make("lvfs:/dev/vg/root:ext4:64M:gpt", str(out), str(tree))
    bmap(["dump", "-q", str(out), "/dev/vg/root", str(tmp_path / "volume")])
    run("e2fsck", "-fn", tmp_path / "volume")
    with mounted(tmp_path / "volume", "ro") as root:
        assert seen(root) == seen(tree)
    assert run("losetup", "-j", out) == b""


def test_an_encrypted_tree_needs_no_root_and_no_kernel(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        disk, "LUKS", (*disk.LUKS, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    )  # made to be slow otherwise
    need("cryptsetup", "cryptsetup-bin"), need_root()
    pytest.importorskip("cryptography")
    out, key = tmp_path / "out.img", tmp_path / "key"
    key.write_text("open sesame")
    make("luks:ext4:64M", str(out), str(tree), str(key))
    with open(tmp_path / "part", "wb") as file:
        file.write(out.read_bytes()[MIB:])
    name = "/dev/mapper/luks-" + run("cryptsetup", "luksUUID", tmp_path / "part").decode().strip()
    bmap(["dump", "-q", "--key", f"all:file:{key}", str(out), name, str(tmp_path / "volume")])
    run("e2fsck", "-fn", tmp_path / "volume")
    with mounted(tmp_path / "volume", "ro") as root:
        assert seen(root) == seen(tree)
    run("cryptsetup", "open", "--test-passphrase", "--key-file", key, tmp_path / "part")
    assert (tree / "boot/vmlinuz").read_bytes() not in out.read_bytes()


# ---- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "format"),
    [("qcow2", "qcow2"), ("vmdk", "vmdk"), ("vdi", "vdi"), ("vhdx", "vhdx"), ("VHD", "vpc"), ("raw", "raw")],
)
def test_the_extension_says_the_format(ending: str, format: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-utils")
    out = tmp_path / f"out.{ending}"
    make("fs:ext4:32M", str(out))
    about = json.loads(run("qemu-img", "info", "-f", format, "--output=json", out))
    assert about["format"] == format
    assert 0 <= about["virtual-size"] - 32 * MIB < MIB  # VHD counts in cylinders
    run("qemu-img", "convert", "-f", format, "-O", "raw", out, tmp_path / "raw")
    assert list(mapped(tmp_path / "raw").volumes.column("type").to_pylist()) == ["dos", "ext4"]


# ---- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "words"), [
    ("fss", r"unknown SPEC 'fss'; there are: disk\[:size\], part\[:size\[:partition\]\], fs"),
    ("", "unknown SPEC ''"),
    ("disk:1G:mbr", r"disk takes at most 1 parameter: disk\[:size\]"),
    ("disk:much", "size 'much': is not a size"),
    ("fs:ext5", "filesystem 'ext5': no filesystem of this name can be made; there are: ext2, "),
    ("part:1G:sun", "partition 'sun': no partition table of this name"),
    ("lv:VG/LV", "name 'VG/LV': a logical volume is named /dev/VG/LV"),
    ("lv:/dev/../x", "a logical volume is named"),
    ("lv:/dev/a/-b", "a logical volume is named"),
    ("lv:/dev/a b/c;d", "a logical volume is named"),
    ("md:raid7", "level 'raid7': no RAID level"),
    ("md:raid6:ext4:3", "raid6 is made of 4 to 100 partitions"),
    ("md:raid1:ext4:zwei", "raid1 is made of 2 to 100 partitions"),
    ("part:1M", "has no room for that"),
    ("bootroot::ext2:64M:64M", "has no room for that"),
    ("fs:ext4:2M:gpt", "has no room for that"),
    ("luks::4M", "luks needs a passphrase"),
])  # fmt: skip
def test_a_wrong_spec_is_said_in_one_line_and_nothing_is_made(spec: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        make(spec, str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_what_a_tool_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    need("mkfs.xfs", "xfsprogs")
    with pytest.raises(ImageError, match=r"^xfs of \d[\d,]* bytes: mkfs.xfs failed: "):
        make("fs:xfs:64M", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_a_tree_that_does_not_fit(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/large").write_bytes(os.urandom(3 * MIB))
    for kind in ("ext4", "vfat"):
        with pytest.raises(BmapError) as caught:
            make(f"fs:{kind}:3M", str(tmp_path / "out"), str(tmp_path / "tree"))
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["tree"]


def test_a_tool_that_is_not_there_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "search_path", lambda *_: str(tmp_path))
    with pytest.raises(MissingTool, match=r"sfdisk is not installed \(apt-get install fdisk\)"):
        make("part:8M", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_an_output_that_exists_is_replaced_with_force_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists already; --force replaces it"):
        bmap(["make", "disk:1M", str(out)])
    assert out.read_text() == "mine"
    assert bmap(["make", "--force", "disk:1M", str(out)]) == 0
    assert out.read_bytes() == bytes(MIB)
    assert re.fullmatch(
        rf"{out}: disk:1M, .* on this host, made in .* s with files\n", capsys.readouterr().out
    )
    with pytest.raises(UsageError, match="is a directory"):
        make("disk:1M", str(tmp_path), force=True)
    with pytest.raises(OutputError, match="No such file or directory"):
        make("disk:1M", str(tmp_path / "no" / "out"))


@pytest.mark.parametrize(("arguments", "words"), [
    (("disk:1M", None), "makes no filesystem"), (("fs::8M", "nowhere"), "there is no such directory"),
    (("fs::8M", __file__), "is not a directory"), (("fs:swap:8M", "/etc/apt"), "holds no files"),
])  # fmt: skip
def test_a_tree_that_makes_no_sense(arguments: tuple[str, str | None], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        make(arguments[0], str(tmp_path / "out"), arguments[1] or "/etc/apt")
    assert os.listdir(tmp_path) == []


def test_without_space_nothing_is_left(tmp_path: Path, tree: Path) -> None:
    need_root()
    (tmp_path / "small").mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=200k", "none", tmp_path / "small")
    try:
        for name, spec in (
            ("out.img", "fs:ext4:64M"),
            ("out.qcow2", "bootroot:ext2:ext2:64M:8M"),
            ("lv.img", "lvfs::ext4:64M"),
        ):
            with pytest.raises(OutputError, match="No space left on device"):
                make(spec, str(tmp_path / "small" / name), str(tree))
            assert os.listdir(tmp_path / "small") == []
        run("mount", "-o", "remount,ro", tmp_path / "small")
        with pytest.raises(OutputError, match="Read-only file system"):
            make("disk:1M", str(tmp_path / "small/out"))
    finally:
        unmount(tmp_path / "small")


def test_layout_keeps_room_for_gpts_second_table() -> None:
    for size in ("5M", "64M", "1000000k"):
        for table in ("mbr", "gpt"):
            (entry,) = disk.layout(parse(f"part:{size}:{table}"))
            end = bytes_of(size) - (33 * 512 if table == "gpt" else 0)
            assert end - 2 * MIB < entry.start + entry.size <= end
    for members in (3, 7):
        entries = disk.layout(parse(f"md:raid5:ext4:{members}:1G:gpt"))
        assert [entry.start for entry in entries[1:]] == [entry.start + entry.size for entry in entries[:-1]]
        assert len({entry.size for entry in entries}) == 1


@pytest.mark.parametrize("members", [4, 5, 7])
def test_more_than_four_members_lie_in_logical_partitions(members: int, tmp_path: Path) -> None:
    """sfdisk finds the partitions where they were meant to lie, by the numbers that the array is made of."""
    spec = parse(f"md:raid5:ext4:{members}:1G:mbr")
    work = disk.Work(spec, tmp_path, tmp_path / "disk", {}, None)
    tools.blank(work.disk, spec.size)
    entries = disk.layout(spec)
    disk._write_table(work, entries)
    rows = json.loads(run("sfdisk", "--json", work.disk))["partitiontable"]["partitions"]
    found = {row["node"].removeprefix(str(work.disk)): (row["start"] * 512, row["size"] * 512)
             for row in rows if row["type"] == "fd"}  # fmt: skip
    meant = zip(disk.numbers("dos", members), entries, strict=True)
    assert found == {str(number): (entry.start, entry.size) for number, entry in meant}


# ---- the appliance -----------------------------------------------------------------------------------------

SPECS = (
    "disk", "part", "fs", "lv:/dev/one/lv", "lvfs:/dev/two/lv", "bootroot", "bootrootlv:/dev/three/lv",
    "part:64M:gpt", "fs:ext4:64M:gpt", "fs:vfat:32M", "lv:/dev/four/name:64M:gpt",
    "lvfs:/dev/five/name:ext4:64M:gpt", "bootroot:vfat:ext4:256M:64M:gpt",
    "bootrootlv:/dev/six/root:ext3:ext4:256M:64M:gpt",
)  # fmt: skip
"""Every SPEC of `guestfish -N help` with its defaults (names of groups apart, as one machine sees them all),
and with parameters."""


def guestfish(script: list[str]) -> str:
    """What guestfish says."""
    need("guestfish", "libguestfs-tools")
    environment = {**os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    done = subprocess.run(
        ["guestfish"],
        input="\n".join(script) + "\n",
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("specs", [SPECS[:7], SPECS[7:]], ids=["defaults", "parameters"])
def test_libguestfs_finds_what_guestfish_itself_would_have_made(
    specs: tuple[str, ...], tmp_path: Path
) -> None:
    """The disks of `guestfish -N SPEC`, described by libguestfs, and ours: tables, partitions, volumes and
    filesystems are the same."""
    for number, spec in enumerate(specs):
        make(spec, str(tmp_path / f"ours{number}.img"))
    facts = ["list-devices", "list-partitions", "list-filesystems", "lvs", "vgs"]
    facts += [f"-part-get-parttype /dev/sd{chr(97 + number)}" for number in range(len(specs))]
    facts += [f"blockdev-getsize64 /dev/sd{chr(97 + number)}" for number in range(len(specs))]
    ours = guestfish(
        [*(f"add {tmp_path}/ours{number}.img format:raw" for number in range(len(specs))), "run", *facts]
    )
    need("guestfish", "libguestfs-tools")
    options = [
        part for number, spec in enumerate(specs) for part in ("-N", f"{tmp_path}/theirs{number}.img={spec}")
    ]
    environment = {**os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    theirs = subprocess.run(
        ["guestfish", *options],
        input="\n".join(facts) + "\n",
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert theirs.returncode == 0, theirs.stderr[-1500:]
    assert "/lv: ext2" in ours or "/name: ext4" in ours
    assert ours == theirs.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "device"), [
    ("md:raid5:ext4:3:96M:gpt", "md"), ("md:raid0:ext2:2:64M", "md"), ("md::ext2::64M", "md"),
    ("md:raid10:ext2:4:96M", "md"), ("thin:/dev/vg1/thin:ext4:96M", "/dev/vg1/thin"),
    ("lvfs:/dev/vg2/lv:ext4:64M", "/dev/vg2/lv"), ("fs:xfs:320M", "/dev/sda1"),
])  # fmt: skip
def test_what_needs_a_kernel_is_made_in_the_appliance(
    spec: str, device: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays, thin volumes; and LVM and XFS where there are no loop devices.

    Mapped and proven; a kernel finds the tree in what the map puts together, and libguestfs the filesystem.
    """
    out, kind = tmp_path / "out.img", parse(spec).filesystem()
    with monkeypatch.context() as patch:
        patch.setattr(tools, "can_loop", lambda: False)
        assert "appliance" in make(spec, str(out), str(tree))
    (name,) = [name for name, found in devices(out).items() if found == kind]
    assert device in name
    bmap(["dump", "-q", str(out), name, str(tmp_path / "volume")])
    with mounted(tmp_path / "volume", "ro") as root:
        assert seen(root) == seen(tree)
    said = guestfish([f"add {out} format:raw", "run", "list-filesystems"])
    assert re.search(rf"^/dev/\S*{device.removeprefix('/dev/')}\S*: {kind}$", said, re.MULTILINE), said
