"""Maps, traces and results in SQL: the same answers as the tables give, no way out of the database, bad
questions in one line."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_cli import bmap, disk, fails  # noqa: F401

DOCS = Path(__file__).parents[2] / "docs"
pytest.importorskip("duckdb", reason="DuckDB is not installed (pip install 'virt-bmap[sql]')")


@pytest.fixture(scope="module")
def files(disk, tmp_path_factory) -> dict[str, Path]:
    """A map, and the trace of a read of one file and of free space."""
    folder = tmp_path_factory.mktemp("sql")
    table, log, trace = folder / "map.parquet", folder / "log.csv", folder / "trace.parquet"
    bmap("-q", "-o", table, disk)
    piece = json.loads(bmap("locate", "--json", table, "/dev/sda1", "/hard").stdout.splitlines()[0])
    log.write_text(
        f"time,op,offset,bytes\n1.0,R,{piece['start']},512\n2.0,R,{38 << 20},4096\n2.5,W,{38 << 20},4096\n"
    )
    assert bmap("trace", "import", log, "--map", table, "-o", trace).returncode == 0
    return {"map": table, "trace": trace, "folder": folder}


def ask(query: str, *sources: object) -> list[dict]:
    done = bmap("sql", query, *sources, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_files_are_what_was_put_in(files):
    rows = {row["path"]: row for row in ask("select * from files", files["map"])}
    assert {
        "/",
        "/lost+found",
        "/etc",
        "/etc/passwd",
        "/hard",
        "/sparse",
        "/line\\x0abreak\\x1b[31m",
        "/not-utf8-\\xff",
    } == set(rows)
    assert rows["/hard"]["size"] == 11_000
    assert rows["/hard"]["inode"] == rows["/etc/passwd"]["inode"]
    assert rows["/sparse"]["size"] == 100_003
    assert rows["/sparse"]["allocated"] < 8192
    assert rows["/etc"]["type"] == "directory"


def test_sums_are_the_disks(files):
    assert ask(
        "select sum(length)::bigint as bytes from extents where volume = 1 and flags & 1 = 0", files["map"]
    ) == [{"bytes": 30 << 20}]


def test_a_trace_names_what_was_touched(files):
    rows = ask(
        "select op, kind, path, length from touched where device = '/dev/sda1' order by time_ns, path",
        files["map"],
        files["trace"],
    )
    [row] = [row for row in rows if row["path"]]  # an object is named once, by the first of its names
    assert (row["op"], row["kind"], row["length"]) == ("read", "data", 512)
    assert row["path"] in ("/etc/passwd", "/hard")


def test_two_maps_side_by_side(files):
    query = "select (select count(*) from a.files) as one, (select count(*) from b.files) as other"
    assert ask(query, f"a={files['map']}", f"b={files['map']}") == [{"one": 8, "other": 8}]


def test_an_answer_is_the_next_questions_table(files):
    for name in ("big.parquet", "big.csv"):
        kept = files["folder"] / name
        assert (
            bmap(
                "sql",
                "select path, size from files where type = 'file' and size > 6000",
                files["map"],
                "-o",
                kept,
            ).returncode
            == 0
        )
        assert ask("select count(*) as n from big join files using (path)", kept, files["map"]) == [{"n": 3}]
    assert pq.read_table(files["folder"] / "big.parquet").column_names == ["path", "size"]


@pytest.mark.parametrize("page", ["questions.md", "never-read.sql"])
def test_the_documented_questions_have_answers(page, files, tmp_path):
    text = (DOCS / page).read_text()
    queries = re.findall(r"```sql\n(.*?)```", text, re.DOTALL) if page.endswith(".md") else [text]
    assert queries
    for query in queries:
        path = tmp_path / "query.sql"
        path.write_text(query)
        sources = (
            [f"old={files['map']}", f"new={files['map']}"]
            if "new.files" in query
            else [files["map"], files["trace"]]
        )
        done = bmap("sql", "-f", path, *sources)
        assert done.returncode == 0, (query, done.stderr)


def test_never_read_counts_what_the_trace_left_out(files):
    query = (DOCS / "never-read.sql").read_text()
    rows = {row["directory"]: row for row in ask(query, files["map"], files["trace"])}
    assert (rows["/etc"]["files"], rows["/etc"]["never_read"]) == (1, 0)
    assert rows["/sparse"]["never_read"] == 1


@pytest.mark.parametrize("query", [
    "select * from read_text('/etc/passwd')", "select * from '/etc/passwd.csv'",
    "copy (select 1) to '/tmp/virt-bmap-was-here'", "attach '/tmp/virt-bmap-was-here'", "install httpfs",
    ("set enable_external_access = true; select * "
        "from read_text('/etc/passwd')"),
])  # fmt: skip
def test_a_query_reaches_nothing_else(query, files):
    assert "can't be answered" in fails("sql", query, files["map"])
    assert not Path("/tmp/virt-bmap-was-here").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["selec 1"], "syntax error"),
    (["select * from nothing"], "nothing does not exist"),
    ([""], "needs a query"),
])  # fmt: skip
def test_bad_questions(arguments, words, files):
    assert words in fails("sql", *arguments, files["map"])


def test_bad_files(files, tmp_path, disk):
    assert "at least one file" in fails("sql", "select 1")
    assert "No such file" in fails("sql", "select 1", tmp_path / "none.parquet")
    assert "is not a saved map" in fails("sql", "select 1", disk)
    assert "No such file" in fails("sql", "-f", tmp_path / "none.sql", files["map"])
    assert "both have a table" in fails("sql", "select 1", files["map"], files["map"])
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(files["map"].read_bytes()[:5000])
    assert "cut.parquet: can't be read" in fails("sql", "select 1", cut)
