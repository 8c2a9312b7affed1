"""Bytes of which only reading tells whether they can be had: by checksums, or by unpacking them."""

from virt_bmap.core.arrays import EMPTY, Bytes, Int, subtract, union
from virt_bmap.core.lost import NOTHING, Lost
from virt_bmap.core.reader import Reader


class CheckedReader(Reader):
    """A reader that looks at what it reads. Subclasses provide `_look`."""

    def __init__(self, size: int, name: str) -> None:
        super().__init__(size, name)
        self._looked_at, self._found = (EMPTY, EMPTY), NOTHING
        """What was read last, and what of it is lost."""

    def _look(self, offsets: Int, lengths: Int) -> tuple[Bytes, Lost]:
        """The ranges as `_fetch` gives them, and what of them is lost."""
        raise NotImplementedError

    @property
    def whole(self) -> bool:
        return False

    def lost(self, starts: Int, ends: Int) -> Lost:
        with self._turn:
            left = subtract(starts, ends, *self._looked_at)
            parts = [self._found]
            if len(left[0]):
                self._fetch(left[0], left[1] - left[0])
                parts.append(self._found)
            return Lost.join(parts).within(starts, ends)[1]

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        data, self._found = self._look(offsets, lengths)
        self._looked_at = union(offsets, offsets + lengths)
        return data
