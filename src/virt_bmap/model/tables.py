"""THE contract: every table of a block map, each column with its unit and meaning.

Offsets, lengths and sizes are bytes, int64, ranges half open. Columns whose name ends in `volume_offset`
count from the start of the volume named in the row's `volume`, never from the disk. A `volume` is a number
that a map gives to each disk, partition, logical volume, array or opened container; a filesystem is named by
the volume it lies on.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int
from virt_bmap.core.mapping import ROLES, Rows
from virt_bmap.model.problems import SEVERITY_MEANING

# ---- what owns bytes ---------------------------------------------------------------------------------------

KINDS = (
    "data", "directory", "symlink", "unwritten", "xattr", "tree", "metadata", "boot", "gap", "free",
    "content", "unknown", "unreferenced",
)  # fmt: skip
(
    DATA,
    DIRECTORY,
    SYMLINK,
    UNWRITTEN,
    XATTR,
    TREE,
    METADATA,
    BOOT,
    GAP,
    FREE,
    CONTENT,
    UNKNOWN,
    UNREFERENCED,
) = range(len(KINDS))
KIND_MEANING = {
    "data": "content of a file (or of a named stream of it)",
    "directory": "names: the blocks of a directory, its hash tree included",
    "symlink": "the target of a symbolic link",
    "unwritten": "allocated to a file but never written: reads as zeroes",
    "xattr": "extended attributes of the inode",
    "tree": "where the inode's blocks lie: extent tree nodes, indirect blocks, B-tree nodes",
    "metadata": "structures of the filesystem, partition table or volume manager; `part` names which",
    "boot": "boot code: boot records, the gap where a boot loader's core lies",
    "gap": "belongs to nothing: outside any partition, or slack beyond a filesystem's or volume's end",
    "free": "the filesystem's or volume manager's own allocator calls it free",
    "content": "one piece that is named but not looked into: a foreign or encrypted filesystem",
    "unknown": "allocated, but no owner was found: damage, a feature "
    "that is not read yet, or (`part` says so) never observed",
    "unreferenced": "nothing refers to it, but no allocator says that it is free",
}
STAGING = "CoW staging"
"""The part of bytes that are set aside for what is about to be written to a shared file: no file owns them
yet, and soon one does."""
OWNED = (DATA, DIRECTORY, SYMLINK, UNWRITTEN, XATTR, TREE, METADATA, BOOT, CONTENT)
"""Kinds that an allocator must call used."""
IDLE = (GAP, FREE, UNREFERENCED)
"""Kinds of bytes that belong to nothing that the map knows.

Of these only `free` is an allocator's word: what it says may be written over.
"""

INLINE = 1
"""The bytes lie inside another extent's (a small file in its inode): no allocation of their own."""
SHARED = 2
"""Other inodes own the same bytes on purpose (reflink, snapshot, packed fragment)."""
COMPRESSED = 4
"""`file_length` bytes of the file are stored in `length` bytes; offsets inside do not correspond."""
ENCRYPTED = 8
"""The bytes are ciphertext."""
FLAGS = {"inline": INLINE, "shared": SHARED, "compressed": COMPRESSED, "encrypted": ENCRYPTED}

VOLUME_KINDS = ("file", "disk", "partition", "lv", "md", "crypt", "pool", "image")
"""What a volume is."""

# ---- what a volume's bytes are tied to ---------------------------------------------------------------------

TRAITS = ("checksummed", "verified", "journaled", "vouching", "sleeping")
CHECKSUMMED, VERIFIED, JOURNALED, VOUCHING, SLEEPING = (1 << bit for bit in range(len(TRAITS)))
TRAIT_MEANING = {
    "checksummed": "each block has a checksum elsewhere, which only "
    "the layer above can write with it (dm-integrity)",
    "verified": "hashes or a signature cover all of its bytes, those of "
    "free blocks as well (dm-verity, Android Verified Boot)",
    "journaled": "a journal on another device may hold newer bytes than "
    "it shows, and parity that was made with them (md)",
    "vouching": "holds hashes, checksums or signatures of the bytes of other volumes",
    "sleeping": "holds the memory of a machine that sleeps, which has filesystems open that may look clean",
}

# ---- what state a filesystem is in -------------------------------------------------------------------------

STATES = (
    "clean", "frozen", "recovered", "needs recovery", "in use", "hibernated", "damaged", "observed",
)  # fmt: skip
CLEAN, FROZEN, RECOVERED, NEEDS_RECOVERY, IN_USE, HIBERNATED, DAMAGED, OBSERVED = STATES
"""What the superblock and the journal say of a filesystem; that it is damaged follows from its problems
alone, and only survey says so."""
STATE_MEANING = {
    CLEAN: "unmounted in order, or of a kind that nobody writes to: all is in place",
    FROZEN: "still mounted when the disk was copied, but all metadata is in place",
    RECOVERED: "a mount would first replay its journal: done in memory, and the map shows the result",
    NEEDS_RECOVERY: "its journal holds changes that are not in place, or may hold some, and could not be "
    "replayed: the map shows the state before",
    IN_USE: "marked as mounted, and there is no journal that says what is not in place",
    HIBERNATED: "of a machine that sleeps, which has it open and may look clean",
    DAMAGED: "a problem of it is an error: bytes or names are lost or wrong",
    OBSERVED: "mapped by reading its files through a kernel: what was never read is `unknown`",
}
CONSISTENT = (CLEAN, FROZEN)
"""States in which all of a filesystem's metadata is in place on the disk."""

# ---- what an inode is --------------------------------------------------------------------------------------

TYPES = ("file", "directory", "symlink", "char", "block", "fifo", "socket", "metadata", "unknown")
T_FILE, T_DIRECTORY, T_SYMLINK, T_CHAR, T_BLOCK, T_FIFO, T_SOCKET, T_METADATA, T_UNKNOWN = range(len(TYPES))
_TYPE_OF_MODE = np.full(16, T_UNKNOWN, np.uint8)
_TYPE_OF_MODE[[0o10, 0o4, 0o12, 0o2, 0o6, 0o1, 0o14]] = [
    T_FILE, T_DIRECTORY, T_SYMLINK, T_CHAR, T_BLOCK, T_FIFO, T_SOCKET,
]  # fmt: skip


MODE = 0xFFFF
"""The bits of st_mode: type and permissions. Rock Ridge and btrfs keep it in 32."""


def type_of_mode(mode: Int) -> np.ndarray:
    """POSIX st_mode to codes of TYPES."""
    codes: np.ndarray = _TYPE_OF_MODE[(mode >> 12) & 15]
    return codes


I_DELETED = 1
"""No name leads to it any more: deleted but open at the
time, or deleted and still described by its record."""
I_ENCRYPTED = 2
I_COMPRESSED = 4
I_IMMUTABLE = 8
I_VERITY = 16
INODE_FLAGS = {
    "deleted": I_DELETED, "encrypted": I_ENCRYPTED, "compressed": I_COMPRESSED, "immutable": I_IMMUTABLE,
    "verity": I_VERITY,
}  # fmt: skip

# ---- the schemas -------------------------------------------------------------------------------------------


def _field(name: str, kind: pa.DataType, meaning: str, null: str = "") -> pa.Field:
    about = f"{meaning}; null: {null}" if null else meaning
    return pa.field(name, kind, nullable=bool(null), metadata={"meaning": about})


I64, I32, TEXT = pa.int64(), pa.int32(), pa.string()
CODE = pa.dictionary(pa.int8(), TEXT)
PART = pa.dictionary(pa.int16(), TEXT)

SCHEMAS: Mapping[str, pa.Schema] = {
    "volumes": pa.schema([
        _field("volume", I32, "number of the volume in this map, from 0; parents come before children"),
        _field("disk", I32, "number of the disk, from 1", "lies on several disks"),
        _field("kind", TEXT, "disk, partition, lv, md, crypt, pool (btrfs chunks), "
            "image (nested), file (of the host: --host-offsets)"),
        _field("name", TEXT, "as libguestfs names it: /dev/sda, /dev/sda1, "
            "/dev/VG/LV, see below; the path of a file of the host"),
        _field("size", I64, "bytes"),
        _field("type", TEXT, "what it contains, in blkid's words: gpt, dos, LVM2_member, ext4, ...",
            "nothing known"),
        _field("label", TEXT, "partition name or volume label", "none"),
        _field("uuid", TEXT, "of the partition, logical volume or array", "none"),
        _field("detail", TEXT, "more for a person: partition type, RAID level and state", "nothing to say"),
        _field("traits", I32, "bit mask: 1 checksummed, 2 verified, 4 "
            "journaled, 8 vouching, 16 sleeping; see below", "not "
            "looked for"),
    ]),
    "mappings": pa.schema([
        _field("volume", I32, "the volume whose bytes are placed"),
        _field("volume_offset", I64, "first byte, in the volume"),
        _field("parent", I32, "the volume they lie in"),
        _field("parent_offset", I64, "first byte, in the parent"),
        _field("run", I64, "bytes that lie together"),
        _field("count", I64, "how many such runs"),
        _field("volume_step", I64, "from one run to the next, in the volume; 0 where count is 1"),
        _field("parent_step", I64, "from one run to the next, in the parent; 0 where count is 1"),
        _field("parent_run", I64,
            "bytes that a run takes in the parent: `run`, but where role is compressed"),
        _field("role", CODE, "data (each byte of the volume once), copy (again), zero (space kept for "
            "zeroes), parity (computed from it), compressed"),
    ]),
    "filesystems": pa.schema([
        _field("volume", I32, "the volume it lies on"),
        _field("type", TEXT, "in blkid's words: ext2, ext3, ext4, xfs, ..."),
        _field("uuid", TEXT, "as blkid prints it", "none"),
        _field("label", TEXT, "volume label, UTF-8", "none"),
        _field("block_size", I64, "the unit of allocation in bytes"),
        _field("size", I64, "bytes from the volume's start that the filesystem claims"),
        _field("root", I64, "inode of the root directory", "has no names"),
        _field("state", TEXT, f"{', '.join(STATES)}; see below"),
        _field("features", TEXT, "space separated, in the words of the filesystem's own tools", "none"),
    ]),
    "inodes": pa.schema([
        _field("volume", I32, "the volume of the filesystem"),
        _field("inode", I64, "number in the filesystem, unique there; "
            "formats without numbers: see docs/formats.md"),
        _field("type", CODE, "file, directory, symlink, char, block, fifo, socket, metadata, unknown"),
        _field("mode", I32, "POSIX st_mode", "the format has none"),
        _field("uid", I64, "owner", "the format has none"),
        _field("gid", I64, "group", "the format has none"),
        _field("size", I64, "bytes, as stat reports"),
        _field("nlink", I64, "link count"),
        _field("mtime_ns", I64, "last change of the content, nanoseconds since 1970 UTC", "none kept"),
        _field("flags", I32, "bit mask: 1 deleted, 2 encrypted, 4 compressed, 8 immutable, 16 verity"),
        _field("record_offset", I64, "where the inode's own record lies, in the volume", "has none"),
    ]),
    "names": pa.schema([
        _field("volume", I32, "the volume of the filesystem"),
        _field("parent", I64, "inode of the directory"),
        _field("inode", I64, "inode that the name leads to"),
        _field("name", pa.binary(), "bytes as on disk (UTF-16 names as UTF-8); never '.' or '..'"),
    ]),
    "extents": pa.schema([
        _field("volume", I32, "the volume whose bytes these are"),
        _field("inode", I64, "the owner", "belongs to no inode"),
        _field("kind", CODE, "what the bytes are, see KINDS"),
        _field("part", PART, "which metadata structure or named stream, in the format's own terms",
            "plain content"),
        _field("file_offset", I64, "where in the file or stream the first byte lies", "not file content"),
        _field("file_length", I64, "bytes of the file it holds: `length` unless compressed",
            "not file content"),
        _field("volume_offset", I64, "first byte, in the volume"),
        _field("length", I64, "bytes"),
        _field("flags", I32, "bit mask: 1 inline, 2 shared, 4 compressed, 8 encrypted"),
    ]),
    "problems": pa.schema([
        _field("severity", TEXT, "; ".join(f"{name}: {words}" for name, words in SEVERITY_MEANING.items())),
        _field("format", TEXT, "which reader says so"),
        _field("volume", I32, "where"),
        _field("volume_offset", I64, "the byte at fault", "not one place"),
        _field("code", TEXT, "stable word for programs: see problems.md"),
        _field("detail", TEXT, "one line for people"),
    ]),
    "accesses": pa.schema([
        _field("disk", I32, "number of the disk, from 1"),
        _field("time_ns", I64, "since 1970 UTC"),
        _field("connection", I32, "NBD connection"),
        _field("op", CODE, "read, write, trim, zero, flush, cache"),
        _field("offset", I64, "first byte, on the disk"),
        _field("length", I64, "bytes"),
    ]),
    "former": pa.schema([
        _field("volume_offset", I64, "first byte that the owner had, in the volume"),
        _field("length", I64, "bytes"),
        _field("inode", I64, "the owner's number then"),
        _field("names", pa.list_(pa.large_binary()), "its paths; of a name whose directory is not known the "
            "name alone; empty: none is left"),
        _field("part", TEXT, "which structure or named stream", "plain content"),
        _field("file_offset", I64, "where in the file or stream the first byte lay", "not known"),
        _field("size", I64, "bytes of the file", "not kept"),
        _field("mtime_ns", I64, "last change of its content, nanoseconds since 1970 UTC", "none kept"),
        _field("said_by", TEXT, "what remembers it"),
        _field("sequence", I64, "tells later from earlier: transaction, log sequence number, generation",
            "nothing but mtime does"),
        _field("doubt", TEXT, "what is assumed, not recorded", "the place is recorded"),
    ]),
}  # fmt: skip

OPS = ("read", "write", "trim", "zero", "flush", "cache", "fua")
_CODES = {"kind": KINDS, "type": TYPES, "role": ROLES, "op": OPS}


def make(name: str, /, **columns: Any) -> pa.Table:
    """The table `name` from NumPy arrays, lists or scalars (repeated); a column left out is null.

    In nullable integer columns a negative number stands for null, but in mtime_ns, where INT64_MIN does. Code
    columns take uint8 codes. Raises ValueError where a column is unknown, missing though required, or of
    another length: a fault of the caller, not of a disk.
    """
    schema = SCHEMAS[name]
    unknown = set(columns) - set(schema.names)
    if unknown:
        raise ValueError(f"table {name} has no column {', '.join(sorted(unknown))}")
    lengths = {len(value) for value in columns.values() if _is_column(value)}
    if len(lengths) > 1:
        raise ValueError(f"table {name}: columns of different lengths {sorted(lengths)}")
    rows = lengths.pop() if lengths else 1
    arrays = [_array(field, columns.get(field.name), rows) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def empty(name: str) -> pa.Table:
    """The table `name` without rows."""
    return SCHEMAS[name].empty_table()


def _is_column(value: Any) -> bool:
    return isinstance(value, (np.ndarray, list, pa.Array, pa.ChunkedArray))


def _array(field: pa.Field, value: Any, rows: int) -> pa.Array:
    if value is None:
        if not field.nullable:
            raise ValueError(f"column {field.name} is required")
        return pa.nulls(rows, field.type)
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        return value.combine_chunks() if isinstance(value, pa.ChunkedArray) else value
    if field.type == CODE:
        codes = np.asarray(value, np.int8) if _is_column(value) else np.full(rows, value, np.int8)
        return pa.DictionaryArray.from_arrays(arrow(codes), pa.array(_CODES[field.name], TEXT))
    if not _is_column(value):
        if field.nullable and isinstance(value, (int, np.integer)) and value < 0:
            return pa.nulls(rows, field.type)
        if pa.types.is_integer(field.type):
            value = np.full(rows, value, field.type.to_pandas_dtype())
        else:
            return pa.repeat(pa.scalar(value, field.type), rows)
    if isinstance(value, np.ndarray) and pa.types.is_integer(field.type):
        return _integers(field, value)
    return pa.array(value, field.type)


def _integers(field: pa.Field, value: np.ndarray) -> pa.Array:
    if field.name == "mode" and value.dtype.itemsize > 2:
        value = np.where(value < 0, value, value & MODE)
    values, missing = value.astype(field.type.to_pandas_dtype(), copy=False), None
    if field.nullable:
        missing = value == np.iinfo(np.int64).min if field.name == "mtime_ns" else value < 0
    return arrow(values, missing)


def arrow(values: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    """Integers as an Arrow array without a copy, null where `missing`. pa.array() would import numpy.ma, a
    tenth of the start-up."""
    nulls = 0 if missing is None else int(np.count_nonzero(missing))
    valid = pa.py_buffer(np.packbits(~missing, bitorder="little")) if missing is not None and nulls else None
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(
        kind, len(values), [valid, pa.py_buffer(np.ascontiguousarray(values))], nulls
    )


def integers(table: pa.Table, name: str) -> Int:
    """An integer column as int64, null as -1."""
    column = table.column(name).combine_chunks()
    if column.null_count:
        column = column.fill_null(-1)
    values: Int = column.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    return values


def codes(table: pa.Table, name: str) -> np.ndarray:
    """A code column (kind, type, role, op) as int8 codes of its tuple."""
    column = table.column(name)
    chunks = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int8)


def parts(extents: pa.Table) -> tuple[Int, list[str]]:
    """(for each extent the number of its part among the words, -1 where it has none; the words)."""
    column = extents.column("part").combine_chunks()
    numbers = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers, column.dictionary.to_pylist() if len(column) else []


def recode(table: pa.Table) -> pa.Table:
    """The table with its code columns numbered as in this module: files number dictionaries as they like."""
    # takes longer to import than most maps take, and only saved maps need it here
    import pyarrow.compute as pc

    for at, field in enumerate(table.schema):
        if field.type == CODE:
            words = pa.array(_CODES[field.name], TEXT)
            codes = pc.index_in(table.column(at).cast(TEXT), words).cast(pa.int8()).combine_chunks()
            if codes.null_count:
                raise ValueError(f"column {field.name} has words that this version does not know")
            table = table.set_column(at, field, pa.DictionaryArray.from_arrays(codes, words))
    return table


class ExtentRows:
    """Collects extents as a reader finds them, a batch a call, and joins them once.

    `add` takes arrays of one length or scalars. `part` is one string for the batch.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, dict[str, Any]]] = []

    def add(
        self, kind: Any, volume_offset: Any, length: Any, *, part: str | None = None, inode: Any = -1,
        file_offset: Any = -1, file_length: Any = None, flags: Any = 0,
    ) -> None:  # fmt: skip
        """Rows [volume_offset, +length) of `kind` (codes).

        A file_offset of -1 means none; file_length defaults to length.
        """
        columns = {"kind": kind, "volume_offset": volume_offset, "length": length, "inode": inode,
            "file_offset": file_offset,
                   "file_length": file_length, "flags": flags, "part": part}  # fmt: skip
        rows = max((len(value) for value in columns.values() if isinstance(value, np.ndarray)), default=1)
        # to leave rows out later takes Arrow's functions, slow to import
        if rows and (isinstance(length, np.ndarray) or length):
            self._batches.append((rows, columns))

    def __bool__(self) -> bool:
        return bool(self._batches)

    def table(self, volume: int) -> pa.Table:
        """The table `extents` of all that was added, in that order, without rows of length 0."""
        if not self._batches:
            return empty("extents")

        def join(name: str, dtype: Any) -> np.ndarray:
            return np.concatenate([_spread(columns[name], rows, dtype) for rows, columns in self._batches])

        length, file_offset = join("length", np.int64), join("file_offset", np.int64)
        file_length = np.concatenate([
            _spread(columns["length"] if columns["file_length"] is None else columns["file_length"], rows,
                np.int64)
            for rows, columns in self._batches
        ])  # fmt: skip
        parts = list(
            dict.fromkeys(columns["part"] for _, columns in self._batches if columns["part"] is not None)
        )
        code_of = {part: code for code, part in enumerate(parts)} | {None: -1}
        part = np.concatenate(
            [np.full(rows, code_of[columns["part"]], np.int16) for rows, columns in self._batches]
        )
        result = make(
            "extents", volume=volume, inode=join("inode", np.int64), kind=join("kind", np.int8),
            part=pa.DictionaryArray.from_arrays(arrow(part, part < 0), pa.array(parts, TEXT)),
            file_offset=file_offset, file_length=np.where(file_offset < 0, -1, file_length),
            volume_offset=join("volume_offset", np.int64), length=length, flags=join("flags", np.int32),
        )  # fmt: skip
        return result if (length > 0).all() else result.filter(pa.array(length > 0))


def _spread(value: Any, rows: int, dtype: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value.astype(dtype, copy=False)
    return np.full(rows, value, dtype)


def mappings(parts: list[Rows]) -> pa.Table:
    """Mapping rows of several volumes as the table `mappings`, which has the same columns."""
    rows = Rows.concat(parts)
    return make("mappings", **{name: getattr(rows, name) for name in SCHEMAS["mappings"].names})


def concat(name: str, parts: list[pa.Table]) -> pa.Table:
    """Tables of one schema, one after the other, their dictionaries made one."""
    parts = [part for part in parts if part.num_rows]
    if not parts:
        return empty(name)
    return parts[0] if len(parts) == 1 else pa.concat_tables(parts).unify_dictionaries()


def check(name: str, table: pa.Table) -> None:
    """Raise ValueError where a table breaks the contract: schema, nulls where none may be, negative sizes,
    ranges beyond 2**63."""
    schema = SCHEMAS[name]
    if not table.schema.equals(schema):
        raise ValueError(
            f"table {name} has the schema {table.schema.to_string()} instead of {schema.to_string()}"
        )
    for field in schema:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            raise ValueError(f"table {name}, column {field.name}: {column.null_count} nulls")
        if pa.types.is_integer(field.type) and not field.name.endswith("time_ns") and len(column):
            low = integers(table, field.name)[~column.is_null().to_numpy()]
            if len(low) and low.min() < 0:
                raise ValueError(f"table {name}, column {field.name}: {int(low.min())} is negative")
    for start, length in (pair for pair in _RANGES if set(pair) <= set(schema.names)):
        # both are below 2**63: what is more wraps below 0
        last = integers(table, start) + integers(table, length)
        if len(last) and last.min() < -2:  # -1 and -1 are two nulls
            raise ValueError(f"table {name}: column {start} and {length} lead beyond byte 2**63")


_RANGES = (("volume_offset", "length"), ("offset", "length"), ("file_offset", "file_length"))


def check_map(tables: Mapping[str, pa.Table]) -> None:
    """Raise ValueError where the tables of a map break the contract, or refer to volumes that are not there:
    what reads a map may trust all that follows."""
    for name, table in tables.items():
        check(name, table)
    volumes, mappings = tables["volumes"], tables["mappings"]
    count = volumes.num_rows
    if not np.array_equal(integers(volumes, "volume"), np.arange(count)):
        raise ValueError("table volumes: the volumes are not numbered from 0")
    kinds = volumes.column("kind").to_pylist()
    if unknown := set(kinds) - set(VOLUME_KINDS):
        raise ValueError(f"table volumes: no kind {min(unknown)!r} of volume is known")
    top = np.flatnonzero([kind == ("file" if "file" in kinds else "disk") for kind in kinds])
    if len(top) == 0 or not integers(volumes, "size")[top].min():
        raise ValueError("table volumes: there is no disk, or one without bytes")
    if integers(volumes, "disk").max() > len(top):
        raise ValueError(
            f"table volumes: it has {plural(len(top), 'disk')}, but one is number "
            f"{integers(volumes, 'disk').max()}"
        )
    if unknown := set(tables["problems"].column("severity").to_pylist()) - set(SEVERITY_MEANING):
        raise ValueError(f"table problems: no severity {min(unknown)!r} is known")
    for name, table in tables.items():
        volume = integers(table, "volume")
        if len(volume) and volume.max() >= count:
            raise ValueError(f"table {name}: there is no volume {volume.max()}")
        if name in GROUPED and (volume[1:] < volume[:-1]).any():
            raise ValueError(f"table {name}: its rows are not in the order of the volumes")
    _check_mappings(mappings)


GROUPED = ("filesystems", "inodes", "names", "extents")
"""Tables whose rows lie together by volume."""


def _check_mappings(table: pa.Table) -> None:
    columns = {name: integers(table, name) for name in table.column_names if name != "role"}
    if (columns["parent"] >= columns["volume"]).any():
        raise ValueError("table mappings: a volume lies in one that comes after it")
    if (columns["run"] < 1).any() or (columns["count"] < 1).any() or (columns["parent_run"] < 1).any():
        raise ValueError("table mappings: a row without bytes")
    for side, run in (("volume", "run"), ("parent", "parent_run")):
        end = (
            columns[f"{side}_offset"]
            + (columns["count"] - 1).astype(float) * columns[f"{side}_step"]
            + columns[run]
        )
        if (end >= 1 << 63).any():
            raise ValueError(f"table mappings: a row leads beyond byte 2**63 of its {side}")


def disk_name(number: int) -> str:
    """The name that libguestfs gives to disk `number`, from 1: /dev/sda, ..., /dev/sdz, /dev/sdaa."""
    letters = ""
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return f"/dev/sd{letters}"
