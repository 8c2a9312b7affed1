"""Where symbolic links of Rock Ridge lead.

Sources: RRIP 1.12, 4.1.3; Linux fs/isofs/rock.c get_symlink_chunk().
"""

CONTINUE, CURRENT, PARENT, ROOT = 1, 2, 4, 8
"""Flags of a component; others (the root of the volume, the host's name) mean nothing here."""


def target(data: bytes, size: int) -> bytes | None:
    """SL entries, one after the other, of components: flags, length, text."""
    path, joined, at = bytearray(), True, 0
    while at < len(data):
        length = data[at + 2] if at + 2 < len(data) else 0
        if data[at : at + 2] != b"SL" or length < 5 or at + length > len(data):
            return None
        part, at = data[at + 5 : at + length], at + length
        while part:
            flags, text = part[0], part[2 : 2 + part[1]] if len(part) > 1 else b""
            if (
                flags & ~(CONTINUE | CURRENT | PARENT | ROOT)
                or len(part) < 2 + len(text)
                or len(text) < part[1]
            ):
                return None
            words = {0: text, CURRENT: b".", PARENT: b"..", ROOT: b"/"}.get(flags & ~CONTINUE)
            if words is None:
                return None
            path += words if joined else b"/" + words
            joined = bool(flags & (CONTINUE | ROOT))
            part = part[2 + part[1] :]
    return bytes(path) or None
