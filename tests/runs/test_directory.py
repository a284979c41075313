"""Which commands go on with a run: with the same options and data, and not when it is finished."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_runs import interrupt, kill, result, run_here, states

from elo.runs.processes import World


def stopped_run(monkeypatch, command="train", step=3):
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        assert run_here(command) == 0


def test_other_options_are_refused_and_all_named(project, monkeypatch, capfd):
    stopped_run(monkeypatch)
    assert run_here("train --lr 1e-3 --seed 5 --layers 1,2") == 2
    (line,) = capfd.readouterr().err.splitlines()
    for part in ("--lr 0.01 instead of 0.001", "--seed 0 instead of 5", "--layers None instead of 1,2", "--restart"):
        assert part in line
    assert states(Path("out")) == ["step-3"]
    free = "--save-every 30 --keep-checkpoints 1 --workers 1 --cache other --stop-on-spike --micro-batch 2"
    assert run_here(f"train {free}") == 0
    assert "--micro-batch was 4" in capfd.readouterr().out


def test_one_run_at_a_time(project, monkeypatch, capfd):
    """Not even one that begins anew: the first would go on among the files of the second."""
    stopped_run(monkeypatch)
    held = os.open("out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    for command in ("train", "train --restart --lr 1e-3"):
        assert run_here(command) == 2
        assert "--out out: a run is at work there; stop it" in capfd.readouterr().err
        assert states(Path("out")) == ["step-3"]
    os.close(held)
    assert run_here("train --max-steps 4 --restart") == 0


def test_a_directory_that_cannot_be_locked_is_told(project, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run_here("train --max-steps 1") == 0
    assert "out: it cannot be locked (No locks available)" in capfd.readouterr().err


def test_an_option_that_did_not_exist_when_the_run_began(project, monkeypatch, capfd):
    stopped_run(monkeypatch)
    run = json.loads(Path("out/run.json").read_text())
    assert run["options"].pop("bridge") is False
    Path("out/run.json").write_text(json.dumps(run))
    assert run_here("train --bridge") == 2
    assert "--bridge None instead of True" in capfd.readouterr().err
    assert run_here("train") == 0


# All options but these are part of what a run computes.
MAY_CHANGE = {
    *("resume", "restart", "overwrite", "out"),
    *("save_every", "keep_checkpoints", "stop_on_spike", "workers", "cache", "merge", "tensorboard"),
    *("validation", "validation_mb", "validation_field", "validate_every"),
    *("micro_batch", "micro_batch_tokens", "activation_checkpointing", "cpu_offload", "gather_once", "shard"),
}


@pytest.mark.parametrize("command", ["train", "train --method lora", "align --elo elo --gb 0.000003", "sft"])
def test_every_other_option_has_to_stay(project, monkeypatch, command, capfd):
    stopped_run(monkeypatch, command)
    run = json.loads(Path("out/run.json").read_text())
    changed = {name: "another value" for name in run["options"] if name not in MAY_CHANGE}
    assert len(changed) > 20
    for name, value in changed.items():
        Path("out/run.json").write_text(json.dumps({**run, "options": {**run["options"], name: value}}))
        capfd.readouterr()
        assert run_here(command) == 2
        assert f"it has --{name.replace('_', '-')} another value instead of" in capfd.readouterr().err


CHANGES = {
    "target texts": ("ko.jsonl", "train"),
    "base model": ("base/model.safetensors", "train"),
    "stage-1 model": ("elo/model.safetensors", "align --elo elo --gb 0.000003"),
    "conversations": ("chats.json", "sft"),
    "model": ("base/model.safetensors", "sft"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_data_is_refused(project, monkeypatch, what, capfd):
    file, command = CHANGES[what]
    stopped_run(monkeypatch, command)
    before = Path(file).read_bytes()
    try:
        if file.endswith(".safetensors"):
            tensors = load_file(file)
            tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
            save_file(tensors, file)
        else:
            other = before.replace(rb"\ub458", rb"\uc14b", 1).replace(b"some text", b"more text", 1)
            assert other != before
            Path(file).write_bytes(other)
        assert run_here(command) == 2
    finally:
        Path(file).write_bytes(before)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"its {what} changed" in line
    assert states(Path("out")) == ["step-3"]
    assert run_here(command) == 0  # a copy with another time of change is no change


@pytest.mark.parametrize("name", ["--lr", "--out", "base model", "source texts", "first document"])
def test_every_process_has_the_same_command_and_files(project, monkeypatch, name, capfd):
    """Process 1, on another node, has its own cache and number of cores, and by mistake another `name`."""
    others = dict.fromkeys((name, "--cache", "--workers"), "another node's")

    def gather(_, mine):
        return [mine, {known: others.get(known, value) for known, value in mine.items()}]

    monkeypatch.setattr(World, "gather", gather)
    assert run_here("train") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"process 1 has another {name} than process 0; give every node the same command, and" in line
    assert not Path("out").exists()


def test_a_finished_run_is_not_touched(project, capfd):
    assert run_here("train --max-steps 3") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    for options, status in (("", 2), ("--restart", 2), ("--resume", 0), ("--seed 3", 2), ("--resume --seed 3", 2)):
        assert run_here(f"train --max-steps 3 {options}") == status
        said = capfd.readouterr()
        assert "is finished" in said.out + said.err
        assert ("--overwrite" in said.err) == (status == 2)
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    assert run_here("train --max-steps 3 --seed 3 --overwrite") == 0
    assert json.loads(Path("out/elo.json").read_text())["stream"]["seed"] == 3


def test_overwrite_goes_on_with_the_same_run_and_replaces_another(project, alone, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert run_here("train --overwrite") == 0
    with monkeypatch.context() as patch:
        patch.setattr("elo.runs.directory.clear", kill)
        assert run_here("train --overwrite") == 0
    assert result(Path("out")) == alone("train")


def test_resume_and_restart_exclude_each_other(project, capfd):
    assert run_here("train --resume --restart") == 2
    assert "not allowed with" in capfd.readouterr().err
