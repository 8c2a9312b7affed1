"""Where symbolic links of NTFS lead, of Interix (which ntfs-3g makes) and of WSL.

Sources: ntfs-3g libntfs-3g/dir.c, [MS-FSCC] 2.1.2.
"""

from virt_bmap.formats.filesystems.ntfs.ondisk import REPARSE_LX_SYMLINK

INTERIX_LINK = b"IntxLNK\x01"


def target(data: bytes, size: int) -> bytes | None:
    """Links of Interix and ntfs-3g (UTF-16 after a magic) and of WSL (UTF-8 in a reparse point); those of
    Windows name devices, not files."""
    if data.startswith(INTERIX_LINK):
        data = data[:size] if size > len(INTERIX_LINK) else data
        words = data[len(INTERIX_LINK) : len(data) // 2 * 2]
        return words.decode("utf-16-le", "surrogatepass").encode(errors="surrogatepass") or None
    if int.from_bytes(data[:4], "little") == REPARSE_LX_SYMLINK:
        return data[12 : 8 + int.from_bytes(data[4:6], "little")] or None
    return None
