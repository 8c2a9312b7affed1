"""No words from a disk, or from a file beside it, command a terminal or a spreadsheet; and what was written
can be read back."""

import ast
import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv as arrow

import virt_bmap
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import OBEYED, one_line, printable, to_json
from virt_bmap.saved import results

PACKAGE = Path(virt_bmap.__file__).parent
HOSTILE = "\x1b]0;title\x07\x9b31m\u202egnp.exe\r\n\udcff"


@given(st.text() | st.text(st.sampled_from(HOSTILE)))
def test_what_is_said_only_prints(words: str) -> None:
    assert not OBEYED.search(printable(words))
    assert printable(printable(words)) == printable(words)
    assert "\n" not in one_line(words)


@given(st.binary())
def test_what_is_escaped_passes_as_it_is(name: bytes) -> None:
    assert printable(escape(name)) == escape(name)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_says_the_same(words: str) -> None:
    assert json.loads(to_json({"a": words})) == {"a": words}
    assert not OBEYED.search(to_json({words: words}))


def test_commands_print_through_one_door() -> None:
    """print() and json.dumps() would let words out as they are."""
    files = [
        PACKAGE / "cli.py",
        PACKAGE / "bmaplogger.py",
        PACKAGE / "saved/results.py",
        *(PACKAGE / "commands").glob("*.py"),
    ]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "json.dumps", "sys.stdout.write"), (
                    f"{path.name}:{node.lineno}"
                )


def test_tables_have_safe_names_and_cells(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    table = pa.table({"a\x1b[31m": ["x\x9by", "plain"], "n": [1, 2]})
    results.show(table, sys.stdout)
    shown = capsys.readouterr().out
    assert not OBEYED.search(shown)
    assert "plain" in shown


FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "＝1", "'quoted", "''", "plain", "a=b", "", None)


def test_a_spreadsheet_computes_nothing(tmp_path: Path) -> None:
    """OWASP's list of beginnings; numbers stay numbers, and without its first apostrophe every text is what
    it was."""
    table = pa.table(
        {
            "=name": pa.array(FORMULAS, pa.string()),
            "number": pa.array(range(-5, len(FORMULAS) - 5), pa.int64()),
        }
    )
    results.save(table, str(tmp_path / "r.csv"))
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["'=name", "number"]
    for (text, number), value, at in zip(rows, FORMULAS, range(-5, 99), strict=False):
        assert text[:1] not in tuple("=+-@\t\r＝")
        assert text.removeprefix("'") == (value or "")
        assert int(number) == at
    assert (
        arrow.read_csv(tmp_path / "r.csv").column("number").to_pylist() == table.column("number").to_pylist()
    )
