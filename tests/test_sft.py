"""sft.py from conversations to a chat model that transformers loads."""

import json
import math
import shutil
import sys

import families
import pytest
import torch
from commands import status_of
from safetensors.torch import load_file, save_file
from small_runs import interrupt, lines
from small_tokenizer import add_chat_tokens, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from elo.generation.engine import generate
from elo.generation.sampling import GREEDY
from elo.model.checkpoint import load_model
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer
from elo.validation import HeldOut


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


def run(project, monkeypatch, *options, chat_format="chatml"):
    fixed = ["--model", project / "model", "--data", project / "chats.json", "--lr", "1e-2"]
    fixed += [] if chat_format is None else ["--chat-format", chat_format]
    shape = ["--batch-conversations", "8", "--micro-batch-tokens", "300", "--seq-len", "96", "--dtype", "fp32"]
    return status_of(monkeypatch, sft.main, "sft.py", *map(str, [*fixed, *shape, *options]))


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


def test_a_records_system_message_and_its_switches_change_what_is_learned(project, monkeypatch):
    records = json.loads((project / "chats.json").read_text())
    weights = {}
    for name, fields in {"as it is": {}, "system": {"system": "Be kind."}, "part": {"loss_mask": [0, 0]}}.items():
        changed = [record | (fields if number % 2 else {}) for number, record in enumerate(records)]
        (project / "chats.json").write_text(json.dumps(changed))
        assert run(project, monkeypatch, "--max-steps", "2", "--out", project / name) == 0
        weights[name] = load_file(project / name / "model.safetensors")["model.embed_tokens.weight"]
    assert not any(weights["as it is"].equal(weights[name]) for name in ("system", "part"))


def evaluated(loss):
    return {"validation_loss": loss, "validation": []}


def test_what_is_kept(project, monkeypatch):
    losses = iter([3.0, 1.0, 2.0] * 2)  # of three epochs, the second is the best
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: evaluated(next(losses)))
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


# ---- what travels with the result

BASES = {
    "none": {},
    "jinja": {"chat_template.jinja": "{{ 'old' }}"},
    "config": {"tokenizer_config.json": {"eos_token": "<|endoftext|>", "chat_template": "{{ 'old' }}"}},
    "json": {
        "chat_template.json": {"chat_template": "{{ 'old' }}"},
        "special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>"}},
        "generation_config.json": {"eos_token_id": 0, "top_k": 7},
    },
}


@pytest.mark.parametrize("place", BASES)
def test_the_chat_format_travels_with_the_result(project, place, monkeypatch):
    """Wherever another template stood before: transformers writes and ends a chat with the result as we do."""
    for name, content in BASES[place].items():
        (project / "model" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    out = project / "out"
    options = ["--epochs", "1", "--validation-fraction", "0.2", "--keep", "every"]
    assert run(project, monkeypatch, *options, "--out", out) == 0
    for directory in (out, out / "epoch-1"):
        tokenizer = load_tokenizer(directory)
        format = chat_format(directory, tokenizer)
        assert format.name == "chatml"
        theirs = AutoTokenizer.from_pretrained(directory)
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": " 무엇 3? "}]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert format.prompt(messages) == ids
        end = tokenizer.special_tokens["<|im_end|>"]
        assert theirs.eos_token_id == end
        generation = json.loads((directory / "generation_config.json").read_text())
        assert end in generation["eos_token_id"]
        assert set(generation["eos_token_id"]) == format.stop_ids
        assert end in json.loads((directory / "config.json").read_text())["eos_token_id"]
        assert not (directory / "chat_template.json").exists()
        assert "chat_template" not in json.loads((directory / "tokenizer_config.json").read_text())
    if place == "json":
        assert generation["top_k"] == 7

    # Let the end of turn win wherever the model's third token would: both programs stop there.
    free = generate(load_model(out, "cpu", torch.float32), [ids], [set()], 8, GREEDY)[0]
    weights = load_file(out / "model.safetensors")
    head = weights["lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"]
    head[end] = 2 * head[free[2]]
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (ours,) = generate(load_model(out, "cpu", torch.float32), [ids], [format.stop_ids], 8, GREEDY)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert ours[-1] == end
    assert answer.tolist() == ours


def test_a_checkpoints_own_template_stays(project, monkeypatch):
    """Byte for byte, as does every file that already says what ends a turn."""
    base, out = project / "model", project / "out"
    end = load_tokenizer(base).special_tokens["<|im_end|>"]
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert run(project, monkeypatch, "--epochs", "1", "--out", out, chat_format=None) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / "chat_template.jinja").exists()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [end]


def test_the_date_in_a_run_is_when_it_began(project, monkeypatch):
    """Resumed on another day, a run has the same texts."""
    template = (
        "{% for m in messages %}{{ strftime_now('%S %f') + m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    (project / "model" / "chat_template.jinja").write_text(template)
    out = project / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sft, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(project, monkeypatch, "--epochs", "1", "--out", out, chat_format=None)
    assert run(project, monkeypatch, "--epochs", "1", "--out", out, chat_format=None) == 0


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("keep", ["last", "best", "every"])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_a_model_at_the_end_of_any_run(project, monkeypatch, keep, steps, capfd):
    """An epoch has 4 steps: below it, one, and more than one; and again from the last state, without an export."""
    out = project / "out"
    options = ["--epochs", "2", "--validation-fraction", "0.2", "--keep", keep, "--max-steps", steps, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(sft.Epochs, "finish", lambda *_: sys.exit(3))
        assert run(project, patch, *options) == 3
    assert run(project, monkeypatch, *options) == 0
    assert ("no epoch's model is there: it is that after step 1" in capfd.readouterr().out) == (
        keep == "best" and steps == 1
    )
    notes = json.loads((out / "sft.json").read_text())
    assert notes.get("epoch") == (1 if keep == "best" and steps > 1 else None)
    assert load_model(out, "cpu", torch.float32)
    assert [path.name for path in out.glob("epoch-*")] == (["epoch-1"] if keep == "every" and steps > 1 else [])


def test_a_model_where_that_of_the_best_epoch_is_gone(project, monkeypatch):
    losses = iter([1.0, 2.0])

    def remove_and_evaluate(*_):
        shutil.rmtree(project / "out/epoch-1", ignore_errors=True)
        return evaluated(next(losses))

    monkeypatch.setattr(HeldOut, "evaluate", remove_and_evaluate)
    options = ["--epochs", "2", "--validation-fraction", "0.2", "--keep", "best", "--out", project / "out"]
    assert run(project, monkeypatch, *options) == 0
    assert json.loads((project / "out/sft.json").read_text())["steps"] == 8
    assert load_model(project / "out", "cpu", torch.float32)


def test_the_best_epoch_is_no_nan(project, monkeypatch):
    losses = iter([math.nan, 2.0, math.nan])
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: evaluated(next(losses)))
    options = ["--epochs", "3", "--validation-fraction", "0.2", "--keep", "best", "--out", project / "out"]
    assert run(project, monkeypatch, *options) == 0
    assert json.loads((project / "out/sft.json").read_text())["epoch"] == 2


def test_metrics_have_null_for_a_held_out_loss_that_is_none(project, monkeypatch, capfd):
    """JSON has no NaN. A run that goes on, and what is said at its end, take it for worse than any other."""
    losses = iter([math.nan, 2.0, math.inf])
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: evaluated(next(losses)))
    options = ["--epochs", "3", "--validation-fraction", "0.2", "--keep", "best", "--out", project / "out"]
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        assert run(project, patch, *options) == 0
    assert run(project, monkeypatch, *options) == 0
    assert [line["validation_loss"] for line in lines(project / "out") if "epoch" in line] == [None, 2.0, None]
    assert "NaN" not in (project / "out/metrics.jsonl").read_text()
    assert json.loads((project / "out/sft.json").read_text())["epoch"] == 2
    assert "the held-out one from nan to nan. The" in capfd.readouterr().out


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
