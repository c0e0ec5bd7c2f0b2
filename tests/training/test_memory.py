"""Freed memory that comes back without page faults."""

import platform
import subprocess
import sys

import pytest

FEWEST_FAULTS = """
import resource
import torch
from training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(min(faults() for _ in range(6)))  # something small may take the first of the pages
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_a_large_tensor_takes_the_pages_of_the_one_before():
    faults = int(subprocess.check_output([sys.executable, "-c", FEWEST_FAULTS], text=True))
    assert faults < 100  # of 16,384 pages of 4 KB
