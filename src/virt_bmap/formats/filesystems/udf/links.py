"""Where symbolic links of UDF lead.

Sources: ECMA-167 4/14.16; Linux fs/udf/symlink.c udf_pc_to_char().
"""


def target(data: bytes, size: int) -> bytes | None:
    """Path components: type, length of the identifier, version of the file (2 bytes), identifier (compression
    id 8 or 16, then characters)."""
    data, at = data[:size], 0
    path: list[bytes] = []
    absolute = False
    while at < len(data):
        if at + 4 > len(data) or at + 4 + data[at + 1] > len(data):
            return None
        kind, name = data[at], data[at + 4 : at + 4 + data[at + 1]]
        # the root; whoever made it agreed with its reader on any other
        if kind in (1, 2) and not (kind == 1 and name):
            path, absolute = [], True
        elif kind in (3, 4):
            path.append(b".." if kind == 3 else b".")
        elif kind == 5 and name[:1] in (b"\x08", b"\x10"):
            path.append(
                name[1:]
                .decode("latin-1" if name[0] == 8 else "utf-16-be", "surrogatepass")
                .encode(errors="surrogatepass")
            )
        else:
            return None
        at += 4 + data[at + 1]
    return (b"/" if absolute else b"") + b"/".join(path) or None
