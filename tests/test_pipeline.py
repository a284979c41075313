"""All stages in a row, from a base model to one that can be talked to, for every architecture."""

import json

import families
import pytest
import torch
from commands import status_of
from small_tokenizer import add_chat_tokens, write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import align
import merge_chat_vector
import sft
import train
from elo.common.terminal import printable
from elo.generation import chat as generation
from elo.model.checkpoint import load_model
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def write_model(directory, variant, monkeypatch, seed):
    """A base model (seed 0), or an instruct model with a chat template and its end of turn as a stop token."""
    build = families.VARIANTS[variant]

    def sized():
        architecture, config = build()
        config.vocab_size = 450
        return architecture, config

    monkeypatch.setitem(families.VARIANTS, "sized", sized)
    families.write("sized", directory, seed=seed, dtype=torch.bfloat16)
    write_tokenizer(directory)
    if seed:
        _, end = add_chat_tokens(directory)
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
        (directory / "chat_template.jinja").write_text(TEMPLATE)
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    return directory


def run(script, monkeypatch, *words):
    assert status_of(monkeypatch, script.main, script.__name__, *words) == 0


@pytest.mark.parametrize("variant", families.ONE_EACH)
def test_from_a_base_model_to_a_chat(variant, tmp_path, monkeypatch, capfd):
    base = write_model(tmp_path / "base", variant, monkeypatch, seed=0)
    instruct = write_model(tmp_path / "instruct", variant, monkeypatch, seed=1)
    for name in ("ko", "en"):
        lines = [json.dumps({"text": f"{name} {number} " * (number % 9 + 2)}) for number in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    chats = [
        {"language": language, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
        for language, answer in (("ko", "끝"), ("en", "end")) * 8
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))

    text = ["--target", tmp_path / "ko.jsonl", "--source", tmp_path / "en.jsonl", "--seq-len", "32"]
    common = ["--lr", "1e-3", "--dtype", "fp32"]
    elo, aligned, chat, tuned = (tmp_path / name for name in ("elo", "aligned", "chat", "tuned"))
    run(train, monkeypatch, "--model", base, *text, *common, "--gb", "0.000003", "--out", elo)
    run(align, monkeypatch, "--model", base, "--elo", elo, *text, *common, "--gb", "0.000002", "--out", aligned)
    run(merge_chat_vector, monkeypatch, "--model", aligned, "--base", base, "--instruct", instruct, "--out", chat)
    data = ["--data", tmp_path / "chats.jsonl", "--languages", "ko,en", "--samples", "12", "--epochs", "2"]
    run(sft, monkeypatch, "--model", chat, *data, *common, "--seq-len", "64", "--out", tuned)
    capfd.readouterr()
    talk = ["--prompt", "무엇?", "--max-new-tokens", "5", "--dtype", "fp32", "--temperature", "0"]
    run(generation, monkeypatch, "--model", tuned, *talk)
    said = capfd.readouterr().out

    theirs, info = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    tokens = torch.arange(60).view(2, 30)
    ours = load_model(tuned, "cpu", torch.float32)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)

    messages = [{"role": "user", "content": "무엇?"}]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tuned)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_format(tuned, load_tokenizer(tuned)).prompt(messages) == ids
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    text = printable(load_tokenizer(tuned).decode(answer.tolist()), keep="\n\t")  # random weights may say anything
    assert said.rstrip("\n") == text.rstrip("\n")
