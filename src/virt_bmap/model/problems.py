"""The language of damage: every code that a row of `problems` can have, with one meaning in all formats.

A reader says what is wrong with one of these codes and a phrase of its own (`model/damage.py`); how bad that
is, and which question of `check` it answers, stands here. docs/problems.md is made from this table.
"""

from typing import NamedTuple

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITY_MEANING = {
    ERROR: "bytes or names are lost or wrong",
    WARNING: "a contradiction without loss, or something that is not read",
    NOTE: "worth knowing, nothing is wrong",
}


TORN = True
"""For codes of which `Code.torn` holds."""


class Code(NamedTuple):
    """What a program can rely on: `severity` unless a reader knows better, and the subject of `check`.

    `torn`: as an error it says that a part of what the map is made from is lost; a disk that is written while
    it is read looks like that, too.
    """

    name: str
    severity: str
    subject: str
    meaning: str
    torn: bool = False


class Problem(NamedTuple):
    """Damage or contradiction that leaves the rest readable.

    `offset` is in bytes of the volume; -1: not one place.
    """

    code: str
    detail: str
    offset: int = -1
    severity: str = ERROR


TABLE = (
    # what owns the bytes: found on the tables, for every format
    Code("two-owners", ERROR, "owners", "bytes have two owners that do not share them on purpose"),
    Code("outside", ERROR, "owners", "something lies outside of what holds it, or reaches out of it"),
    Code("owned-but-free", ERROR, "allocator", "bytes are owned, but the allocator calls them free"),
    Code("unowned", WARNING, "allocator", "bytes are allocated, but nothing refers to them"),
    Code("unreferenced", WARNING, "structure", "nothing refers to bytes of a format that has no allocator"),
    Code("untiled", ERROR, "owners", "bytes have no row in the map"),
    Code("inline-outside", ERROR, "owners", "bytes are said to lie inside another extent, but do not"),
    # who is called what: found on the tables, for every format
    Code("dangling-name", ERROR, "structure", "a name leads to an inode that is not in use"),
    Code("nameless-inode", ERROR, "structure", "an inode is in use, but no name leads to it"),
    Code("orphan-name", ERROR, "structure", "a name lies in a directory that is gone or never was one"),
    Code("no-root", ERROR, "structure", "the root directory is missing, so that nothing has a path", TORN),
    # structures
    Code("superblock", ERROR, "structure", "what describes the volume contradicts the format's rules", TORN),
    Code("group", ERROR, "structure", "what describes a part of the volume contradicts the rules", TORN),
    Code("allocator", ERROR, "allocator", "what says which bytes are free is wrong, or can't be read"),
    Code("mapping", ERROR, "structure", "what says where a volume's bytes lie contradicts the rules", TORN),
    Code("tree", ERROR, "structure", "a node of a tree or index is not what its parent or rules say", TORN),
    Code("inode", ERROR, "structure", "an inode contradicts the format's rules", TORN),
    Code("extents", ERROR, "structure", "what says where a file's bytes lie contradicts the rules", TORN),
    Code("directory", ERROR, "structure", "a directory or an entry contradicts the format's rules", TORN),
    Code("name", ERROR, "structure", "a name that nobody can have given"),
    Code("symlink", ERROR, "structure", "a symbolic link contradicts the format's rules"),
    Code("orphan-list", ERROR, "structure", "the list of deleted files that were open is wrong"),
    Code("boot-catalog", ERROR, "structure", "the list of what a machine can start from is damaged"),
    Code("twice", ERROR, "structure", "a structure is referred to more than once; it is read once"),
    Code("count", WARNING, "structure", "a count that the format keeps is not what is there"),
    Code("checksum", ERROR, "checksums", "a checksum of metadata is wrong", TORN),
    Code("copy-used", WARNING, "structure", "a structure is damaged, and its copy is read instead"),
    Code("copy-differs", WARNING, "structure", "a copy of a structure is damaged or says something else"),
    Code("copy-missing", WARNING, "structure", "the copy of a structure is not where it should lie"),
    Code("marked-damaged", ERROR, "structure", "the format's own driver or tool has marked it as damaged"),
    # journals
    Code("journal", ERROR, "journal", "a journal, or what it holds, contradicts the format's rules"),
    Code("journal-missing", WARNING, "journal", "the journal lies on another disk, which is not there"),
    Code("journal-replayed", NOTE, "journal", "changes of a journal are applied in memory, not on the disk"),
    Code("not-replayed", WARNING, "journal", "changes of a journal are missing from the map"),
    # what could not be read, or not wholly
    Code("truncated", ERROR, "structure", "the disk or volume ends before what lies on it does"),
    Code("corrupt", ERROR, "structure", "it can't be read: its bytes contradict the format's rules", TORN),
    Code("unsupported", WARNING, "structure", "a feature that is known by name, but not read"),
    Code("beside", WARNING, "structure", "another format's structures lie beside it, and can't be read"),
    Code("holes", ERROR, "structure", "structures that are not stored: they lie in holes or overlap"),
    Code("too-deep", ERROR, "structure", "layers or directories lie deeper in each other than is followed"),
    Code("too-many", ERROR, "structure", "there is more of something than any real disk has"),
    Code("unexpected", ERROR, "structure", "a fault of virt-bmap itself"),
    Code("missing-member", ERROR, "structure", "a disk or volume that it consists of is not there"),
    Code("content", ERROR, "content", "bytes are not those that a checksum or hash was kept of"),
    Code("no-key", WARNING, "content", "it is encrypted, and none of the given keys opens it"),
    Code("stale", WARNING, "structure", "it is older than what belongs to it"),
    Code("duplicate", WARNING, "structure", "two volumes say that they are the same one"),
    Code("half-done", WARNING, "structure", "a conversion was under way, and part of it is done"),
    Code("unclean", WARNING, "structure", "it was not closed or shut down in order"),
    # remarks
    Code("unused-member", NOTE, "structure", "a member that its volume does not use"),
    Code("bad-blocks", NOTE, "structure", "a member that has a list of bytes that it does not hold"),
    Code("elsewhere", NOTE, "structure", "content of files that lies on another device, or nowhere"),
    Code("leftover", NOTE, "structure", "what an earlier use of the disk left behind; it is not believed"),
    Code("sectors", NOTE, "structure", "a table counts in sectors of another size than is usual"),
    Code("simplified", NOTE, "structure", "the disk knows more than the map keeps apart"),
    Code("hidden", NOTE, "structure", "files that only another tree of names leads to"),
    Code("vouched", NOTE, "structure", "hashes, signatures or checksums vouch for its bytes"),
    Code("asleep", NOTE, "structure", "the memory of a machine that sleeps lies here"),
    Code("in-use", NOTE, "structure", "the disk was in use while it was read"),
    Code("nested", NOTE, "structure", "an image that is a file of the guest was not opened"),
    # maps by observation
    Code("observed", NOTE, "structure", "mapped by reading its files through a kernel"),
    Code("unreadable", ERROR, "structure", "something that can't be read to its end"),
    Code("not-seen", WARNING, "structure", "bytes of files were given without a read that holds them"),
    Code("not-listed", ERROR, "structure", "names are missing from the kernel's list"),
)  # fmt: skip
CODES = {code.name: code for code in TABLE}
