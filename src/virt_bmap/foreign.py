"""What is known by its magic alone: named in `info` and in the map as one piece, never as unknown.

Sources: util-linux libblkid/src/superblocks (names and offsets).
"""

from virt_bmap.reader import Reader

MAGICS: tuple[tuple[str, int, bytes], ...] = (
    ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("jbd", 0x438, b"\x53\xef"),
)
"""(type, offset in bytes, magic), first match wins."""


def recognise(reader: Reader) -> str | None:
    """The type in blkid's words, or None."""
    for name, offset, magic in MAGICS:
        if reader.read_clipped(offset, len(magic)) == magic:
            return name
    return None
