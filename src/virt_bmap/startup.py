"""NumPy and Arrow, set up for a process that lives for a second. Only the command line does this: a program that imports us has its own memory to look after.

Sources: mallopt(3); glibc's malloc/malloc.c (DEFAULT_MMAP_THRESHOLD_MAX); NumPy's numpy/_core/src/multiarray/alloc.c.
"""

import ctypes
import importlib
import os

BLAS_THREADS = "OPENBLAS_NUM_THREADS"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 << 20
"""Bytes: glibc lets nothing larger lie in its heap."""
HEAP = 6 * LARGEST
"""Bytes: about what a map of 200,000 files takes."""


def import_libraries() -> None:
    """Import NumPy without OpenBLAS' threads, and Arrow; both on one heap that keeps its memory.

    Nothing here is linear algebra, and each thread would spin for a tenth of a second when it starts.
    """
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


def _keep_memory() -> None:
    """Let large arrays come from the heap, and the heap stay: otherwise every array is new pages from the kernel, which takes a tenth of the time of a map.

    Arrays of 4 MiB and more make NumPy ask the kernel for large pages; what was asked for stays so for the small ones that lie there later. None of these is touched.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's own
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 8 * HEAP)
        empty = importlib.import_module("numpy").empty
        [empty(LARGEST // 2, "u1") for _ in range(2 * HEAP // LARGEST)]
