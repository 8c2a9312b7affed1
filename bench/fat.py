"""How long a FAT32 volume with 200,000 files takes to map, against `fsck.fat -n` of the same image.

    python bench/fat.py [--files N] [--rounds N] CACHE

CACHE keeps the image for the next run. It is written here, since mtools take an hour for it: directories of
400 files with long names, files of one to three clusters, every tenth of them in pieces. `fsck.fat` calls it
clean.
"""

import struct
from pathlib import Path

import fair
import numpy as np

GOAL = 1 / 3
"""Of the time of fsck.fat."""
CLUSTER, RESERVED, PER_DIRECTORY, SLOTS = 2048, 32 * 512, 400, 3


def entries(names: list[str], first: np.ndarray, sizes: np.ndarray, attribute: int) -> np.ndarray:
    """Directory entries (n, 4, 32): three slots of a long name of up to 39 characters, and the short
    entry."""
    n = len(names)
    raw = np.zeros((n, SLOTS + 1, 32), np.uint8)
    short = np.frombuffer("".join(f"F{number:07d}TXT" for number in range(n)).encode(), np.uint8).reshape(
        n, 11
    )
    checksum = np.zeros(n, np.uint8)
    for column in short.T:
        checksum = (checksum << 7 | checksum >> 1) + column
    units = (
        np.frombuffer("".join(name.ljust(39, "\uffff") for name in names).encode("utf-16-le"), "<u2")
        .reshape(n, 39)
        .copy()
    )
    lengths = np.array([len(name) for name in names])
    units[np.arange(n)[lengths < 39], lengths[lengths < 39]] = 0
    for slot in range(SLOTS):
        part = raw[:, SLOTS - 1 - slot]
        part[:, 0] = slot + 1 | (0x40 if slot == SLOTS - 1 else 0)
        part[:, 11], part[:, 13] = 0x0F, checksum
        part[:, np.r_[1:11, 14:26, 28:32]] = np.ascontiguousarray(units[:, slot * 13 : slot * 13 + 13]).view(
            np.uint8
        )
    last = raw[:, SLOTS]
    last[:, :11], last[:, 11] = short, attribute
    last[:, 20:22] = (first >> 16).astype("<u2")[:, None].view(np.uint8)
    last[:, 24:26] = np.array([0x5B77], "<u2").view(np.uint8)
    last[:, 26:28] = (first & 0xFFFF).astype("<u2")[:, None].view(np.uint8)
    last[:, 28:32] = sizes.astype("<u4")[:, None].view(np.uint8)
    return raw


def dots(own: int, parent: int) -> bytes:
    """The entries . and .. of a directory."""

    def entry(name: bytes, cluster: int) -> bytes:
        return struct.pack("<11sB8xHHHHI", name, 0x10, cluster >> 16, 0, 0x5B77, cluster & 0xFFFF, 0)

    return entry(b".          ", own) + entry(b"..         ", parent)


def build(cache: Path, files: int) -> Path:
    """The image, made once."""
    image = cache / f"fat32-{files}.img"
    if image.exists():
        return image
    directories = -(-files // PER_DIRECTORY)
    per_directory = -(-(2 + PER_DIRECTORY * (SLOTS + 1)) * 32 // CLUSTER)
    root = -(-directories * (SLOTS + 1) * 32 // CLUSTER)
    count = 1 + np.arange(files) % 3
    directory_first = 2 + root + np.arange(directories) * per_directory
    data_first = 2 + root + directories * per_directory + np.cumsum(count) - count
    used = 2 + root + directories * per_directory + int(count.sum())
    clusters = max(66000, used + used // 10)
    fat = np.zeros(clusters + 2, "<u4")
    fat[2:used] = np.arange(3, used + 1)
    fat[np.r_[1 + root, directory_first + per_directory - 1, data_first + count - 1]] = 0x0FFFFFFF
    # swap the last clusters of neighbours among these
    pieces = np.flatnonzero((np.arange(files) % 10 == 2) & (count == 3))
    a, b = data_first[pieces[0::2][: len(pieces) // 2]] + 2, data_first[pieces[1::2]] + 2
    fat[a - 1], fat[b - 1] = b, a
    fat[:2] = 0x0FFFFFF8, 0x0FFFFFFF
    fat_sectors = -(-len(fat) * 4 // 512)
    data = RESERVED + 2 * fat_sectors * 512
    total = data // 512 + clusters * CLUSTER // 512
    boot = struct.pack(
        "<3s8sHBHBHHBHHHII",
        b"\xeb\x58\x90",
        b"bench   ",
        512,
        CLUSTER // 512,
        RESERVED // 512,
        2,
        0,
        0,
        0xF8,
        0,
        32,
        8,
        0,
        total,
    )
    boot += struct.pack(
        "<IHHIHH12xBBBI11s8s",
        fat_sectors,
        0,
        0,
        2,
        1,
        6,
        0x80,
        0,
        0x29,
        0x1234ABCD,
        b"NO NAME    ",
        b"FAT32   ",
    )
    boot = boot.ljust(510, b"\0") + b"\x55\xaa"
    info = struct.pack("<I480xIII12xI", 0x41615252, 0x61417272, clusters + 2 - used, used, 0xAA550000)
    part = image.with_suffix(".part")
    with open(part, "wb") as file:
        file.truncate(total * 512)
        for at, piece in (
            (0, boot + info),
            (6 * 512, boot + info),
            (RESERVED, fat.tobytes()),
            (RESERVED + fat_sectors * 512, fat.tobytes()),
        ):
            file.seek(at)
            file.write(piece)
        file.seek(data)
        names = [f"a directory with a long name {number:06d}" for number in range(directories)]
        file.write(entries(names, directory_first, np.zeros(directories, np.int64), 0x10).tobytes())
        for number in range(directories):
            mine = np.arange(number * PER_DIRECTORY, min(files, (number + 1) * PER_DIRECTORY))
            file.seek(data + (int(directory_first[number]) - 2) * CLUSTER)
            names = [f"some file with a long name {i:07d}.txt" for i in mine]
            file.write(
                dots(int(directory_first[number]), 0)
                + entries(names, data_first[mine], count[mine] * CLUSTER - mine % 2000, 0x20).tobytes()
            )
    part.rename(image)
    return image


if __name__ == "__main__":
    raise SystemExit(fair.main(fair.Match(
        __doc__ or "", "fat", build, ["fsck.fat", "-n"], {"fsck.fat": "dosfstools"}, lambda files: GOAL,
    )))  # fmt: skip
