"""The programs on broken input, whole: exit status 2, one line that names the culprit, nothing half-done left."""

import json
import os
import shutil
import sys
from importlib import import_module

import pytest
import torch
from bench_files import write_bench, write_model
from safetensors.torch import load_file, save_file
from small_runs import TEXT, make_project, run_here

from elo.common.errors import exit_status
from examples import questions

ALIGN = f"align {TEXT} --gb 0.000002 --out out"
SFT = "sft --model base --data chats.json --chat-format chatml --seq-len 64 --epochs 1 --out out"
MERGE = "merge_chat_vector --base base --out out --model"
TALK = "elo.generation.chat --prompt Hi --chat-format chatml --model base"
PERPLEXITY = "eval perplexity --model base --data en.jsonl --json result.json"
CHOICE = "eval choice --model base --data choices --tasks kobest_copa,mmlu_sociology --samples out --json result.json"
ANSWERS = "eval answers --model talker --bench logickor --bench-dir logickor --out out --json result.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Everything that the programs need, unharmed."""
    directory = make_project(tmp_path_factory.mktemp("broken") / "whole", documents=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert run_here("train --max-steps 2 --gb 0.000004", "elo") == 0
    write_model(directory / "talker")
    write_bench(directory / "logickor", "logickor")
    questions.write(directory / "choices")
    (directory / "judged.jsonl").write_text('{"question_id": 1}\n')
    return directory


def put(content):
    return lambda path: path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def remove(path):
    path.unlink()


def occupy(path):
    path.mkdir()
    (path / "config.json").write_text("precious")


def nested(path):
    path.mkdir(parents=True)


def link_to(target):
    return lambda path: path.symlink_to(target)


def change_embedding(path):
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, path, {"format": "pt"})


def poison(path):
    tensors = load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})


def set_field(*keys, value):
    def change(path):
        content = holder = json.loads(path.read_text())
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = value
        path.write_text(json.dumps(content))

    return change


CASES = [
    # command, file and what is done to it, words of the error
    (f"train {TEXT} --out out", "base/config.json", cut, "base/config.json: not valid JSON"),
    (f"train {TEXT} --out out", "base/config.json", set_field("hidden_size", value=-1), "hidden_size"),
    (f"train {TEXT} --out out", "base/model.safetensors", cut, "base/model.safetensors"),
    (f"train {TEXT} --out out", "base/model.safetensors", pipe, "base: neither"),
    (f"train {TEXT} --out out", "base/tokenizer.json", put(b"\xff\xfe"), "base/tokenizer.json"),
    (f"train {TEXT} --out out", "base/tokenizer.json", pipe, "base"),
    (f"train {TEXT} --out out", "ko.jsonl", put(b'{"text": "\xea"}\n'), "ko.jsonl:1: invalid UTF-8"),
    (f"train {TEXT} --out out", "ko.jsonl", put(b"\n\n"), "ko.jsonl: an empty corpus"),
    (f"train {TEXT} --out out", "ko.jsonl", pipe, "ko.jsonl: not a file"),
    (f"train {TEXT} --out out", "token-cache", put(b"a file"), "token-cache: cannot keep tokens there"),
    (f"train {TEXT} --out out", "out", put(b"a file"), "--out out: this is a file"),
    (f"train {TEXT} --out out", "out", occupy, "--out out: config.json is there already"),
    (f"train {TEXT} --out elo", "elo/run.json", put(b"[]"), "elo/run.json: must be a JSON object"),
    (f"train {TEXT} --out elo", "elo/run.json", put(b"{}"), "elo/run.json: no options of a run"),
    (f"{ALIGN} --elo elo", "elo/elo.json", remove, "elo/elo.json: cannot be read"),
    (f"{ALIGN} --elo elo", "elo/elo.json", set_field("layers", value=[1, 9]), "there is no layer 9"),
    (f"{ALIGN} --elo elo", "elo/elo.json", set_field("consumed", "position", value=-1), "consumed: position must be"),
    (f"{ALIGN} --elo elo", "elo/elo.json", set_field("stream", "seed", value=[]), "that run had other seed"),
    (f"{ALIGN} --elo elo", "elo/model.safetensors", change_embedding, "model.embed_tokens.weight, which stage 1 froze"),
    (SFT, "chats.json", cut, "chats.json"),
    (SFT, "chats.json", put(b'[{"conversations": [{"from": "human"}]}]'), "chats.json record 1"),
    (SFT, "chats.json", pipe, "chats.json: not a file"),
    (f"{MERGE} elo --instruct base", "elo/config.json", put(b"{}"), "elo/config.json"),
    (f"{MERGE} elo --instruct base", "ko.jsonl", put(b""), "num_hidden_layers"),
    (f"{MERGE} base --instruct talker", "talker/model.safetensors", cut, "talker/model.safetensors"),
    (TALK, "base/tokenizer.json", remove, "base"),
    (TALK, "base/generation_config.json", put(b'{"eos_token_id": "x"}'), "generation_config.json: eos_token_id"),
    (PERPLEXITY, "en.jsonl", put(b'{"text": 1}\n'), "en.jsonl:1: field 'text' is not a string"),
    (PERPLEXITY, "base/model.safetensors", cut, "base/model.safetensors"),
    (CHOICE, "choices/kobest/copa/test.jsonl", put(b'{"premise": "x"}\n'), "copa/test.jsonl:1: no column"),
    (CHOICE, "choices/mmlu/dev/sociology_dev.csv", put(b'"a,b'), "sociology_dev.csv:1: 1 columns instead of 6"),
    (CHOICE, "out", put(b"precious\n"), "out:1: not a line of JSON"),
    (
        ANSWERS,
        "logickor/question.jsonl",
        put(b'{"id": 1, "category": "x", "questions": []}'),
        "questions must be",
    ),
    (ANSWERS, "talker/chat_template.jinja", put(b"{{ 1 / 0 }}"), "talker"),
    ("eval score judged.jsonl --json result.json", "judged.jsonl", cut, "judged.jsonl: no judgments"),
    ("eval score judged.jsonl --json result.json", "ko.jsonl", put(b""), "judged.jsonl:1: no 'model'"),
    (
        "eval plot judged.jsonl --out out.png",
        "judged.jsonl",
        put(b'{"models": {"a": 1}}'),
        "models.a must have",
    ),
    ("eval plot elo --out out.png", "elo/metrics.jsonl", put(b"{}\n"), "without its tokens"),
    # what a result cannot be written to is known before any work
    (PERPLEXITY, "result.json", occupy, "--json result.json: this is a directory; give a file"),
    (f"{PERPLEXITY[:-11]} en.jsonl", "ko.jsonl", put(b""), "--json en.jsonl: this is an input"),
    (f"{PERPLEXITY[:-11]} base/config.json", "ko.jsonl", put(b""), "base/config.json: this is an input, of base"),
    (f"{PERPLEXITY[:-11]} absent/result.json", "ko.jsonl", put(b""), "its directory does not exist"),
    (f"{PERPLEXITY[:-11]} ko.jsonl/result.json", "ko.jsonl", put(b""), "--json ko.jsonl/result.json: Not a directory"),
    (f"{PERPLEXITY[:-11]} {'x' * 300}", "ko.jsonl", put(b""), "File name too long"),
    (CHOICE.replace("result.json", "out"), "ko.jsonl", put(b""), "--json out: this is an input"),
    (
        CHOICE,
        "result.json",
        link_to("choices/kobest/copa/test.jsonl"),
        "result.json: this is an input, of choices",
    ),
    (ANSWERS.replace("result.json", "logickor/question.jsonl"), "ko.jsonl", put(b""), "an input, of logickor"),
    (ANSWERS.replace("result.json", "out/model_answer/talker.jsonl"), "out/model_answer", nested, "this is an input"),
    ("eval score judged.jsonl --json judged.jsonl", "ko.jsonl", put(b""), "--json judged.jsonl: this is an input"),
    ("eval plot elo --out out.png", "out.png", occupy, "--out out.png: this is a directory"),
    ("eval plot elo --out absent/out.png", "ko.jsonl", put(b""), "its directory does not exist"),
    ("eval plot elo --out out.png --json out.png", "ko.jsonl", put(b""), "--out out.png: this is an input"),
    ("elo.planning.plan --model base --json base", "ko.jsonl", put(b""), "--json base: this is a directory"),
    ("elo.planning.plan --model base --json base/config.json", "ko.jsonl", put(b""), "this is an input, of base"),
    ("benchmarks.training_step --model base --json base", "ko.jsonl", put(b""), "--json base: this is a directory"),
    ("benchmarks.training_step --model base --plot base/x/a.png", "ko.jsonl", put(b""), "directory does not exist"),
]


def everything(directory):
    """What is on the disk, but for finished token shards, which any later run may use."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() or path.is_fifo()]
    names = {str(path.relative_to(directory)): path for path in files}
    cached = [name for name in names if name.startswith("token-cache/") and not name.startswith("token-cache/.")]
    return {name: path.is_file() and path.read_bytes() for name, path in names.items() if name not in cached}


@pytest.mark.parametrize(("command", "file", "damage", "message"), CASES, ids=range(len(CASES)))
def test_broken_input(whole, tmp_path, monkeypatch, capfd, command, file, damage, message):
    project = tmp_path / "project"
    shutil.copytree(whole, project)
    shutil.rmtree(project / "token-cache")
    damage(project / file)
    before = everything(project)
    monkeypatch.chdir(project)
    program, *words = command.split()
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(SystemExit) as exit_:
        exit_status(import_module({"eval": "eval.__main__"}.get(program, program)).main)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert exit_.value.code == 2
    assert line.startswith("error: ")
    assert message in line
    assert everything(project) == before


def test_a_poisoned_weight_leaves_no_model(whole, tmp_path, monkeypatch, capfd):
    """Known only when training has begun: OUT has begun too, and is no checkpoint."""
    shutil.copytree(whole, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    poison(tmp_path / "project/base/model.safetensors")
    assert run_here("train", "out") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: step 1: the loss is nan")
    assert {path.name for path in (tmp_path / "project/out").iterdir()} <= {"run.json", "metrics.jsonl", "checkpoints"}
