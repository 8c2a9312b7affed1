"""One module for each command: NAME is its file's name, HELP one line, `add_arguments(parser)`, and `run(args) -> exit status`.

Modules are imported only when their command is run; `COMMANDS` is the list that `virt-bmap --help` shows, in this order.
"""

COMMANDS = {
    "map": "which file owns every byte of these disks? (the default)",
    "lookup": "who owns these bytes of a disk?",
    "explain": "all that is known of one byte: every layer, the owner, the bytes there",
    "locate": "where do the bytes of a file lie?",
    "info": "the tree of volumes and filesystems",
    "check": "prove that a map is complete and agrees with allocators and checksums",
    "verify": "does a map agree with what a real kernel reads of the files?",
    "diff": "which files changed: between two images, in an overlay, by a dirty bitmap, between two maps",
    "watch": "which files does a running guest read and write?",
    "trace": "make a trace of what another tool logged",
    "profile": "what a guest needs, from traces; lists of it; what changed since the last boot",
    "replay": "warm a disk with what a profile says will be needed",
    "dump": "copy a volume to a file or NBD export, sparse, free space left out if wanted",
    "cat": "write the content of a file to standard output",
    "extract": "copy files and trees out, with modes, times, links and holes",
    "report": "a map, and traces of its disks, as one HTML page",
    "sql": "ask saved maps, traces and results in SQL",
    "freeze": "run a command while the filesystems of a guest or of this host stand still",
    "sparsify": "give the free space of an image back to its host, in place or in a copy",
    "make": "make a prepared disk image, filled with a tree if wanted",
}
