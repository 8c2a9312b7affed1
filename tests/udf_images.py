"""UDF volumes that no tool here makes: entries, blocks and packets that took another's place.

Each is a volume of mkudffs in which the newest state of the root directory has the owner NEWEST, and an older
state, which is still there, has not. Run as `udf_images.py NAME IMAGE` it makes one.
"""

import binascii
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SIZE = 2048
NEWEST = 7777


def sealed(block: bytearray) -> bytearray:
    """A descriptor with its tag's CRC and checksum made right again."""
    covered = int.from_bytes(block[10:12], "little")
    block[8:10] = binascii.crc_hqx(bytes(block[16 : 16 + covered]), 0).to_bytes(2, "little")
    block[4] = (sum(block[:4]) + sum(block[5:16])) & 0xFF
    return block


class Volume:
    """The blocks of a volume with a single partition, which begins at block `start`."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        main = int.from_bytes(self.get(256)[20:24], "little")
        kinds = {self.kind(at): at for at in range(main + 7, main - 1, -1)}
        self.start = int.from_bytes(self.get(kinds[5])[188:192], "little")

    def get(self, block: int) -> bytearray:
        return bytearray(self.data[block * SIZE : (block + 1) * SIZE])

    def put(self, block: int, content: bytes) -> None:
        self.data[block * SIZE : (block + 1) * SIZE] = content.ljust(SIZE, b"\0")

    def kind(self, block: int) -> int:
        return int.from_bytes(self.get(block)[:2], "little")

    def kinds(self) -> set[int]:
        return {self.kind(at) for at in range(self.start, len(self.data) // SIZE)}

    def find(self, kind: int, last: bool = False) -> int:
        """The first block, or the last, that holds a descriptor of this kind."""
        there = [at for at in range(self.start, len(self.data) // SIZE) if self.kind(at) == kind]
        return there[-1 if last else 0]

    def root(self) -> int:
        """The block of the root directory's entry."""
        directories = (at for at in range(self.start, self.start + 99) if self.kind(at) in (261, 266))
        return next(at for at in directories if self.get(at)[27] == 4)

    def use(self, blocks: range) -> None:
        """The space bitmap calls blocks of the partition used."""
        bitmap = self.find(264)
        block = self.get(bitmap)
        for at in blocks:
            assert block[24 + at // 8] & 1 << at % 8, "free until now"
            block[24 + at // 8] &= ~(1 << at % 8)
        self.put(bitmap, block)


def newest(entry: bytearray, block: int) -> bytearray:
    """The entry as it is after a change, for another block of the partition."""
    entry[12:16], entry[36:40] = block.to_bytes(4, "little"), NEWEST.to_bytes(4, "little")
    return sealed(entry)


def replaced(volume: Volume) -> None:
    """ICBs of strategy 4096: the root's leads to a second one at block 100, and that to the newest at 200."""
    root = volume.root()
    entry = volume.get(root)
    for at, to in ((root - volume.start, 100), (100, 200)):
        indirect = bytearray(52)
        indirect[0:2], indirect[2:4] = (259).to_bytes(2, "little"), entry[2:4]
        indirect[10:12], indirect[12:16] = (36).to_bytes(2, "little"), (at + 1).to_bytes(4, "little")
        indirect[20:22], indirect[24:26], indirect[27] = bytes([0, 16]), bytes([2, 0]), 3
        indirect[36:40], indirect[40:44] = (2 * SIZE).to_bytes(4, "little"), to.to_bytes(4, "little")
        volume.put(volume.start + at + 1, sealed(indirect))
    older = bytearray(entry)
    older[12:16] = (100).to_bytes(4, "little")
    volume.put(volume.start + 100, sealed(older))
    volume.put(volume.start + 200, newest(entry, 200))
    volume.use(range(100, 102)), volume.use(range(200, 202))


def virtual(volume: Volume) -> None:
    """A second session: the root was written anew behind the first one's end, then a new table, which says
    where the old one lies."""
    last = max(volume.find(kind, last=True) for kind in (261, 266) if kind in volume.kinds())
    root, table = volume.root(), volume.get(last)
    volume.put(last + 1, newest(volume.get(root), root - volume.start))
    is_old = table[27] == 0
    header = (
        176 + int.from_bytes(table[168:172], "little")
        if is_old
        else 216 + int.from_bytes(table[208:212], "little")
    )
    entries = header + (0 if is_old else int.from_bytes(table[header : header + 2], "little"))
    before = header + (int.from_bytes(table[56:64], "little") - 4 if is_old else 132)
    table[before : before + 4] = (last - volume.start).to_bytes(4, "little")
    at = entries + 4 * (root - volume.start)
    table[at : at + 4] = (last + 1 - volume.start).to_bytes(4, "little")
    table[12:16] = (last + 2 - volume.start).to_bytes(4, "little")
    volume.put(last + 2, sealed(table))
    del volume.data[(last + 3) * SIZE :]


def spared(volume: Volume) -> None:
    """The packet with the root was moved to the first spare one; what is left where it was is older."""
    root, tables = (
        volume.root(),
        [at for at in range(len(volume.data) // SIZE) if volume.get(at)[17:35] == b"*UDF Sparing Table"],
    )
    packet = (root - volume.start) // 32 * 32
    spare = int.from_bytes(volume.get(tables[0])[60:64], "little")
    for at in range(32):
        volume.put(spare + at, volume.get(volume.start + packet + at))
    volume.put(spare + (root - volume.start - packet), newest(volume.get(root), root - volume.start))
    for at in tables:
        table = volume.get(at)
        table[56:60] = packet.to_bytes(4, "little")
        volume.put(at, sealed(table))


KINDS: dict[str, tuple[list[str], Callable[[Volume], None]]] = {
    "replaced": (["--media-type=hd", "--strategy=4096"], replaced),
    "virtual": (["--media-type=cdr"], virtual),
    "virtualold": (["--media-type=cdr", "--udfrev=1.50"], virtual),
    "spared": (["--media-type=cdrw"], spared),
}


def make(name: str, image: Path) -> None:
    """Needs mkudffs."""
    options, change = KINDS[name]
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkudffs", "--blocksize=2048", *options, image], check=True, capture_output=True)
    volume = Volume(image.read_bytes())
    change(volume)
    image.write_bytes(volume.data)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
