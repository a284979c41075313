"""What of a tokenizer.json is not implemented exactly is refused by its name."""

import json
import re

import pytest
from small_tokenizer import llama_json
from tokenizer_styles import begin_of_text, trained, write
from transformers import AutoTokenizer

from elo.common.errors import UserError
from elo.text.tokenizer import load_tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def split_json(**changes: object) -> dict:
    step = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [step, BYTE_LEVEL]}


REFUSED = {
    "normalizer 'NFKC'": {"normalizer": {"type": "NFKC"}},
    "normalizer 'Lowercase'": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
    "pre_tokenizer 'Punctuation'": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTE_LEVEL]}
    },
    "pre_tokenizer 'x'": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": ["x", BYTE_LEVEL]}},
    "Digits + Digits": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "Digits"}, BYTE_LEVEL]}
    },
    "add_prefix_space": {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    "Isolated": {"pre_tokenizer": split_json(behavior="Removed")},
    "not inverted": {"pre_tokenizer": split_json(invert=True)},
    "with a Regex": {"pre_tokenizer": split_json(pattern={"String": " "})},
    r"'\\w": {"pre_tokenizer": split_json(pattern={"Regex": r"\w+|\W+"})},
    r"'\\<+": {"pre_tokenizer": split_json(pattern={"Regex": r"\<+|[^<]+"})},
    r"'\\>+": {"pre_tokenizer": split_json(pattern={"Regex": r"\>+|[^>]+"})},
    "'[[:alpha:]]": {"pre_tokenizer": split_json(pattern={"Regex": "[[:alpha:]]+"})},
    "'(?i:k)": {"pre_tokenizer": split_json(pattern={"Regex": "(?i:k)|."})},
    "not valid": {"pre_tokenizer": split_json(pattern={"Regex": "(?:a"})},
    "empty string": {"pre_tokenizer": split_json(pattern={"Regex": r"\s*"})},
    "post_processor 'BertProcessing'": {"post_processor": {"type": "BertProcessing"}},
    "post_processor puts None": {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": 1}]}},
    "puts 2 tokens": {
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_end|>"}}] * 2}
    },
    "puts 2 tokens before": {
        "post_processor": {
            "type": "Sequence",
            "processors": [json.loads(begin_of_text(2, "<|im_end|>").__getstate__())] * 2,
        }
    },
    "puts another id than that of '<|im_end|>'": {
        "post_processor": json.loads(begin_of_text(1, "<|im_end|>").__getstate__())
    },
    "type = 'WordPiece'": {"model": {"type": "WordPiece"}},
    "dropout = 0.1": {"model": {"dropout": 0.1}},
    "end_of_word_suffix": {"model": {"end_of_word_suffix": "</w>"}},
    "same id 0": {"model": {"vocab": {"a": 0, "b": 0}}},
    "a token of 1,025 characters": {"model": {"vocab": {"a" * 1025: 0}}},
    "id 1000000000000": {"model": {"vocab": {"a": 10**12}}},
    "id -1": {"model": {"vocab": {"a": -1}}},
    "id '1'": {"model": {"vocab": {"a": "1"}}},
    "id True": {"model": {"vocab": {"a": True}}},
    "byte-level alphabet": {"model": {"vocab": {"한": 10}, "merges": []}},
    "merge 1 needs 'zz'": {"model": {"vocab": {"z": 10}, "merges": ["z z"]}},
    "merges out of order: by its id the token 'ba', which merge 2 makes,": {
        "model": {"vocab": dict(a=10, b=11, ab=13, ba=12), "merges": ["a b", "b a"]}
    },
    "from a part with a larger id": {
        "model": {"vocab": dict(a=10, b=11, c=12, bc=19, abc=15), "merges": [["a", "bc"], ["b", "c"]]}
    },
    "'a b c' is not a pair": {"model": {"merges": ["a b c"]}},
    "merge 7 is not a pair": {"model": {"merges": [7]}},
    "vocab must be an object, not": {"model": {"vocab": [1]}},
    "merges must be a list, not": {"model": {"merges": {"a": "b"}}},
    "model must be an object, not": {"model": 3},
    "normalizer must be an object, not": {"normalizer": "NFC"},
    "an added token is 5": {"added_tokens": [5]},
    "has the text None": {"added_tokens": [{"id": 3}]},
    "id 99999999999": {"added_tokens": [{"id": 99999999999, "content": "<x>"}]},
    "its token 5 is": {"added_tokens": [{"id": 5, "content": "<x>"}]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_tokenizer_json_may_not_say(tmp_path, message):
    content = json.loads(trained("qwen2"))
    for name, change in REFUSED[message].items():
        content[name] = content[name] | change if name == "model" and isinstance(change, dict) else change
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_tokenizer(write(tmp_path, tokenizer__json=content))
    assert "tokenizer.json" in str(error.value)


def test_bytes_without_a_token_and_an_unknown_token(tmp_path):
    content = json.loads(trained("smollm2"))
    content["model"]["unk_token"] = "<|endoftext|>"
    with pytest.raises(UserError, match="of 256 bytes have no token"):
        load_tokenizer(write(tmp_path, tokenizer__json=content))


@pytest.mark.parametrize(("style", "says"), [("qwen2", True), ("first", False), ("never", True)])
def test_a_space_in_front_of_texts_of_which_two_files_disagree(tmp_path, style, says):
    """Of Qwen2Tokenizer and LlamaTokenizer transformers goes by tokenizer_config.json, of the others by the other."""
    content = json.loads(trained(style)) if style == "qwen2" else llama_json(style)
    config = {"add_prefix_space": says, "bos_token": "<s>", "eos_token": "</s>"}
    named = {"tokenizer_class": "Qwen2Tokenizer" if style == "qwen2" else "LlamaTokenizer"}
    load_tokenizer(write(tmp_path / "a", tokenizer__json=content, tokenizer_config__json=config))
    load_tokenizer(write(tmp_path / "b", tokenizer__json=content, tokenizer_config__json=named))
    agreed = named | config | {"add_prefix_space": not says}
    load_tokenizer(write(tmp_path / "c", tokenizer__json=content, tokenizer_config__json=agreed))
    disagreed = write(tmp_path / "d", tokenizer__json=content, tokenizer_config__json=named | config)
    with pytest.raises(UserError, match=f"tokenizer_config.json: add_prefix_space is {str(says).lower()}, but token"):
        load_tokenizer(disagreed)
    theirs = [AutoTokenizer.from_pretrained(tmp_path / name).encode("a") for name in "cd"]
    assert theirs[0] != theirs[1]
