"""Where symbolic links of NTFS lead: those of Windows and its junctions, of Interix (which ntfs-3g makes) and
of WSL.

Sources: [MS-FSCC] 2.1.2; Linux fs/ntfs3/inode.c, ntfs_readlink_hlp(); ntfs-3g libntfs-3g/dir.c.
"""

from virt_bmap.formats.filesystems.ntfs.ondisk import (
    REPARSE_LX_SYMLINK,
    REPARSE_MOUNT_POINT,
    REPARSE_SYMLINK,
)

INTERIX_LINK = b"IntxLNK\x01"
PATHS_AT = {REPARSE_SYMLINK: 20, REPARSE_MOUNT_POINT: 16}
"""Where the buffer with both names begins; before it stand where each of them lies."""
NAMESPACE = "\\??\\"


def target(data: bytes, size: int) -> bytes | None:
    """Links of Interix and ntfs-3g (UTF-16 after a magic), of WSL (UTF-8 in a reparse point), of Windows."""
    if data.startswith(INTERIX_LINK):
        data = data[:size] if size > len(INTERIX_LINK) else data
        return _text(data[len(INTERIX_LINK) :]).encode(errors="surrogatepass") or None
    tag = int.from_bytes(data[:4], "little")
    if tag == REPARSE_LX_SYMLINK:
        return data[12 : 8 + int.from_bytes(data[4:6], "little")] or None
    if tag in PATHS_AT:
        return _of_windows(data, PATHS_AT[tag])
    return None


def _of_windows(data: bytes, start: int) -> bytes | None:
    """As Linux shows it: the name that is for people, `\\` as `/`, a drive with its letter; the name that
    Windows follows, without the namespace, where there is no other."""
    substitute, substitute_length, shown, shown_length = (
        int.from_bytes(data[at : at + 2], "little") for at in range(8, 16, 2)
    )
    places = (shown, shown_length), (substitute, substitute_length)
    names = (data[start + at :][:length] for at, length in places)
    path = _text(next(filter(None, names), b"")).removeprefix(NAMESPACE).rstrip("\0").replace("\\", "/")
    return path.encode(errors="surrogatepass") or None


def _text(utf16: bytes) -> str:
    return utf16[: len(utf16) // 2 * 2].decode("utf-16-le", "surrogatepass")
