"""F2FS volumes as a real kernel leaves them, made in libguestfs's appliance, with what that kernel said of
them."""

import re
from dataclasses import dataclass
from pathlib import Path

from appliance import Step, made
from support import Extent, join

FEATURES = (
    "extra_attr,inode_checksum,sb_checksum,compression,flexible_inline_xattr,inode_crtime,quota,project_quota,"
    "verity,encrypt,casefold,lost_found"
)

FILL = """
cd /mnt/d; mkdir plain many frag packed folded attrs links
for i in $(seq 1 300); do seq 1 $((i * 3)) > plain/f$i; done
for i in $(seq 1 450); do : > many/$(printf '%05d-%0*d' $i $((i % 200 + 1)) 7); done
for i in $(seq 1 3 450); do rm many/$(printf '%05d' $i)-*; done
sync -f .
for i in $(seq 1 3 300); do rm plain/f$i; done
for i in $(seq 1 25); do for f in a b c; do seq $i $((i + 2500)) >> frag/$f; sync frag/$f; done; done
for i in $(seq 1 40)
do seq $i $((i + 900)) | dd of=frag/holes bs=4096 seek=$((i * 30)) conv=notrunc 2>/dev/null; done
fallocate -l 3000000 frag/promised; fallocate -p -o 40960 -l 81920 frag/a
seq 1 2000 | dd of=frag/far bs=4096 seek=2200000 2>/dev/null
seq 1 2000 | dd of=frag/far bs=4096 seek=900000 conv=notrunc 2>/dev/null
seq 1 2000 | dd of=frag/far bs=4096 seek=1000 conv=notrunc 2>/dev/null
for i in 1 2 3; do setfattr -n user.small -v value$i plain/f$((i * 3 - 1)); done
echo x > attrs/large; setfattr -n user.large -v $(printf '%03000d' 5) attrs/large; mkdir attrs/dir
setfattr -n user.dir -v d attrs/dir
ln plain/f2 links/hard; ln -s ../plain/f2 links/short; ln -s $(printf '%03900d' 5) links/long
ln -s $(printf '%0300d' 5) links/middle
mkfifo links/pipe; mknod links/null c 1 3; mknod links/disk b 8 300
chattr +F folded; echo Case > folded/MiXeD
seq 1 9000 > attrs/plain
chattr +i attrs/large
sync -f .
"""
PACK = """
cd /mnt/d; chattr +c packed
for i in 1 2 3 4 5; do seq $i $((i * 9000)) > packed/text$i; done
dd if=/dev/urandom of=packed/noise bs=4096 count=40 2>/dev/null
cat packed/text2 packed/noise packed/text3 > packed/mixed
sync -f .; f2fs_io release_cblocks packed/text3; f2fs_io release_cblocks packed/mixed
echo more >> packed/text4
"""
TELL = """
cd /mnt/d; echo; echo '== stat'; find . -exec stat -c '%i %f %h %s %u %g %Y %n' {} +
echo '== sums'; find . -type f -size -1000000k -exec sha256sum {} +
echo '== extents'; filefrag -v $(find . -path ./packed -prune -o -type f -size +0 -print)
"""
PREPARE = "modprobe f2fs; mkdir -p /mnt/d; mount -t f2fs {options} /dev/disk/guestfs/sda /mnt/d\n"
BEFORE_CRASH = """
cd /mnt/d; mkdir old new; for i in $(seq 1 50); do seq 1 $((i * 50)) > old/f$i; done; seq 1 30000 > old/open
seq 1 100 > gone
seq 1 200000 > old/big; seq 1 1500000 > old/large; setfattr -n user.small -v s old/f20; exec 7< old/open
rm old/open
"""
CRASHES = {
    "none": "true",
    "new": "for i in 1 2 3; do seq $i 40000 > new/f$i; sync new/f$i; done; echo never > new/never; seq 1 "
        "7 > new/tiny; sync new/tiny; rm gone",
    "grown": "seq 1 5000 >> old/f50; sync old/f50; seq 1 9000 >> old/f50; sync old/f50; seq 1 3000 >> "
        "old/f1; sync old/f1; seq 1 9 >> old/f11",
    "large": "seq 1 200000 >> old/large; sync old/large; seq 7 9999 | dd of=old/large bs=4096 seek=1500 "
        "conv=notrunc,fsync 2>/dev/null; "
             "seq 7 9999 | dd of=new/holes bs=4096 seek=9999 conv=fsync 2>/dev/null",
    "cut": "truncate -s 100 old/big; sync old/big; fallocate -p -o 4096 -l 4096 old/f45; sync old/f45; "
        "truncate -s 0 old/f44; echo x >> old/f44; sync old/f44",
    "attributes": "setfattr -n user.large -v $(printf '%03000d' 5) old/f20; sync old/f20; chmod 600 "
        "old/f9; sync old/f9",
    "again": "for i in 77 66; do rm old/f7; seq 1 $i > old/f7; sync old/f7; done",
    "moved": "mv old/f8 old/moved; echo more >> old/moved; sync old/moved",
}  # fmt: skip
"""By name, what happens between a checkpoint and the copy that is taken of the mounted volume."""


@dataclass(frozen=True)
class Told:
    """What the kernel says: inode, mode, links, size, uid, gid, mtime by path; SHA-256 of files; extents of
    FIEMAP."""

    stat: dict[str, tuple[int, ...]]
    sums: dict[str, str]
    extents: dict[str, list[Extent]]


def aged() -> tuple[Path, Told]:
    """A volume of 256 MiB with files of every kind, aged, cleanly unmounted."""
    steps: list[Step] = [
        ("host", f"truncate -s 256M sda; PATH=$PATH:/usr/sbin mkfs.f2fs -q -f -C utf8 -O {FEATURES} sda"),
        (
            "sh",
            PREPARE.format(options="-o compress_algorithm=lz4,compress_log_size=2")
            + FILL
            + PACK
            + "cd /; umount /mnt/d\n"
            + PREPARE.format(options="-o ro")
            + TELL
            + "cd /; umount /mnt/d",
        ),
    ]
    folder = made("f2fs-aged", {"sda": 0}, steps)
    return folder / "sda", told((folder / "log").read_text())


def crashed() -> dict[str, tuple[Path, Path, Told]]:
    """By the names of CRASHES: a copy, the same one recovered by the kernel, and what that kernel then says.

    A deleted file was open all the time.
    """
    size, copies = 128 << 20, {name: (f"copy{name}", f"back{name}") for name in CRASHES}
    script = [PREPARE.format(options=""), BEFORE_CRASH]
    for name, commands in CRASHES.items():
        script.append(f"cd /mnt/d; sync -f .; {commands}; {_copy('sda', copies[name][0])}")
    script.append("exec 7<&-; cd /; umount /mnt/d")
    for name, (copy, back) in copies.items():
        script += [
            _copy(copy, back),
            f"mount -t f2fs /dev/disk/guestfs/{back} /mnt/d; sync -f /mnt/d; echo; echo '== {name}'",
            TELL,
            "cd /; umount /mnt/d",
        ]
    make = f"truncate -s {size} sda; PATH=$PATH:/usr/sbin mkfs.f2fs -q -f -O extra_attr,inode_checksum sda"
    disks = {"sda": 0, **{disk: size for pair in copies.values() for disk in pair}}
    folder = made("f2fs-crashed", disks, [("host", make), ("sh", "\n".join(script))])
    log = (folder / "log").read_text()
    parts = [re.split(rf"^\s*== {name}$", log, flags=re.MULTILINE)[1] for name in CRASHES]
    return {
        name: (folder / copies[name][0], folder / copies[name][1], told(part))
        for name, part in zip(CRASHES, parts, strict=True)
    }


def _copy(disk: str, to: str) -> str:
    return (
        f"dd if=/dev/disk/guestfs/{disk} of=/dev/disk/guestfs/{to} bs=1M iflag=direct oflag=direct "
        "2>/dev/null"
    )


def told(log: str) -> Told:
    """Take apart what TELL printed: guestfish indents it with a tab."""
    lines = [line.strip() for line in log.splitlines()]
    at = [lines.index(f"== {word}") for word in ("stat", "sums", "extents")]
    stat = {}
    for line in filter(None, lines[at[0] + 1 : at[1]]):
        inode, mode, *numbers, name = line.split(" ", 7)
        stat[name[1:] or "/"] = int(inode), int(mode, 16), *map(int, numbers)
    sums = {line[66:][1:]: line[:64] for line in filter(None, lines[at[1] + 1 : at[2]])}
    extents: dict[str, list[Extent]] = {}
    name = ""
    end = next((i for i in range(at[2] + 1, len(lines)) if lines[i].startswith("== ")), len(lines))
    for line in lines[at[2] + 1 : end]:
        if found := re.match(r"File size of (\S+) is", line):
            name = found[1][1:]
            extents[name] = []
        elif found := re.match(
            r"\d+:\s+(\d+)\.\.\s*\d+:\s+(\d+)\.\.\s*\d+:\s+(\d+):(?!.*(unwritten|inline|unknown))", line
        ):
            logical, physical, length = (4096 * int(word) for word in found.groups()[:3])
            extents[name].append(Extent(logical, physical, length))
    return Told(stat, sums, {name: join(rows) for name, rows in extents.items()})
