"""States of a run: when one is saved, what it holds, and which ones stay."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run_here, states

from elo.common.options import Interval
from elo.runs.states import States


def test_states_are_snapshots(project, monkeypatch):
    """What is written is what was there when saving began, whatever training has done since."""
    held = []
    save = States.save

    def hold(self, step):
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        held.append({name: value.full_tensor().clone() for name, value in trained.items()})
        save(self, step)

    monkeypatch.setattr(States, "save", hold)
    assert run_here("train --save-every 5 --max-steps 12 --keep-checkpoints 9") == 0
    assert states(Path("out")) == ["step-5", "step-10", "step-12"]
    for name, expected in zip(states(Path("out")), held, strict=True):
        found = load_file(f"out/checkpoints/{name}/part-0.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert not any(key.startswith("model.embed") for key in found)  # frozen


def test_how_many_states_stay(project):
    assert run_here("train --save-every 2 --max-steps 9 --keep-checkpoints 3") == 0
    assert states(Path("out")) == ["step-6", "step-8", "step-9"]
    assert run_here("train --save-every 3 --max-steps 11", "more") == 0
    assert states(Path("more")) == ["step-9", "step-11"]  # by their numbers, not by their letters
    assert run_here("train --max-steps 4", "plain") == 0
    assert not Path("plain/checkpoints").exists()  # the state before the export, for which nobody asked


def test_states_in_time(project, monkeypatch):
    """By the clock: one that goes a minute a step."""
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("elo.runs.states.time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert run_here("train --save-every 5m --max-steps 9 --keep-checkpoints 9") == 0
    assert states(Path("out")) == ["step-4", "step-9"]  # the clock is read once before the first step, too


def test_intervals():
    assert Interval.parse("100").is_due(100, 0)
    assert not Interval.parse("100").is_due(99, 1e9)
    assert Interval.parse("15m").is_due(1, 900)
    assert not Interval.parse("2h").is_due(10**9, 7199)
    for text in ("0", "-1", "1.5", "15 m", "m", "1d", "inf", "٣"):
        with pytest.raises(Exception, match="neither a number of steps"):
            Interval.parse(text)
