"""What a Parquet file unpacks to, by its own page headers, before any of it is unpacked.

Run lengths and dictionaries make a thousand million values of a hundred bytes, and a codec gigabytes of a
megabyte. The footer may lie of both; what is decoded follows the headers of the pages, so these are added up.

Sources: apache/parquet-format, parquet.thrift and Encodings.md; the Thrift compact protocol.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

DICTIONARY_PAGE, DATA_PAGE, DATA_PAGE_V2 = 2, 0, 3
PLAIN_DICTIONARY, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 2, 7, 8
BYTE_ARRAY = 6
CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 5: "lz4", 6: "zstd", 7: "lz4_raw"}
MAX_DEPTH = 16
"""Of structures in structures: those of Parquet are 6 deep."""


class Unpacked(NamedTuple):
    """What a file becomes in memory: values, bytes of its pages without their codec, and at most so many
    bytes of text that dictionaries repeat."""

    values: int
    bytes: int
    text: int


def unpacked(data: memoryview) -> Unpacked:
    """What a file becomes in memory. ValueError where it is not a Parquet file."""
    length = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or bytes(data[-4:]) != b"PAR1" or length > len(data) - 12:
        raise ValueError("it has no footer")
    footer = _Thrift(data, len(data) - 8 - length).structure()
    most = len(data) // 8 + 1024
    values = size = text = pages = 0
    for group in _list(footer, 4):
        for chunk in _list(group, 1):
            meta = _structure(chunk, 3)
            word = 0
            for page in _pages(data, meta):
                pages += 1
                if pages > most:
                    raise ValueError("its columns overlap")
                size += page.size
                if page.kind == DICTIONARY_PAGE:
                    word = _longest(data, meta, page)
                    continue
                values += page.values
                if page.encoding == DELTA_BYTE_ARRAY:
                    raise ValueError(
                        "its text is packed in a way that is not supported here (DELTA_BYTE_ARRAY)"
                    )
                if page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
                    text += page.values * word
    return Unpacked(values, size, text)


class _Page(NamedTuple):
    kind: int
    values: int
    encoding: int
    size: int
    start: int
    stored: int


def _pages(data: memoryview, meta: dict[int, Any]) -> Iterator[_Page]:
    """The pages of a column chunk, as a reader goes through them."""
    at = _number(meta, 9)
    first = _number(meta, 11)
    at = first if 0 < first < at else at
    end = at + _number(meta, 7)
    if end > len(data):
        raise ValueError("a column lies beyond its end")
    seen, total = 0, _number(meta, 5)
    while at < end and seen < total:
        thrift = _Thrift(data, at)
        header = thrift.structure()
        kind, stored = _number(header, 1), _number(header, 3)
        inner = _structure(header, {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}.get(kind, 0))
        yield _Page(
            kind,
            _number(inner, 1),
            _number(inner, 4 if kind == DATA_PAGE_V2 else 2),
            _number(header, 2),
            thrift.at,
            stored,
        )
        at = thrift.at + stored


def _longest(data: memoryview, meta: dict[int, Any], page: _Page) -> int:
    """Bytes of the longest word of a dictionary of text, 0 where its values are numbers."""
    if _number(meta, 1) != BYTE_ARRAY:
        return 0
    codec = CODECS.get(_number(meta, 4))
    words = data[page.start : page.start + page.stored]
    if codec:
        if page.size > 64 * len(data) + (64 << 20):
            raise ValueError("it holds a dictionary that is larger than the file can be")
        words = memoryview(pa.decompress(words, page.size, codec, asbytes=True))
    at = longest = 0
    while at + 4 <= len(words):
        length = int.from_bytes(words[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return longest


def _number(structure: dict[int, Any], field: int) -> int:
    value = structure.get(field, 0)
    if not isinstance(value, int) or value < 0:
        raise ValueError("its footer or a page has no number where one belongs")
    return value


def _structure(structure: dict[int, Any], field: int) -> dict[int, Any]:
    value = structure.get(field, {})
    if not isinstance(value, dict):
        raise ValueError("its footer or a page is malformed")
    return value


def _list(structure: dict[int, Any], field: int) -> list[dict[int, Any]]:
    value = structure.get(field, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("its footer is malformed")
    return value


class _Thrift:
    """A structure of the compact protocol as a dictionary of its fields.

    Every value takes a byte or more, so it is never larger than its bytes.
    """

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self.at = data, at

    def structure(self, depth: int = 0) -> dict[int, Any]:
        found: dict[int, Any] = {}
        field = 0
        if depth > MAX_DEPTH:
            raise ValueError("its footer is nested too deeply")
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._zigzag()
            found[field] = self._value(head & 15, depth, in_list=False)
        return found

    def _byte(self) -> int:
        if not 0 <= self.at < len(self._data):
            raise ValueError("its footer or a page is cut off")
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("its footer or a page is malformed")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _value(self, kind: int, depth: int, in_list: bool) -> Any:
        if kind in (1, 2):
            return self._byte() if in_list else kind == 1
        if kind in (3, 4, 5, 6):
            return self._byte() if kind == 3 else self._zigzag()
        if kind == 7:
            self.at += 8
            return None
        if kind == 8:
            length = self._varint()
            self.at += length
            return None
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            if count > len(self._data) - self.at:
                raise ValueError("its footer is malformed")
            return [self._value(head & 15, depth, in_list=True) for _ in range(count)]
        if kind == 12:
            return self.structure(depth + 1)
        raise ValueError("its footer or a page is malformed")
