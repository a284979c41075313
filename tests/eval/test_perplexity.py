"""`python -m eval perplexity` against transformers and the definition."""

import json
import math

import families
import pytest
import torch
from commands import status_of
from safetensors.torch import load_file, save_file
from small_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

from elo.text.tokenizer import load_tokenizer
from eval import __main__ as evaluation

DOCUMENTS = ["첫째 문서. 그리고 끝.", "a second one\n" * 9, "x", "naïve 🤖 " * 5]


def evaluate(monkeypatch, *words):
    return status_of(monkeypatch, evaluation.main, "eval", "perplexity", *words)


@pytest.fixture
def model(tmp_path):
    families.VARIANTS["small"] = lambda: families.llama(vocab_size=400)
    families.write("small", tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return tmp_path


@pytest.mark.parametrize("seq_len", [2, 7, 128])
def test_equals_the_definition(model, seq_len, monkeypatch, capfd):
    result = model / "result.json"
    words = ["--model", model / "model", "--data", model / "data.jsonl", "--seq-len", seq_len, "--dtype", "fp32"]
    assert evaluate(monkeypatch, *words, "--json", result) == 0
    (ours,) = json.loads(result.read_text())["files"]

    theirs = AutoModelForCausalLM.from_pretrained(model / "model", dtype=torch.float32)
    tokenizer = load_tokenizer(model / "model")
    nats, tokens = 0.0, 0
    for text in DOCUMENTS:
        ids = torch.tensor(tokenizer.encode(text))
        for start in range(0, len(ids), seq_len):
            window = ids[start : start + seq_len]
            log_probabilities = theirs(window[None]).logits[0].log_softmax(-1)
            nats -= log_probabilities[:-1].gather(1, window[1:, None]).sum().item()
            tokens += len(window) - 1
    size = sum(len(text.encode()) for text in DOCUMENTS)
    assert (ours["documents"], ours["tokens"], ours["bytes"]) == (len(DOCUMENTS), tokens, size)
    assert ours["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert ours["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert ours["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert f"{ours['bits_per_byte']:.4f}" in capfd.readouterr().out


def test_the_familys_bos_stands_before_a_document(model, monkeypatch):
    def tokens(result):
        words = ["--model", model / "model", "--data", model / "data.jsonl", "--json", result, "--dtype", "bf16"]
        assert evaluate(monkeypatch, *words) == 0
        return json.loads(result.read_text())["files"][0]["tokens"]

    without = tokens(model / "without.json")
    tokenizer = json.loads((model / "model" / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (model / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert tokens(model / "with.json") == without + len(DOCUMENTS)


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ('{"text": "ab"', [], "data.jsonl:5: "),
        ('{"body": "ab"}', [], "data.jsonl:5: "),
        ("", ["--seq-len", "1"], "--seq-len 1: a window needs at least 2 tokens"),
        ("", ["--data", "absent.txt"], "absent.txt: no such file"),
    ],
)
def test_mistakes_are_one_line(model, line, options, message, monkeypatch, capfd):
    with open(model / "data.jsonl", "a") as file:
        file.write(line)
    assert evaluate(monkeypatch, "--model", model / "model", "--data", model / "data.jsonl", *options) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error


def test_a_file_in_which_nothing_can_be_predicted(model, monkeypatch, capfd):
    (model / "data.jsonl").write_text('{"text": "x"}\n')
    assert evaluate(monkeypatch, "--model", model / "model", "--data", model / "data.jsonl") == 2
    assert "no token has a predecessor" in capfd.readouterr().err


def test_windows_are_no_longer_than_the_model_has_positions(model, monkeypatch, capfd):
    """128 of them here; beyond, the figures would be those of positions that it has never seen."""
    (model / "long.txt").write_text("a b c d e f g h " * 100)
    results = []
    for name, *options in (("default",), ("all", "--seq-len", 128)):
        words = ["--model", model / "model", "--data", model / "long.txt", "--json", model / name, *options]
        assert evaluate(monkeypatch, *words) == 0
        results.append((model / name).read_text())
    assert results[0] == results[1]
    capfd.readouterr()
    assert evaluate(monkeypatch, *words[:4], "--seq-len", 129) == 2
    assert capfd.readouterr().err == "error: --seq-len 129: the model has 128 positions\n"


def test_a_model_whose_logits_are_no_numbers(model, monkeypatch, capfd):
    weights = load_file(model / "model/model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, model / "model/model.safetensors", {"format": "pt"})
    words = ["--model", model / "model", "--data", model / "data.jsonl", "--json", model / "result"]
    assert evaluate(monkeypatch, *words) == 2
    assert "data.jsonl: the model's logits are not finite numbers" in capfd.readouterr().err
    assert not (model / "result").exists()
