"""Settings of glibc's memory allocator."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # parameters of mallopt(3)
SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")  # environment variables of the user, which take precedence


def reuse_freed_memory() -> None:
    """Have the allocator keep the memory of freed tensors for the next ones.

    By default glibc maps each large tensor and unmaps it when it is freed, so that every activation costs page faults:
    two thirds of the time of a feature extractor at batch 64 (docs/performance.md). Nothing happens with other C
    libraries.
    """
    if not _is_glibc() or any(name.startswith(SETTINGS) for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)  # the heap grows in steps of 64 MB


def return_freed_memory() -> None:
    """Return freed memory to the system, so that what is used next can be measured."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
