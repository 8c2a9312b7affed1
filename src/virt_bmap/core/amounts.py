"""Amounts for people: every number in a message that says how many or how large."""

import re

_NUMBER = re.compile(r"\[([^][|]*)\|([^][|]*)\]")


def human(size: int) -> str:
    """Bytes in binary units with one decimal: 4.0 KiB."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{size} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def plural(count: int, word: str, words: str | None = None) -> str:
    """'1 file', '2 files', '1,234 directories'."""
    return f"{count:,} {word if count == 1 else words or word + 's'}"


def counted(count: int, text: str) -> str:
    """The count and a text that agrees with it, word by word [singular|plural].

    >>> counted(1, "[name leads|names lead] nowhere")
    '1 name leads nowhere'
    >>> counted(1234, "[name leads|names lead] nowhere")
    '1,234 names lead nowhere'
    """
    return f"{count:,} " + _NUMBER.sub(lambda found: found[1 if count == 1 else 2], text)
