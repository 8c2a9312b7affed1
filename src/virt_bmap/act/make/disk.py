"""From a SPEC to a raw disk: every volume is built in a file of its own, the innermost first, and copied to
its place in the next.

    filesystem -> LUKS or logical volume -> partition -> disk

What needs a kernel that this host has not (arrays, thin volumes, LVM without root, some mounts) is left for
one run of the appliance over the whole disk.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from virt_bmap.act.make import appliance, filesystems, tools
from virt_bmap.act.make.filesystems import FILESYSTEMS
from virt_bmap.act.make.spec import Spec
from virt_bmap.core.errors import ImageError, UsageError

MIB = 1 << 20
START = MIB
"""Where the first partition begins, and to what all are aligned, as today's tools do it."""
END = MIB
"""Left after the last one for GPT's second table."""
LUKS = ("--type", "luks2")
"""cryptsetup's defaults for all else: cipher, key derivation."""
LUKS_HEADER = 8 * MIB
"""Half of what `cryptsetup reencrypt --reduce-device-size` takes is the header, half is where the data was
before it moved (cryptsetup-reencrypt(8))."""
TYPES = {
    "lvm": ("8e", "E6D6D379-F507-44C2-A23C-238F2A3DF928"),
    "raid": ("fd", "A19D880F-05FC-4D3B-A006-743F0F84911E"),
    "luks": ("83", "CA7D7CCB-63ED-4C53-861C-1742536059CC"),
    "linux": ("83", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"),
}
"""Partition types, for MBR and GPT."""


class NewPartition(NamedTuple):
    """One entry of the table: where it lies, in bytes, and what it says it holds."""

    start: int
    size: int
    type: tuple[str, str]
    bootable: bool = False


@dataclass
class Work:
    """One disk being made. `how` are the means that were used; `steps` what the appliance is still to do."""

    spec: Spec
    folder: Path
    disk: Path
    trees: dict[str, Path]
    """What goes into "/" and, where it has a filesystem of its own, "/boot"."""
    key: Path | None
    how: set[str] = field(default_factory=set)
    steps: list[appliance.Step] = field(default_factory=list)


def build(work: Work) -> None:
    """Make the raw disk `work.disk`."""
    spec = work.spec
    tools.blank(work.disk, spec.size)
    work.how.add("files")
    if spec.kind == "disk":
        return
    partitions = layout(spec)
    _write_table(work, partitions)
    if spec.kind.startswith("boot"):
        _filesystem(work, "bootfs", "/boot", partitions[0], "/dev/sda1")
    last = partitions[-1]
    if spec.kind in ("fs", "bootroot"):
        _filesystem(
            work, "filesystem" if spec.kind == "fs" else "rootfs", "/", last, f"/dev/sda{len(partitions)}"
        )
    elif spec.kind == "luks":
        _luks(work, last)
    elif spec.kind == "md":
        _array(work, len(partitions))
    elif spec.kind != "part":
        _logical(work, last, f"/dev/sda{len(partitions)}")
    if work.steps:
        work.how.add("appliance")
        appliance.run(work.disk, work.steps)


def layout(spec: Spec) -> list[NewPartition]:
    """The partitions of a disk. Raises UsageError where it is too small."""
    end = (spec.size - (END if spec.table == "gpt" else 0)) // MIB * MIB
    if spec.kind.startswith("boot"):
        boot, first = -(-spec.bootsize // MIB) * MIB, FILESYSTEMS[spec.filesystem("bootfs")]
        sizes, kinds = [boot, end - START - boot], [(first.mbr, first.gpt), _type(spec)]
    else:
        count = int(spec.values.get("members", 1))
        room = end - START - (count - logical_from(spec.table, count)) * MIB
        sizes, kinds = [room // count // MIB * MIB] * count, [_type(spec)] * count
    if min(sizes) < MIB:
        raise UsageError(
            f"a disk of {spec.size:,} bytes has no room for that: "
            "partitions begin at 1 MiB and are at least as large"
        )
    logical = logical_from(spec.table, len(sizes))
    # a record lies in front of each logical partition
    starts = [START + sum(sizes[:n]) + max(0, n + 1 - logical) * MIB for n in range(len(sizes))]
    return [NewPartition(start, size, kind, number == 0 and spec.kind.startswith("boot"))
            for number, (start, size, kind) in enumerate(zip(starts, sizes, kinds, strict=True))]  # fmt: skip


def logical_from(table: str, count: int) -> int:
    """How many of so many partitions come before the first logical one: a DOS table has four entries, and
    the last leads to the others."""
    return 3 if table == "dos" and count > 4 else count


def numbers(table: str, count: int) -> list[int]:
    """The numbers of so many partitions: logical ones begin at 5."""
    first = logical_from(table, count)
    return [*range(1, first + 1), *range(5, 5 + count - first)]


def _type(spec: Spec) -> tuple[str, str]:
    """What the last partition holds."""
    if spec.kind in ("lv", "lvfs", "bootrootlv", "thin"):
        return TYPES["lvm"]
    if spec.kind in ("md", "luks", "part"):
        return TYPES[{"md": "raid", "luks": "luks", "part": "linux"}[spec.kind]]
    found = FILESYSTEMS[spec.filesystem("filesystem" if spec.kind == "fs" else "rootfs")]
    return found.mbr, found.gpt


def _write_table(work: Work, partitions: list[NewPartition]) -> None:
    gpt = work.spec.table == "gpt"
    lines = [f"label: {work.spec.table}"]
    first = logical_from(work.spec.table, len(partitions))
    for number, entry in enumerate(partitions):
        if number == first:
            start, last = entry.start - MIB, partitions[-1]
            lines.append(f"start={start // 512}, size={(last.start + last.size - start) // 512}, type=5")
        boot = ", bootable" if entry.bootable and not gpt else ""
        lines.append(f"start={entry.start // 512}, size={entry.size // 512}, type={entry.type[gpt]}{boot}")
    # without --no-tell-kernel it calls sync(2) before it asks the kernel, and waits for every disk of the
    # host (fdisk's disk-utils/sfdisk.c, write_changes)
    tools.run("sfdisk", "--quiet", "--no-tell-kernel", work.disk, stdin="\n".join(lines) + "\n")


def _made(work: Work, parameter: str, where: str, size: int, device: str) -> Path:
    """A file of `size` bytes with the filesystem that a parameter asks for; what this host can't put into it
    the appliance will, on `device`."""
    kind, tree = work.spec.filesystem(parameter), work.trees.get(where)
    file = tools.blank(work.folder / f"{parameter}.img", size)
    how = filesystems.make(kind, file, tree)
    if how:
        work.how.add(how)
    elif tree:
        work.steps += appliance.fill(device, kind, appliance.archived(tree, work.folder / f"{parameter}.tar"))
    return file


def _filesystem(work: Work, parameter: str, where: str, partition: NewPartition, device: str) -> None:
    tools.place(_made(work, parameter, where, partition.size, device), work.disk, partition.start)


def _luks(work: Work, partition: NewPartition) -> None:
    """The filesystem, moved back by the header's size while
    it is encrypted; a kernel is not needed for that."""
    if not work.key:
        raise UsageError("luks needs a passphrase: put it into a file and name that with --key-file")
    size = partition.size - LUKS_HEADER
    if size < MIB:
        raise UsageError(
            f"the partition of {partition.size:,} bytes has no room for "
            f"a LUKS header of {LUKS_HEADER:,} bytes and a filesystem"
        )
    file = _made(work, "filesystem", "/", size, "")
    if work.steps:
        raise ImageError(
            f"{work.spec.filesystem()}: filling it inside LUKS needs root "
            "and a kernel that mounts it; ext4 and btrfs need neither"
        )
    with open(file, "r+b") as grown:
        grown.truncate(size + 2 * LUKS_HEADER)
    tools.run("cryptsetup", "reencrypt", "--encrypt", *LUKS, "--batch-mode", "--reduce-device-size",
        f"{2 * LUKS_HEADER // MIB}M",
              "--key-file", work.key, file)  # fmt: skip
    header = json.loads(tools.run("cryptsetup", "luksDump", "--dump-json-metadata", file))
    if [segment["offset"] for segment in header["segments"].values()] != [str(LUKS_HEADER)]:
        raise ImageError("this version of cryptsetup lays out the header in a way that is not known here")
    with open(file, "r+b") as cut:
        cut.truncate(LUKS_HEADER + size)
    tools.place(file, work.disk, partition.start)


def _logical(work: Work, partition: NewPartition, device: str) -> None:
    """A volume group on a partition, and one volume over all of it."""
    group, name = work.spec.volume
    volume = f"/dev/{group}/{name}"
    if work.spec.kind == "thin":
        work.steps += [("pvcreate", device), ("vgcreate", group, device)]
        work.steps += _thin(group, name)
    elif tools.can_loop():
        work.how.add("loop devices")
        start, size, file = _linear(work, partition.size, group, name)
        if work.spec.kind != "lv":
            tools.place(_made(work, *_root(work), size, volume), file, start)
        tools.place(file, work.disk, partition.start)
        return
    else:
        work.steps += [
            ("pvcreate", device),
            ("vgcreate", group, device),
            ("lvcreate-free", name, group, "100"),
        ]
    if work.spec.kind != "lv":
        _inside(work, volume, *_root(work))


def _root(work: Work) -> tuple[str, str]:
    """The parameter for the filesystem in the volume, and what it is to hold."""
    return ("rootfs" if work.spec.kind == "bootrootlv" else "filesystem"), "/"


def _linear(work: Work, size: int, group: str, name: str) -> tuple[int, int, Path]:
    """A physical volume in a file, written by LVM itself without device-mapper: where the logical volume
    begins in it, its size, and the file."""
    file = tools.blank(work.folder / "pv.img", size)
    with tools.loop(file) as device:
        # a folder of settings of our own, and no look at other
        # devices: the group may be called like one of this host
        settings = {"LVM_SYSTEM_DIR": str(work.folder), "LVM_SUPPRESS_FD_WARNINGS": "1"}
        only = (
            f'devices{{filter=["a|^{device}$|","r|.*|"] use_devicesfile=0}} backup{{backup=0 '
            f"archive=0}} activation{{udev_sync=0 udev_rules=0}}"
        )
        options = ("--config", only, "--driverloaded", "n")
        tools.run("lvm", "pvcreate", "-qq", *options, device, env=settings)
        tools.run("lvm", "vgcreate", "-qq", *options, group, device, env=settings)
        tools.run(
            "lvm",
            "lvcreate",
            "-qq",
            *options,
            "-an",
            "-Zn",
            "-Wn",
            "-l",
            "100%FREE",
            "-n",
            name,
            group,
            env=settings,
        )
        columns = ("--units", "b", "--nosuffix", "--reportformat", "json", "-o", "pe_start,lv_size")
        found = json.loads(tools.run("lvm", "pvs", *options, *columns, env=settings))["report"][0]["pv"][0]
    return int(found["pe_start"]), int(found["lv_size"]), file


def _thin(group: str, name: str) -> list[appliance.Step]:
    """A pool over the whole group but for some extents that LVM keeps to repair it, and a volume of the
    pool's size."""
    pool = "pool"
    return [
        appliance.shell("lvm", "lvcreate", "-qq", "-y", "-l", "90%FREE", "--thinpool", pool, group),
        appliance.shell(
            "lvm", "lvcreate", "-qq", "-y", "-V", "$(($(lvm lvs --noheadings --units b "
                f"--nosuffix -o lv_size {group}/{pool})))b",
            "--thin", "-n", name, f"{group}/{pool}",
        ),
    ]  # fmt: skip


def _array(work: Work, members: int) -> None:
    """An array over all partitions.

    They are blank: copies and parity of zeroes are in place already, nothing needs to be synchronised.
    """
    device = "/dev/md127"
    devices = [f"{appliance.DISK}{number}" for number in numbers(work.spec.table, members)]
    words = (
        "--run",
        "--assume-clean",
        "--metadata=1.2",
        "--homehost=any",
        "--name=md0",
        f"--level={work.spec.values['level']}",
    )
    work.steps.append(
        appliance.shell("mdadm", "--create", device, *words, f"--raid-devices={members}", *devices)
    )
    _inside(work, device, "filesystem", "/")
    work.steps.append(("md-stop", device))


def _inside(work: Work, device: str, parameter: str, where: str) -> None:
    """A filesystem made and filled in the appliance."""
    kind, tree = work.spec.filesystem(parameter), work.trees.get(where)
    if tree:
        filesystems.refuse_files(kind)
    holds_files = FILESYSTEMS[kind].fills != "never"
    work.steps.append(("mkfs", kind, device) if holds_files else ("mkswap", device))
    if tree:
        work.steps += appliance.fill(device, kind, appliance.archived(tree, work.folder / f"{parameter}.tar"))


def split(tree: Path, folder: Path) -> dict[str, Path]:
    """A tree as two: what is below /boot, and the rest with /boot empty.

    The rest is a copy (of references, where the filesystem can).
    """
    boot = tree / "boot"
    if not boot.is_dir() or boot.is_symlink():
        return {"/": tree}
    rest = folder / "root"
    tools.run("cp", "-aT", "--reflink=auto", "--", tree, rest)
    for path in tools.entries(rest / "boot"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return {"/": rest, "/boot": boot}
