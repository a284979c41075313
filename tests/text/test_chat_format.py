"""Which chat format a checkpoint has, what ends an answer, and what is no conversation."""

import json

import pytest
import tokenizers
from chat_checkpoints import (
    LLAMA3_TEMPLATE,
    SPECIALS,
    TEMPLATES,
    assistant,
    checkpoint,
    open_format,
    specials_of,
    system,
    user,
)
from small_chats import chatml
from tokenizer_styles import begin_of_text

from elo.common.errors import UserError
from elo.text.built_in_formats import CHATML, FORMATS
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer

NO_CONFIG = {}
SCALED_4 = {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
SCALED_5 = {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 32.0}}
PLAIN_5 = {"model_type": "llama", "rope_parameters": {"rope_type": "default"}}
RECOGNIZED = [
    ("llama3", SPECIALS["llama3"], None, PLAIN_5),
    ("llama3.1", SPECIALS["llama3.1"], None, SCALED_4),
    ("llama3.1", SPECIALS["llama3.1"], None, SCALED_5),
    ("llama3", SPECIALS["llama3.1"], LLAMA3_TEMPLATE, SCALED_4),
    ("mistral", SPECIALS["mistral"], None, NO_CONFIG),
    ("chatml", (*SPECIALS["llama3.1"], *CHATML), TEMPLATES["chatml"], SCALED_4),
    ("chatml", (*SPECIALS["mistral"], *CHATML), TEMPLATES["chatml"], NO_CONFIG),
]


@pytest.mark.parametrize(("name", "specials", "template", "config"), RECOGNIZED)
def test_the_format_is_recognized(tmp_path, name, specials, template, config):
    _, format = open_format(checkpoint(tmp_path, specials, template, config=config))
    assert format.name == name


REFUSED = [
    (CHATML, None, "without a chat template it cannot be told"),
    (CHATML, "{{ messages }}", "its chat template cannot be used"),
    (["<s>"], None, "special tokens are those of no format known here, or of several"),
    ((*SPECIALS["llama3"], *CHATML), None, "or of several"),
    ((*SPECIALS["mistral"], "[SYSTEM_PROMPT]"), None, "of no format known here"),
]


@pytest.mark.parametrize(("specials", "template", "message"), REFUSED)
def test_what_cannot_be_told_is_refused(tmp_path, specials, template, message):
    with pytest.raises(UserError) as error:
        open_format(checkpoint(tmp_path, specials, template))
    assert message in str(error.value)
    assert "--chat-format" in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_override(tmp_path):
    directory = checkpoint(tmp_path, SPECIALS["llama3"], LLAMA3_TEMPLATE)
    assert open_format(directory, "llama3.1")[1].name == "llama3.1"
    with pytest.raises(UserError, match="llama3, llama3.1, mistral, qwen2, qwen2.5, smollm2, chatml"):
        open_format(directory, "alpaca")
    with pytest.raises(
        UserError, match=r"qwen2 needs .*<\|im_start\|>.* has those of llama3, llama3.1 \(--chat-format\)"
    ):
        open_format(directory, "qwen2")


@pytest.mark.parametrize("template", [b"\xff", [{"name": "rag", "template": "x"}], 7])
def test_override_of_a_template_that_cannot_be_read(tmp_path, template):
    directory = checkpoint(tmp_path, SPECIALS["llama3"], LLAMA3_TEMPLATE)
    expected = open_format(directory, "llama3")[1].prompt([user("Hi")])
    if isinstance(template, bytes):
        (directory / "chat_template.jinja").write_bytes(template)
    else:
        (directory / "chat_template.jinja").unlink()
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(UserError, match="chat.template.*--chat-format"):
        open_format(directory)
    assert open_format(directory, "llama3")[1].prompt([user("Hi")]) == expected


def test_bos_of_a_chatml_fine_tune(tmp_path):
    """Its template tells; without one it is as in pretraining."""
    for case, template in enumerate([None, TEMPLATES["chatml"], "{{ bos_token }}" + TEMPLATES["chatml"]]):
        directory = checkpoint(tmp_path / str(case), ("<s>", *CHATML), template)
        reference = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        reference.post_processor = begin_of_text(reference.token_to_id("<s>"), "<s>")
        reference.save(str(directory / "tokenizer.json"))
        tokenizer, format = open_format(directory, "chatml")
        has_bos = case != 1
        assert (format.prompt([user("Hi")])[0] == tokenizer.special_tokens["<s>"]) == has_bos


def test_stop_ids(tmp_path):
    for name in FORMATS:
        directory = checkpoint(tmp_path / name, specials_of(name))
        tokenizer, format = open_format(directory, name)
        special = tokenizer.special_tokens
        expected = {
            "llama3": ["<|end_of_text|>", "<|eot_id|>"],
            "llama3.1": ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"],
            "mistral": ["</s>"],
            "smollm2": ["<|im_end|>"],
        }.get(name, ["<|im_end|>", "<|endoftext|>"])
        assert format.stop_ids == {special[text] for text in expected}
        for eos in (7, [7, 8]):
            (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
            more = chat_format(directory, tokenizer, name).stop_ids - format.stop_ids
            assert more == ({7} if eos == 7 else {7, 8})
    # As in transformers: config.json tells where there is no generation_config.json.
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert chat_format(directory, tokenizer, name).stop_ids - format.stop_ids == {7, 8}
    (directory / "generation_config.json").unlink()
    assert chat_format(directory, tokenizer, name).stop_ids - format.stop_ids == {7, 9}
    for file in ("config.json", "generation_config.json"):
        (directory / file).write_text(json.dumps({"eos_token_id": "</s>"}))
        with pytest.raises(UserError, match=f"/{file}: eos_token_id '</s>'"):
            chat_format(directory, tokenizer, name)


MISTAKES = [
    ([], "without messages"),
    ([{"role": "tool", "content": ""}], "message 1 has the role 'tool'; roles are system, user, assistant"),
    ([user("Hi"), {"content": "x"}], "message 2 has the role None"),
    ([user("Hi"), assistant(None)], "message 2: its content is None, not a string"),
    ([user([{"type": "text", "text": "Hi"}])], "message 1: its content is [{"),
    ([assistant("Hi")], "the assistant speaks first"),
    ([system("S"), assistant("Hi")], "the assistant speaks first"),
    ([user("Hi"), system("S")], "message 2 is the system's, which can only be the first"),
    ([system("S")], "a system message only"),
]


@pytest.mark.parametrize(("messages", "mistake"), MISTAKES, ids=[mistake for _, mistake in MISTAKES])
def test_mistakes(mistral, messages, mistake):
    for use in (mistral[1].prompt, mistral[1].conversation):
        with pytest.raises(UserError) as error:
            use(messages)
        assert mistake in str(error.value)


def test_a_prompt_ends_with_the_user(mistral):
    with pytest.raises(UserError, match="the last message is the assistant's"):
        mistral[1].prompt([user("Hi"), assistant("Hello")])


def test_a_special_token_beyond_the_models_rows(tmp_path):
    """A fine-tune's tokenizer with a base model's embedding: one line instead of an index out of range."""
    chatml(tmp_path)  # <|im_start|> is 344, <|im_end|> 345
    assert chat_format(tmp_path, load_tokenizer(tmp_path, 346), "chatml").prompt([{"role": "user", "content": "Hi"}])
    format = chat_format(tmp_path, load_tokenizer(tmp_path, 344), "chatml")
    message = r"the special token <\|im_start\|> has the id 344, but the model only 344 rows of embeddings"
    with pytest.raises(UserError, match=message):
        format.prompt([{"role": "user", "content": "Hi"}])
    with pytest.raises(UserError, match=message):
        format.conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
