"""The language of damage: one table of codes and one of states, and nothing outside of them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import virt_bmap
from support import BytesReader
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.formats.filesystems import swap
from virt_bmap.model import tables
from virt_bmap.model.contract import SUBJECTS, Filesystem
from virt_bmap.model.damage import Damage, table
from virt_bmap.model.problems import CODES, ERROR, NOTE, SEVERITY_MEANING, TABLE, WARNING
from virt_bmap.survey.owners import check_names, check_owners
from virt_bmap.survey.survey import survey

SOURCE = Path(virt_bmap.__file__).parent
PLACE = {"add": 0, "say": 0, "check": 1}
"""Where methods of Damage take the code."""


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name != "problems.py":
            yield path, ast.parse(path.read_text())


def codes_said() -> Iterator[tuple[str, str]]:
    """(code, where) of every literal code that is given to a Damage or to an exception."""
    for path, tree in trees():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            given = [word.value for word in call.keywords if word.arg == "code"]
            if name.endswith("Corrupt"):
                given += call.args[2:3]
            elif name.rpartition(".")[0].endswith("damage") and name.rpartition(".")[2] in PLACE:
                at = PLACE[name.rpartition(".")[2]]
                given += call.args[at : at + 1]
            for node in (node for argument in given for node in ast.walk(argument)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value, f"{path.relative_to(SOURCE)}:{call.lineno}"


def test_every_code_that_is_said_is_in_the_table() -> None:
    said = list(codes_said())
    assert len(said) > 200, "the search finds what it looks for"
    assert [(code, where) for code, where in said if code not in CODES] == []


def test_every_code_in_the_table_is_said() -> None:
    words = {
        node.value
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(CODES) - words == set()


def test_the_table_is_sound() -> None:
    assert len(CODES) == len(TABLE), "a code has one meaning"
    assert {code.severity for code in TABLE} <= set(SEVERITY_MEANING)
    assert {code.subject for code in TABLE} <= set(SUBJECTS)
    assert len({code.meaning for code in TABLE}) == len(TABLE), "a meaning has one code"
    assert {code.severity for code in TABLE if code.torn} == {ERROR}, "what is torn lacks something"
    assert all("_" not in code.name and code.name == code.name.lower() for code in TABLE)


def test_states_are_said_by_their_names_alone() -> None:
    """No reader has words of its own for a state, and only the survey calls a filesystem damaged."""
    assert set(tables.STATE_MEANING) == set(tables.STATES)
    assert set(tables.CONSISTENT) < set(tables.STATES)
    for path, tree in trees():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            for word in call.keywords:
                if word.arg == "state" and ast.unparse(call.func).endswith("Filesystem"):
                    literal = [node for node in ast.walk(word.value) if isinstance(node, ast.Constant)]
                    assert not [node for node in literal if isinstance(node.value, str)], path
    said = [path.name for path, tree in trees() if "tables.DAMAGED" in ast.unparse(tree)]
    assert said == ["survey.py"]


def test_unknown_codes_are_a_fault() -> None:
    damage = Damage("me")
    for say in (
        lambda: damage.say("nonsense", "words"),
        lambda: damage.add("nonsense", "words", severity=NOTE),
    ):
        with pytest.raises(KeyError):
            say()


def test_damage_adds_up() -> None:
    damage = Damage("ext4")
    good = np.array([True, False, True, False])
    assert damage.check(good, "inode", "inodes are odd", np.array([10, 30, 40, 20])) is good
    damage.add("inode", "inodes are odd", np.array([15]))
    damage.add("inode", "inodes are even", np.zeros(0, np.int64))
    damage.add("count", "counts are wrong", count=1000)
    assert not damage.take(Damage("other"))
    damage.refuse(Unsupported("a feature"), "not read")
    damage.refuse(Corrupt("bytes", 1 << 63, "tree"), severity=NOTE)
    assert damage.is_damaged
    rows = table([(3, damage)]).to_pylist()
    assert {(row["format"], row["volume"]) for row in rows} == {("ext4", 3)}
    assert [(row["code"], row["severity"], row["volume_offset"], row["detail"]) for row in rows] == [
        ("inode", ERROR, 15, "3 inodes are odd, the first at byte 0xf"),
        ("count", WARNING, None, "1,000 counts are wrong"),
        ("unsupported", WARNING, None, "not read: a feature"),
        ("tree", NOTE, None, "bytes"),
    ]
    assert table([]).num_rows == 0


# ---- what must hold of every format's tables ---------------------------------------------------------------

KINDS = st.sampled_from([tables.DATA, tables.METADATA, tables.FREE])
EXTENTS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 12), KINDS, st.sampled_from([0, tables.SHARED])), max_size=8
)


@given(EXTENTS)
def test_owners_by_brute_force(extents: list[tuple[int, int, int, int]]) -> None:
    """Each byte by itself: two owners where more than one, all sharers together being one."""
    extents = [row if row[2] != tables.FREE else (*row[:3], 0) for row in extents]
    start, length, kind, flags = (np.array(column, np.int64) for column in zip(*extents, strict=True)) if (
        extents) else [np.zeros(0, np.int64)] * 4  # fmt: skip
    damage = Damage()
    low, high = check_owners(start, start + length, kind, flags, damage)
    twice, both, covered = set(), set(), set()
    for byte in range(60):
        here = [row for row in extents if row[0] <= byte < row[0] + row[1]]
        alone = sum(row[2] != tables.FREE and not row[3] for row in here)
        owners = alone + any(row[3] for row in here)
        twice |= {byte} if owners > 1 else set()
        both |= {byte} if owners and any(row[2] == tables.FREE for row in here) else set()
        covered |= {byte} if here else set()
    said = {problem.code: problem.offset for problem in damage.problems()}
    expected = {"two-owners": twice, "owned-but-free": both}
    assert said == {code: min(found) for code, found in expected.items() if found}
    depth = np.zeros(61, np.int64)
    np.add.at(depth, low, 1)
    np.subtract.at(depth, high, 1)
    assert set(np.flatnonzero(np.cumsum(depth)[:60] > 0).tolist()) == covered


@given(
    st.lists(st.integers(1, 30), unique=True, max_size=12),
    st.lists(st.integers(1, 40), max_size=12),
    st.sampled_from([1, 10**6]),
    st.randoms(),
)
def test_names_by_brute_force(numbers: list[int], targets: list[int], step: int, rng: object) -> None:
    """Numbers in any order, near each other or far apart."""
    rng.shuffle(numbers)  # type: ignore[attr-defined]
    count = len(numbers)
    links = [rng.randrange(2) for _ in numbers]  # type: ignore[attr-defined]
    kinds = [rng.choice([tables.T_FILE, tables.T_DIRECTORY, tables.T_METADATA]) for _ in numbers]  # type: ignore[attr-defined]
    gone = [rng.randrange(2) for _ in numbers]  # type: ignore[attr-defined]
    inode = np.array(numbers, np.int64) * step
    found = Filesystem(
        type="x", size=1, block_size=1, root=step, state=tables.CLEAN,
        reader=BytesReader(np.zeros(1, np.uint8)),
        inodes=tables.make("inodes", volume=np.zeros(count, np.int64), inode=inode,
            type=np.array(kinds, np.uint8), size=0, nlink=np.array(links, np.int64),
            flags=np.array(gone, np.int64), record_offset=inode),
        names=tables.make("names", volume=np.zeros(len(targets), np.int64),
            parent=np.full(len(targets), step), inode=np.array(targets, np.int64) * step,
            name=[b"x"] * len(targets)),
        extents=tables.empty("extents"),
    )  # fmt: skip
    damage = Damage()
    check_names(found, damage)
    dangling = sum(target not in numbers for target in targets)
    nameless = [
        number * step
        for number, link, kind, deleted in zip(numbers, links, kinds, gone, strict=True)
        if link and number not in targets and number != 1 and kind != tables.T_METADATA and not deleted
    ]
    is_rooted = any(n == 1 and kind == tables.T_DIRECTORY for n, kind in zip(numbers, kinds, strict=True))
    expected = {
        "no-root": None if is_rooted else -1,
        "dangling-name": -1 if dangling else None,
        "nameless-inode": min(nameless) if nameless else None,
    }
    said = {problem.code: problem.offset for problem in damage.problems()}
    assert said == {code: at for code, at in expected.items() if at is not None}


def test_an_error_makes_a_filesystem_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its reader says of its state; and nothing else does."""
    page = np.zeros(1 << 16, np.uint8)
    page[4086:4096] = np.frombuffer(b"SWAPSPACE2", np.uint8)
    page[1024:1032] = np.frombuffer((1).to_bytes(4, "little") + (15).to_bytes(4, "little"), np.uint8)
    assert survey([BytesReader(page)]).filesystems.column("state").to_pylist() == [tables.CLEAN]
    read = swap.read

    def reader(severity: str) -> object:
        def with_damage(*arguments: object) -> Filesystem:
            arguments[2].say("inode", "it is odd", severity=severity)  # type: ignore[attr-defined]
            return read(*arguments)  # type: ignore[arg-type]

        return with_damage

    for severity, state in ((NOTE, tables.CLEAN), (WARNING, tables.CLEAN), (ERROR, tables.DAMAGED)):
        monkeypatch.setattr(swap, "FORMAT", swap.FORMAT._replace(read=reader(severity)))
        bmap = survey([BytesReader(page)])
        assert bmap.filesystems.column("state").to_pylist() == [state]
        assert bmap.problems.column("code").to_pylist() == ["inode"]
