"""A run that was interrupted ends as if nothing had been: in every stage and method, to the last bit."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from small_runs import Killed, interrupt, kill, lines, make_project, result, run_here, states

from elo.common.options import interval
from elo.model import saving
from elo.runs.directory import Metrics
from elo.runs.state_files import write_checksum


@pytest.fixture(scope="module")
def module_project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("project"), documents=30)
    os.chdir(project)
    assert run_here("train --max-steps 2", "elo") == 0
    return project


@pytest.fixture
def project(module_project, monkeypatch):
    """The working directory; what a test leaves in it is removed."""
    monkeypatch.chdir(module_project)
    kept = set(module_project.iterdir())
    yield module_project
    for path in set(module_project.iterdir()) - kept:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def alone():
    """What a command leaves that nobody interrupts. Each runs once."""

    @cache
    def result_of(command):
        assert run_here(command, "alone") == 0
        found = result(Path("alone"))
        shutil.rmtree("alone")
        return found

    return result_of


@pytest.fixture(scope="module")
def stopped(module_project):
    """A run of `train --save-every 3` that was stopped after step 7, for tests to copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(module_project)
        interrupt(patch, 7)
        assert run_here("train --save-every 3", "stopped") == 0
    assert states(module_project / "stopped") == ["step-6", "step-7"]
    return module_project / "stopped"


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
        patch.setattr("elo.runs.states.dcp.async_save", kill)
        assert run_here(command) == 0
    assert result(Path("out")) == alone(command)


def test_states_are_snapshots(project, monkeypatch):
    """What is written is what was there when saving began, whatever training has done since."""
    held = []
    save = dcp.async_save

    def hold(state, **settings):
        held.append({name: value.full_tensor().clone() for name, value in state["model"].items()})
        return save(state, **settings)

    monkeypatch.setattr(dcp, "async_save", hold)
    assert run_here("train --save-every 5 --max-steps 12 --keep-checkpoints 9") == 0
    assert states(Path("out")) == ["step-5", "step-10", "step-12"]
    for name, expected in zip(states(Path("out")), held, strict=True):
        found = {f"model.{key}": torch.empty_like(value) for key, value in expected.items()}
        dcp.load(found, checkpoint_id=f"out/checkpoints/{name}", no_dist=True)
        assert all(torch.equal(found[f"model.{key}"], expected[key]) for key in expected)
        assert not any(key.startswith("model.model.embed") for key in found)  # frozen


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
    assert interval("100").is_due(100, 0)
    assert not interval("100").is_due(99, 1e9)
    assert interval("15m").is_due(1, 900)
    assert not interval("2h").is_due(10**9, 7199)
    for text in ("0", "-1", "1.5", "15 m", "m", "1d", "inf", "٣"):
        with pytest.raises(Exception, match="neither a number of steps"):
            interval(text)


# ---- damaged states


def cut(state):
    file = next(state.glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)


def flip(state):
    file = next(state.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove(state):
    next(state.glob("*.distcp")).unlink()


def garble(state):
    (state / ".metadata").write_bytes(b"\x80\x04nonsense")


def empty(state):
    (state / ".metadata").write_bytes(b"")


def cut_short(state):
    (state / ".metadata").unlink()


@pytest.mark.parametrize("damage", [cut, flip, remove, garble, empty, cut_short])
def test_a_damaged_state_is_passed_over(project, alone, stopped, damage, capfd):
    shutil.copytree(stopped, "out")
    damage(Path("out/checkpoints/step-7"))
    assert run_here("train --save-every 3") == 0
    said = capfd.readouterr().out
    # One without .metadata was being written when the run was killed: that is nothing to tell.
    assert (f"{Path('out/checkpoints/step-7')}: this state is damaged" in said) == (damage is not cut_short)
    assert f"going on from {Path('out/checkpoints/step-6')}" in said
    assert result(Path("out")) == alone("train --save-every 3")


def test_nothing_is_begun_anew_where_all_states_are_damaged(project, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert run_here("train") == 0
    cut(Path("out/checkpoints/step-3"))
    assert run_here("train") == 2
    assert "--restart begins anew" in capfd.readouterr().err
    assert states(Path("out")) == ["step-3"]
    assert run_here("train --restart --max-steps 4") == 0
    assert len(lines(Path("out"))) == 4


# ---- states of other versions


def rewrite(state, change):
    """`.metadata` with its pickle changed, and the right checksum."""
    file = state / ".metadata"
    file.write_bytes(change(file.read_bytes()))
    write_checksum(file)


def older(state):
    """`.metadata` as it was written before it had a checksum, when it named the state's path."""
    (state / ".metadata.crc32").unlink()
    metadata = pickle.loads((state / ".metadata").read_bytes())
    metadata.storage_meta = dcp.metadata.StorageMeta(state)
    (state / ".metadata").write_bytes(pickle.dumps(metadata, protocol=2))  # names are lines


@pytest.mark.parametrize("name", ["pathlib\nPosixPath", "pathlib._local\nPosixPath", "pathlib._local\nWindowsPath"])
def test_a_state_that_another_python_wrote(project, alone, stopped, name, capfd):
    """Python 3.13 has another name for a path."""
    shutil.copytree(stopped, "out")
    state = Path("out/checkpoints/step-7")
    older(state)
    written = (state / ".metadata").read_bytes()
    assert written.count(b"pathlib\nPosixPath") == 1
    (state / ".metadata").write_bytes(written.replace(b"pathlib\nPosixPath", name.encode()))
    assert run_here("train --save-every 3") == 0
    assert f"going on from {state}" in capfd.readouterr().out
    assert result(Path("out")) == alone("train --save-every 3")


def test_a_state_names_no_path_and_is_read_by_torch_itself(stopped):
    for state in stopped.glob("checkpoints/step-*"):
        assert b"pathlib" not in (state / ".metadata").read_bytes()
        assert dcp.FileSystemReader(state).read_metadata().storage_data


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruded",)


def intrude(state):
    rewrite(state, lambda _: pickle.dumps(Intruder()))


def intrude_by_a_number(state):
    """In place of a value that is no tensor."""
    metadata = pickle.loads((state / ".metadata").read_bytes())
    key, entry = next((key, entry) for key, entry in metadata.storage_data.items() if "lr" in key.fqn)
    file, hostile = state / entry.relative_path, BytesIO()
    torch.save(Intruder(), hostile)
    entry = replace(entry, offset=file.stat().st_size, length=hostile.tell())
    file.write_bytes(file.read_bytes() + hostile.getvalue())
    write_checksum(file)
    metadata.storage_data[key] = entry
    rewrite(state, lambda _: pickle.dumps(metadata))


def name_what_is_not_known(state):
    rewrite(state, lambda data: data.replace(b"TensorStorageMetadata", b"TensorStorageMetadat2"))


def name_what_is_not_known_without_a_checksum(state):
    name_what_is_not_known(state)
    (state / ".metadata.crc32").unlink()


def have_another_protocol(state):
    rewrite(state, lambda data: b"\x80\x09" + data[2:])


def have_other_tensors(state):
    rewrite(state, lambda data: data.replace(b"exp_avg_sq", b"exp_avg_s2"))


VERSIONS = [
    intrude,
    intrude_by_a_number,
    name_what_is_not_known,
    name_what_is_not_known_without_a_checksum,
    have_another_protocol,
    have_other_tensors,
]


@pytest.mark.parametrize("change", VERSIONS)
def test_a_state_that_cannot_be_read_here_is_not_damaged(project, alone, stopped, change, capfd):
    """It is not passed over for the one before, nothing in it is run, and nobody is told to throw it away."""
    shutil.copytree(stopped, "out")
    state = Path("out/checkpoints/step-7")
    change(state)
    files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert run_here("train --save-every 3") == 2
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {state}: this state is as it was written, but Python 3.")
    assert "go on with the versions that wrote it, which run.json names" in line
    assert "damaged" not in said.out + said.err
    assert "--restart" not in line
    assert all(path.read_bytes() == files[path] for path in files if path.name != "run.json")
    assert not Path("intruded").exists()
    state.rename("elsewhere")
    assert run_here("train --save-every 3") == 0
    assert f"going on from {Path('out/checkpoints/step-6')}" in capfd.readouterr().out
    assert result(Path("out")) == alone("train --save-every 3")


def test_a_damaged_state_after_one_that_cannot_be_read_here(project, stopped, capfd):
    shutil.copytree(stopped, "out")
    cut(Path("out/checkpoints/step-7"))
    name_what_is_not_known(Path("out/checkpoints/step-6"))
    assert run_here("train --save-every 3") == 2
    assert "step-6: this state is as it was written" in capfd.readouterr().err
    assert states(Path("out")) == ["step-6", "step-7"]


# ---- what may go on, and what may be replaced


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


def test_a_run_may_be_moved(project, alone, stopped):
    shutil.copytree(stopped, "moved")
    assert run_here("train --save-every 3", "moved") == 0
    assert result(Path("moved")) == alone("train --save-every 3")


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


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "metrics.jsonl"])
def test_files_of_others_are_not_replaced(project, name, capfd):
    Path("out").mkdir()
    Path("out", name).write_text("precious")
    Path("out/notes.txt").write_text("mine")
    assert run_here("train --max-steps 2") == 2
    assert f"{name} is there already" in capfd.readouterr().err
    assert Path("out", name).read_text() == "precious"
    assert run_here("train --max-steps 2 --overwrite") == 0
    assert Path("out/notes.txt").read_text() == "mine"


def test_resume_and_restart_exclude_each_other(project, capfd):
    assert run_here("train --resume --restart") == 2
    assert "not allowed with" in capfd.readouterr().err
