"""The one door to a terminal: whatever words come from (disks, files beside them, other programs), no letter
that a terminal would obey gets out.

Names are escaped where they are made text, reversibly (`core/escape.py`); this is the wall behind that,
for what was forgotten or never was a name.
"""

import json
import re
import sys
from typing import Any, TextIO

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, separators of
lines, bidirectional overrides, and what was not UTF-8."""


def printable(text: str) -> str:
    """Text of which every letter only prints."""
    return OBEYED.sub(_bytes, text)


def _bytes(match: re.Match[str]) -> str:
    return "".join(
        f"\\x{byte:02x}"
        for byte in match[0].encode(
            errors="surrogateescape" if "\udc80" <= match[0] <= "\udcff" else "surrogatepass"
        )
    )


def one_line(words: object) -> str:
    """Words as one line that only prints: messages quote what would end it."""
    return printable(" ".join(str(words).split()))


def say(words: object = "", file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """print(), and the only use of it."""
    print(printable(str(words)), file=file or sys.stdout, end=end, flush=flush)


def to_json(value: Any, default: Any = None, allow_nan: bool = True) -> str:
    """A value as JSON on one line, UTF-8; letters that a terminal would obey in JSON's own escapes."""
    text = json.dumps(value, ensure_ascii=False, default=default, allow_nan=allow_nan)
    return OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
