"""Maps, traces and profiles that somebody else wrote: read whole, or refused in one line; whatever they say,
nothing behind them falls over."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from support import need, run
from virt_bmap.accesses.trace import KEY, SCHEMA
from virt_bmap.cli import run as cli
from virt_bmap.core.errors import BmapError, MapError
from virt_bmap.host import inputs
from virt_bmap.host.pages import unpacked
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.saved import parquet

RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]")
"""What may reach no terminal."""


def large_map(rows: int) -> BlockMap:
    """A disk of so many blocks: every second one a file's, with a name for each."""
    extents = tables.ExtentRows()
    number = np.arange(rows)
    extents.add(
        (number % 2 * tables.FREE).astype(np.int8),
        number * 4096,
        np.full(rows, 4096),
        inode=np.where(number % 2, -1, number),
    )
    extents.add(tables.METADATA, rows * 4096, 4096, part="the end")
    found = {name: tables.empty(name) for name in BlockMap.TABLES}
    found["volumes"] = tables.make(
        "volumes", volume=[0], disk=[1], kind=["disk"], name=["/dev/sda"], size=[(rows + 1) * 4096]
    )
    found["extents"] = extents.table(0)
    found["names"] = tables.make(
        "names", volume=0, parent=2, inode=number, name=pa.array([b"%d" % n for n in number])
    )
    return BlockMap(**found)


def test_a_map_of_several_row_groups_is_read_whole(tmp_path: Path) -> None:
    bmap = large_map(parquet.CHUNK * parquet.ROW_GROUP + 1000)
    with open(tmp_path / "m.parquet", "wb") as file:
        parquet.save(bmap, file)
    assert pq.ParquetFile(tmp_path / "m.parquet").num_row_groups == 2
    found = parquet.load(str(tmp_path / "m.parquet"))
    for name in BlockMap.TABLES:
        assert getattr(found, name).equals(getattr(bmap, name)), name


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_what_a_file_unpacks_to_is_known_before(codec: str, version: str, dictionary: bool) -> None:
    """Against what Arrow says of the same file, and what it really holds."""
    words = [f"{n % 50} a word" * (n % 7) if n % 11 else None for n in range(70_000)]
    table = pa.table(
        {"number": np.arange(70_000) % 9, "word": words, "list": [[n] * (n % 3) for n in range(70_000)]}
    )
    file = io.BytesIO()
    pq.write_table(
        table,
        file,
        compression=codec,
        data_page_version=version,
        use_dictionary=dictionary,
        row_group_size=30_000,
    )
    about = pq.ParquetFile(file).metadata
    groups = [about.row_group(n) for n in range(about.num_row_groups)]
    found = unpacked(memoryview(file.getvalue()))
    assert found.values == sum(group.column(n).num_values for group in groups for n in range(3))
    whole = sum(group.column(n).total_uncompressed_size for group in groups for n in range(3))
    assert 0.9 * whole <= found.bytes <= whole  # Arrow counts the headers of the pages, too
    longest = max(len(word) for word in words if word is not None)
    assert found.text == (longest * 70_000 if dictionary else 0)


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    for name, column in (
        ("values", pa.nulls(1 << 26, pa.int8())),
        ("bytes", pa.array([bytes(1 << 20)] * 300)),
        ("text", pa.DictionaryArray.from_arrays(np.zeros(1000, np.int32), [b"x" * (1 << 20)])),
    ):
        about = {parquet.KEY: json.dumps({"version": parquet.VERSION})}
        with pq.ParquetWriter(
            tmp_path / name,
            pa.schema([pa.field("a", column.type)], about),
            compression="zstd",
            use_dictionary=name != "bytes",
        ) as file:
            file.write_table(pa.table({"a": column}), row_group_size=1 << 26)
        assert (tmp_path / name).stat().st_size < 1 << 18
        with pytest.raises(
            MapError,
            match=f"claims [0-9,]+ {name} in a file of [0-9,]+ bytes: it is damaged, or made to fill memory",
        ):
            parquet.load(str(tmp_path / name))


def test_a_footer_that_lies_does_not_help(tmp_path: Path) -> None:
    """Pages are counted by their own headers."""
    file = io.BytesIO()
    pq.write_table(
        pa.table({"a": np.zeros(5_000_000, np.int64)}), file, compression="none", data_page_size=1 << 30
    )
    about = pq.ParquetFile(file).metadata.row_group(0).column(0)
    data = bytearray(file.getvalue())
    assert data.count(_zigzag(about.num_values)) >= 2  # in the footer, for the rows and for the column
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for small in (1, 100_000):
        lies = data[:footer] + data[footer:].replace(
            _zigzag(about.num_values), _padded(small, len(_zigzag(about.num_values)))
        )
        assert unpacked(memoryview(bytes(lies))).values >= small


def _zigzag(value: int) -> bytes:
    return _padded(value, -(-(value << 1).bit_length() // 7))


def _padded(value: int, length: int) -> bytes:
    """A number of the compact protocol in so many bytes."""
    value <<= 1
    return bytes((value >> 7 * n) & 127 | (128 if n < length - 1 else 0) for n in range(length))


def test_bytes_that_are_no_parquet_are_refused() -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"a": ["x", "y"] * 50}), file)
    data = file.getvalue()
    chooser = np.random.default_rng(3)
    for _ in range(3000):
        broken = bytearray(data)
        for at in chooser.integers(0, len(data), 3):
            broken[at] = chooser.integers(0, 256)
        with contextlib.suppress(ValueError):
            assert min(unpacked(memoryview(bytes(broken[: chooser.integers(0, len(data) + 1)])))) >= 0


# ---- absurd numbers, in every column -----------------------------------------------------------------------

ABSURD = (0, 1, -1, 255, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63), None)
WORDS = ("", "x" * 3000, "\x1b[31m\n", "/", "data", "disk", "partition", "\u202e", None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a disk, its maps, a trace and a profile of it."""
    need("mke2fs", "e2fsprogs")
    need("sfdisk", "fdisk")
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "tree/etc").mkdir(parents=True)
    for number in range(30):
        (folder / f"tree/etc/{number}").write_bytes(b"x" * 300 * number)
    with open(folder / "disk.img", "wb") as file:
        file.truncate(10 << 20)
    run("sfdisk", "-q", folder / "disk.img", stdin=b"label: gpt\nsize=8M\n")
    run(
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-b",
        "1024",
        "-d",
        folder / "tree",
        "-E",
        f"offset={1 << 20}",
        folder / "disk.img",
        "8M",
    )
    (folder / "log.csv").write_text(
        "time_ns,op,offset,length\n" + "".join(f"{n * 1000},read,{n * 40960},8192\n" for n in range(200))
    )
    for words in (
        ("-q", "-o", "m.parquet", "disk.img"),
        ("-q", "-o", "m.bmap", "disk.img"),
        ("trace", "import", "log.csv", "--map", "m.parquet", "-o", "t.parquet"),
        ("profile", "t.parquet", "-o", "p.profile"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "virt_bmap", *words], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done
    return folder


def of_map(path: str, folder: Path) -> list[list[str]]:
    good = str(folder / "m.parquet")
    return [
        ["lookup", path, "1M+4k"], ["lookup", "--json", path, "0-9M"], ["explain", path, "1100000"],
        ["locate", path, "/dev/sda1", "/etc/3"], ["check", path],
        ["report", path, "-o", str(folder / "r.html")], ["diff", good, path], ["diff", path, good],
        ["info", path], ["sparsify", "--estimate", path], ["map", "-q", "-o", str(folder / "again"), path],
        ["sql", "select * from files", path],
        ["sql", "select kind, sum(length) from extents group by 1", path],
        ["sql", "select * from problems", path],
        ["trace", "import", str(folder / "log.csv"), "--map", path, "-o", str(folder / "o.parquet")],
        ["profile", "--never-read", "--map", path, str(folder / "t.parquet")],
        ["report", path, str(folder / "t.parquet"), "-o", str(folder / "r.html")],
    ]  # fmt: skip


def of_trace(path: str, folder: Path) -> list[list[str]]:
    good = str(folder / "m.parquet")
    return [
        ["profile", path], ["profile", "--json", path], ["profile", path, "-o", str(folder / "o.profile")],
        ["profile", "--never-read", "--map", good, path],
        ["report", good, path, "-o", str(folder / "r.html")], ["sql", "select * from accesses", path],
        ["sql", "select * from touched", path],
    ]  # fmt: skip


def of_profile(path: str, folder: Path) -> list[list[str]]:
    return [
        ["profile", path], ["profile", "--json", path],
        ["profile", "--compare", str(folder / "p.profile"), path],
        ["sql", "select * from profile", f"{path}"], ["replay", path, str(folder / "disk.img")],
        *(["profile", "--export", how, path] for how in ("csv", "paths", "nbdkit")),
    ]  # fmt: skip


def survives(words: list[str]) -> None:
    """The command ends well or says what is wrong, and prints nothing that a terminal would obey."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    error = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), contextlib.suppress(BmapError):
        cli(words)
    out.flush()
    text = out.buffer.getvalue().decode() + error.getvalue()
    assert not RAW.search(text), (words, RAW.search(text))


def absurd(array: pa.Array, chooser: np.random.Generator) -> pa.Array:
    """Values of the same kind, some of which are absurd; now and then of another kind."""
    kind = array.type
    if chooser.random() < 0.03:
        return pa.array([chooser.choice([None, 1, 1 << 40]) for _ in range(len(array))], pa.int64())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = (
            array.offsets
            if chooser.random() < 0.9
            else pa.array(np.sort(chooser.permutation(array.offsets)), array.offsets.type)
        )
        return pa.ListArray.from_arrays(offsets.cast(pa.int32()), absurd(array.values, chooser))
    if pa.types.is_struct(kind):
        parts = [array.field(n) for n in range(kind.num_fields)]
        at = chooser.integers(len(parts))
        parts[at] = absurd(parts[at], chooser)
        order = pa.array(
            chooser.permutation(len(array)) if chooser.random() < 0.05 else np.arange(len(array))
        )
        return pa.StructArray.from_arrays(parts, [field.name for field in kind]).take(order)
    values = array.to_pylist()
    for at in chooser.integers(0, max(1, len(values)), chooser.choice((1, 3, 20))).tolist():
        if at < len(values):
            value = chooser.choice(ABSURD if pa.types.is_integer(kind) else WORDS)
            if (
                pa.types.is_integer(kind)
                and value is not None
                and not -(1 << kind.bit_width - 1) <= value < 1 << kind.bit_width - 1
            ):
                continue
            values[at] = (
                value.encode()
                if value is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
                else value
            )
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_boolean(kind):
        return pa.array([value if isinstance(value, bool) else None for value in values], kind)
    return pa.array(values, kind)


@pytest.mark.parametrize(
    ("name", "rounds", "commands"),
    [("m.parquet", 100, of_map), ("t.parquet", 24, of_trace), ("p.profile", 40, of_profile)],
)
def test_absurd_tables_end_in_words(saved: Path, name: str, rounds: int, commands) -> None:
    table = pq.read_table(saved / name)
    chooser = np.random.default_rng(15)
    path = saved / f"absurd{Path(name).suffix}"
    for at in range(rounds):
        changed = chooser.integers(table.num_columns)
        column = absurd(table.column(int(changed)).combine_chunks(), chooser)
        broken = table.set_column(int(changed), table.schema.names[changed], column).replace_schema_metadata(
            table.schema.metadata
        )
        if at % 25 == 0:
            words = chooser.choice(
                [
                    "{}",
                    "[]",
                    "null",
                    '{"version": 1}',
                    '{"version": 2, "disks": 5}',
                    '{"version": 1, "disks": [1e99, -5], "runs": [5]}',
                ]
            )
            broken = broken.replace_schema_metadata(dict.fromkeys(table.schema.metadata, str(words)))
        pq.write_table(broken, path)
        for words in (
            (every := commands(str(path), saved))[at % 4 :: 4]
            if len(every := commands(str(path), saved)) > 8
            else every
        ):
            survives(words)


def test_a_text_map_of_absurd_lines_ends_in_words(saved: Path) -> None:
    lines = (saved / "m.bmap").read_text().splitlines()
    chooser = np.random.default_rng(16)
    new = [
        "1 0 fffffffffffffff v /dev/sda",
        "9999 0 1 d /dev/sdz",
        "1 0 10 f /dev/sda1 /x",
        "1 5 5 f /dev/sda1 /x",
        "garbage",
        "",
        "1 0 1 q /x",
        "1 0 1 f /x [\\x1b]",
    ]
    for at in range(60):
        broken = list(lines)
        for _ in range(chooser.integers(1, 4)):
            broken.insert(chooser.integers(len(broken)), str(chooser.choice(new)))
        if at % 3 == 0:
            broken = [str(line) for line in chooser.permutation(broken)]
        (saved / "absurd.bmap").write_text("\n".join(broken) + "\n")
        for words in of_map(str(saved / "absurd.bmap"), saved)[at % 6 :: 6]:
            survives(words)


def test_words_of_another_version_are_refused(saved: Path) -> None:
    table = pq.read_table(saved / "m.parquet")
    kind = table.schema.get_field_index("extents")
    lists = table.column(kind).combine_chunks()
    parts = dict(zip([field.name for field in lists.values.type], lists.values.flatten(), strict=True))
    parts["kind"] = pc.replace_with_mask(
        parts["kind"].cast(pa.string()), pa.array(np.arange(len(parts["kind"])) == 3), pa.array(["bogus"])
    )
    made = pa.ListArray.from_arrays(
        lists.offsets, pa.StructArray.from_arrays(list(parts.values()), list(parts))
    )
    pq.write_table(
        table.set_column(kind, "extents", made).replace_schema_metadata(table.schema.metadata),
        saved / "words.parquet",
    )
    with pytest.raises(MapError, match="kind"):
        parquet.load(str(saved / "words.parquet"))


def test_a_trace_of_the_first_version_is_read(saved: Path) -> None:
    """Its objects did not say which map named them."""
    table = pq.read_table(saved / "t.parquet")
    lists = table.column("objects").combine_chunks()
    old = [field.name for field in lists.values.type if field.name not in ("map", "older")]
    made = pa.ListArray.from_arrays(
        lists.offsets, pa.StructArray.from_arrays([lists.values.field(name) for name in old], old)
    )
    at = table.schema.get_field_index("objects")
    pq.write_table(
        table.set_column(at, "objects", made).replace_schema_metadata({KEY: table.schema.metadata[KEY]}),
        saved / "old.parquet",
    )
    from virt_bmap.accesses.traces import read

    assert read(str(saved / "old.parquet")).rows.column("offset").equals(table.column("offset"))
    assert inputs.fit(table, SCHEMA).schema.equals(SCHEMA)
