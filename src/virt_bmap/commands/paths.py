"""Types of arguments that name files: they say what is read and what is written, so that the one is never
overwritten by the other (`host/protection.py`).

Every argument that takes a file has one of these types; a test goes over all parsers. Where one argument is
of several kinds, its command says them itself.
"""

from collections.abc import Callable

from virt_bmap.host import protection


class Input:
    """A file, image or device that is read. `name` finds it in arguments that hold more than its name."""

    def __init__(self, name: Callable[[str], str] = lambda text: text) -> None:
        self._name = name

    def __call__(self, text: str) -> str:
        protection.reads(self._name(text))
        return text


class Output:
    """A file that is written.

    `ours` says of one that is there whether it is an older result of the same kind; None: nothing is, and
    --force is always needed.
    """

    def __init__(self, ours: Callable[[str], bool] | None) -> None:
        self.ours = ours
        self._said: str | None = None

    def __call__(self, path: str) -> str:
        if path != self._said:  # argparse asks for a default's twice where options stand between arguments
            protection.writes(path, self.ours)
        self._said = path
        return path


INPUT = Input()
