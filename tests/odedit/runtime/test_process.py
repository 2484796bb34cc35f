"""Settings of a process: reuse of freed memory, threads and determinism."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from odedit.runtime.process import keep_freed_memory

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(40)
plain = faults(40)
kept = keep_freed_memory()
faults(40)
print(kept, plain, faults(40))
"""


def run(code, **environment):
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], env=known | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_freed_memory_is_reused():
    kept, plain, faults = run(FAULTS)
    assert kept == str(platform.libc_ver()[0] == "glibc"), "only glibc is configured"
    if kept == "True":
        assert int(plain) > 20 and int(faults) < int(plain) / 10, "reused pages cause no faults"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_is_left_alone(name):
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    assert run(FAULTS, **{name: value})[0] == "False"


def test_a_worker_computes_the_same_every_time_on_its_threads():
    shown = run(
        "import torch; from odedit.runtime.process import settle; settle(1, 'cpu');"
        "print(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),"
        "torch.is_deterministic_algorithms_warn_only_enabled())"
    )
    assert shown == ["1", "True", "True"]
