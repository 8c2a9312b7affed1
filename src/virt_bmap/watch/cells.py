"""Parts of the screen as text: the strip of a disk and lists of objects, cut to a width.

No terminal is needed to make them.

All names that come here are escaped; they are never read as markup.
"""

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from virt_bmap.core.amounts import human
from virt_bmap.core.arrays import Int
from virt_bmap.watch.activity import BINS, ObjectRow, Strip

FADING = 0.75
"""How much of a place's light is left at the next look."""
BRIGHT = 0.3
NARROW = 64
"""Columns below which a list has one number a line instead of three."""

# the upper half of a cell is for reads, the lower for writes: the shape says it where colours don't
UNTOUCHED, TOUCHED, READS, WRITES, BOTH = " ", "·", "▀", "▄", "█"
SHAPES = (UNTOUCHED, TOUCHED, READS, WRITES, BOTH)
READ_COLOURS, WRITE_COLOURS = ("green", "bright_green"), ("red", "bright_red")
COLOURS = (
    ("bright_black",) * 2,
    ("bright_black",) * 2,
    READ_COLOURS,
    WRITE_COLOURS,
    ("yellow", "bright_yellow"),
)
"""Of each shape, dim and bright."""
BARS = " ▁▂▃▄▅▆▇█"


class Light:
    """How brightly the places of one disk are lit: fully when they are touched, then fading."""

    def __init__(self) -> None:
        self.reads, self.writes = np.zeros(BINS), np.zeros(BINS)

    def fade(self, strip: Strip) -> None:
        """One look later."""
        self.reads = np.where(strip.reads > 0, 1.0, self.reads * FADING)
        self.writes = np.where(strip.writes > 0, 1.0, self.writes * FADING)


def strip_lines(strip: Strip, light: Light, width: int, height: int) -> Text:
    """The disk, first byte first, in `height` lines of `width` cells.

    Small disks and large alike fill them all.
    """
    cells = max(1, width * height)
    reads, writes = _spread(light.reads, cells), _spread(light.writes, cells)
    touched = _spread(np.maximum(strip.was_read, strip.was_written), cells) > 0
    lit = np.stack([reads, writes]) > FADING**8
    both = np.maximum(reads, writes) > BRIGHT
    shape = np.where(lit.any(axis=0), 1 + lit[0] + 2 * lit[1], touched)
    look = 2 * shape + both
    text = Text(no_wrap=True, end="")
    # neighbours of one look are one piece: the terminal's time goes by pieces
    for low in range(0, cells, width):
        row = look[low : low + width]
        first = np.flatnonzero(np.append(True, row[1:] != row[:-1]))
        text.append("\n" if low else "")
        for number, count in zip(
            row[first].tolist(), np.diff(np.append(first, len(row))).tolist(), strict=True
        ):
            text.append(SHAPES[number >> 1] * count, COLOURS[number >> 1][number & 1])
    return text


def _spread(values: np.ndarray, cells: int) -> np.ndarray:
    """The largest value in each of `cells` equal parts; cells that are smaller than a place show the place
    they lie in."""
    edges: Int = np.arange(cells + 1) * len(values) // cells
    starts = np.minimum(edges[:-1], len(values) - 1)
    return np.asarray(np.maximum.reduceat(values, starts))


def rows_lines(rows: list[ObjectRow], sort: str, width: int) -> Text:
    """One line for each object: what it is sorted by (or read, written and accesses where there is room), and
    its name, whose end matters most."""
    text = Text(no_wrap=True, end="")
    for number, row in enumerate(rows):
        numbers = [_amount(row.read), _amount(row.written), f"{row.accesses:,}"]
        if width < NARROW:
            chosen = {"read": numbers[0], "written": numbers[1], "accesses": numbers[2]}
            numbers = [chosen.get(sort, _amount(row.read + row.written))]
        front = " ".join(f"{value:>9}" for value in numbers) + f" {row.letter} "
        name = f"{row.device} {row.name}" if row.name else row.device
        text.append("\n" if number else "")
        text.append(front, "dim")
        text.append(shortened(name, width - len(front)))
    return text


def spark(values: list[float], width: int) -> str:
    """The last `width` values as bars, the highest of them as high as the line."""
    shown = values[-width:] if width > 0 else []
    highest = max(shown, default=0.0)
    bars = [
        BARS[min(len(BARS) - 1, -int(-value * (len(BARS) - 1) // highest))] if value > 0 else BARS[0]
        for value in shown
    ]
    return "".join(bars).rjust(max(0, width))


def heading(sort: str, width: int) -> str:
    """The heading of `rows_lines`."""
    if width < NARROW:
        return f"{sort if sort in ('read', 'written', 'accesses') else 'bytes':>9}   object"
    return f"{'read':>9} {'written':>9} {'accesses':>9}   object"


def _amount(size: int) -> str:
    return human(size) if size else "-"


def shortened(name: str, width: int) -> str:
    """The name in `width` cells: its middle gives way."""
    if cell_len(name) <= width:
        return name
    if width < 4:
        return set_cell_size(name, max(0, width))
    tail = name
    while cell_len(tail) > (width - 1) * 2 // 3:
        tail = tail[1 + (len(tail) - width if len(tail) > 2 * width else 0) :]
    return set_cell_size(name, width - 1 - cell_len(tail)) + "…" + tail
