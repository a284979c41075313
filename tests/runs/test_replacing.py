"""What a run may remove or replace in --out, and which of its inputs it must not."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from put_files import all_there, put
from small_runs import interrupt, run_here, states

import align
import merge_chat_vector
import sft
import train
from elo.common.options import PATHS, Parser
from elo.runs.replacing import INPUTS

# Names near to those of a run.
OTHERS = (
    *("epoch-final/notes", "epoch-1-backup/config.json", "epoch-01/model.safetensors", "epoch-0/config.json"),
    *("adapter/notes", "original/notes", "epoch-1/notes", ".saving-mine/x", "epoch-2/.saving-mine/x"),
    *("model-old.safetensors", "model.fp32.safetensors", "model-1-of-2.safetensors", "run.json.old", "notes.txt"),
)


@pytest.mark.parametrize(
    "command",
    ["train --max-steps 2", "train --method lora --merge --max-steps 2", "sft --keep best --epochs 2", "align --gb 0"],
)
def test_what_others_put_there_stays(project, command):
    put(*OTHERS)
    for _ in range(2):
        assert run_here(command) == 0
        assert all_there(*OTHERS)
        assert Path("out/config.json").exists()
        command += " --overwrite"
    assert set(json.loads(Path("out/run.json").read_text())["written"]) == {
        str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()
    } - {"run.json", *OTHERS}


@pytest.mark.parametrize("command", ["sft --keep best", "sft --keep every --save-every 2"])
def test_what_others_put_beside_a_run_stays(project, monkeypatch, command):
    """Also what was copied from it, and what lies in its own folders."""
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        assert run_here(command) == 0
    newest = states(Path("out"))[-1]
    shutil.copytree("out/epoch-1", "out/epoch-1-backup")
    shutil.copytree(f"out/checkpoints/{newest}", f"out/checkpoints/{newest}-copy")
    others = "epoch-1/notes", "checkpoints/notes", f"checkpoints/{newest}/notes", "epoch-1-backup/notes"
    put(*others)
    for _ in range(2):
        assert run_here(command) == 0
        assert all_there(*others)
        assert Path("out/epoch-1-backup/model.safetensors").exists()
        assert Path(f"out/checkpoints/{newest}-copy/state.json").exists()
        command += " --overwrite"


IN_THE_WAY = ["adapter_model.safetensors", "adapter/adapter_config.json", "original/tokenizer.model", "run.json.new"]


OWN = ["config.json", "tokenizer.json", "metrics.jsonl"]


@pytest.mark.parametrize("name", [*IN_THE_WAY, "model-00001-of-00002.safetensors", "sft.json", *OWN])
def test_overwrite_replaces_files_by_their_exact_names(project, name, capfd):
    put(name, "adapter/notes")
    assert run_here("train --max-steps 2") == 2
    assert f"{name} is there already; use --overwrite" in capfd.readouterr().err
    assert all_there(name)
    assert run_here("train --max-steps 2 --overwrite") == 0
    assert Path("out", name).exists() == (name in OWN) and not (name in OWN and all_there(name))
    assert all_there("adapter/notes")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("checkpoints/step-1/state.json", "train"),
        ("checkpoints/notes", "train"),
        ("checkpoints", "train"),
        ("config.json/notes", "train"),
        ("adapter", "train"),
        ("epoch-7/config.json", "sft --keep best"),
        ("epoch-1/model-00001-of-00002.safetensors", "sft --keep every"),
        ("epoch-1", "sft --keep every"),
    ],
)
def test_what_overwrite_does_not_replace(project, name, command, capfd):
    """States and models that no run has listed, and folders for files."""
    put(name)
    for overwrite in ("", " --overwrite"):
        assert run_here(command + overwrite) == 2
        assert "--out out: " in capfd.readouterr().err
        assert all_there(name)
        assert not Path("out/run.json").exists()


def test_files_put_into_an_interrupted_run_are_not_replaced(project, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert run_here("train --max-steps 4") == 0
    put("chat_template.jinja", "config.json")
    assert run_here("train --max-steps 4") == 2
    assert "config.json is there already" in capfd.readouterr().err
    assert run_here("train --max-steps 4 --overwrite") == 0
    assert "going on from" in capfd.readouterr().out
    assert not Path("out/chat_template.jinja").exists()


def test_files_put_there_while_it_trains(project, monkeypatch, capfd):
    """They are found before anything is moved; the state of the last step is there already."""
    with monkeypatch.context() as patch:
        interrupt(patch, 4, how=lambda: put("tokenizer.json"))
        assert run_here("train --max-steps 4") == 2
    assert "tokenizer.json: not this run's, but in its way; move it" in capfd.readouterr().err
    assert all_there("tokenizer.json")
    Path("out/tokenizer.json").unlink()
    assert run_here("train --max-steps 4") == 0
    assert "going on from out/checkpoints/step-4" in capfd.readouterr().out


# ---- links


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "original", "epoch-1"])
def test_nothing_is_removed_through_a_link(project, name, capfd):
    files = "step-1/state.json", "adapter_config.json", "tokenizer.model", "config.json", "notes"
    put(*files, out="elsewhere")
    Path("out").mkdir()
    Path("out", name).symlink_to("../elsewhere")
    for overwrite in ("", " --overwrite"):
        assert run_here("sft --keep best" + overwrite) == 2
        assert f"--out out: {name} is there" in capfd.readouterr().err
        assert all_there(*files, out="elsewhere")


@pytest.mark.parametrize("name", ["checkpoints", "epoch-1", "metrics.jsonl"])
def test_a_run_does_not_go_on_through_a_link(project, monkeypatch, name, capfd):
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        assert run_here("sft --keep best") == 0
    os.rename(Path("out", name), "elsewhere")
    Path("out", name).symlink_to("../elsewhere")
    there = sorted(Path("elsewhere").rglob("*"))
    assert run_here("sft --keep best") == 2
    assert f"--out out: {name} is there" in capfd.readouterr().err
    assert sorted(Path("elsewhere").rglob("*")) == there
    Path("out", name).unlink()
    os.rename("elsewhere", Path("out", name))
    assert run_here("sft --keep best") == 0


def test_out_may_be_a_link(project):
    Path("elsewhere").mkdir()
    Path("out").symlink_to("elsewhere")
    assert run_here("train --max-steps 2") == 0
    assert run_here("train --max-steps 2 --overwrite") == 0
    assert Path("elsewhere/config.json").exists()


# ---- what is read


@pytest.mark.parametrize(
    "options",
    [
        *("--model R", "--model R/epoch-1", "--model R/../R/epoch-1/.", "--model link/epoch-1", "--model epoch-link"),
        *("--model weights-linked", "--data R/metrics.jsonl", "--data R/epoch-1/chats.json", "--data R/*.jsonl"),
        "--data .",
    ],
)
def test_no_input_is_replaced(tuned, options, capfd):
    Path("link").symlink_to("R")
    Path("epoch-link").symlink_to("R/epoch-2")
    shutil.copytree("base", "weights-linked")
    Path("weights-linked/model.safetensors").unlink()
    Path("weights-linked/model.safetensors").symlink_to("../R/epoch-1/model.safetensors")
    before = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    for out in ("R", "link"):
        assert run_here(f"sft {options} --overwrite", out) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"--out {out}: " in line
        assert options.split()[0] in line
    assert {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("option", ["--elo", "--after", "--target", "--source", "--cache"])
def test_no_input_of_stage_2_is_replaced(project, option, capfd):
    put("epoch-1/x.jsonl")
    for place in ("out", "out/epoch-1"):
        if option == "--elo":  # which is opened first
            shutil.rmtree("out", ignore_errors=True)
            assert run_here("train --max-steps 1", place) == 0
        assert run_here(f"align {option} {place} --overwrite") == 2
        assert f"{option}" in capfd.readouterr().err
    assert Path("out/epoch-1").exists()


@pytest.mark.parametrize("script", [train, align, sft, merge_chat_vector])
def test_every_option_that_names_an_input_is_looked_at(script, monkeypatch):
    parsers = []
    monkeypatch.setattr(Parser, "parse_args", lambda parser: parsers.append(parser))
    with suppress(AttributeError):  # what is done with the arguments
        script.parse_arguments()
    named = {action.dest for action in parsers[0]._actions if action.type is Path or action.metavar in PATHS}
    assert named - {"out"} <= set(INPUTS)
    assert {"model", "out"} <= named


def test_inputs_beside_what_is_replaced(project):
    """A folder of one's own in --out is nobody's but one's own."""
    shutil.copytree("base", "out/base")
    shutil.copy("ko.jsonl", "out/ko.jsonl")
    for overwrite in ("", " --overwrite"):
        options = "--model out/base --target out/ko.jsonl --cache out/cache --max-steps 2"
        assert run_here(f"train {options}{overwrite}") == 0
    assert Path("out/ko.jsonl").read_bytes() == Path("ko.jsonl").read_bytes()
