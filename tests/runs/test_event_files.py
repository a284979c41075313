"""--tensorboard: event files say what metrics.jsonl says, also of a run that was interrupted."""

import importlib.util
import os
from pathlib import Path

import pytest
from small_runs import lines, make_project, run_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path, documents=20))
    Path("held.txt").write_text("a few words\n" * 20)


def scalars(out, name):
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]


def test_they_say_what_the_metrics_say():
    assert run_here("train --max-steps 3 --tensorboard --validation held.txt --validate-every 2") == 0
    out = Path("out")
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes"):
        assert scalars(out, f"train/{name}") == [(line["step"], line[name]) for line in lines(out)], name
    measured = [(line["step"], line["validation_loss"]) for line in lines(out) if "validation" in line]
    assert measured and scalars(out, "validation/loss") == measured
    held_out = [(line["step"], line["validation"][0]["loss"]) for line in lines(out) if "validation" in line]
    assert scalars(out, "validation/loss/held.txt") == held_out
    assert run_here("train --max-steps 3 --overwrite") == 0
    assert not (out / "tensorboard").exists()


def test_a_run_that_goes_on():
    """What was written after the state that it goes on from is no longer shown."""
    out = Path("out")
    assert run_here("train --max-steps 4 --tensorboard --save-every 2") == 0
    (out / "model.safetensors").unlink()
    (out / "config.json").unlink()
    for file in (out / "checkpoints/step-4").iterdir():
        file.unlink()
    (out / "checkpoints/step-4").rmdir()
    assert run_here("train --max-steps 4 --tensorboard --save-every 2") == 0
    assert [step for step, _ in scalars(out, "train/loss")] == [1, 2, 3, 4]
    assert len(os.listdir(out / "tensorboard")) == 2


def test_nothing_is_written_through_a_link(tmp_path, capfd):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tensorboard").symlink_to(tmp_path / "elsewhere")
    assert run_here("train --max-steps 1 --tensorboard") == 2
    assert "tensorboard: not this run's, but in its way" in capfd.readouterr().err
    assert os.listdir(tmp_path / "elsewhere") == []


def test_without_the_package(monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_here("sft --epochs 1 --tensorboard") == 2
    assert "--tensorboard writes with the package tensorboard: pip install tensorboard" in capfd.readouterr().err
