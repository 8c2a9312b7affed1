"""NumPy and Arrow, set up for the kind of process that a command is.

Only the command line does this: a program that imports us has its own memory to look after.

Sources: mallopt(3), madvise(2); glibc's malloc/malloc.c (DEFAULT_MMAP_THRESHOLD_MAX).
"""

import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

from virt_bmap.commands import BARE, LONG, SHORT

SETTINGS = {"OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
"""Environment variables that the libraries look at while they are imported."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
MADV_HUGEPAGE, LARGE_PAGE = 14, 2 << 20
SOON = 1 << 18
"""Bytes: an array of this size is pages of its own in a long process, and the heap's end goes back when so
much is free there."""
LARGEST = 32 << 20
"""Bytes: glibc lets nothing larger lie in its heap."""
HEAP = 12 * LARGEST
"""Bytes of address space: what maps of nearly a million files take."""
DOCSTRINGS = ("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars")
"""Modules that do nothing but give NumPy's functions their docstrings."""


def import_libraries(process: str = SHORT) -> None:
    """Import NumPy without OpenBLAS' threads, and Arrow; both on one heap, which keeps its memory in a short
    process, and gives it back in a long one. A bare process needs neither.

    Nothing here is linear algebra, and each thread would spin for a tenth of a second when it starts. Nothing
    that an import leaves behind is garbage, either.
    """
    if process == BARE:
        return
    gc.disable()
    (_give_back if process == LONG else _keep_memory)()
    binding = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # of Arrow's 28,000 symbols a map calls few
    sys.meta_path.insert(0, finder := _Unneeded())
    before = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    importlib.import_module("numpy")
    importlib.import_module("pyarrow").array([0]).to_numpy(zero_copy_only=False)  # looks for pandas
    for name, value in before.items():  # the commands that we run are to find their environment as it was
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    sys.meta_path.remove(finder)
    sys.setdlopenflags(binding)
    gc.freeze()
    gc.enable()


class _Unneeded:
    """Finds no pandas, whose arrays Arrow might be given or asked for: to import that takes longer than most
    maps, and here are none. NumPy's docstrings, which nobody here reads, wait until somebody asks their
    modules for something.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """ModuleNotFoundError for pandas; anything else that is needed is left to the finders after it."""
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)
        if fullname not in DOCSTRINGS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = LazyLoader(spec.loader)
        return spec


def _give_back() -> None:
    """Let what is free go back to the kernel: maps come and go for hours, and a hole in the heap would stay
    as long as what lies after it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, SOON)
        mallopt(M_TRIM_THRESHOLD, SOON)


def _keep_memory() -> None:
    """Let large arrays come from the heap, and the heap stay: otherwise every array is new pages from the
    kernel, which takes a tenth of the time of a map.

    The heap is made large at once, and of large pages. None of these is touched.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)  # glibc's own
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)  # for all threads
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 4 * HEAP)
        mallopt(M_TOP_PAD, HEAP)
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        start = libc.sbrk(ctypes.c_ssize_t(0))
        libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(LARGEST // 2))))
        mallopt(M_TOP_PAD, LARGEST)
        libc.madvise(
            ctypes.c_void_p(-(-start // LARGE_PAGE) * LARGE_PAGE), ctypes.c_size_t(HEAP), MADV_HUGEPAGE
        )
