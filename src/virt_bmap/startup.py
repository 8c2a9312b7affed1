"""NumPy and Arrow, set up for a process that lives for a second. Only the command line does this: a program that imports us has its own memory to look after.

Sources: mallopt(3); glibc's malloc/malloc.c (DEFAULT_MMAP_THRESHOLD_MAX); NumPy's numpy/_core/src/multiarray/alloc.c.
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

BLAS_THREADS = "OPENBLAS_NUM_THREADS"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST = 32 << 20
"""Bytes: glibc lets nothing larger lie in its heap."""
HEAP = 6 * LARGEST
"""Bytes: about what a map of 200,000 files takes."""
DOCSTRINGS = ("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars")
"""Modules that do nothing but give NumPy's functions their docstrings."""


def import_libraries() -> None:
    """Import NumPy without OpenBLAS' threads, and Arrow; both on one heap that keeps its memory.

    Nothing here is linear algebra, and each thread would spin for a tenth of a second when it starts. Nothing that an import leaves behind is garbage, either.
    """
    gc.disable()
    binding = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # of Arrow's 28,000 symbols a map calls few
    sys.meta_path.insert(0, finder := _Unneeded())
    before = os.environ.get(BLAS_THREADS)
    os.environ[BLAS_THREADS] = "1"
    importlib.import_module("numpy")
    if before is None:
        del os.environ[BLAS_THREADS]  # the commands that we run are to find their environment as it was
    else:
        os.environ[BLAS_THREADS] = before
    _keep_memory()
    arrow = importlib.import_module("pyarrow")
    arrow.set_memory_pool(arrow.system_memory_pool())
    arrow.array([0]).to_numpy(zero_copy_only=False)  # looks for pandas
    sys.meta_path.remove(finder)
    sys.setdlopenflags(binding)
    gc.freeze()
    gc.enable()


class _Unneeded:
    """Finds no pandas, whose arrays Arrow might be given or asked for: to import that takes longer than most maps, and here are none. NumPy's docstrings, which
    nobody here reads, wait until somebody asks their modules for something.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """ModuleNotFoundError for pandas; anything else that is needed is left to the finders behind."""
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)
        if fullname not in DOCSTRINGS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = LazyLoader(spec.loader)
        return spec


def _keep_memory() -> None:
    """Let large arrays come from the heap, and the heap stay: otherwise every array is new pages from the kernel, which takes a tenth of the time of a map.

    Arrays of 4 MiB and more make NumPy ask the kernel for large pages; what was asked for stays so for the small ones that lie there later. None of these is touched.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's own
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)  # for all threads
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 8 * HEAP)
        empty = importlib.import_module("numpy").empty
        [empty(LARGEST // 2, "u1") for _ in range(2 * HEAP // LARGEST)]
