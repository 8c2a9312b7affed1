"""What a person should know of what is read, though nothing is wrong with it.

Programs say it; the library alone says nothing.
"""

import contextlib
from collections.abc import Callable, Iterator

_listener: Callable[[str], None] | None = None
_said: set[str] = set()


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Give notices to `listener` until the block ends, each once."""
    global _listener
    before, _listener = _listener, listener
    _said.clear()
    try:
        yield
    finally:
        _listener = before


def say(words: str) -> None:
    """One line."""
    if _listener and words not in _said:
        _said.add(words)
        _listener(words)
