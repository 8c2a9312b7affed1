"""One module for each command: NAME is its file's name, HELP one line, `add_arguments(parser)`, and
`run(args) -> exit status`.

Modules are imported only when their command is run; `COMMANDS`
is the list that `virt-bmap --help` shows, in this order.
"""

from typing import NamedTuple

SHORT, LONG, BARE = "short", "long", "bare"
"""What kind of process a command is: one that is over in seconds; one that stays for hours, beside a guest
that needs the memory; one that needs neither NumPy nor Arrow."""


class Command(NamedTuple):
    """What it is about, and the kind of its process."""

    about: str
    process: str = SHORT


COMMANDS = {
    "map": Command("which file owns every byte of these disks? (the default)"),
    "lookup": Command("who owns these bytes of a disk?"),
    "explain": Command("all that is known of one byte: every layer, the owner, the bytes there"),
    "locate": Command("where do the bytes of a file lie?"),
    "info": Command("the tree of volumes and filesystems"),
    "check": Command("prove that a map is complete and agrees with allocators and checksums"),
    "verify": Command("does a map agree with what a real kernel reads of the files?"),
    "diff": Command(
        "which files changed: between two images, in an overlay, by a dirty bitmap, between two maps"
    ),
    "watch": Command("which files does a running guest read and write?", LONG),
    "trace": Command("make a trace of what another tool logged"),
    "profile": Command("what a guest needs, from traces; lists of it; what changed since the last boot"),
    "replay": Command("warm a disk with what a profile says will be needed"),
    "dump": Command("copy a volume to a file or NBD export, sparse, free space left out if wanted"),
    "cat": Command("write the content of a file to standard output"),
    "extract": Command("copy files and trees out, with modes, times, links and holes"),
    "report": Command("a map, and traces of its disks, as one HTML page"),
    "sql": Command("ask saved maps, traces and results in SQL"),
    "freeze": Command("run a command while the filesystems of a guest or of this host stand still", BARE),
    "sparsify": Command("give the free space of an image back to its host, in place or in a copy"),
    "make": Command("make a prepared disk image, filled with a tree if wanted"),
}
