"""minix volumes: made by mkfs.minix, filled by hand, a block at a time, since this kernel has no driver.
fsck.minix says whether that was done right, and GRUB reads it.

Sources: include/uapi/linux/minix_fs.h; Tanenbaum and Woodhull, "Operating Systems: Design and
Implementation", chapter 5.
"""

import os
import stat
import struct
from pathlib import Path

from support import need, run

ROOT = 1
VERSIONS = {
    "v1": "-1 -n 14", "v1-30": "-1 -n 30", "v2": "-2 -n 14", "v2-30": "-2 -n 30", "v3": "-3 -n 60",
    "v3-4k": "",
}  # fmt: skip
"""Options of mkfs.minix, which makes no blocks of 4 KiB."""
INODES = 512


class Volume:
    """An open image: what its superblock says, and its two maps."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, bytearray(path.read_bytes())
        self.v3 = self.data[1024 + 24 : 1024 + 26] == b"\x5a\x4d"
        if self.v3:
            self.inodes, self.imap, self.zmap, self.first = struct.unpack_from("<IxxHHH", self.data, 1024)
            self.zones, self.block = struct.unpack_from("<I4xH", self.data, 1024 + 20)
            self.version, self.name = 3, 60
        else:
            head = struct.unpack_from("<HHHHHHIHHI", self.data, 1024)
            self.inodes, nzones, self.imap, self.zmap, self.first = head[:5]
            self.version = 1 if head[7] in (0x137F, 0x138F) else 2
            self.name = 30 if head[7] in (0x138F, 0x2478) else 14
            self.zones, self.block = nzones if self.version == 1 else head[9], 1024
        self.pointer = "H" if self.version == 1 else "I"
        self.per_block = self.block // struct.calcsize(self.pointer)

    def _take(self, start: int, bits: int) -> int:
        """The first bit that is clear in a map; it is set."""
        for bit in range(1, bits):
            if not self.data[start + bit // 8] >> bit % 8 & 1:
                self.data[start + bit // 8] |= 1 << bit % 8
                return bit
        raise AssertionError("the volume is full")

    def new_inode(self) -> int:
        return self._take(2 * self.block, self.inodes + 1)

    def new_zone(self, content: bytes) -> int:
        zone = self._take((2 + self.imap) * self.block, self.zones - self.first + 1) + self.first - 1
        self.data[zone * self.block : zone * self.block + len(content)] = content
        return zone

    def _blocks(self, zones: list[int]) -> list[int]:
        """The pointers of an inode: seven to content, then trees of one, two and three levels."""
        pointers, rest = (zones + [0] * 7)[:7], zones[7:]
        for level in range(1, 3 if self.version == 1 else 4):
            size = self.per_block**level
            pointers.append(self._tree(rest[:size], level))
            rest = rest[size:]
        assert not rest
        return pointers

    def _tree(self, zones: list[int], level: int) -> int:
        if not any(zones):
            return 0
        if level > 1:
            size = self.per_block ** (level - 1)
            zones = [self._tree(zones[at : at + size], level - 1) for at in range(0, len(zones), size)]
        return self.new_zone(struct.pack(f"<{len(zones)}{self.pointer}", *zones))

    def write(
        self, number: int, mode: int, links: int, content: bytes, device: int = 0, size: int = -1
    ) -> None:
        """An inode with this content; blocks of zeroes are holes, but those of directories."""
        zones = []
        for at in range(0, len(content), self.block):
            piece = content[at : at + self.block]
            zones.append(self.new_zone(piece) if piece.strip(b"\0") or stat.S_ISDIR(mode) else 0)
        pointers, size = self._blocks(zones), len(content)
        pointers[0] = device or pointers[0]
        if self.version == 1:
            record = struct.pack("<HHIIBB9H", mode, 0, size, 1_000_000_000, 0, links, *pointers)
        else:
            times = [1_000_000_000] * 3
            record = struct.pack("<HHHHIIII10I", mode, links, 0, 0, size, *times, *pointers)
        at = (2 + self.imap + self.zmap) * self.block + (number - 1) * len(record)
        self.data[at : at + len(record)] = record

    def entry(self, number: int, name: bytes) -> bytes:
        return number.to_bytes(4 if self.v3 else 2, "little") + name[: self.name].ljust(self.name, b"\0")

    def root_zone(self) -> int:
        """Where mkfs.minix put the root directory, which is written anew there."""
        at = (2 + self.imap + self.zmap) * self.block + (14 if self.version == 1 else 24)
        return struct.unpack_from(f"<{self.pointer}", self.data, at)[0]


def fill(path: Path, source: Path) -> None:
    """Copy a tree into an empty volume: directories, files, links of both kinds, pipes, devices."""
    volume, inodes = Volume(path), dict[int, int]()

    def add(where: bytes, number: int, parent: int) -> None:
        names, folders = [(number, b"."), (parent, b"..")], 0
        for name in sorted(os.listdir(where)):
            child = os.path.join(where, name)
            about = os.lstat(child)
            if about.st_ino not in inodes or stat.S_ISDIR(about.st_mode):
                inodes[about.st_ino] = new = volume.new_inode()
                if stat.S_ISDIR(about.st_mode):
                    folders += 1
                    add(child, new, number)
                elif stat.S_ISLNK(about.st_mode):
                    volume.write(new, about.st_mode, 1, os.fsencode(os.readlink(child)))
                elif stat.S_ISREG(about.st_mode):
                    volume.write(new, about.st_mode, about.st_nlink, Path(os.fsdecode(child)).read_bytes())
                else:
                    volume.write(new, about.st_mode, about.st_nlink, b"", device=about.st_rdev)
            names.append((inodes[about.st_ino], name))
        if number == ROOT:  # its first zone is free again
            bit = volume.root_zone() - volume.first + 1
            volume.data[(2 + volume.imap) * volume.block + bit // 8] &= ~(1 << bit % 8) & 255
        volume.write(
            number, stat.S_IFDIR | 0o755, 2 + folders, b"".join(volume.entry(*name) for name in names)
        )

    add(os.fsencode(source), ROOT, ROOT)
    path.write_bytes(volume.data)


def make(path: Path, version: str, source: Path, kibibytes: int = 2048) -> Path:
    """A volume with a tree in it, which fsck.minix finds nothing wrong with."""
    with open(path, "wb") as file:
        file.truncate(kibibytes << 10)
    if options := VERSIONS[version].split():
        run(need("mkfs.minix", "util-linux"), *options, "-i", str(INODES), path)
    else:
        large_blocks(path, kibibytes // 4)
    fill(path, source)
    if options:
        run(need("fsck.minix", "util-linux"), "-f", path)
    return path


def large_blocks(path: Path, zones: int) -> None:
    """Version 3 in blocks of 4 KiB: one for each map, eight of inodes; bit 0 of a map stands for nothing."""
    first = 4 + INODES * 64 // 4096
    head = struct.pack("<IHHHHHHIIHHHB", INODES, 0, 1, 1, first, 0, 0, 2**31 - 1, zones, 0x4D5A, 0, 4096, 0)
    with open(path, "r+b") as file:
        for offset, data in ((1024, head), (2 * 4096, b"\3"), (3 * 4096, b"\3")):
            file.seek(offset)
            file.write(data)
        file.seek(4 * 4096 + 24)
        file.write(struct.pack("<I", first))  # the root's zone
