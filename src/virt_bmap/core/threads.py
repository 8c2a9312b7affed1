"""Reading ahead: what waits for memory, a disk or a network needs no lock of Python's, and goes on while what
came before is looked at."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")


def ahead(work: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
    """work(part) for each of the parts, in order; each is begun in another thread when the one before it is
    given out. What `work` raises comes in its place."""
    rest = iter(parts)
    for first in rest:
        result = work(first)
        for part in rest:
            begun = _Begun(work, part)
            try:
                yield result
            finally:
                begun.wait()  # whoever takes no more of them may close what `work` reads
            result = begun.result()
        yield result


class _Begun(Generic[Result]):
    """A call in a thread of its own."""

    def __init__(self, work: Callable[[Part], Result], part: Part) -> None:
        self._results: list[Result] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(work, part), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Part], Result], part: Part) -> None:
        try:
            self._results.append(work(part))
        except BaseException as error:  # raised again in `result`, in the thread that asked
            self._errors.append(error)

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> Result:
        if self._errors:
            raise self._errors[0]
        return self._results.pop()
