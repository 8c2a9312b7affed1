"""Results as a table, JSON lines, CSV and Parquet: the same rows in each, hostile names harmless, files whole
or not there."""

import csv
import datetime
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from virt_bmap.core.errors import OutputError, UsageError
from virt_bmap.core.escape import unescape
from virt_bmap.saved.results import field, json_lines, safe, save, show

NAMES = [
    b"/plain",
    "/für".encode(),
    b"/bell\x07",
    b"/\x1b[31mred",
    b"/new\nline",
    b"/\xff\xfe",
    b'/quo"te,comma',
    b"/back\\slash",
    None,
]


def made() -> pa.Table:
    """A result with every type that occurs."""
    n = len(NAMES)
    ranges = [[{"start": at, "name": b"\x1b]0;x\x07"}] for at in range(n - 1)]
    schema = pa.schema([
        field("bytes", pa.int64(), "bytes", unit="bytes"),
        field("path", pa.large_binary(), "where", null="none"),
        field("device", pa.dictionary(pa.int8(), pa.string()), "volume"),
        field("ranges", pa.list_(pa.struct([("start", pa.int64()), ("name", pa.binary())])), "places",
            null="none"),
        field("share", pa.float64(), "part of all", null="unknown"),
    ])  # fmt: skip
    device = pa.array(["/dev/sda\x07"] * n).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string()))
    return pa.Table.from_arrays(
        [
            pa.array([10**at for at in range(n)]),
            pa.array(NAMES, pa.large_binary()),
            device,
            pa.array([*ranges, None], schema.field("ranges").type),
            pa.array([0.5] * (n - 1) + [None]),
        ],
        schema=schema,
    )


def test_every_name_comes_back_from_its_escape() -> None:
    assert [
        None if path is None else unescape(path) for path in safe(made()).column("path").to_pylist()
    ] == NAMES


def test_all_forms_hold_the_same_rows(tmp_path: Path) -> None:
    table = safe(made())
    rows = table.to_pylist()
    for ending in ("csv", "parquet", "jsonl"):
        save(table, str(tmp_path / f"out.{ending}"))
    assert [json.loads(line) for line in json_lines(table)] == rows
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == rows
    with open(tmp_path / "out.csv", newline="") as file:
        read = list(csv.DictReader(file))
    for got, row in zip(read, rows, strict=True):
        assert (int(got["bytes"]), got["path"] or None, got["device"]) == (
            row["bytes"],
            row["path"],
            row["device"],
        )
        assert (json.loads(got["ranges"]) if got["ranges"] else None) == row["ranges"]


def test_no_form_carries_control_characters(tmp_path: Path) -> None:
    table = safe(made())
    for ending in ("csv", "jsonl"):
        save(table, str(tmp_path / f"out.{ending}"))
    out = io.StringIO()
    show(table, out)
    for text in (out.getvalue(), (tmp_path / "out.csv").read_text(), (tmp_path / "out.jsonl").read_text()):
        assert not {c for c in text if ord(c) < 32 or 0x7F <= ord(c) < 0xA0} - {"\n"}


def test_a_table_for_people_has_a_line_a_row_and_says_how_many_it_left_out() -> None:
    out = io.StringIO()
    assert show(safe(made()), out, ["bytes", "path"], 4) == len(NAMES) - 4
    lines = out.getvalue().splitlines()
    assert [line.split() for line in lines[:3]] == [["bytes", "path"], ["1", "/plain"], ["10", "/für"]]
    assert lines[4] == "1,000  /\\x1b[31mred"
    assert all(line == line.rstrip() for line in lines)


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_narrow_terminal_long_names_are_folded_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = "/" + "abcdefghij" * 12
    out = Terminal()
    show(pa.table({"bytes": [12345678], "path": [name]}), out)
    lines = re.sub(r"\x1b\[[0-9]*m", "", out.getvalue()).splitlines()
    assert max(map(len, lines)) <= 40
    assert "".join(line[10:].strip() for line in lines[1:]) == name


def test_an_empty_result_has_its_columns_in_every_form(tmp_path: Path) -> None:
    table = safe(made().slice(0, 0))
    out = io.StringIO()
    assert show(table, out) == 0
    assert out.getvalue().split() == ["bytes", "path", "device", "ranges", "share"]
    for ending in ("csv", "parquet", "jsonl"):
        save(table, str(tmp_path / f"out.{ending}"))
    assert (tmp_path / "out.csv").read_text().strip() == '"bytes","path","device","ranges","share"'
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_what_json_has_no_word_for_does_not_break_it() -> None:
    table = pa.table(
        {"a": [float("nan"), 1.0], "b": [datetime.date(2026, 1, 2), None], "c": [[float("inf")], [1.5]]}
    )
    assert [json.loads(line) for line in json_lines(table)] == [
        {"a": None, "b": "2026-01-02", "c": [None]},
        {"a": 1.0, "b": None, "c": [1.5]},
    ]


@pytest.mark.parametrize("name", ["out", "out.txt", "-", "out.csv.gz"])
def test_a_name_that_says_no_format_is_refused(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"the end of the name says what to write: \.csv, \.parquet or \.jsonl"
    ):
        save(pa.table({"a": [1]}), name)


def test_where_nothing_can_be_written_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        save(pa.table({"a": [1]}), str(tmp_path / "none" / "out.csv"))
    assert list(tmp_path.iterdir()) == []
