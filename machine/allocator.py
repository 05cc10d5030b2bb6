"""Settings of glibc's memory allocator."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # parameters of mallopt(3)
SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")  # environment variables of the user, which take precedence


def reuse_freed_memory() -> None:
    """Have the allocator keep the memory of freed tensors for the next ones.

    By default glibc maps each large tensor and unmaps it when it is freed, so that every activation costs page faults:
    half the time of a feature extractor at batch 64, and a tenth of a small model's training step
    (docs/performance.md). Peak memory stays the same. Nothing happens with other C libraries.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(SETTINGS) for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)  # the heap grows in steps of 64 MB
