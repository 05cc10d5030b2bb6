"""Freed tensors leave their memory to the next ones, so that these cost no page faults."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy
from machine.allocator import reuse_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        numpy.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

page_faults()
unset = page_faults()
reuse_freed_memory()
page_faults()
print(unset, page_faults())
"""


def page_faults(environment: dict[str, str]) -> tuple[int, int]:
    """Page faults of ten allocations of 64 MB, before and after `reuse_freed_memory`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    before, after = map(int, done.stdout.split())
    return before, after


@pytest.fixture
def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_freed_memory_is_used_again(environment):
    before, after = page_faults(environment)
    assert before > 100
    assert after < before / 10


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_the_users_own_settings_of_the_allocator_stand(environment):
    before, after = page_faults({**environment, "MALLOC_ARENA_MAX": "2"})
    assert after > before / 2 > 50
