"""NBD servers that lie or never end: whoever reads from them, writes to them or asks them for status gets an
error in words, soon and in little memory."""

import contextlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import BmapError, ImageError, OutputError
from virt_bmap.diff.compare import compare
from virt_bmap.open import nbd
from virt_bmap.open.nbd import NbdReader
from virt_bmap.open.nbd_writer import NbdWriter
from virt_bmap.open.status import ALLOCATION, StatusReader

SIZE = 1 << 20
CONTENT = np.random.default_rng(8).integers(0, 256, SIZE, np.uint8).tobytes()
SIMPLE, STRUCTURED, OPTION = 0x67446698, 0x668E33EF, 0x3E889045565A9
NONE, DATA, HOLE, STATUS, ERROR = 0, 1, 2, 5, 0x8001


def chunk(cookie: int, kind: int, body: bytes, done: int = 1) -> bytes:
    return struct.pack(">IHHQI", STRUCTURED, done, kind, cookie, len(body)) + body


def data(cookie: int, at: int, size: int, done: int = 1) -> bytes:
    return chunk(cookie, DATA, struct.pack(">Q", at) + CONTENT[at : at + size], done)


def simple(cookie: int, at: int, size: int) -> bytes:
    return struct.pack(">IIQ", SIMPLE, 0, cookie) + CONTENT[at : at + size]


class Liar:
    """A server that answers options, requests and the greeting as it is told; None: honestly."""

    def __init__(self, **lies: object) -> None:
        self.lies = {
            "size": SIZE,
            "structured": False,
            "infos": [],
            "contexts": [(0, ALLOCATION)],
            "answer": simple,
            "status": None,
            **lies,
        }

    def serve(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen()
            self.ready.set()
            link, _ = listening.accept()
            with link, contextlib.suppress(OSError):
                self._talk(link)

    def _talk(self, link: socket.socket) -> None:
        lies = self.lies
        link.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        self._get(link, 4)
        while True:
            _, option, length = struct.unpack(">8sII", self._get(link, 16))
            self._get(link, length)

            def reply(kind: int, body: bytes = b"", option: int = option) -> None:
                link.sendall(struct.pack(">QIII", OPTION, option, kind, len(body)) + body)

            if option == 8:
                reply(1 if lies["structured"] else (1 << 31) + 1)
            elif option == 10:
                for number, name in lies["contexts"]:
                    reply(4, struct.pack(">I", number) + name.encode())
                reply(1)
            else:
                for info in lies["infos"]:
                    reply(3, info)
                reply(3, struct.pack(">HQH", 0, lies["size"], 1 | 1 << 2 | 1 << 5))
                reply(1)
                break
        while True:
            _, _, kind, cookie, at, length = struct.unpack(">IHHQQI", self._get(link, 28))
            if kind == 2:
                return
            if kind == 1:
                self._get(link, length)
            answer = lies["status"] if kind == 7 else lies["answer"]
            for part in (found,) if isinstance(found := answer(cookie, at, length), bytes) else found:
                link.sendall(part)

    @staticmethod
    def _get(link: socket.socket, count: int) -> bytes:
        found = b""
        while len(found) < count:
            part = link.recv(count - len(found))
            if not part:
                raise OSError
            found += part
        return found

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[str]:
        path, self.ready = str(folder / "nbd"), threading.Event()
        threading.Thread(target=self.serve, args=(path,), daemon=True).start()
        self.ready.wait()
        yield f"nbd+unix:///?socket={path}"


def read_all(uri: str, kind: type[NbdReader] = NbdReader) -> bytes:
    reader = kind(uri)
    try:
        offsets = ints(np.arange(0, 1 << 18, 8192))
        return reader.read_ranges(offsets, np.full(len(offsets), 4096)).tobytes()
    finally:
        reader.close()


def expected() -> bytes:
    return b"".join(CONTENT[at : at + 4096] for at in range(0, 1 << 18, 8192))


HALVES: dict[str, Callable[[int, int, int], bytes]] = {
    "two halves": lambda c, at, n: data(c, at + n // 2, n - n // 2, 0) + data(c, at, n // 2),
    "data, then done": lambda c, at, n: data(c, at, n, 0) + chunk(c, NONE, b""),
    "many parts": lambda c, at, n: b"".join(data(c, at + k, 512, k == n - 512) for k in range(0, n, 512)),
}


@pytest.mark.parametrize("how", HALVES)
def test_parts_in_any_order_are_read(how: str, tmp_path: Path) -> None:
    with Liar(structured=True, answer=HALVES[how]).running(tmp_path) as uri:
        assert read_all(uri, StatusReader) == expected()


def endless(*part: bytes) -> Callable[[int, int, int], Iterator[bytes]]:
    return lambda *_: itertools.cycle(part)


READS: dict[str, tuple[Callable[[int, int, int], object], str]] = {
    "a half twice": (lambda c, at, n: data(c, at, n // 2, 0) + data(c, at, n - n // 2), "does not answer"),
    "a part inside another": (
        lambda c, at, n: data(c, at, n - 512, 0) + data(c, at + 512, 512),
        "does not answer",
    ),
    "less": (lambda c, at, n: data(c, at, n // 2), "less than was asked"),
    "more": (lambda c, at, n: data(c, at, n, 0) + data(c, at, 512), "does not answer"),
    "an end twice": (
        lambda c, at, n: data(c, at, n) + data(c, at, n),
        "no.* reply to any request|does not answer",
    ),
    "elsewhere": (lambda c, at, n: chunk(c, DATA, struct.pack(">Q", at + n) + bytes(n)), "does not answer"),
    "a hole of 4 GiB": (
        lambda c, at, n: chunk(c, HOLE, struct.pack(">QI", at, 0xFFFFFFFF)),
        "does not answer",
    ),
    "holes of nothing": (
        lambda c, at, n: itertools.repeat(chunk(c, HOLE, struct.pack(">QI", at, 0), 0)),
        "does not answer",
    ),
    "chunks of nothing": (lambda c, at, n: itertools.repeat(chunk(c, NONE, b"", 0)), "does not answer"),
    "another request": (lambda c, at, n: data(1 << 40, at, n), "not a reply to any request"),
    "words of 16 MiB": (
        lambda c, at, n: chunk(c, ERROR, struct.pack(">IH", 5, 0) + bytes(16 << 20)),
        "does not answer",
    ),
    "another kind": (lambda c, at, n: chunk(c, 77, b"x" * 100), "does not answer"),
}


@pytest.mark.parametrize("how", READS)
def test_chunks_that_lie_are_refused(how: str, tmp_path: Path) -> None:
    """Each byte of an answer comes exactly once, or none of it is believed: what did not come would be what
    the memory held before."""
    answer, words = READS[how]
    with (
        Liar(structured=True, answer=answer).running(tmp_path) as uri,
        pytest.raises(ImageError, match=words),
    ):
        assert read_all(uri, StatusReader) == expected()


@pytest.mark.parametrize("cookie", [0, 1 << 62])
def test_one_request_is_not_answered_twice(cookie: int, tmp_path: Path) -> None:
    with (
        Liar(answer=lambda _, at, n: simple(cookie, at, n)).running(tmp_path) as uri,
        pytest.raises(ImageError, match="not a reply to any request"),
    ):
        read_all(uri)


@pytest.mark.parametrize(
    "contexts",
    [
        [(0, ALLOCATION)] * 2,
        [(0, ALLOCATION), (1, ALLOCATION)],
        [(0, ALLOCATION), (0, "x")],
        [(0, "not asked")],
        [(n, f"x{n}") for n in range(5000)],
    ],
)
def test_contexts_are_those_that_were_asked_for(contexts: list[tuple[int, str]], tmp_path: Path) -> None:
    with (
        Liar(structured=True, contexts=contexts).running(tmp_path) as uri,
        pytest.raises(ImageError, match=r"context|is not valid"),
    ):
        StatusReader(uri)


@pytest.mark.parametrize("block", [3, 1 << 17, 0xFFFFFFFF])
def test_blocks_are_what_the_protocol_allows(block: int, tmp_path: Path) -> None:
    with (
        Liar(infos=[struct.pack(">HIII", 3, block, block, 0xFFFFFFFF)]).running(tmp_path) as uri,
        pytest.raises(ImageError, match="which the protocol does not allow"),
    ):
        NbdReader(uri)


@pytest.mark.parametrize("most", [0, 1, 511])
def test_reads_are_as_long_as_the_protocol_wants_at_least(most: int, tmp_path: Path) -> None:
    """A byte at a time is a request for each byte."""
    with (
        Liar(infos=[struct.pack(">HIII", 3, 1, 512, most)]).running(tmp_path) as uri,
        pytest.raises(
            ImageError, match=f"no more than {most} bytes at a time, which the protocol does not allow"
        ),
    ):
        NbdReader(uri)


def test_an_export_may_be_shorter_than_the_shortest_block(tmp_path: Path) -> None:
    infos = [struct.pack(">HIII", 3, 1, 512, 100)]
    with Liar(size=100, infos=infos).running(tmp_path) as uri, contextlib.closing(NbdReader(uri)) as reader:
        assert reader.read(0, 100) == CONTENT[:100]


def test_options_end(tmp_path: Path) -> None:
    with (
        Liar(infos=itertools.repeat(struct.pack(">H", 9) + bytes(1000))).running(tmp_path) as uri,
        pytest.raises(ImageError, match="NBD_OPT_GO is not valid"),
    ):
        NbdReader(uri)


def extents(*lengths: int, context: int = 0) -> Callable[[int, int, int], bytes]:
    body = struct.pack(">I", context) + b"".join(struct.pack(">II", length, 0) for length in lengths)
    return lambda cookie, at, n: chunk(cookie, STATUS, body)


STATUSES: dict[str, tuple[int, Callable[[int, int, int], object]]] = {
    "of nothing": (SIZE, extents(0)),
    "of another context": (SIZE, extents(SIZE, context=7)),
    "twice": (SIZE, lambda c, at, n: chunk(c, STATUS, struct.pack(">III", 0, n, 0), 0) * 2),
    "of ever new contexts": (
        SIZE,
        lambda c, at, n: (chunk(c, STATUS, struct.pack(">III", k, n, 0), 0) for k in itertools.count(1)),
    ),
    "a byte at a time": (1 << 40, extents(*[1] * (1 << 20))),
    "a byte an answer": (1 << 40, extents(1)),
    "of an export that no disk is": (1 << 62, extents(1 << 30)),
}


@pytest.mark.parametrize("how", STATUSES)
def test_statuses_that_lie_or_do_not_end(how: str, tmp_path: Path) -> None:
    size, status = STATUSES[how]
    began = time.process_time()
    with (
        Liar(structured=True, size=size, status=status).running(tmp_path) as uri,
        contextlib.closing(StatusReader(uri)) as reader,
        pytest.raises(ImageError),
    ):
        reader.status(ALLOCATION)
    assert time.process_time() - began < 10


def test_two_exports_of_exabytes_are_not_compared(tmp_path: Path) -> None:
    """The batches alone would be 4 TiB of numbers."""
    with (
        Liar(size=1 << 62).running(tmp_path) as uri,
        contextlib.closing(NbdReader(uri)) as reader,
        pytest.raises(BmapError, match="batches of"),
    ):
        next(compare(reader, ints(0), reader, ints(0), ints(1 << 62)))


def test_a_trickle_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by silence: a byte comes again and again.

    The limits are those of a real server, a thousandth as long.
    """
    monkeypatch.setattr(nbd, "PATIENCE", 0.3)
    monkeypatch.setattr(nbd, "EACH", 0.001)
    monkeypatch.setattr(nbd, "RATE", 1024_000)

    def trickle(cookie: int, at: int, n: int) -> Iterator[bytes]:
        for byte in simple(cookie, at, n):
            time.sleep(0.06)
            yield bytes([byte])

    began = time.monotonic()
    with (
        Liar(answer=trickle).running(tmp_path) as uri,
        pytest.raises(ImageError, match="sends too slowly: we waited"),
    ):
        read_all(uri)
    assert time.monotonic() - began < 20


def test_a_link_of_1200_bytes_a_second_is_patient_enough() -> None:
    """The longest answer of all, and each one on its way for a second."""
    assert nbd.REQUEST / 1200 < nbd.PATIENCE + nbd.EACH + nbd.REQUEST / nbd.RATE


@pytest.mark.parametrize("cookie", [lambda c: c + 1, lambda _: 0])
def test_writes_are_acknowledged_one_by_one(cookie: Callable[[int], int], tmp_path: Path) -> None:
    server = Liar(answer=lambda c, at, n: struct.pack(">IIQ", SIMPLE, 0, cookie(c)))
    with (
        server.running(tmp_path) as uri,
        contextlib.closing(NbdWriter(uri)) as writer,
        pytest.raises(OutputError, match="not a reply to any"),
    ):
        write_some(writer)


def write_some(writer: NbdWriter) -> None:
    for at in range(4096, 1 << 17, 4096):
        writer.write(at, np.zeros(4096, np.uint8))
    writer.flush()


def test_words_of_a_server_are_short(tmp_path: Path) -> None:
    assert len(nbd.refusal((1 << 31) + 6, b"x" * 60000)) < 300
    assert issubclass(ImageError, BmapError)
