"""A damaged file beside images: maps (Parquet and text), traces, profiles, lists of ranges, logs of other
tools. People are sent such files, too.

Parquet is damaged in two ways: bytes of the file, and numbers, nulls, lists and types of its tables, written
anew.
"""

import io
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from virt_bmap.core.errors import BmapError

from .consumers import command
from .disk import Patch
from .invariants import Broken
from .seeds import Seed

NUMBERS = (0, 1, -1, 2, 255, 4095, 10**9, 2**31 - 1, -(2**31), 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
TEXTS = ("", "data", "free", "bogus", "disk", "lv", "/", "\x1b[31m\n", "\u202e", "x" * 5000)
BYTES = (b"", b"..", b"/", b"\0", b"\x1b[31m\n", b"\xff" * 3000)
WORDS = (
    b"0", b"-1", b"1", b"4095", b"7fffffffffffffff", b"ffffffffffffffff", b"9223372036854775807",
    b"9223372036854775808", b"18446744073709551615", b"1e9", b"1e400", b"nan", b"inf", b"", b"9" * 30, b"0x",
    b"\xd9\xa1\xd9\xa2", b"1_000",
)  # fmt: skip
LINES = (
    b"1 0 ffffffffffffffff v /dev/sda", b"9999 0 1 d /dev/sdz", b"1 0 10 f /dev/sda1 /x", b"garbage", b"# x",
    b"{", b"[" * 20000, b"0x0 0x7fffffffffffffff -",
)  # fmt: skip
ENDS = (b"\x1b[31m", b"\0", b"\xff", b"\r", b" ", b"\xe2\x80\xa8", b"," * 50, b"x" * 100_000)
COMMANDS_TERMINAL = re.compile("[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u2028-\u202e]")
"""What must not be printed: names from a hostile file could command the terminal."""
METADATA = (
    b"{}", b"[]", b"null", b'{"version":2}', b'{"version":2,"disks":5}',
    b'{"version":2,"disks":[{"image":5,"size":"x"}]}', b"\xff", b"1" * 5000,
    b'{"version":1,"disks":[1e308,-5],"runs":[5]}',
)  # fmt: skip

LOGS = {
    "blkparse": "".join(
        f"  8,0    3  {i:7}     {i / 1000:.9f}   697  D   {'RW'[i % 3 == 0]} {i * 16 % 8000} + 8 [x]\n"
        for i in range(1, 300)
    ),
    "fio-3": "fio version 3 iolog\n"
    + "".join(f"{i} /dev/sda {'read' if i % 2 else 'write'} {i * 4096} 4096\n" for i in range(100)),
    "fio-2": "fio version 2 iolog\n/dev/sda add\n/dev/sda open\n"
    + "".join(f"/dev/sda read {i * 4096} 4096\n" for i in range(100)),
    "fio-latency": "".join(f"{i}, 100, {i % 2}, 4096, {i * 4096}, 0\n" for i in range(100)),
    "nbdkit": "".join(
        f"2026-11-28 07:00:{i % 60:02}.{i:06} connection=1 Read id={i} offset={i * 4096:#x} "
        "count=0x1000 ...\n"
        f"2026-11-28 07:00:{i % 60:02}.{i:06} connection=1 ...Read id={i} return=0\n"
        for i in range(1, 100)
    ),
    "qemu": "".join(
        f"77@1700000000.{i:06}:blk_co_preadv blk 0x5 bs 0x6 offset {i * 512} bytes 4096 flags 0x0\n"
        for i in range(100)
    ),
    "csv": "time_ns,op,offset,length\n" + "".join(f"{i * 1000},read,{i * 4096},4096\n" for i in range(100)),
    "biosnoop": "TIME(s)     COMM           PID    DISK    T SECTOR     BYTES  LAT(ms)\n"
    + "".join(f"0.{i:06}    supervise      1950   xvda1   W {i * 8}   4096      0.74\n" for i in range(100)),
}
RANGES = {
    "ddrescue": "# Mapfile. Created by GNU ddrescue\n# current_pos current_status current_pass\n"
    "0x00000000 + 1\n# pos size status\n"
    + "".join(f"0x{i * 65536:08X}  0x00010000  {'+-*/'[i % 4]}\n" for i in range(60)),
    "offsets": "offset,length\n" + "".join(f"{i * 4096},512\n" for i in range(50)),
    "nbdinfo": "".join(
        f"{i * 65536:10}       65536    {i % 4 and 3}  {'hole,zero' if i % 4 else 'data'}\n"
        for i in range(60)
    ),
    "qemu-map": "["
    + ",\n".join(
        json.dumps(
            {
                "start": i * 65536,
                "length": 65536,
                "depth": 0,
                "present": True,
                "zero": bool(i % 2),
                "data": not i % 2,
                "offset": i * 65536,
            }
        )
        for i in range(50)
    )
    + "]\n",
    "badblocks": "".join(f"{i * 7}\n" for i in range(60)),
}


class File:
    """A file under damage, and the commands that read one of its kind.

    It has no seed but what `make` wrote.
    """

    def __init__(self, path: Path, kind: str, folder: Path, image: Path) -> None:
        self.name = f"beside-{kind}-{path.name}"
        self.kind, self.folder, self.image = kind, folder, image
        self._whole = path.read_bytes()
        self.path = folder / f"damaged{path.suffix if kind in ('map', 'trace', 'profile') else ''}"
        self._bytes = self._whole

    def close(self) -> None:
        self.path.unlink(missing_ok=True)

    def mutate(self, number: int) -> list[str]:
        """The damage with this number; what was done."""
        rng = random.Random(f"{self.name}/{number}")
        tables = self.kind in ("map", "trace", "profile")
        for how in (rng.choices((_tables if tables else _lines, _raw), (3, 1))[0], _raw):
            try:
                self._bytes = how(rng, self._whole)
                break
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                continue  # a table that can't be written: not a file that anybody can have
        return [how.__name__.strip("_")]

    def use(self, number: int, ran: list[str]) -> str:
        """One of the commands. Raises what is a fault."""
        rng = random.Random(f"{self.name}/{number}/command")
        self.path.write_bytes(self._bytes)
        words = rng.choice(self._commands(rng))
        ran.append(" ".join(words[:2]))
        try:
            printed = command(*words)
        except BmapError:
            return "refused"
        if found := COMMANDS_TERMINAL.search(printed):
            raise Broken(f"{words[0]} prints {found[0]!r} of a {self.kind} as it is")
        return "mapped"

    def restore(self) -> None:
        self._bytes = self._whole

    def patches(self) -> list[tuple[int, Patch]]:
        """The whole file: most damage moves all that follows."""
        return [(len(self._bytes), [(0, self._bytes.hex())])]

    def apply(self, patches: Sequence[tuple[int, Patch]]) -> None:
        self._bytes = bytes.fromhex(patches[0][1][0][1])

    def smaller(self, _: Sequence[tuple[int, Patch]]) -> Iterator[list[tuple[int, Patch]]]:
        """Nothing: where a byte is gone, all others are elsewhere."""
        yield from ()

    def copy(self, out: Path) -> list[Path]:
        out.write_bytes(self._bytes)
        return [out]

    def _commands(self, rng: random.Random) -> list[list[str]]:
        path, good, out = str(self.path), str(self.folder / "ext4.parquet"), str(self.folder / "out")
        json_ = ["--json"] if rng.random() < 0.5 else []
        at = str(rng.choice((0, 1024, 73728, 2**40, rng.randrange(1 << 23))))
        maps = [
            ["lookup", *json_, path, at],
            ["lookup", *json_, path, f"0-{rng.choice((4096, 1 << 22, 1 << 62))}"],
            ["explain", *json_, path, at], ["locate", *json_, path, "/dev/sda", "/text"],
            ["check", *json_, path], ["report", path, "-o", f"{out}.html"], ["diff", good, path],
            ["diff", path, good], ["lookup", *json_, path, "--ranges", str(self.folder / "offsets")],
            ["info", *json_, path], ["sparsify", "--estimate", path], ["map", "-q", "-o", "/dev/null", path],
        ]  # fmt: skip
        queries = (
            "select count(*) from extents",
            "select kind, sum(length) from extents group by 1",
            "select device, path, size from files limit 20",
            "select * from volumes",
            "select * from problems",
            "select * from names limit 30",
        )
        return {
            "map": [*maps, *(["sql", *json_, query, path] for query in queries)],
            "textmap": maps,
            "trace": [
                ["profile", *json_, path], ["profile", path, "-o", f"{out}.profile"],
                ["profile", "--never-read", "--map", good, path], ["report", good, path, "-o", f"{out}.html"],
                *(["sql", f"select * from {table} limit 20", path] for table in ("accesses", "touched")),
            ],
            "profile": [
                ["profile", *json_, path], ["sql", "select * from damaged", path],
                ["replay", "--dry-run", path, str(self.image)],
                ["profile", "--compare", str(self.folder / "boot.profile"), path],
                ["profile", "--export", "csv", path],
            ],
            "log": [
                ["trace", "import", path, "--map", good, "-o", f"{out}.parquet"],
                ["trace", "import", path, "-o", f"{out}.parquet"], ["lookup", good, "--ranges", path],
            ],
            "ranges": [["lookup", *json_, good, "--ranges", path], ["diff", "--ranges", path, good, good]],
        }[self.kind]  # fmt: skip


def make(folder: Path, seeds: dict[str, Seed]) -> dict[str, Callable[[], File]]:
    """The whole files, written into the folder by the commands themselves; by name, what makes a subject of
    each."""
    folder.mkdir(parents=True, exist_ok=True)
    image = seeds["ext4"].paths[0]
    kinds: dict[Path, str] = {}
    for name in ("ext4", "lvm", "gpt"):
        disks = [word for path in seeds[name].paths for word in ("-a", str(path))]
        for ending, kind in (("parquet", "map"), ("bmap", "textmap")):
            command("map", "-q", "--format", "raw", "-o", str(folder / f"{name}.{ending}"), *disks)
            kinds[folder / f"{name}.{ending}"] = kind
    command("map", "-q", "--host-offsets", "-o", str(folder / "host.bmap"), str(seeds["qcow2"].paths[0]))
    kinds[folder / "host.bmap"] = "textmap"
    for kind, texts in (("log", LOGS), ("ranges", RANGES)):
        for name, text in texts.items():
            (folder / name).write_text(text)
            kinds[folder / name] = kind
    command(
        "trace",
        "import",
        str(folder / "blkparse"),
        "--map",
        str(folder / "ext4.parquet"),
        "-o",
        str(folder / "trace.parquet"),
    )
    command("profile", str(folder / "trace.parquet"), "-o", str(folder / "boot.profile"))
    kinds |= {folder / "trace.parquet": "trace", folder / "boot.profile": "profile"}

    def subject(path: Path, kind: str) -> Callable[[], File]:
        return lambda: File(path, kind, folder, image)

    return {f"beside-{kind}-{path.name}": subject(path, kind) for path, kind in kinds.items()}


# ---- damage ------------------------------------------------------------------------------------------------


def _raw(rng: random.Random, data: bytes) -> bytes:
    """Some bytes, half of them near the end, where Parquet describes itself; now and then the end is cut
    off."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = (
            rng.randrange(len(result))
            if rng.random() < 0.5
            else max(0, len(result) - 1 - rng.randrange(min(len(result), 4000)))
        )
        if rng.random() < 0.7:
            result[at] = rng.choice(
                (0, 1, 0x7F, 0x80, 0xFF, result[at] ^ 1 << rng.randrange(8), rng.randrange(256))
            )
        else:
            count = rng.choice((2, 4, 8))
            result[at : at + count] = rng.randbytes(count)
    return bytes(result[: rng.randrange(len(result)) + 1] if rng.random() < 0.05 else result)


def _lines(rng: random.Random, data: bytes) -> bytes:
    """Numbers, words, lines and their order."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, chance = rng.randrange(len(lines)), rng.random()
        words = list(re.finditer(rb"0x[0-9a-fA-F]+|[0-9a-f]{1,20}", lines[at]))
        if chance < 0.45 and words:
            word = rng.choice(words)
            lines[at] = lines[at][: word.start()] + rng.choice(WORDS) + lines[at][word.end() :]
        elif chance < 0.55:
            lines[at] += rng.choice(ENDS)
        elif chance < 0.62:
            lines[at] = b""
        elif chance < 0.7:
            lines[at] = rng.choice(lines)
        elif chance < 0.78:
            mixed = lines[at].split(b" ")
            rng.shuffle(mixed)
            lines[at] = b" ".join(mixed)
        elif chance < 0.85:
            lines.insert(at, rng.choice(LINES))
        elif chance < 0.9 and lines[at]:
            line = bytearray(lines[at])
            line[rng.randrange(len(line))] = rng.randrange(256)
            lines[at] = bytes(line)
        elif chance < 0.95:
            rng.shuffle(lines)
        else:
            lines = lines[: max(1, rng.randrange(len(lines)))]
    return b"\n".join(lines)


def _tables(rng: random.Random, data: bytes) -> bytes:
    """The same file with numbers, nulls, lists, types or its own description changed."""
    table = pq.read_table(io.BytesIO(data))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, chance = rng.randrange(table.num_columns), rng.random()
        field, rows = table.schema.field(at), table.column(at).to_pylist()
        if chance < 0.06 and table.num_columns > 1:
            table = table.remove_column(at)
        elif chance < 0.12:
            other: list[Any] = (
                [rng.choice((None, 1, 2**40)) for _ in rows]
                if rng.random() < 0.5
                else [rng.choice((None, "x", "\x1b[31m")) for _ in rows]
            )
            table = table.set_column(at, field.name, pa.array(other))
        elif rows:
            for _ in range(1 if pa.types.is_list(field.type) else rng.choice((1, 3, 20))):
                row = rng.randrange(len(rows))
                rows[row] = _changed(rng, rows[row], field.type)
            table = table.set_column(
                at, pa.field(field.name, _loose(field.type)), pa.array(rows, _loose(field.type))
            )
    if rng.random() < 0.1:
        metadata = dict(table.schema.metadata or {b"x": b""})
        metadata[rng.choice(list(metadata))] = rng.choice(METADATA)
        table = table.replace_schema_metadata(metadata)
    written = io.BytesIO()
    pq.write_table(table, written)
    return written.getvalue()


def _changed(rng: random.Random, value: Any, type: pa.DataType) -> Any:
    """Another value of this type, or a null."""
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        return _changed_list(rng, list(value), type) if value else value
    if pa.types.is_struct(type):
        if value is None:
            return value
        field = type.field(rng.randrange(type.num_fields))
        return dict(value) | {field.name: _changed(rng, value[field.name], field.type)}
    if rng.random() < 0.08:
        return None
    if pa.types.is_integer(type):
        number = rng.choice(NUMBERS) if rng.random() < 0.7 else (value or 0) + rng.choice((-1, 1, 100))
        signed = pa.types.is_signed_integer(type)
        low, high = (
            (-(1 << type.bit_width - 1), (1 << type.bit_width - 1) - 1)
            if signed
            else (0, (1 << type.bit_width) - 1)
        )
        return min(max(number, low), high)
    if pa.types.is_dictionary(type) or pa.types.is_string(type) or pa.types.is_large_string(type):
        return rng.choice(TEXTS)
    return rng.choice(BYTES) if pa.types.is_binary(type) or pa.types.is_large_binary(type) else value


def _changed_list(rng: random.Random, values: list[Any], type: pa.DataType) -> list[Any]:
    chance = rng.random()
    if chance < 0.15:
        return values[: rng.randrange(len(values) + 1)]
    if chance < 0.25:
        rng.shuffle(values)
        return values
    if chance < 0.33:
        return values + values
    for _ in range(rng.choice((1, 1, 3, 10))):
        row = rng.randrange(len(values))
        values[row] = _changed(rng, values[row], type.value_type)
    return values


def _loose(type: pa.DataType) -> pa.DataType:
    """The type with nulls allowed everywhere, and plain text for dictionaries."""
    if pa.types.is_list(type):
        return pa.list_(pa.field("element", _loose(type.value_type)))
    if pa.types.is_struct(type):
        return pa.struct([pa.field(field.name, _loose(field.type)) for field in type])
    return type.value_type if pa.types.is_dictionary(type) else type
