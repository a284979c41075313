"""Runs of many processes, and what they have in common with that of one, `alone`."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import losses

SMALL_STEPS = "train --batch-tokens 32 --method full"  # many of them


def same_within_rounding(out):
    """What sums in another order differ by grows from step to step, and most where a loss has nearly gone."""
    ours, alone = losses(out), losses("alone")
    assert ours[:20] == pytest.approx(alone[:20], rel=1e-4)
    assert ours == pytest.approx(alone, rel=1e-3, abs=1e-3)
    ours, theirs = (load_file(Path(directory, "model.safetensors")) for directory in (out, "alone"))
    for name in theirs:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=5e-2, atol=5e-3)


def wait_for(condition, *processes):
    while not condition():
        time.sleep(0.002)
        assert all(process.poll() is None for process in processes)


def steps_done(out, steps):
    return lambda: Path(out, "metrics.jsonl").exists() and Path(out, "metrics.jsonl").read_bytes().count(b"\n") >= steps


def load_bytes(out):
    return Path(out, "model.safetensors").read_bytes()
