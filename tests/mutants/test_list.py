"""The list of deliberate faults fits the code as it is; whether tests notice them is for `make mutants`."""

import shlex

from mutants import run


def test_every_fault_can_be_made():
    faults = run.read_faults()
    assert len(set(faults)) == len(faults) >= 80
    for fault in faults:
        assert fault.text(run.ROOT)  # raises where the old text is not there exactly once
        compile(fault.text(run.ROOT), fault.file, "exec")
        for word in shlex.split(fault.tests):
            assert not word.startswith("tests") or (run.ROOT / word).exists(), fault
