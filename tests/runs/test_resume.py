"""A run that was interrupted ends as if nothing had been: in every stage and method, to the last bit."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from small_runs import Killed, interrupt, kill, lines, result, run_here, states

from elo.model import saving
from elo.runs.directory import Metrics
from elo.runs.states import States

COMMANDS = [
    "train --layers 1,4",
    "train --layers 1,4 --micro-batch 1 --dtype bf16 --gather-once",
    "train --method full --save-every 4",
    "train --method full --optimizer-in-backward --clip 0 --micro-batch 9",
    "train --method full --activation-checkpointing --cpu-offload",
    "train --method lora --merge",
    "align --elo elo --gb 0.000004",
    "align --after elo --gb 0.000004 --save-every 3",
    "align --elo elo --gb 0.000004 --optimizer-in-backward --clip 0",
    "sft",
    "sft --optimizer-in-backward --clip 0 --micro-batch-tokens 900",
    "sft --keep every --save-every 4",
    "sft --keep best",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_and_resumed_is_the_same_to_the_last_bit(project, alone, monkeypatch, command, capfd):
    model, metrics = alone(command)
    stops = (3, 6) if command == COMMANDS[0] else (5,)
    for stop in stops:
        with monkeypatch.context() as patch:
            interrupt(patch, stop)
            assert run_here(command) == 0
        assert f"stopped after step {stop}; the same command goes on from there" in capfd.readouterr().out
        assert states(Path("out"))[-1] == f"step-{stop}"
        assert not Path("out/config.json").exists()
    assert run_here(command) == 0
    assert f"going on from {Path('out/checkpoints')}/step-{stops[-1]}" in capfd.readouterr().out
    assert result(Path("out")) == (model, metrics)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    seconds = [line["seconds"] for line in lines(Path("out"))]
    assert seconds == sorted(seconds)


def test_stopped_before_the_first_step(project, monkeypatch, capfd):
    load = States.load_newest
    with monkeypatch.context() as patch:
        patch.setattr(States, "load_newest", lambda self: os.kill(os.getpid(), signal.SIGTERM) or load(self))
        assert run_here("train --max-steps 2") == 0
    assert "stopped before the first step" in capfd.readouterr().out
    assert not states(Path("out")) and not lines(Path("out"))
    assert run_here("train --max-steps 2") == 0


def test_random_numbers_go_on(project, monkeypatch):
    """Whatever torch's generator is for: a run that draws in each step draws the same after an interruption."""
    write, drawn = Metrics.write, []

    def draw_and_write(self, line):
        drawn.append(torch.rand(1).item())
        write(self, line)

    monkeypatch.setattr(Metrics, "write", draw_and_write)
    torch.manual_seed(1)
    assert run_here("train --max-steps 6", "alone") == 0
    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert run_here("train --max-steps 6") == 0
    torch.manual_seed(2)
    assert run_here("train --max-steps 6") == 0
    assert drawn[6:] == drawn[:6]


@pytest.mark.parametrize("command", ["train --save-every 4", "sft --keep best --save-every 3"])
def test_killed_between_metrics_and_state(project, alone, monkeypatch, command):
    """The lines after the state go, and so does one that was cut short."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, 7, kill)
        run_here(command)
    assert len(lines(Path("out"))) == 7
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    assert run_here(command) == 0
    assert result(Path("out")) == alone(command)


@pytest.mark.parametrize("command", ["train", "sft --keep best"])
def test_killed_while_the_model_is_written(project, alone, monkeypatch, command):
    """It is written again, and no step is trained or saved again; also when only some files had been moved."""
    replace = os.replace
    for moved in (0, 1, 2):  # files that are in OUT already
        with monkeypatch.context() as patch, pytest.raises(Killed):
            left = moved

            def stop(source, destination):
                nonlocal left
                if Path(destination).parent == Path("out") and Path(destination).name != "run.json":
                    left -= 1
                    if left < 0:
                        raise Killed
                replace(source, destination)

            patch.setattr(saving.os, "replace", stop)
            run_here(command)
        assert not Path("out/config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("elo.training.accumulate", kill)
        patch.setattr("elo.runs.states.write_part", kill)
        assert run_here(command) == 0
    assert result(Path("out")) == alone(command)


def test_a_run_may_be_moved(project, alone, stopped):
    shutil.copytree(stopped, "moved")
    assert run_here("train --save-every 3", "moved") == 0
    assert result(Path("moved")) == alone("train --save-every 3")
