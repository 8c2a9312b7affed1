"""Files that others chose, opened for reading: each is looked at first, and what is no file or block device
is not opened.

Sources: open(2) on O_PATH.
"""

import os
import stat

from virt_bmap.core.errors import ImageError

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}
"""What is neither a disk nor anything saved.

To open it could wait for ever (a FIFO), or act: a watchdog starts, a tape is wound back.
"""


def open_looked_at(path: str, wanted: str = "a disk image") -> int:
    """The descriptor of a file or block device, open for reading.

    Anything else is looked at, and not opened. Raises ImageError; `wanted` is what it was to be.
    """
    try:
        seen = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            about = os.fstat(seen)
            if not (stat.S_ISREG(about.st_mode) or stat.S_ISBLK(about.st_mode)):
                raise ImageError(
                    f"{path}: is "
                    f"{KINDS.get(stat.S_IFMT(about.st_mode), 'neither a file nor a block device')}, "
                    f"not {wanted}"
                )
            again = f"/proc/self/fd/{seen}"
            found = os.open(
                again if os.path.exists(again) else path,
                os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY,
            )
        finally:
            os.close(seen)
    except OSError as error:
        raise ImageError(f"{path}: can't be opened: {error.strerror}") from error
    except ValueError as error:
        raise ImageError(f"{path!r}: can't be opened: there is a NUL in the name") from error
    return found
