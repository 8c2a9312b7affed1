"""Names from a disk made safe to print, reversibly.

A backslash becomes `\\\\`; control characters (C0, DEL, C1), line and paragraph separators, bidirectional
overrides and bytes that are not UTF-8 become `\\xNN` for each byte. Everything else stays as it is, so nearly
every name is its own escape.
"""

import re

import numpy as np
import pyarrow as pa

_SUSPECT = re.compile(
    rb"[\x00-\x1f\x7f\\]|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9\xaa-\xae]|\xe2\x81[\xa6-\xa9]"
    rb"|(?:[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})|[\x80-\xff]"
)
_BACK = re.compile(rb"\\(?:\\|x([0-9a-f]{2}))")


def escape(name: bytes) -> str:
    """One name as printable text."""
    return _SUSPECT.sub(_replace, name).decode()


def _replace(match: re.Match[bytes]) -> bytes:
    found = match[0]
    if found == b"\\":
        return b"\\\\"
    plain = len(found) > 1 and not re.fullmatch(
        rb"\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9\xaa-\xae]|\xe2\x81[\xa6-\xa9]", found
    )
    return found if plain else b"".join(b"\\x%02x" % byte for byte in found)


def unescape(text: str) -> bytes:
    """The bytes that `escape` was given."""
    return _BACK.sub(lambda match: b"\\" if match[1] is None else bytes([int(match[1], 16)]), text.encode())


def escape_all(names: pa.Array) -> pa.Array:
    """`escape` for a large_binary array, as large_string; names that need nothing, nearly all of them, pass
    in one sweep."""
    if len(names) == 0:
        return pa.array([], pa.large_string())
    data = np.frombuffer(names.buffers()[2] or b"", np.uint8)
    if not ((data < 0x20) | (data >= 0x7F) | (data == 0x5C)).any():
        return names.view(pa.large_string())
    import pyarrow.compute as pc  # slow to import, and nearly no map needs it here

    suspect = _suspects(names)
    rows = np.flatnonzero(suspect)
    fixed = pa.array(
        [escape(name) if name is not None else None for name in names.take(pa.array(rows)).to_pylist()],
        pa.large_string(),
    )
    clean = pc.if_else(pa.array(~suspect), names, pa.scalar(b"", pa.large_binary())).view(pa.large_string())
    return pc.replace_with_mask(clean, pa.array(suspect), fixed)


def _suspects(names: pa.Array) -> np.ndarray:
    """Which names hold a byte that may need escaping."""
    offsets = np.frombuffer(names.buffers()[1], np.int64)[names.offset : names.offset + len(names) + 1]
    data = np.frombuffer(names.buffers()[2] or b"", np.uint8)
    flags = np.append(0, np.cumsum((data < 0x20) | (data >= 0x7F) | (data == 0x5C)))
    suspect: np.ndarray = flags[offsets[1:]] > flags[offsets[:-1]]
    return suspect
