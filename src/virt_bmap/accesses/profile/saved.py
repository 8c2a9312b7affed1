"""A profile: one table of byte ranges in order of first use, and the file that holds it."""

import json
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from virt_bmap.core.arrays import Int
from virt_bmap.core.errors import MapError
from virt_bmap.host import inputs
from virt_bmap.model import tables
from virt_bmap.saved.results import field

KEY = b"virt-bmap-profile"
VERSION = 1
LONGEST = 4e9
"""Seconds that a run may take: 127 years, as far as 64 bits of nanoseconds go."""
RANGES = pa.schema([
    field("disk", pa.int32(), "number of the disk, from 1"),
    field("offset", pa.int64(), "first byte, on the disk", "bytes"),
    field("length", pa.int64(), "bytes", "bytes"),
    field("device", pa.large_string(), "the volume it lies on"),
    field("kind", pa.large_string(), "kind of the object, as in the table extents, or of the volume"),
    field("path", pa.large_binary(), "path in the filesystem", null="has none"),
    field("part", pa.large_string(), "metadata structure or named stream", null="plain content"),
    field("inode", pa.int64(), "number of the inode", null="has none"),
    field("file_offset", pa.int64(), "where in the file the range begins",
        null="means nothing, or is not known"),
    field("size", pa.int64(), "bytes of the whole file", null="no file, or made without a map"),
    field("runs", pa.int32(), "in how many of the runs it was read before anything wrote it", "count"),
    field("first_ns", pa.int64(), "when it was first read, from the first "
        "access of its run; the earliest of all runs"),
    field("read", pa.int64(), "bytes read of it in all runs, each time they were", "bytes"),
])  # fmt: skip


class RunFacts(NamedTuple):
    """One run as a whole; sizes in bytes."""

    trace: str
    seconds: float
    requests: int
    read: int


class Profile(NamedTuple):
    """`ranges` has the schema RANGES, sorted by first use;
    `sizes` are those of the disks (empty: not known)."""

    ranges: pa.Table
    runs: list[RunFacts]
    sizes: list[int]

    def column(self, name: str) -> Int:
        """An integer column, null as -1."""
        return tables.integers(self.ranges, name)


def save(profile: Profile, file: BinaryIO) -> None:
    """Write a profile as Parquet."""
    about = {"version": VERSION, "disks": profile.sizes, "runs": [run._asdict() for run in profile.runs]}
    pq.write_table(profile.ranges.replace_schema_metadata({KEY: json.dumps(about)}), file, compression="zstd")


def is_profile(path: str) -> bool:
    """Is this file a profile?"""
    return KEY in inputs.columns_and_metadata(path)[1]


def load(path: str) -> Profile:
    """Read a profile back. Raises ImageError where it can't
    be read, MapError where it is not one, or is damaged."""
    with inputs.reading(path, "a profile"):
        file = inputs.open_file(path, "a profile")
        about = inputs.metadata(file, KEY)
        if about.get("version") != VERSION:
            what = (
                f"a profile of version {about['version']!r}"
                if "version" in about
                else "a Parquet file, but not a profile"
            )
            raise MapError(f"{path}: is {what}; virt-bmap profile TRACE... -o PROFILE makes one")
        table = inputs.fit(inputs.rows(file, RANGES.names), RANGES)
        profile = Profile(table, [_run_facts(run) for run in about["runs"]], inputs.sizes(about))
    _check_numbers(path, profile)
    return profile


def _run_facts(run: dict[str, Any]) -> RunFacts:
    found = RunFacts(**run)
    whole = all(type(value) is int and 0 <= value < 1 << 63 for value in (found.requests, found.read))
    if not (
        isinstance(found.trace, str)
        and whole
        and isinstance(found.seconds, (int, float))
        and 0 <= found.seconds < LONGEST
    ):
        raise ValueError("its metadata describes a run that can't have been")
    return found


def _check_numbers(path: str, profile: Profile) -> None:
    for name, least in (
        ("disk", 1),
        ("offset", 0),
        ("length", 1),
        ("runs", 1),
        ("first_ns", 0),
        ("read", 0),
        ("inode", 0),
        ("file_offset", 0),
        ("size", 0),
    ):
        low = pc.min(profile.ranges.column(name)).as_py()
        if low is not None and low < least:
            raise MapError(f"{path}: is damaged: column {name!r} has the value {low}")
    if (pc.max(profile.ranges.column("first_ns")).as_py() or 0) >= LONGEST * 1e9:
        raise MapError(f"{path}: is damaged: it has ranges first read after more than {LONGEST:,.0f} seconds")
    end = profile.column("offset").astype(float) + profile.column("length")
    if (end >= 1 << 63).any():
        raise MapError(f"{path}: is damaged: it has ranges beyond byte 2**63")
