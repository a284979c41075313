"""sft.py from conversations to a chat model that transformers loads."""

import json
import sys

import families
import pytest
import torch
from small_runs import lines
from small_tokenizer import add_chat_tokens, write_tokenizer
from transformers import AutoModelForCausalLM

import sft
from elo.common.errors import exit_status
from elo.model.checkpoint import load_model


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setitem(families.VARIANTS, "small", lambda: families.qwen2(vocab_size=450))
    model = families.write("small", tmp_path / "model", dtype=torch.bfloat16)
    write_tokenizer(model)
    add_chat_tokens(model)
    records = [
        {
            "language": language,
            "conversations": [
                {"from": "human", "value": f"{question} {number}?"},
                {"from": "gpt", "value": answer * (number % 4 + 1)},
            ],
        }
        for number in range(20)
        for language, question, answer in (("Korean", "무엇", "그리고 끝. "), ("English", "What", "some text "))
    ]
    (tmp_path / "chats.json").write_text(json.dumps(records))
    return tmp_path


def run(project, monkeypatch, *options):
    fixed = ["--model", project / "model", "--data", project / "chats.json", "--chat-format", "chatml", "--lr", "1e-2"]
    shape = ["--batch-conversations", "8", "--micro-batch-tokens", "300", "--seq-len", "96", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, [*fixed, *shape, *options])])
    with pytest.raises(SystemExit) as exit_:
        exit_status(sft.main)
    return exit_.value.code


def test_both_languages_are_learned(project, monkeypatch, capfd):
    out = project / "out"
    options = ["--languages", "ko,en", "--samples", "30", "--epochs", "3", "--validation-fraction", "0.2"]
    assert run(project, monkeypatch, *options, "--out", out) == 0
    assert "30 conversations: 15 of 20 Korean, 15 of 20 English" in capfd.readouterr().out
    assert [line["validation_loss"] for line in lines(out) if "validation_loss" in line] == pytest.approx(
        sorted((line["validation_loss"] for line in lines(out) if "validation_loss" in line), reverse=True)
    )
    assert lines(out)[-1]["epoch"] == 3
    assert lines(out)[-1]["loss"] < lines(out)[0]["loss"]
    tokens = torch.arange(60).view(2, 30)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(load_model(out, "cpu", torch.float32)(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    assert (out / "tokenizer.json").read_bytes() == (project / "model" / "tokenizer.json").read_bytes()


def test_what_is_kept(project, monkeypatch):
    losses = iter([3.0, 1.0, 2.0] * 2)  # of three epochs, the second is the best
    monkeypatch.setattr(sft, "evaluate", lambda *_: next(losses))
    options = ["--epochs", "3", "--validation-fraction", "0.2"]
    every, best = project / "every", project / "best"
    assert run(project, monkeypatch, *options, "--out", every, "--keep", "every") == 0
    assert run(project, monkeypatch, *options, "--out", best, "--keep", "best") == 0
    assert sorted(path.name for path in every.glob("epoch-*")) == ["epoch-1", "epoch-2", "epoch-3"]
    assert not list(best.glob("epoch-*"))
    weights = {path: (path / "model.safetensors").read_bytes() for path in (best, every, *every.glob("epoch-*"))}
    assert weights[best] == weights[every / "epoch-2"] != weights[every / "epoch-3"]
    assert weights[every] == weights[every / "epoch-3"]
    assert json.loads((best / "sft.json").read_text())["epoch"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "best"], "--validation-fraction"),
        (["--languages", "ko,ja"], "Japanese"),
        (["--languages", "ko,en", "--samples", "50"], "20"),
        (["--seq-len", "4096"], "the model has 128 positions"),
        (["--chat-format", "llama3"], "llama3"),
        (["--data", "absent.json"], "absent.json"),
        (["--epochs", "0"], "'0' is not a whole number above 0"),
    ],
)
def test_mistakes_are_one_line(project, options, message, monkeypatch, capfd):
    assert run(project, monkeypatch, "--out", project / "out", *options) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (project / "out").exists()
