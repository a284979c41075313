"""What a process has taken of the host's memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from elo.cpu.memory import peak_resident_memory

ROOT = Path(__file__).parents[2]
MEASURE = "from elo.cpu.memory import peak_resident_memory as peak; a = peak(); b = b'1' * 2**26; print(a, peak())"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="without /proc it is that of the parent, if more")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    large = b"1" * 2**28
    told = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    before, after = map(int, told.split())
    assert before + 0.9 * 2**26 < after < 2**28 == len(large) < peak_resident_memory()
